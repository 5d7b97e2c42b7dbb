"""The files of a classifier: the folder `classifier` of a run, and the metadata of an exported model."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tl_keras.backbones import preprocessing  # noqa: F401 (registers its layer with Keras for loading)
from tl_keras.classifier import probe_layers  # noqa: F401 (likewise)
from tl_keras.classifier.classifier import Classifier
from tl_keras.config import check_classifier_path
from tl_keras.errors import UserError
from tl_keras.run import Interrupts, disk_errors, read_json, replace_folder, write_atomically

_FORMAT = 1
_DECODING_FILE = "tl_keras.json"
_NETWORK_FILE, _DESCRIPTION_FILE, _SAMPLES_FILE = "network.keras", "classifier.json", "samples.npz"


def write_classifier(classifier: Classifier, folder: Path, *, samples: Sequence[bytes], expected: np.ndarray) -> None:
    """Writes `network.keras`, `classifier.json`, and `samples.npz`, which a later export is compared with.

    Args:
        classifier: the trained classifier.
        folder: the folder; it is created if it does not exist.
        samples: m encoded images.
        expected: their evaluated probabilities, float32 `(m, classes)`.

    Raises:
        UserError: the disk is full, or the folder can't be written.
        LostRunError: another process has continued the run.
    """
    description = {
        "format": _FORMAT,
        "name": classifier.name,
        "backbone": classifier.backbone,
        "embedding_layer": classifier.embedding_layer,
        "resize": classifier.resize,
        "image_size": classifier.image_size,
        "labels": list(classifier.labels),
    }
    images = {f"image_{number}": np.frombuffer(sample, np.uint8) for number, sample in enumerate(samples)}
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **{"expected": expected, **images})
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with disk_errors(str(folder)):
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            classifier.network.save(unfinished / _NETWORK_FILE)
            (unfinished / _SAMPLES_FILE).write_bytes(content.getvalue())
            text = json.dumps(description, indent=2, ensure_ascii=False)
            (unfinished / _DESCRIPTION_FILE).write_text(text, encoding="utf-8")
            replace_folder(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def load_trained(path: str) -> Classifier:
    """Loads the classifier of a run folder, with its Keras network.

    Raises:
        UserError: there is no classifier, or it is damaged.
    """
    root, folder = Path(path), find_folder(path)
    check_classifier_path(path)
    if is_exported(root):
        raise UserError(f"{path} is an exported model, but a run folder is needed here. Give a run folder: runs/NAME.")
    if not os.path.isfile(folder / _DESCRIPTION_FILE) or not os.path.isfile(folder / _NETWORK_FILE):
        raise UserError(
            f"{path} contains no classifier. Give the folder of a complete run, or saved_models/NAME/VERSION."
        )
    description = read_json(folder / _DESCRIPTION_FILE)
    try:
        with Interrupts.restored():
            network = keras.models.load_model(folder / _NETWORK_FILE, compile=False)
        labels = tuple(description["labels"])
        classifier = Classifier(
            network,
            description["name"],
            labels,
            description["backbone"],
            description["embedding_layer"],
            description["resize"],
        )
        _check_fit(classifier)
        return classifier
    except Exception as error:  # Keras raises the exceptions of zipfile, h5py and json
        first = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"the classifier in {path} is damaged: {type(error).__name__}: {first}. Train it again."
        ) from error


def load_samples(path: str) -> tuple[list[bytes], np.ndarray]:
    """Loads sample images of a run with their evaluated probabilities.

    Args:
        path: the run folder.

    Returns:
        m encoded images, and float32 `(m, classes)`.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = find_folder(path) / _SAMPLES_FILE
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images = [arrays[f"image_{number}"].tobytes() for number in range(len(arrays["expected"]))]
            return images, arrays["expected"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is missing or damaged: {error}. Train the classifier again.") from error


def find_folder(path: str) -> Path:
    """Finds the folder `classifier` of a run folder; the path may also be this folder."""
    root = Path(path)
    return root if os.path.isfile(root / _DESCRIPTION_FILE) else root / "classifier"


def is_exported(path: Path) -> bool:
    """Whether a folder is an exported version folder."""
    return os.path.isfile(path / "saved_model.pb")


def read_labels(path: Path) -> list[str]:
    """Reads the labels of an exported version folder.

    Raises:
        UserError: it has no labels.
    """
    try:
        return (path / "assets" / "labels.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise UserError(
            f"{path} has no assets/labels.txt, so it was not exported by tl_keras. Give a model exported by tl_keras."
        ) from error


def read_decoding(path: Path) -> dict[str, Any]:
    """Reads how an exported model resizes images, and its pixel limit, from the file of `write_decoding`.

    Models exported by earlier versions do not have this file; they crop images and have no limit.
    """
    file = path / "assets.extra" / _DECODING_FILE
    known = read_json(file) if file.is_file() else {}
    return {"resize": known.get("resize", "crop"), "max_pixels": known.get("max_pixels")}


def read_run_id(path: Path) -> str:
    """Reads the id of the run that exported a version folder, see `RunFolder.run_id`; empty if it is unknown."""
    file = path / "assets.extra" / _DECODING_FILE
    return str(read_json(file).get("run_id", "")) if file.is_file() else ""


def write_decoding(path: Path, classifier: Classifier, *, max_pixels: int | None, run_id: str = "") -> None:
    """Writes metadata of an exported model that is not in its graph, see `read_decoding` and `read_run_id`."""
    content = {"resize": classifier.resize, "image_size": classifier.image_size, "max_pixels": max_pixels}
    content |= {"run_id": run_id} if run_id else {}
    write_atomically(path / "assets.extra" / _DECODING_FILE, json.dumps(content).encode())


def _check_fit(classifier: Classifier) -> None:
    """Checks that the description matches the network.

    Raises:
        ValueError: it does not.
    """
    network = classifier.network
    network.get_layer(classifier.embedding_layer)
    if network.output_shape[1] != len(classifier.labels):
        raise ValueError(f"{len(classifier.labels)} labels for {network.output_shape[1]} outputs")
