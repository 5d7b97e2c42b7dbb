"""Folding: converts a fitted probe and its scaler to a Keras head of standard TensorFlow ops."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from sklearn.preprocessing import Normalizer, StandardScaler

from tl_keras.classifier.probe_layers import NearestNeighbours, SupportVectors
from tl_keras.probes.estimators import PROBES, Fitted

NEIGHBOURS_SMOOTHING = 1.0  # one additional vote, distributed over all classes


def fold(fitted: Fitted, *, num_classes: int) -> keras.Model:
    """Converts a scikit-learn probe to a Keras head with the same probabilities.

    Scaler, linear probe and the slopes of its sigmoids become one dense layer. It computes in float64 like
    scikit-learn, because large weights (large C) cancel out, and float32 would lose precision.

    Args:
        fitted: a probe fitted on labels 0 to `num_classes` - 1, all of which occur.
        num_classes: number of classes.

    Returns:
        Embeddings, float32 `(b, dim)` → logits, float64 `(b, num_classes)`. Their softmax equals `predict_proba`; for
        knn with `NEIGHBOURS_SMOOTHING` additional votes.
    """
    scaler, probe = fitted.pipeline[0], fitted.pipeline[-1]
    if list(probe.classes_) != list(range(num_classes)):
        raise ValueError(f"the probe has {len(probe.classes_)} of {num_classes} classes")
    if fitted.name == "knn":
        layers: list[Any] = [_fold_neighbors(fitted, num_classes)]
    elif fitted.name == "rbf_svm":
        layers = [_fold_support_vectors(fitted, num_classes)]
    else:
        layers = _fold_linear(fitted, scaler, probe, num_classes)
    dim = fitted.embeddings.shape[1]
    inputs = outputs = keras.Input((dim,), name="embeddings")
    for layer in layers:
        outputs = layer(outputs)
    return keras.Model(inputs, outputs, name="head")


def _fold_linear(fitted: Fitted, scaler: Any, probe: Any, num_classes: int) -> list[Any]:
    kernel = np.atleast_2d(probe.coef_).astype(np.float64).T
    bias = np.atleast_1d(probe.intercept_).astype(np.float64)
    center, spread = _center_and_spread(scaler, len(kernel))
    kernel = kernel / spread[:, np.newaxis]
    bias = bias - center @ kernel
    if PROBES[fitted.name].calibrated:
        slope, offset = np.array(fitted.sigmoids).T
        kernel, bias = -kernel * slope, -(bias * slope + offset)
    if num_classes == 2:
        kernel = np.concatenate([np.zeros_like(kernel), kernel], 1)
        bias = np.concatenate([np.zeros_like(bias), bias])
    unit = keras.layers.UnitNormalization(dtype="float64", name="unit")
    one_sigmoid_each = PROBES[fitted.name].calibrated and num_classes > 2
    dense = keras.layers.Dense(
        num_classes, dtype="float64", activation="log_sigmoid" if one_sigmoid_each else None, name="logits"
    )
    dense.build((None, len(kernel)))
    dense.set_weights([kernel, bias])
    return [unit, dense] if isinstance(scaler, Normalizer) else [dense]


def _fold_neighbors(fitted: Fitted, num_classes: int) -> keras.layers.Layer:
    scaler, probe = fitted.pipeline[0], fitted.pipeline[-1]
    count, dim = fitted.embeddings.shape
    unit = isinstance(scaler, Normalizer)
    layer = NearestNeighbours(
        count=count, dim=dim, unit=unit, num_classes=num_classes, k=probe.n_neighbors, smoothing=NEIGHBOURS_SMOOTHING
    )
    _assign(layer, scaler, kept=fitted.embeddings, labels=probe._y)  # there is no public attribute
    return layer


def _fold_support_vectors(fitted: Fitted, num_classes: int) -> keras.layers.Layer:
    scaler, probe = fitted.pipeline[0], fitted.pipeline[-1]
    counts = [int(count) for count in probe.n_support_]
    dual = np.zeros((sum(counts), num_classes))
    intercepts = np.zeros((num_classes, num_classes))
    sign = -1 if num_classes == 2 else 1  # for two classes scikit-learn inverts the signs of libsvm
    for label, rows in enumerate(np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])):
        others = np.delete(np.arange(num_classes), label)
        dual[np.ix_(rows, others)] = sign * probe.dual_coef_[:, rows].T
    intercepts[np.triu_indices(num_classes, 1)] = sign * probe.intercept_
    layer = SupportVectors(
        counts=counts,
        dim=fitted.embeddings.shape[1],
        unit=isinstance(scaler, Normalizer),
        gamma=fitted.pipeline["kernel"].gamma_,
    )
    slope, offset = np.array(fitted.sigmoids).T
    kept = fitted.embeddings[probe.support_]
    _assign(layer, scaler, kept=kept, dual=dual, intercepts=intercepts, slope=slope, offset=offset)
    return layer


def _assign(layer: Any, scaler: Any, **weights: np.ndarray) -> None:
    center, spread = _center_and_spread(scaler, layer.kept.shape[1])
    for name, values in {"center": center, "spread": spread, **weights}.items():
        getattr(layer, name).assign(values)


def _center_and_spread(scaler: Any, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Offset and divisor of a scaler, float64 `(dim,)` each; 0 and 1 for other scalers."""
    if isinstance(scaler, StandardScaler):
        return scaler.mean_.astype(np.float64), scaler.scale_.astype(np.float64)
    return np.zeros(dim), np.ones(dim)
