"""Loads an exported model as TensorFlow Serving does, in a fresh process without Keras, and compares its answers.

As a program (`python -m tl_keras.export.parity`) it is that process: it reads a line of JSON and answers with one. It
loads the model through TensorFlow's C++ loader, as TensorFlow Serving does. TensorFlow's wheels for Windows and macOS
have no such library; there it loads the model through a session of TensorFlow 1, which calls the same operations.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from tl_keras.errors import UserError
from tl_keras.export.cpp_loader import CppModel, find_libraries, load_library

_BATCH_SIZE = 8
_ONE_BY_ONE = 8  # so many images are run alone as well
_SECONDS = 600
_CPP, _SESSION = "C++", "TF1 session"
Run = Callable[[Sequence[bytes]], dict[str, np.ndarray]]
_OUTPUTS = ("probabilities", "valid")


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How well an exported model agrees with what was evaluated.

    Attributes:
        count: images compared.
        decisions: share of images with the same best class.
        largest_difference: of any probability.
        batch_difference: largest difference of any probability between two batch sizes.
        loader: what loaded the model: `C++`, TensorFlow Serving's own loader, or `TF1 session`.
    """

    count: int
    decisions: float
    largest_difference: float
    batch_difference: float
    loader: str = _CPP


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
            start_new_session=True,  # Ctrl-C in a terminal is for the run, which goes on to its end
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
        question = {
            "folder": str(folder),
            "tensors": _name_tensors(folder),
            "images": [base64.b64encode(sample).decode() for sample in samples],
        }
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
            loader=found["loader"],
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


def _name_tensors(folder: Path) -> dict[str, Any]:
    """The tensors of the signature `serving_default`: `feed`, and `fetches`; read from the model's file."""
    from tensorflow.core.protobuf import saved_model_pb2

    model = saved_model_pb2.SavedModel()
    with contextlib.suppress(OSError, ValueError, IndexError, DecodeError):
        model.ParseFromString((folder / "saved_model.pb").read_bytes())
        signature = model.meta_graphs[0].signature_def["serving_default"]
        fetches = {name: signature.outputs[name].name for name in _OUTPUTS}
        return {"feed": signature.inputs["image_bytes"].name, "fetches": fetches}
    return {"feed": "", "fetches": {}}  # whoever loads the model will say what is wrong with it


def _answer(question: dict[str, Any], library: Any = None) -> dict[str, Any]:
    """Runs the model's signature on the images, in two batch sizes.

    Args:
        question: `folder`, `tensors` and `images`, base64.
        library: TensorFlow's C API; None: the model is loaded through a TF1 session.
    """
    images = [base64.b64decode(image) for image in question["images"]]
    with _open_cpp(library, question) if library else _open_session(question) as run:
        starts = range(0, len(images), _BATCH_SIZE)
        batched = [run(images[start : start + _BATCH_SIZE]) for start in starts]
        alone = [run([image]) for image in images[:_ONE_BY_ONE]]
    return {
        "batched": np.concatenate([part["probabilities"] for part in batched]).tolist(),
        "alone": np.concatenate([part["probabilities"] for part in alone]).tolist(),
        "valid": all(bool(part["valid"].all()) for part in batched + alone),
        "loader": _CPP if library else _SESSION,
    }


@contextlib.contextmanager
def _open_cpp(library: Any, question: dict[str, Any]) -> Iterator[Run]:
    """The model in TensorFlow's C++ runtime, as TensorFlow Serving has it."""
    model = CppModel(library, question["folder"], **question["tensors"])
    try:
        yield model.run
    finally:
        model.close()


@contextlib.contextmanager
def _open_session(question: dict[str, Any]) -> Iterator[Run]:
    """The model in a session of TensorFlow 1."""
    import tensorflow as tf

    tensors = question["tensors"]
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.compat.v1.saved_model.load(session, ["serve"], question["folder"])
        yield lambda images: dict(session.run(tensors["fetches"], {tensors["feed"]: images}))


def _load_runtime() -> Any:
    """TensorFlow, while the question is still being prepared: its C API if the wheel has one, or else its Python."""
    libraries = find_libraries()
    if libraries:
        with contextlib.suppress(OSError, AttributeError):
            return load_library(libraries)
    import tensorflow as tf  # noqa: F401 (loads it)

    return None


def _main() -> None:
    sys.modules["keras"] = None  # type: ignore[assignment]  # whoever imports Keras fails, as in TensorFlow Serving
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    library = _load_runtime()
    answer = json.dumps(_answer(json.loads(sys.stdin.readline()), library))
    sys.stdout.write(answer)


if __name__ == "__main__":
    _main()
