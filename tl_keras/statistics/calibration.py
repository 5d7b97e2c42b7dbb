"""Calibration: whether predictions with a confidence of 0.8 are correct eight times in ten."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import optimize
from scipy.special import log_softmax, softmax

from tl_keras.statistics.intervals import accuracy_interval

BINS = 15  # Guo et al. 2017, section 5
RELIABILITY = ("low", "high", "n", "confidence", "accuracy", "accuracy_low", "accuracy_high")
_TEMPERATURES = (1 / 20, 20.0)
_FEWEST = 20  # with more examples, label smoothing is less than 5 %
_LIKELIHOOD_RATIO = 1.92  # half the 95 % quantile of chi-squared with one degree of freedom
_DRAWS, _TAIL = 1000, 0.025
_FARTHEST, _HALVINGS = 64.0, 16  # standard errors; the search resolves 64 / 2^16 of one
_ROUNDING = 1e-12


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Fits the temperature that maximizes the likelihood of the labels (Guo et al. 2017, section 4.2).

    Labels are smoothed by 1 / (n + 2) (Platt 1999, section 2.2). Without smoothing, a small val split without errors
    would lead to unbounded confidence.

    Args:
        logits: float `(n, classes)`, n at least 1, of examples that the classifier was not trained on.
        labels: int `(n,)`.

    Returns:
        The divisor of the logits, between 1/20 and 20. It does not change the order of the classes.
    """
    nll = _make_nll(logits, labels)
    bounds = tuple(map(math.log, _TEMPERATURES))
    found = optimize.minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return math.exp(float(found.x))


def is_supported(logits: np.ndarray, labels: np.ndarray, temperature: float) -> bool:
    """Whether the examples determine the temperature.

    They do if there are at least twenty (with fewer, the label smoothing of `fit_temperature` dominates), and if the
    95 % confidence interval of the temperature is bounded on both sides. This is the likelihood ratio interval (Wilks
    1938): all temperatures whose log-likelihood is within half the 95 % quantile of chi-squared, with one degree of
    freedom, of the maximum.

    Args:
        logits: see `fit_temperature`.
        labels: int `(n,)`.
        temperature: from `fit_temperature`.
    """
    if len(labels) < _FEWEST:
        return False
    nll = _make_nll(logits, labels)
    best = nll(math.log(temperature))
    return all(len(labels) * (nll(math.log(bound)) - best) > _LIKELIHOOD_RATIO for bound in _TEMPERATURES)


def _make_nll(logits: np.ndarray, labels: np.ndarray) -> Callable[[float], float]:
    """Makes the mean negative log-likelihood as a function of log temperature, with smoothed labels."""
    rows, spread = np.arange(len(labels)), 1 / (len(labels) + 2)
    exact = logits.astype(np.float64)

    def nll(log_temperature: float) -> float:
        logs = log_softmax(exact / math.exp(log_temperature), axis=1)
        return float(-(1 - spread) * logs[rows, labels].mean() - spread * logs.mean())

    return nll


def calibrated_softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Softmax of logits divided by a temperature, float32 `(n, classes)`."""
    return np.asarray(softmax(logits.astype(np.float64) / temperature, axis=1), np.float32)


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean difference between confidence and accuracy over 15 bins of confidence (Naeini et al. 2015, section 3).

    Args:
        probabilities: float `(n, classes)`.
        labels: int `(n,)`.

    Returns:
        0 to 1.
    """
    counts, confidence, accuracy = _in_bins(probabilities, labels)
    return float(np.abs(confidence - accuracy) @ (counts / counts.sum()))


def error_interval(probabilities: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """95 % confidence interval of `expected_calibration_error`.

    The interval is the range of true calibration errors under which the observed one is not unusual (a test inverted).
    The bootstrap does not work here: by chance even a calibrated classifier has an observed error above 0, and
    resamples of its images have a still larger one. Instead, the accuracy of each bin is moved toward calibration, or
    away from it, and predictions are simulated, until the observed error is at the 2.5 % tail. At zero error this is
    the consistency resampling of Bröcker & Smith (2007).

    Args:
        probabilities: float `(n, classes)`, n at least 1.
        labels: int `(n,)`.

    Returns:
        Low and high, 0 to 1.
    """
    counts, confidence, accuracy = _in_bins(probabilities, labels)
    gaps, share = confidence - accuracy, counts / counts.sum()
    smooth = (accuracy * counts + 1) / (counts + 2)  # Laplace smoothing, so that a bin without errors has a variance
    step = np.where(gaps < 0, -1, 1) * np.sqrt(smooth * (1 - smooth) / counts)

    def error(true: np.ndarray) -> np.ndarray:
        return np.asarray(np.abs(confidence - true) @ share)

    def draw(true: np.ndarray) -> np.ndarray:
        right = np.random.default_rng(0).binomial(counts, np.clip(true, 0, 1), (_DRAWS, len(counts)))
        return error(right / counts)

    found = float(error(accuracy))

    def nearer(by: float) -> np.ndarray:  # noisy bins reach calibration first
        return np.asarray(confidence - np.sign(gaps) * np.maximum(np.abs(gaps) - by * np.abs(step), 0))

    def often_as_large(by: float) -> bool:
        return bool((draw(nearer(by)) >= found - _ROUNDING).mean() >= _TAIL)

    def outwards(by: float) -> np.ndarray:
        return np.asarray(np.clip(confidence - gaps - by * step, 0, 1))

    def across(by: float) -> np.ndarray:  # on the other side of the diagonal
        return np.asarray(np.clip(confidence + by * step, 0, 1))

    def often_as_small(path: Callable[[float], np.ndarray], by: float) -> bool:
        return bool((draw(path(by)) <= found + _ROUNDING).mean() >= _TAIL)

    low = 0.0 if often_as_large(_FARTHEST) else float(error(nearer(_last(often_as_large, _FARTHEST))))
    high = found
    for path in (outwards, across):
        if often_as_small(path, 0.0):
            high = max(high, float(error(path(_last(functools.partial(often_as_small, path), _FARTHEST)))))
    return low, high


def _last(holds: Callable[[float], bool], end: float) -> float:
    """Finds the largest number between 0, where `holds` is true, and `end` for which it is true, by bisection."""
    start = 0.0
    for _ in range(_HALVINGS):
        middle = (start + end) / 2
        start, end = (middle, end) if holds(middle) else (start, middle)
    return start


def describe_calibration(
    temperature: float, before: Mapping[str, tuple[np.ndarray, np.ndarray]], *, supported: bool = True
) -> dict[str, Any]:
    """Makes the entry `calibration` of `metrics.json`.

    Args:
        temperature: the temperature fitted on val; 1 without calibration.
        before: split → probabilities before calibration, float `(n, classes)`, and labels, int `(n,)`.
        supported: whether val determines the temperature, see `is_supported`.

    Returns:
        `temperature`, `supported`, and for each split in `before` its `ece` and `nll` (nats) before calibration.
    """
    return {
        "temperature": temperature,
        "supported": supported,
        "before": {
            split: {"ece": expected_calibration_error(*values), "nll": float(losses(*values).mean())}
            for split, values in before.items()
        },
    }


def losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each example in nats, float64 `(n,)`, clipped like scikit-learn's `log_loss`.

    Args:
        probabilities: float `(n, classes)`.
        labels: int `(n,)`.
    """
    exact = probabilities.astype(np.float64)
    exact = exact / exact.sum(1, keepdims=True)  # a float32 softmax sums to 1 within 1e-6
    chosen = exact[np.arange(len(labels)), labels]
    return np.asarray(-np.log(np.clip(chosen, np.finfo(np.float64).eps, 1.0)))


def reliability(probabilities: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    """Computes the reliability curve (DeGroot & Fienberg 1983) over the nonempty bins of confidence.

    Args:
        probabilities: float `(n, classes)`.
        labels: int `(n,)`.

    Returns:
        For each bin the entries of `RELIABILITY`: bounds, number of examples, mean confidence, accuracy, and its 95 %
        confidence interval (Wilson).
    """
    confidence = probabilities.max(1)
    correct = probabilities.argmax(1) == labels
    bins, rows = _bins(confidence), []
    for number in np.unique(bins):
        own = bins == number
        low, high = accuracy_interval(int(correct[own].sum()), int(own.sum()))
        means = float(confidence[own].mean()), float(correct[own].mean())
        values = (number / BINS, (number + 1) / BINS, int(own.sum()), *means, low, high)
        rows.append(dict(zip(RELIABILITY, values, strict=True)))
    return rows


def _in_bins(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number of examples, mean confidence and accuracy of each nonempty bin, `(k,)` each."""
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    bins = _bins(confidence)
    counts = np.bincount(bins)
    used = counts > 0
    sure, right = (np.bincount(bins, values)[used] / counts[used] for values in (confidence, correct))
    return counts[used], sure, right


def _bins(confidence: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1))
