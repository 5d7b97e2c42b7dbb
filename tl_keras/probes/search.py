"""Choosing a probe's parameter: coarse, then fine, on val or by cross-validation within train and val."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import joblib
import numpy as np
from joblib import Parallel, delayed
from sklearn.model_selection import RepeatedStratifiedKFold
from threadpoolctl import threadpool_limits

from tl_keras.probes.estimators import PROBES, RbfKernel, Recipe, build_scaler, has_converged, quiet

SMALL_VAL = 1000  # at 1,000 images the 95 % interval of an accuracy of 0.9 is still 0.88 to 0.92
_FOLDS = 5
_SCORED = 2000  # with fewer examples the folds are drawn several times: one draw's accuracies differ by 0.01 by luck
_REPEATS = 5
_TAIL = 2
_ROUGH_TOLERANCE, _ROUGH_ITERATIONS = 1e-2, 100

Labelled = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Search:
    """How a parameter was chosen.

    Attributes:
        value: the best.
        scores: value → accuracy, the simplest classifier first.
        chosen_by: `val`, or `5-fold cross-validation within train and val, 3 times`.
        unconverged: values at which the solver did not come to its end.
    """

    value: float
    scores: dict[float, float]
    chosen_by: str
    unconverged: list[float]


def choose_parameter(
    name: str, train: Labelled, val: Labelled, *, recipe: Recipe, choose_by: str, show_progress: Callable[[str], None]
) -> Search:
    """Tries the grid's decades, then thirds of decades around the best; the simpler of equals wins.

    Args:
        name: of the probe.
        train: embeddings, float32 `(n, dim)`, and labels, int `(n,)`.
        val: the same.
        recipe: of the estimators.
        choose_by: `val`, `cv`, or `auto`: cross-validation where val has fewer than 1,000 images and train more than
            val; its folds are then about as large as train, so that what is best for them is best for train.
        show_progress: shows how far it is.

    Returns:
        The best value, and all that were tried.
    """
    probe = PROBES[name]
    folds, fewest, chosen_by = _make_folds(train, val, choose_by=choose_by, recipe=recipe)
    cores = joblib.cpu_count()
    paths = [_PATHS.get(name, _RegularizationPath)(name, recipe, cores if len(folds) == 1 else 1) for _ in folds]
    scores: dict[float, list[float]] = {}

    def score(fold: int, values: Sequence[float]) -> dict[float, float]:
        return paths[fold].score(values, *folds[fold]())

    def try_values(values: Sequence[float]) -> None:
        show_progress(f"{name}: trying {probe.parameter} " + ", ".join(f"{value:.3g}" for value in values))
        # set here, not in the threads: it is the whole process's, and the last thread to end would leave it set
        one_thread = threadpool_limits(1) if len(folds) > 1 else contextlib.nullcontext()
        with one_thread, quiet():
            found = Parallel(n_jobs=cores if len(folds) > 1 else 1, prefer="threads")(
                delayed(score)(fold, values) for fold in range(len(folds))
            )
        scores.update({value: [one[value] for one in found] for value in values})

    coarse = [value for value in probe.coarse if name != "knn" or value <= fewest]
    for part in _split_path(name, coarse):
        try_values(part)
        tail = list(scores)[-_TAIL:]
        if part[-1] != coarse[-1] and _best(scores, scores) not in tail and len(scores) > _TAIL:
            break
    best = _best(scores, scores)
    if probe.fine:
        try_values([best * factor for factor in probe.fine])
    ordered = sorted(scores, reverse=probe.coarse[0] > probe.coarse[-1])
    unconverged = sorted(set().union(*(path.unconverged for path in paths)))
    means = {value: float(np.mean(scores[value])) for value in ordered}
    return Search(_best(scores, ordered), means, chosen_by, unconverged)


def _split_path(name: str, values: Sequence[float]) -> list[Sequence[float]]:
    """The grid in parts, after each of which the path may end; of most probes in one.

    A linear SVM's solver is the slower the larger C is: its path ends after two decades in a row below the best. The
    parts are of two whatever the cores: what is chosen must not depend on the machine.
    """
    size = _TAIL if name == "linear_svm" else len(values)
    return [values[start : start + size] for start in range(0, len(values), size)]


def _best(scores: dict[float, list[float]], values: Iterable[float]) -> float:
    """The value with the best mean; of equals the first, which is the simplest classifier."""
    return max(values, key=lambda value: round(float(np.mean(scores[value])), 9))


def _make_folds(
    train: Labelled, val: Labelled, *, choose_by: str, recipe: Recipe
) -> tuple[list[Callable[[], tuple[Labelled, Labelled]]], int, str]:
    """What is fitted on and what is scored, scaled by the statistics of the former; made when asked for.

    Returns:
        The folds, how many examples the smallest of them and train have, and what was done in words.
    """
    labels = np.concatenate([train[1], val[1]])
    rarest = int(np.bincount(labels)[np.unique(labels)].min())
    trusted = len(val[1]) >= SMALL_VAL or len(train[1]) <= len(val[1])
    if choose_by == "val" or (choose_by == "auto" and trusted) or rarest < 2:
        return [lambda: _scale(train, val, recipe)], len(train[1]), "val"
    embeddings = np.concatenate([train[0], val[0]])
    number = min(
        _FOLDS, int(np.bincount(labels).max())
    )  # a rare class is not in every fold, but in every training part
    repeats = min(_REPEATS, -(-_SCORED // len(labels)))
    folds = RepeatedStratifiedKFold(n_splits=number, n_repeats=repeats, random_state=recipe.seed)

    def make(fit: np.ndarray, score: np.ndarray) -> Callable[[], tuple[Labelled, Labelled]]:
        return lambda: _scale((embeddings[fit], labels[fit]), (embeddings[score], labels[score]), recipe)

    times = f", {repeats} times" if repeats > 1 else ""
    with quiet():
        parts = list(folds.split(embeddings, labels))
    how = f"{number}-fold cross-validation within train and val{times}"
    fewest = min(len(train[1]), *(len(fit) for fit, _ in parts))
    return [make(*part) for part in parts], fewest, how


def _scale(fit: Labelled, score: Labelled, recipe: Recipe) -> tuple[Labelled, Labelled]:
    scaler = build_scaler(recipe.scale).fit(fit[0])
    return (scaler.transform(fit[0]), fit[1]), (scaler.transform(score[0]), score[1])


class _RegularizationPath:
    """Scores values of a parameter, side by side on several cores."""

    def __init__(self, name: str, recipe: Recipe, cores: int) -> None:
        self._probe, self._recipe, self._cores = PROBES[name], recipe, cores
        self.unconverged: list[float] = []

    def score(self, values: Sequence[float], fit: Labelled, score: Labelled) -> dict[float, float]:
        found = Parallel(n_jobs=self._cores, prefer="threads")(
            delayed(self._score_one)(value, fit, score) for value in values
        )
        return dict(zip(values, found, strict=True))

    def _build(self, value: float) -> Any:
        return self._probe.build(value, self._recipe)

    def _score_one(self, value: float, fit: Labelled, score: Labelled) -> float:
        estimator = self._build(value).fit(*fit)
        return float(np.mean(estimator.predict(score[0]) == score[1]))


class _WarmStartPath(_RegularizationPath):
    """Logistic regression: each value starts from the solution of the one before, the simplest first."""

    def __init__(self, name: str, recipe: Recipe, cores: int) -> None:
        super().__init__(name, recipe, cores)
        self._solutions: dict[float, tuple[np.ndarray, np.ndarray]] = {}

    def score(self, values: Sequence[float], fit: Labelled, score: Labelled) -> dict[float, float]:
        found = {}
        for value in sorted(values):
            estimator = self._build(value).set_params(warm_start=True)
            before = max((known for known in self._solutions if known < value), default=None)
            if before is not None:
                estimator.coef_, estimator.intercept_ = self._solutions[before]
            estimator.fit(*fit)
            self._solutions[value] = estimator.coef_, estimator.intercept_
            if not has_converged(estimator, self._recipe.max_iter):
                self.unconverged.append(value)
            found[value] = float(np.mean(estimator.predict(score[0]) == score[1]))
        return found


class _LowTolerancePath(_RegularizationPath):
    """Linear SVM: a hundred iterations to a hundredth tell which value is best; the last fit is solved to the end."""

    def _build(self, value: float) -> Any:
        iterations = min(_ROUGH_ITERATIONS, self._recipe.max_iter)
        return super()._build(value).set_params(tol=_ROUGH_TOLERANCE, max_iter=iterations)


class _KernelPath(_RegularizationPath):
    """SVM with an RBF kernel: the kernel does not depend on C and is computed once."""

    _kernels: tuple[np.ndarray, np.ndarray] | None = None

    def score(self, values: Sequence[float], fit: Labelled, score: Labelled) -> dict[float, float]:
        if self._kernels is None:
            kernel = RbfKernel().fit(fit[0])
            self._kernels = kernel.transform(fit[0]), kernel.transform(score[0])
        return super().score(values, (self._kernels[0], fit[1]), (self._kernels[1], score[1]))


class _NeighboursPath(_RegularizationPath):
    """Nearest neighbours: they are looked up once, for the largest number of them."""

    def score(self, values: Sequence[float], fit: Labelled, score: Labelled) -> dict[float, float]:
        estimator = self._build(max(values)).fit(*fit)
        labels = fit[1][estimator.kneighbors(score[0], return_distance=False)]
        classes = int(fit[1].max()) + 1
        votes = np.zeros((len(labels), classes), np.int32)
        found, rows = {}, np.arange(len(labels))
        for number in range(int(max(values))):
            votes[rows, labels[:, number]] += 1
            if number + 1 in values:
                found[float(number + 1)] = float(np.mean(votes.argmax(1) == score[1]))
        return found


_PATHS: dict[str, type[_RegularizationPath]] = {
    "logistic_regression": _WarmStartPath,
    "linear_svm": _LowTolerancePath,
    "rbf_svm": _KernelPath,
    "knn": _NeighboursPath,
}
