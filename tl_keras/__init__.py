"""tl_keras: transfer learning for image classification, from labeled images to TensorFlow Serving."""

from __future__ import annotations

import contextlib
import sys
import types
from typing import TYPE_CHECKING, Any

from tl_keras import api
from tl_keras.api import audit, evaluate, export, extract, finetune, predict
from tl_keras.config import check_classifier_path
from tl_keras.errors import UserError
from tl_keras.jobs.result import Result
from tl_keras.version import __version__

if TYPE_CHECKING:
    from tl_keras.classifier import LoadedClassifier

__all__ = [
    "Result",
    "UserError",
    "__version__",
    "audit",
    "evaluate",
    "export",
    "extract",
    "finetune",
    "load_classifier",
    "predict",
]


def load_classifier(path: str) -> LoadedClassifier:
    """Loads a classifier from a run folder or an exported version folder.

    Args:
        path: `runs/NAME` or `saved_models/NAME/VERSION`.

    Returns:
        The classifier; its `predict` takes paths, encoded images, arrays, or Pillow images.

    Raises:
        UserError: there is no classifier at `path`, or it is damaged.
    """
    check_classifier_path(path)
    with contextlib.nullcontext() if "tensorflow" in sys.modules else api.quiet_tensorflow():
        from tl_keras.classifier import load  # loads TensorFlow, which `import tl_keras` must not
    return load(path)


class _CallableModule(types.ModuleType):
    """The packages `audit` and `export`, which can be called as the functions of these names."""

    def __call__(self, **settings: Any) -> Result:
        function = getattr(api, self.__name__.rpartition(".")[2])
        result: Result = function(**settings)
        return result


class _Package(types.ModuleType):
    """Keeps `tl_keras.audit(…)` and `tl_keras.export(…)` callable when the packages of these names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in {"audit", "export"} and isinstance(value, types.ModuleType):
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
