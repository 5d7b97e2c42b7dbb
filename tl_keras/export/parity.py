"""Loads an exported model like TensorFlow Serving, in a new process without Keras, and compares its predictions.

As a program (`python -m tl_keras.export.parity`) this module is that process: it reads a line of JSON and writes one.
It loads the model with TensorFlow's C++ loader, like TensorFlow Serving. The wheels for Windows and macOS do not have
this library; there the model is loaded in a TensorFlow 1 session, which runs the same operations.
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
_ONE_BY_ONE = 8  # number of images that also run in a batch of their own
_SECONDS = 600
_CPP, _SESSION = "C++", "TF1 session"
Run = Callable[[Sequence[bytes]], dict[str, np.ndarray]]
_OUTPUTS = ("probabilities", "valid")


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement of an exported model with the evaluated classifier.

    Attributes:
        count: number of compared images.
        decisions: fraction of images with the same predicted class.
        largest_difference: largest difference of a probability.
        batch_difference: largest difference of a probability between two batch sizes.
        loader: the loader of the model: `C++`, as in TensorFlow Serving, or `TF1 session`.
    """

    count: int
    decisions: float
    largest_difference: float
    batch_difference: float
    loader: str = _CPP


class ParityProcess:
    """A new Python process that loads TensorFlow while the model is being written."""

    def __enter__(self) -> ParityProcess:
        """Starts the process."""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "CUDA_VISIBLE_DEVICES": "-1",  # the parent process may use all GPU memory
        }
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tl_keras.export.parity"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            start_new_session=True,  # Ctrl-C is handled by the parent process
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def compare(self, folder: Path, samples: Sequence[bytes], expected: np.ndarray) -> Agreement:
        """Runs images through the exported model, in two batch sizes.

        Args:
            folder: the exported model.
            samples: m encoded images.
            expected: their probabilities, float32 `(m, classes)`.

        Returns:
            The agreement.

        Raises:
            UserError: the model can't be loaded, or rejects an image that was evaluated.
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
                f"the exported model can't be loaded like in TF Serving: {self._explain()}. Nothing was exported."
            ) from error
        if not found["valid"]:
            raise UserError("the exported model rejects images that were evaluated. Nothing was exported.")
        batched, alone = np.array(found["batched"], np.float32), np.array(found["alone"], np.float32)
        return Agreement(
            count=len(expected),
            decisions=float(np.mean(expected.argmax(1) == batched.argmax(1))),
            largest_difference=float(np.abs(expected - batched).max()),
            batch_difference=float(np.abs(batched[: len(alone)] - alone).max()),
            loader=found["loader"],
        )

    def _explain(self) -> str:
        """Explains why the process gave no answer: its signal, or the last line of its output."""
        status = self._process.poll()
        if status is None:
            return f"no answer within {_SECONDS} s"
        if status < 0:
            hint = ", probably for lack of memory" if status == -signal.SIGKILL else ""
            return f"the process was killed by signal {-status}{hint}"
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:300].rstrip(".") if lines else f"the process exited with status {status}"


def _name_tensors(folder: Path) -> dict[str, Any]:
    """Reads the tensor names of the signature `serving_default` from the model's file: `feed` and `fetches`."""
    from tensorflow.core.protobuf import saved_model_pb2

    model = saved_model_pb2.SavedModel()
    with contextlib.suppress(OSError, ValueError, IndexError, DecodeError):
        model.ParseFromString((folder / "saved_model.pb").read_bytes())
        signature = model.meta_graphs[0].signature_def["serving_default"]
        fetches = {name: signature.outputs[name].name for name in _OUTPUTS}
        return {"feed": signature.inputs["image_bytes"].name, "fetches": fetches}
    return {"feed": "", "fetches": {}}  # the error is reported when the model is loaded


def _answer(question: dict[str, Any], library: Any = None) -> dict[str, Any]:
    """Runs the model's signature on the images, in two batch sizes.

    Args:
        question: `folder`, `tensors` and `images`, base64.
        library: TensorFlow's C API; None to load the model in a TF1 session.
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
    """Loads the model in TensorFlow's C++ runtime, like TensorFlow Serving."""
    model = CppModel(library, question["folder"], **question["tensors"])
    try:
        yield model.run
    finally:
        model.close()


@contextlib.contextmanager
def _open_session(question: dict[str, Any]) -> Iterator[Run]:
    """Loads the model in a TensorFlow 1 session."""
    import tensorflow as tf

    tensors = question["tensors"]
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.compat.v1.saved_model.load(session, ["serve"], question["folder"])
        yield lambda images: dict(session.run(tensors["fetches"], {tensors["feed"]: images}))


def _load_runtime() -> Any:
    """Loads TensorFlow before the question arrives: its C API if the wheel has it, otherwise its Python package."""
    libraries = find_libraries()
    if libraries:
        with contextlib.suppress(OSError, AttributeError):
            return load_library(libraries)
    import tensorflow as tf  # noqa: F401 (loads it)

    return None


def _main() -> None:
    sys.modules["keras"] = None  # type: ignore[assignment]  # importing Keras fails, as in TensorFlow Serving
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    library = _load_runtime()
    answer = json.dumps(_answer(json.loads(sys.stdin.readline()), library))
    sys.stdout.write(answer)


if __name__ == "__main__":
    _main()
