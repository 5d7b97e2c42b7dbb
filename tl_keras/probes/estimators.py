"""The probes: which of scikit-learn's estimators, what of it is chosen from a grid, and how it gets probabilities."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import joblib
import numpy as np
from scipy.linalg import LinAlgWarning
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler
from sklearn.svm import SVC, LinearSVC

from tl_keras.errors import UserError

# Over twelve data sets the best C for a ResNet-50 runs from 0.006 to 1,000 (Ericsson, Gouk & Hospedales 2021,
# ssl-transfer); DINOv2 (Oquab et al. 2023) searches 10^-6 to 10^5.
_DECADES = tuple(10.0**power for power in range(-6, 6))
_THIRDS = tuple(10 ** (part / 3) for part in (-2, -1, 1, 2))
_NEIGHBOURS = (100.0, 50.0, 30.0, 20.0, 15.0, 10.0, 7.0, 5.0, 3.0, 2.0, 1.0)
_CALIBRATION_FOLDS = 5
_DUAL_UNTIL = 0.01


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is given to every estimator.

    Attributes:
        scale: `standard`, `l2` or `none`.
        max_iter: of the iterative ones.
        seed: of the random ones.
    """

    scale: str
    max_iter: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Probe:
    """One row of the table of probes.

    Attributes:
        parameter: what is chosen from the grid, as scikit-learn calls it.
        coarse: the grid, the simplest classifier first.
        fine: factors around the best of it.
        build: parameter and recipe → the estimator.
        calibrated: whether it has no probabilities of its own, and gets them by sigmoids.
    """

    parameter: str
    coarse: tuple[float, ...]
    fine: tuple[float, ...]
    build: Callable[[float, Recipe], Any]
    calibrated: bool


def _logistic_regression(value: float, recipe: Recipe) -> Any:
    """L-BFGS: its cost an iteration is linear in images, dimensions and classes; Newton's is cubic in the last two."""
    return LogisticRegression(C=value, max_iter=recipe.max_iter, random_state=recipe.seed)


def _linear_svm(value: float, recipe: Recipe) -> Any:
    """Coordinate descent in the dual for a small C, where it is the faster (benchmarks/probes.py, dual)."""
    dual = True if value <= _DUAL_UNTIL else "auto"
    return LinearSVC(C=value, dual=dual, max_iter=recipe.max_iter, random_state=recipe.seed)


def _rbf_svm(value: float, recipe: Recipe) -> Any:  # noqa: ARG001 (all are built alike)
    return SVC(C=value, kernel="precomputed")


def _knn(value: float, recipe: Recipe) -> Any:  # noqa: ARG001 (all are built alike)
    return KNeighborsClassifier(n_neighbors=int(value), algorithm="brute")


def _ridge(value: float, recipe: Recipe) -> Any:
    return RidgeClassifier(alpha=value, random_state=recipe.seed)


_ALPHAS = tuple(1 / value for value in _DECADES)
PROBES: dict[str, Probe] = {
    "logistic_regression": Probe("C", _DECADES, _THIRDS, _logistic_regression, calibrated=False),
    "linear_svm": Probe("C", _DECADES, _THIRDS, _linear_svm, calibrated=True),
    "rbf_svm": Probe("C", _DECADES, _THIRDS, _rbf_svm, calibrated=True),
    "knn": Probe("n_neighbors", _NEIGHBOURS, (), _knn, calibrated=False),
    "ridge": Probe("alpha", _ALPHAS, _THIRDS, _ridge, calibrated=True),
}


class RbfKernel(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """The RBF kernel with all that it was fitted on, by matrix products: libsvm computes its own a number at a time.

    Its gamma is what scikit-learn's SVC calls "scale": one over dimensions times variance.
    """

    def fit(self, X: np.ndarray, y: Any = None) -> RbfKernel:  # noqa: N803, ARG002 (scikit-learn's names)
        """Keeps X, `(n, dim)`."""
        variance = float(np.var(X, dtype=np.float64))
        self.gamma_ = 1 / (X.shape[1] * variance) if variance else 1.0
        self.kept_ = X
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:  # noqa: N803 (scikit-learn's name)
        """X, `(b, dim)` → `(b, n)`."""
        kernel: np.ndarray = rbf_kernel(X, self.kept_, gamma=self.gamma_)
        return kernel


def build_scaler(scale: str) -> Any:
    """What embeddings go through before the estimator: `standard`, `l2` or `none`."""
    if scale == "standard":
        return StandardScaler()
    return Normalizer() if scale == "l2" else FunctionTransformer()


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A probe that was fitted.

    Attributes:
        name: of the probe.
        value: of its parameter.
        estimator: scikit-learn's, with `predict_proba`: embeddings `(n, dim)` → `(n, classes)`.
        embeddings: what it was fitted on, float32 `(n, dim)`, not scaled.
        converged: whether the solver came to its end.
    """

    name: str
    value: float
    estimator: Any
    embeddings: np.ndarray
    converged: bool

    @property
    def pipeline(self) -> Pipeline:
        """Scaler and estimator, without the calibration."""
        return self.estimator.calibrated_classifiers_[0].estimator if PROBES[self.name].calibrated else self.estimator

    @property
    def sigmoids(self) -> list[tuple[float, float]]:
        """Slope and offset of each class's sigmoid 1 / (1 + exp(slope x + offset)); a single one of two classes."""
        return [(float(one.a_), float(one.b_)) for one in self.estimator.calibrated_classifiers_[0].calibrators]


def check_probe(name: str, labels: np.ndarray, *, value: float | None) -> None:
    """Checks that a probe can be fitted on so many examples.

    Args:
        name: of the probe.
        labels: of train, int `(n,)`, every class from 0 up.
        value: of its parameter, where it is asked for.

    Raises:
        UserError: a class has too few examples for the calibration, or knn has fewer examples than neighbours.
    """
    if name == "knn" and value and value > len(labels):
        raise UserError(f"--probe=knn can't ask {value:g} neighbours: train has {len(labels)} examples. Ask fewer.")
    if PROBES[name].calibrated and int(np.bincount(labels).min()) < 2:
        raise UserError(
            f"--probe={name} has no probabilities of its own: they are calibrated on examples held out, and a "
            "class has one alone. Give more images, or --probe=logistic_regression."
        )


def fit_probe(name: str, value: float, embeddings: np.ndarray, labels: np.ndarray, recipe: Recipe) -> Fitted:
    """Fits scaler, estimator and, where it has no probabilities, sigmoids on out-of-fold decisions (Platt 1999).

    Args:
        name: of the probe.
        value: of its parameter.
        embeddings: float32 `(n, dim)`.
        labels: int `(n,)`, every class from 0 up.
        recipe: the rest.

    Returns:
        The fitted probe.

    Raises:
        UserError: see `check_probe`.
    """
    probe = PROBES[name]
    check_probe(name, labels, value=value)
    kernel = [("kernel", RbfKernel())] if name == "rbf_svm" else []
    estimator: Any = Pipeline([("scaler", build_scaler(recipe.scale)), *kernel, ("probe", probe.build(value, recipe))])
    if probe.calibrated:
        estimator = CalibratedClassifierCV(
            estimator, method="sigmoid", cv=split_folds(labels), ensemble=False, n_jobs=-1
        )
    exact = embeddings if name == "logistic_regression" else embeddings.astype(np.float64)  # as the others would
    with quiet(), joblib.parallel_backend("threading"):
        estimator.fit(exact, labels)
    fitted = Fitted(name, value, estimator, embeddings, converged=True)
    return dataclasses.replace(fitted, converged=has_converged(fitted.pipeline[-1], recipe.max_iter))


def split_folds(labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Five stratified folds, as many as the data has examples if these are fewer.

    A class of two images is in two folds, and in the training part of all: its rarity must not make the folds of all
    other classes fewer, as scikit-learn does where it is given their number.

    Args:
        labels: int `(n,)`, at least two of each class.

    Returns:
        Positions that are fitted on and positions that are predicted, of each fold.
    """
    number = min(_CALIBRATION_FOLDS, int(np.bincount(labels).max()))
    with quiet():
        return list(StratifiedKFold(number).split(np.zeros(len(labels)), labels))


def has_converged(estimator: Any, max_iter: int) -> bool:
    """Whether an iterative estimator ended by itself; others always do."""
    iterates = isinstance(estimator, (LogisticRegression, LinearSVC))
    return not iterates or int(np.max(estimator.n_iter_)) < max_iter


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps scikit-learn's warnings off the screen.

    These are warnings of classes that are smaller than the number of folds, of convergence, which `has_converged` is
    asked about, and of ridge with so small an alpha that its matrix is singular, for which it takes another solver.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", LinAlgWarning)
        warnings.filterwarnings("ignore", "Singular matrix", UserWarning)
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        yield
