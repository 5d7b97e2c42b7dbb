"""Loads an exported model as TF Serving does, in a fresh process without Keras, and compares its answers.

As a program (`python -m tl_keras.export.parity`) it is that process: it reads a line of JSON, answers with one.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tl_keras.errors import UserError

_BATCH_SIZE = 8
_ONE_BY_ONE = 8  # so many images are run alone as well
_SECONDS = 600


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How well an exported model agrees with what was evaluated.

    Attributes:
        count: images compared.
        decisions: share of images with the same best class.
        largest_difference: of any probability.
        batch_difference: largest difference of any probability between two batch sizes.
    """

    count: int
    decisions: float
    largest_difference: float
    batch_difference: float


class ParityProcess:
    """A fresh Python that loads TensorFlow while the model is still being written."""

    def __enter__(self) -> ParityProcess:
        """Starts it."""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "CUDA_VISIBLE_DEVICES": "-1",  # this process may hold all of the GPU's memory
        }
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tl_keras.export.parity"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends it."""
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def compare(self, folder: Path, samples: Sequence[bytes], expected: np.ndarray) -> Agreement:
        """Runs images through the model there, in two batch sizes.

        Args:
            folder: the exported model.
            samples: m encoded images.
            expected: their probabilities, float32 `(m, classes)`.

        Returns:
            The agreement.

        Raises:
            UserError: the model can't be loaded, or finds an image invalid that was evaluated.
        """
        question = {"folder": str(folder), "images": [base64.b64encode(sample).decode() for sample in samples]}
        try:
            answer, _ = self._process.communicate(json.dumps(question).encode() + b"\n", timeout=_SECONDS)
            found = json.loads(answer)
        except (subprocess.TimeoutExpired, ValueError, OSError) as error:
            raise UserError(
                f"the exported model can't be loaded as TF Serving loads it: {self._explain()}. Nothing was exported."
            ) from error
        if not found["valid"]:
            raise UserError("the exported model finds images invalid that were evaluated. Nothing was exported.")
        batched, alone = np.array(found["batched"], np.float32), np.array(found["alone"], np.float32)
        return Agreement(
            count=len(expected),
            decisions=float(np.mean(expected.argmax(1) == batched.argmax(1))),
            largest_difference=float(np.abs(expected - batched).max()),
            batch_difference=float(np.abs(batched[: len(alone)] - alone).max()),
        )

    def _explain(self) -> str:
        """Why the process gave no answer: what ended it, or else the last line that it wrote."""
        status = self._process.poll()
        if status is None:
            return f"no answer within {_SECONDS} s"
        if status < 0:
            hint = " (is there too little memory?)" if status == -signal.SIGKILL else ""
            return f"signal {-status} ended the process{hint}"
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:300].rstrip(".") if lines else f"the process ended with {status}"


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    """Loads the model through a TF1 session and runs its signature, as TF Serving's C++ does."""
    import tensorflow as tf

    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        meta = tf.compat.v1.saved_model.load(session, ["serve"], question["folder"])
        signature = meta.signature_def["serving_default"]
        feed = signature.inputs["image_bytes"].name
        fetches = [signature.outputs[name].name for name in ("probabilities", "valid")]
        images = [base64.b64decode(image) for image in question["images"]]
        starts = range(0, len(images), _BATCH_SIZE)
        batched = [session.run(fetches, {feed: images[start : start + _BATCH_SIZE]}) for start in starts]
        alone = [session.run(fetches, {feed: [image]}) for image in images[:_ONE_BY_ONE]]
    return {
        "batched": np.concatenate([part[0] for part in batched]).tolist(),
        "alone": np.concatenate([part[0] for part in alone]).tolist(),
        "valid": all(bool(part[1].all()) for part in batched + alone),
    }


def _main() -> None:
    sys.modules["keras"] = None  # type: ignore[assignment]  # whoever imports Keras fails, as in TF Serving
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf  # noqa: F401 (loaded while the question is being prepared)

    answer = json.dumps(_answer(json.loads(sys.stdin.readline())))
    sys.stdout.write(answer)


if __name__ == "__main__":
    _main()
