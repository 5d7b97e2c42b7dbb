"""Selection of a probe's parameter with a coarse and a fine grid, on val or by cross-validation in train and val."""

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

SMALL_VAL = 1000  # with 1,000 images the 95 % confidence interval of an accuracy of 0.9 is still 0.88 to 0.92
_FOLDS = 5
_SCORED = 2000  # with fewer examples cross-validation is repeated, because accuracies vary by 0.01 between draws
_REPEATS = 5
_TAIL = 2
_ROUGH_TOLERANCE, _ROUGH_ITERATIONS = 1e-2, 100

Labeled = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Search:
    """The result of a search for a parameter.

    Attributes:
        value: the best value.
        scores: value → accuracy, simplest classifier first.
        chosen_by: `val`, or `5-fold cross-validation within train and val, 3 times`.
        unconverged: values for which the solver did not converge.
    """

    value: float
    scores: dict[float, float]
    chosen_by: str
    unconverged: list[float]


def choose_parameter(
    name: str, train: Labeled, val: Labeled, *, recipe: Recipe, choose_by: str, show_progress: Callable[[str], None]
) -> Search:
    """Selects a parameter from a grid of decades, then of thirds of decades; simpler classifiers win ties.

    Args:
        name: name of the probe.
        train: embeddings, float32 `(n, dim)`, and labels, int `(n,)`.
        val: the same for val.
        recipe: settings of the estimators.
        choose_by: `val`, `cv`, or `auto`: cross-validation if val has fewer than 1,000 images and fewer than train;
            then the training part of a fold is about as large as train, so that the best value also fits train.
        show_progress: called with the progress as text.

    Returns:
        The best value, and the scores of all values.
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
        # set here and not in the threads: it is global, and the last thread to finish would leave it set
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
    """Splits the grid into parts after which the search may stop; most probes have a single part.

    The solver of a linear SVM is slow for a large C, so its search stops after two decades in a row below the best. The
    parts do not depend on the number of cores, so that the result does not depend on the machine.
    """
    size = _TAIL if name == "linear_svm" else len(values)
    return [values[start : start + size] for start in range(0, len(values), size)]


def _best(scores: dict[float, list[float]], values: Iterable[float]) -> float:
    """The value with the best mean score; ties go to the first value, which is the simplest classifier."""
    return max(values, key=lambda value: round(float(np.mean(scores[value])), 9))


def _make_folds(
    train: Labeled, val: Labeled, *, choose_by: str, recipe: Recipe
) -> tuple[list[Callable[[], tuple[Labeled, Labeled]]], int, str]:
    """Makes the folds lazily; both parts of a fold are scaled with statistics of its training part.

    Returns:
        The folds, the size of the smallest training part (including train), and a description of the method.
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

    def make(fit: np.ndarray, score: np.ndarray) -> Callable[[], tuple[Labeled, Labeled]]:
        return lambda: _scale((embeddings[fit], labels[fit]), (embeddings[score], labels[score]), recipe)

    times = f", {repeats} times" if repeats > 1 else ""
    with quiet():
        parts = list(folds.split(embeddings, labels))
    how = f"{number}-fold cross-validation within train and val{times}"
    fewest = min(len(train[1]), *(len(fit) for fit, _ in parts))
    return [make(*part) for part in parts], fewest, how


def _scale(fit: Labeled, score: Labeled, recipe: Recipe) -> tuple[Labeled, Labeled]:
    scaler = build_scaler(recipe.scale).fit(fit[0])
    return (scaler.transform(fit[0]), fit[1]), (scaler.transform(score[0]), score[1])


class _RegularizationPath:
    """Scores values of a parameter in parallel."""

    def __init__(self, name: str, recipe: Recipe, cores: int) -> None:
        self._probe, self._recipe, self._cores = PROBES[name], recipe, cores
        self.unconverged: list[float] = []

    def score(self, values: Sequence[float], fit: Labeled, score: Labeled) -> dict[float, float]:
        found = Parallel(n_jobs=self._cores, prefer="threads")(
            delayed(self._score_one)(value, fit, score) for value in values
        )
        return dict(zip(values, found, strict=True))

    def _build(self, value: float) -> Any:
        return self._probe.build(value, self._recipe)

    def _score_one(self, value: float, fit: Labeled, score: Labeled) -> float:
        estimator = self._build(value).fit(*fit)
        return float(np.mean(estimator.predict(score[0]) == score[1]))


class _WarmStartPath(_RegularizationPath):
    """Logistic regression: each value starts from the solution of the previous one, simplest first."""

    def __init__(self, name: str, recipe: Recipe, cores: int) -> None:
        super().__init__(name, recipe, cores)
        self._solutions: dict[float, tuple[np.ndarray, np.ndarray]] = {}

    def score(self, values: Sequence[float], fit: Labeled, score: Labeled) -> dict[float, float]:
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
    """Linear SVM: 100 iterations with tolerance 0.01 are enough to compare values; only the final fit converges."""

    def _build(self, value: float) -> Any:
        iterations = min(_ROUGH_ITERATIONS, self._recipe.max_iter)
        return super()._build(value).set_params(tol=_ROUGH_TOLERANCE, max_iter=iterations)


class _KernelPath(_RegularizationPath):
    """SVM with an RBF kernel: the kernel does not depend on C and is computed once."""

    _kernels: tuple[np.ndarray, np.ndarray] | None = None

    def score(self, values: Sequence[float], fit: Labeled, score: Labeled) -> dict[float, float]:
        if self._kernels is None:
            kernel = RbfKernel().fit(fit[0])
            self._kernels = kernel.transform(fit[0]), kernel.transform(score[0])
        return super().score(values, (self._kernels[0], fit[1]), (self._kernels[1], score[1]))


class _NeighborsPath(_RegularizationPath):
    """Nearest neighbors: they are searched once, for the largest number of neighbors."""

    def score(self, values: Sequence[float], fit: Labeled, score: Labeled) -> dict[float, float]:
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
    "knn": _NeighborsPath,
}
