"""Calibration: whether predictions with a confidence of 0.8 are right eight times in ten."""

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
_FEWEST = 20  # the spread part of a label is then less than 5 %
_LIKELIHOOD_RATIO = 1.92  # half the 95 % quantile of chi-squared with one degree of freedom
_DRAWS, _TAIL = 1000, 0.025
_FARTHEST, _HALVINGS = 64.0, 16  # standard errors; the interval is as sharp as 64 / 2^16 of one
_ROUNDING = 1e-12


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that makes the logits' probabilities most likely (Guo et al. 2017, section 4.2).

    Each label counts as 1 - 1 / (n + 2) of an example, the rest is spread over all classes (Platt 1999, section 2.2):
    where all of a small val is right, nothing else would keep it from boundless trust in itself.

    Args:
        logits: float `(n, classes)`, n at least 1, of examples that nothing was fitted on.
        labels: int `(n,)`.

    Returns:
        What logits are divided by, between 1/20 and 20; the order of the classes stays as it is.
    """
    nll = _make_nll(logits, labels)
    bounds = tuple(map(math.log, _TEMPERATURES))
    found = optimize.minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return math.exp(float(found.x))


def is_supported(logits: np.ndarray, labels: np.ndarray, temperature: float) -> bool:
    """Whether the examples say how large the temperature is.

    They do if there are twenty or more (of fewer, the part of each label that `fit_temperature` spreads decides), and
    if the temperature's 95 % interval is bounded on both sides. The interval is that of the likelihood ratio (Wilks
    1938): all temperatures whose log-likelihood is less than half the 95 % quantile of chi-squared with one degree of
    freedom below the best.

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
    """Logarithm of the temperature → mean negative log-likelihood, smoothed as `fit_temperature` says."""
    rows, spread = np.arange(len(labels)), 1 / (len(labels) + 2)
    exact = logits.astype(np.float64)

    def nll(log_temperature: float) -> float:
        logs = log_softmax(exact / math.exp(log_temperature), axis=1)
        return float(-(1 - spread) * logs[rows, labels].mean() - spread * logs.mean())

    return nll


def calibrated_softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities of logits divided by a temperature, float32 `(n, classes)`."""
    return np.asarray(softmax(logits.astype(np.float64) / temperature, axis=1), np.float32)


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance between confidence and accuracy over 15 bins of confidence (Naeini et al. 2015, section 3).

    Args:
        probabilities: float `(n, classes)`.
        labels: int `(n,)`.

    Returns:
        0 to 1.
    """
    counts, confidence, accuracy = _in_bins(probabilities, labels)
    return float(np.abs(confidence - accuracy) @ (counts / counts.sum()))


def error_interval(probabilities: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """95 % interval of `expected_calibration_error`: the true errors with which the one that was found is no rarity.

    By chance even a classifier without an error does not get 0, so that resamples of the images would have more error
    still, and never none. Instead it is simulated how often each image would be right if the bins were nearer to
    calibration than they look, or farther from it, until what was found stands at a tail of 2.5 % (a test, inverted; at
    no error at all it is Bröcker & Smith's consistency resampling, 2007).

    Args:
        probabilities: float `(n, classes)`, n at least 1.
        labels: int `(n,)`.

    Returns:
        Low and high, 0 to 1.
    """
    counts, confidence, accuracy = _in_bins(probabilities, labels)
    gaps, share = confidence - accuracy, counts / counts.sum()
    smooth = (accuracy * counts + 1) / (counts + 2)  # Laplace: all right is no certainty
    step = np.where(gaps < 0, -1, 1) * np.sqrt(smooth * (1 - smooth) / counts)

    def error(true: np.ndarray) -> np.ndarray:
        return np.asarray(np.abs(confidence - true) @ share)

    def draw(true: np.ndarray) -> np.ndarray:
        right = np.random.default_rng(0).binomial(counts, np.clip(true, 0, 1), (_DRAWS, len(counts)))
        return error(right / counts)

    found = float(error(accuracy))

    def nearer(by: float) -> np.ndarray:  # what may be noise goes first
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
    """The last number from 0, where it holds, to the end for which it does."""
    start = 0.0
    for _ in range(_HALVINGS):
        middle = (start + end) / 2
        start, end = (middle, end) if holds(middle) else (start, middle)
    return start


def describe_calibration(
    temperature: float, before: Mapping[str, tuple[np.ndarray, np.ndarray]], *, supported: bool = True
) -> dict[str, Any]:
    """The entry `calibration` of `metrics.json`.

    Args:
        temperature: that was fitted on val; 1: none was.
        before: split → probabilities as they were without it, float `(n, classes)`, and labels, int `(n,)`.
        supported: whether val says how large a temperature should be.

    Returns:
        `temperature`, `supported`, and for each split in `before` its `ece` and `nll` (nats) without it.
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
    """Negative log-likelihood of each example in nats, float64 `(n,)`; bounded as scikit-learn's `log_loss` bounds it.

    Args:
        probabilities: float `(n, classes)`.
        labels: int `(n,)`.
    """
    exact = probabilities.astype(np.float64)
    exact = exact / exact.sum(1, keepdims=True)  # a float32 softmax sums to 1 within 1e-6
    chosen = exact[np.arange(len(labels)), labels]
    return np.asarray(-np.log(np.clip(chosen, np.finfo(np.float64).eps, 1.0)))


def reliability(probabilities: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    """The reliability curve (DeGroot & Fienberg 1983): each bin of confidence that has examples.

    Args:
        probabilities: float `(n, classes)`.
        labels: int `(n,)`.

    Returns:
        For each bin what `RELIABILITY` names: its bounds, examples, mean confidence, accuracy, and its 95 % interval
        (Wilson).
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
    """Examples, mean confidence and accuracy of each bin that has examples, `(k,)` each."""
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    bins = _bins(confidence)
    counts = np.bincount(bins)
    used = counts > 0
    sure, right = (np.bincount(bins, values)[used] / counts[used] for values in (confidence, correct))
    return counts[used], sure, right


def _bins(confidence: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1))
