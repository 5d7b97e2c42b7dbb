"""tl_keras: transfer learning for image classification, from labelled images to TensorFlow Serving."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tl_keras.classifier import LoadedClassifier

__version__ = "0.2.0"
__all__ = ["__version__", "load_classifier"]


def load_classifier(path: str) -> LoadedClassifier:
    """Loads a classifier from a run folder or an exported version folder.

    Args:
        path: `runs/NAME` or `saved_models/NAME/VERSION`.

    Returns:
        The classifier; its `predict` takes paths or encoded images.

    Raises:
        UserError: there is no classifier at `path`, or it is damaged.
    """
    from tl_keras import classifier  # loads TensorFlow, which `import tl_keras` must not

    return classifier.load(path)
