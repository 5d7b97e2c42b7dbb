"""The result of a mode."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_keras.errors import UserError

if TYPE_CHECKING:
    from tl_keras.classifier import LoadedClassifier


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a mode.

    Attributes:
        run_dir: the run folder, if there is one.
        exported: the exported version folder, if there is one.
        metrics: the content of `metrics.json`.
        exit_status: 0; 130 if the user interrupted the run; 1 if a part of it failed.
        is_complete: whether nothing is left to do; otherwise the same command continues the run.
    """

    run_dir: Path | None = None
    exported: Path | None = None
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    exit_status: int = 0
    is_complete: bool = True

    @functools.cached_property
    def classifier(self) -> LoadedClassifier:
        """The trained classifier, loaded from the run folder or the exported model.

        Raises:
            UserError: the mode trained no classifier, or its files are damaged.
        """
        from tl_keras.classifier import load  # loads TensorFlow

        if self.run_dir and (self.run_dir / "classifier").is_dir():
            return load(str(self.run_dir))
        if self.exported:
            return load(str(self.exported))
        raise UserError("this run has no classifier. Use the result of finetune, extract or export.")
