"""The classifier: image bytes → class probabilities."""

from tl_keras.classifier.classifier import Classifier
from tl_keras.classifier.files import (
    find_folder,
    is_exported,
    load_samples,
    load_trained,
    read_decoding,
    read_labels,
    read_run_id,
    write_classifier,
    write_decoding,
)
from tl_keras.classifier.graph import EXAMPLE_FEATURE, NETWORK_FUNCTION, TOP_K, Servable
from tl_keras.classifier.loaded import LoadedClassifier, load

__all__ = [
    "EXAMPLE_FEATURE",
    "NETWORK_FUNCTION",
    "TOP_K",
    "Classifier",
    "LoadedClassifier",
    "Servable",
    "find_folder",
    "is_exported",
    "load",
    "load_samples",
    "load_trained",
    "read_decoding",
    "read_labels",
    "read_run_id",
    "write_classifier",
    "write_decoding",
]
