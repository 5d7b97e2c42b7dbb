"""The probes: scikit-learn estimators, the grids of their parameters, and their probabilities."""

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

# Over twelve data sets the best C for a ResNet-50 ranges from 0.006 to 1,000 (Ericsson, Gouk & Hospedales 2021,
# ssl-transfer); DINOv2 (Oquab et al. 2023) searches 10^-6 to 10^5.
_DECADES = tuple(10.0**power for power in range(-6, 6))
_THIRDS = tuple(10 ** (part / 3) for part in (-2, -1, 1, 2))
_NEIGHBOURS = (100.0, 50.0, 30.0, 20.0, 15.0, 10.0, 7.0, 5.0, 3.0, 2.0, 1.0)
_CALIBRATION_FOLDS = 5
_DUAL_UNTIL = 0.01


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of all estimators.

    Attributes:
        scale: `standard`, `l2` or `none`.
        max_iter: maximum number of iterations.
        seed: random seed.
    """

    scale: str
    max_iter: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Probe:
    """One row of the table of probes.

    Attributes:
        parameter: name of the regularization parameter in scikit-learn.
        coarse: grid of the parameter, simplest classifier first.
        fine: factors for a second grid around the best value.
        build: parameter and recipe → estimator.
        calibrated: whether it has no probabilities of its own, so that they are fitted with sigmoids.
    """

    parameter: str
    coarse: tuple[float, ...]
    fine: tuple[float, ...]
    build: Callable[[float, Recipe], Any]
    calibrated: bool


def _logistic_regression(value: float, recipe: Recipe) -> Any:
    """Uses L-BFGS: an iteration is linear in images, dimensions and classes; Newton's is cubic in the last two."""
    return LogisticRegression(C=value, max_iter=recipe.max_iter, random_state=recipe.seed)


def _linear_svm(value: float, recipe: Recipe) -> Any:
    """Uses dual coordinate descent for a small C, where it is faster (benchmarks/probes.py, dual)."""
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
    """RBF kernel with the training examples, computed with matrix products, which are faster than libsvm's kernel.

    Its gamma is that of scikit-learn's `SVC(gamma="scale")`: 1 / (dimensions * variance).
    """

    def fit(self, X: np.ndarray, y: Any = None) -> RbfKernel:  # noqa: N803, ARG002 (scikit-learn's names)
        """Stores X, `(n, dim)`."""
        variance = float(np.var(X, dtype=np.float64))
        self.gamma_ = 1 / (X.shape[1] * variance) if variance else 1.0
        self.kept_ = X
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:  # noqa: N803 (scikit-learn's name)
        """X, `(b, dim)` → `(b, n)`."""
        kernel: np.ndarray = rbf_kernel(X, self.kept_, gamma=self.gamma_)
        return kernel


def build_scaler(scale: str) -> Any:
    """Builds the scaler of embeddings: `standard`, `l2` or `none`."""
    if scale == "standard":
        return StandardScaler()
    return Normalizer() if scale == "l2" else FunctionTransformer()


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A fitted probe.

    Attributes:
        name: name of the probe.
        value: value of its parameter.
        estimator: scikit-learn estimator with `predict_proba`: embeddings `(n, dim)` → `(n, classes)`.
        embeddings: training embeddings before scaling, float32 `(n, dim)`.
        converged: whether the solver converged.
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
        """Slope and offset of each class's sigmoid 1 / (1 + exp(slope x + offset)); a single one for two classes."""
        return [(float(one.a_), float(one.b_)) for one in self.estimator.calibrated_classifiers_[0].calibrators]


def check_probe(name: str, labels: np.ndarray, *, value: float | None) -> None:
    """Checks that there are enough examples to fit a probe.

    Args:
        name: name of the probe.
        labels: training labels, int `(n,)`, every class from 0 up.
        value: value of its parameter, if it is given.

    Raises:
        UserError: a class has too few examples for calibration, or there are fewer examples than neighbors for knn.
    """
    if name == "knn" and value and value > len(labels):
        raise UserError(
            f"--probe=knn can't use {value:g} neighbors: train has only {len(labels)} examples. Use fewer neighbors."
        )
    if PROBES[name].calibrated and int(np.bincount(labels).min()) < 2:
        raise UserError(
            f"--probe={name} needs at least two training images per class to calibrate its probabilities, but a class "
            "has only one. Add images, or use --probe=logistic_regression."
        )


def fit_probe(name: str, value: float, embeddings: np.ndarray, labels: np.ndarray, recipe: Recipe) -> Fitted:
    """Fits scaler and estimator; probabilities, if it has none, are fitted to out-of-fold decisions (Platt 1999).

    Args:
        name: name of the probe.
        value: value of its parameter.
        embeddings: float32 `(n, dim)`.
        labels: int `(n,)`, every class from 0 up.
        recipe: settings of the estimator.

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
    exact = (
        embeddings if name == "logistic_regression" else embeddings.astype(np.float64)
    )  # other estimators compute in float64
    with quiet(), joblib.parallel_backend("threading"):
        estimator.fit(exact, labels)
    fitted = Fitted(name, value, estimator, embeddings, converged=True)
    return dataclasses.replace(fitted, converged=has_converged(fitted.pipeline[-1], recipe.max_iter))


def split_folds(labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Makes five stratified folds, or fewer if the largest class has fewer examples.

    A class of two images is in the test part of two folds, and in the training part of all. scikit-learn would reduce
    the number of folds for all classes instead.

    Args:
        labels: int `(n,)`, at least two of each class.

    Returns:
        Training and test positions of each fold.
    """
    number = min(_CALIBRATION_FOLDS, int(np.bincount(labels).max()))
    with quiet():
        return list(StratifiedKFold(number).split(np.zeros(len(labels)), labels))


def has_converged(estimator: Any, max_iter: int) -> bool:
    """Whether an iterative estimator converged; true for others."""
    iterates = isinstance(estimator, (LogisticRegression, LinearSVC))
    return not iterates or int(np.max(estimator.n_iter_)) < max_iter


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences warnings of scikit-learn.

    They concern classes smaller than the number of folds, convergence (`has_converged` reports it), and singular
    matrices of ridge with a very small alpha, for which it falls back to another solver.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", LinAlgWarning)
        warnings.filterwarnings("ignore", "Singular matrix", UserWarning)
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        yield
