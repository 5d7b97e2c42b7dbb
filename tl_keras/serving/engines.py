"""Engines of a served model: its graph as in TF Serving, or its network in OpenVINO, whichever is faster."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tl_keras.backbones.engines import has_openvino, openvino_version, read_cpu_flags
from tl_keras.config import default_store_dir
from tl_keras.errors import UserError
from tl_keras.run import Interrupts, read_json, write_atomically
from tl_keras.serving.graphs import IMAGE_INPUT, Graph, as_strings, time_run
from tl_keras.serving.openvino_graph import OpenVinoGraph
from tl_keras.version import __version__

DIFFERENCE_AT_MOST = 1e-3  # largest change of a probability; the export has the same limit
_COMPARED = 8
_TIMED_SECONDS = 0.5  # at least
_KEPT_NOTES = 200
_ENGINES = {f"{engine} {precision}" for engine in ("tensorflow", "openvino") for precision in ("float32", "bfloat16")}


@dataclasses.dataclass(frozen=True)
class ServingEngine:
    """Engine and precision of a model.

    Attributes:
        engine: `tensorflow` or `openvino`; `auto` before it is chosen.
        precision: `float32` or `bfloat16`; `auto` before it is chosen.
    """

    engine: str
    precision: str

    def __str__(self) -> str:
        """The text for the screen."""
        return f"{self.engine} {self.precision}"


@dataclasses.dataclass(frozen=True)
class _Remembered:
    """An earlier choice, and the lines that were shown with it."""

    choice: ServingEngine
    lines: Sequence[str]


def build_serving_engine(
    path: Path, *, wanted: ServingEngine, samples: Sequence[bytes], show: Callable[[str], None]
) -> tuple[Any, ServingEngine]:
    """Loads a version in the requested engine, or in the fastest one whose predictions agree with the graph.

    The choice is saved in the user's cache: the next time only the chosen engine is loaded.

    Args:
        path: the version folder.
        wanted: requested engine and precision.
        samples: images for the comparison and the benchmark.
        show: shows a line.

    Returns:
        The engine that runs the signatures, and its description.

    Raises:
        RuntimeError: the requested engine is not available, or its predictions differ from the graph.
    """
    note = _find_note(path, wanted)
    remembered = _read_note(note)
    if remembered:
        try:
            with Interrupts.restored():
                loaded = _load(remembered.choice, path)
        except Exception as error:  # see `_choose`
            show(f"{_describe_failure(remembered.choice, path, error)}; the engines are compared again")
        else:
            for line in remembered.lines:
                show(line)
            return loaded, remembered.choice
    chosen, choice, lines = _choose(path, wanted, samples, show)
    if lines is not None:
        _write_note(note, _Remembered(choice, lines))
    return chosen, choice


def _choose(
    path: Path, wanted: ServingEngine, samples: Sequence[bytes], show: Callable[[str], None]
) -> tuple[Any, ServingEngine, list[str] | None]:
    """Loads, compares and times the engines; see `build_serving_engine`.

    Returns:
        The engine, its description, and the lines about it; None if an engine failed, perhaps for this time only.
    """
    graph = Graph(path, precision="float32")
    images = as_strings([*(list(samples) * _COMPARED)[: _COMPARED - 1], b"no image"])
    clock = functools.partial(time_run, images=images, seconds=_TIMED_SECONDS)
    plain, found = ServingEngine("tensorflow", "float32"), dict[ServingEngine, tuple[Any, float]]()
    try:
        expected = graph.run("serving_default", {IMAGE_INPUT: images})
        if plain in _list(wanted):
            found[plain] = graph, clock(graph)
    except BaseException:
        graph.close()
        raise
    lines, reason = list[str](), ""
    for choice in _list(wanted):
        if choice == plain:
            continue
        tried = None
        try:
            with Interrupts.restored():
                tried = _load(choice, path)
                difference = _check_answers(tried, choice, images, expected)
                found[choice] = tried, clock(tried)
            if choice.precision == "bfloat16":
                lines.append(_describe_rounding(choice, difference, len(images) - 1))
                show(lines[-1])
        except Exception as error:  # OpenVINO raises plain RuntimeErrors, TensorFlow its own exceptions
            reason = _describe_failure(choice, path, error)
            show(reason)
            if tried is not None:
                tried.close()
    if not found:
        graph.close()
        raise RuntimeError(reason)
    best = min(found, key=lambda one: found[one][1])
    _close_others(found[best][0], [graph, *(one for one, _ in found.values() if one is not graph)])
    return found[best][0], best, None if reason else lines


def _close_others(chosen: Any, loaded: Sequence[Any]) -> None:
    for one in loaded:
        if one is not chosen:
            one.close()


def _describe_failure(choice: ServingEngine, path: Path, error: Exception) -> str:
    first = (str(error).strip().splitlines() or ["unknown"])[0]
    return f"{choice} does not run {path}: {first[:200]}"


def _find_note(path: Path, wanted: ServingEngine) -> Path:
    """The file of the choice for these files of a model, this request, this machine, and these versions.

    A copy of a model has a choice of its own: it may be incomplete, which OpenVINO does not notice.
    """
    content = hashlib.sha256()
    with contextlib.suppress(OSError):  # files that can't be read are reported when the model is loaded
        for file in sorted(one for one in path.rglob("*") if one.is_file()):
            found = file.stat()
            content.update(repr((str(file.relative_to(path)), found.st_size, found.st_mtime_ns, found.st_ino)).encode())
    versions = (__version__, tf.__version__, openvino_version())
    devices = [device.name for device in tf.config.list_logical_devices()]
    machine = (platform.machine(), platform.processor(), os.cpu_count(), sorted(read_cpu_flags()), devices)
    content.update(repr((str(path.resolve()), wanted, versions, machine)).encode())
    return Path(default_store_dir()) / "serving" / f"{content.hexdigest()[:32]}.json"


def _read_note(note: Path) -> _Remembered | None:
    with contextlib.suppress(UserError, TypeError, KeyError):
        content = read_json(note)
        choice, lines = ServingEngine(**content["choice"]), content["lines"]
        if isinstance(lines, list) and str(choice) in _ENGINES:
            return _Remembered(choice, [str(line) for line in lines])
    return None


def _write_note(note: Path, remembered: _Remembered) -> None:
    """Saves a choice, and deletes the oldest; without a cache, or on a full disk, it is made again the next time."""
    with contextlib.suppress(UserError, OSError):
        write_atomically(note, json.dumps(dataclasses.asdict(remembered)).encode())
        for old in sorted(note.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)[:-_KEPT_NOTES]:
            old.unlink(missing_ok=True)


def _describe_rounding(choice: ServingEngine, difference: float, count: int) -> str:
    return (
        f"{choice}: probabilities differ from the exported model's by up to {difference:.4f} on {count} images; "
        "--precision=float32 answers as the model was evaluated"
    )


def _list(wanted: ServingEngine) -> list[ServingEngine]:
    """Lists the engines to try."""
    engines = [wanted.engine]
    if wanted.engine == "auto":
        engines = ["tensorflow", "openvino"] if has_openvino() else ["tensorflow"]
    # bfloat16 changes probabilities by up to 0.1 (MobileNetV2), the export allows 0.001: it must be requested
    precision = "float32" if wanted.precision == "auto" else wanted.precision
    return [ServingEngine(engine, precision) for engine in engines]


def _load(choice: ServingEngine, path: Path) -> Any:
    return (OpenVinoGraph if choice.engine == "openvino" else Graph)(path, precision=choice.precision)


def _check_answers(tried: Any, choice: ServingEngine, images: np.ndarray, expected: dict[str, np.ndarray]) -> float:
    """Compares the answers of an engine with those of the exported graph.

    Returns:
        The largest difference of a probability.

    Raises:
        RuntimeError: the answers differ. Probabilities in bfloat16 may differ by any finite amount, because it was
            requested explicitly.
    """
    answers = tried.run("serving_default", {IMAGE_INPUT: images})
    if (answers["valid"] != expected["valid"]).any():
        raise RuntimeError("it does not find the same images invalid as the graph does")
    difference = float(np.abs(answers["probabilities"] - expected["probabilities"]).max())
    if not difference <= (DIFFERENCE_AT_MOST if choice.precision == "float32" else 1.0):  # also rejects NaN
        raise RuntimeError(f"its probabilities differ from the graph's by {difference:.1e}")
    # rounding may swap the two best classes if they are nearly equal
    ordered = np.sort(expected["probabilities"], axis=1)
    is_clear = ordered[:, -1] - ordered[:, -2] > 2 * difference
    if (answers["labels"][is_clear, 0] != expected["labels"][is_clear, 0]).any():
        raise RuntimeError("its labels are not the graph's")
    return difference
