"""Classification data sets of TensorFlow Datasets (TFDS), by name."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from tl_keras.config import nearest
from tl_keras.data.splits import SPLIT_NAMES, UNUSED
from tl_keras.errors import UserError
from tl_keras.run import Interrupts

_REACH_SECONDS = 10.0
_SPLIT_NAMES = {**SPLIT_NAMES, "dev": 1}


def load(name: str, *, data_dir: str | None) -> dict[str, Any]:
    """Loads a data set; downloads and prepares it if necessary.

    Args:
        name: `name` or `name/config:version`.
        data_dir: data directory of TFDS.

    Returns:
        The fields of a `Source`.

    Raises:
        UserError: TFDS can't be imported, the data set does not exist or can't be downloaded, or it is not a
            classification data set.
    """
    tfds = import_tfds()
    builder = _build(tfds, name, data_dir)
    image_key, label_key = _keys(builder, name)
    _prepare(tfds, builder)
    splits = [split for split in builder.info.splits if split in _SPLIT_NAMES]
    if "train" not in splits:
        found = ", ".join(builder.info.splits) or "none"
        raise UserError(f"the TFDS data set {name} has no train split (it has: {found}). Choose another.")
    names = list(builder.info.features[label_key].names)
    order = sorted(range(len(names)), key=lambda number: names[number])  # classes are sorted by name, as in all sources
    renumber = np.empty(len(names), np.int32)
    renumber[order] = np.arange(len(names), dtype=np.int32)
    ids, labels, given = _scan(tfds, builder, splits, label_key)
    return {
        "name": builder.info.name,
        "ids": ids,
        "labels": renumber[labels],
        "class_names": tuple(names[number] for number in order),
        "splits": given,
        "read": _Reader(tfds, builder, splits, image_key, label_key),
        "notes": (f"TensorFlow Datasets {builder.info.full_name}",),
    }


def import_tfds() -> Any:
    """Imports TFDS, which fails on some machines.

    Raises:
        UserError: it can't be imported; the message has the cause.
    """
    try:
        import tensorflow_datasets as tfds

        tfds.core.DatasetBuilder  # noqa: B018 (TFDS imports lazily: a broken protobuf shows only now)
    except Exception as error:  # its imports raise exceptions of many types
        raise UserError(
            f"TensorFlow Datasets can't be imported: {type(error).__name__}: {error}. Try: pip install --upgrade "
            "tensorflow-datasets protobuf importlib_resources. folder:PATH and csv:PATH work without it."
        ) from error
    return tfds


class _Reader:
    """Reads encoded images in the order in which TFDS stores them."""

    def __init__(self, tfds: Any, builder: Any, splits: list[str], image_key: str, label_key: str) -> None:
        self._load: Callable[[], Iterator[tuple[str, Any]]] = lambda: _iterate(
            tfds, builder, splits, {image_key, label_key}, {image_key}
        )
        self._image_key = image_key

    def __call__(self, positions: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        wanted = {int(position) for position in positions}
        if not wanted:
            return
        last = max(wanted)
        for position, (_, example) in enumerate(self._load()):
            if position in wanted:
                yield position, example[self._image_key]
            if position == last:
                return


def _build(tfds: Any, name: str, data_dir: str | None) -> Any:
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        other = "See https://www.tensorflow.org/datasets/catalog, or give folder:PATH, csv:PATH or digits."
        raise UserError(
            f"--dataset={name} is not a TFDS data set. {nearest(name.split('/')[0], known)}{_own(name) or other}"
        ) from error
    except (ValueError, AssertionError, OSError, ImportError) as error:
        advice = _own(name) or "Check its name."
        raise UserError(f"--dataset={name}: TFDS can't load it: {_first_line(error)}. {advice}") from error


def _own(name: str) -> str:
    """Advice if a path was given as a name."""
    kind = "folder" if os.path.isdir(name) else "csv"
    return f"For your own data: --dataset={kind}:{name}." if os.path.exists(name) else ""


def _keys(builder: Any, name: str) -> tuple[str, str]:
    keys = builder.info.supervised_keys
    features = builder.info.features
    if keys is None and "image" in features and "label" in features:
        keys = ("image", "label")  # data sets with bounding boxes, such as stanford_dogs, have no supervised keys
    if keys is None and "image" in features:
        labels = [one for one in features if type(features[one]).__name__ == "ClassLabel"]
        keys = ("image", labels[0]) if len(labels) == 1 else None
    if keys is None or len(keys) != 2 or keys[1] not in features or not hasattr(features[keys[1]], "names"):
        raise UserError(
            f"--dataset={name} is not a classification data set: it has no image with a single label (its features are "
            f"{', '.join(features)}). Choose another."
        )
    if type(features[keys[0]]).__name__ != "Image":
        kind = type(features[keys[0]]).__name__
        raise UserError(f"--dataset={name} is not an image data set: its input is {kind}. Choose another.")
    return keys[0], keys[1]


def _prepare(tfds: Any, builder: Any) -> None:
    if builder.data_path.exists():
        return
    manual = os.path.join(os.path.expanduser(str(builder._data_dir_root)), "downloads", "manual")
    missing = {
        url: info.filename
        for url, info in (builder.url_infos or {}).items()  # None if a builder downloads nothing
        if not os.path.exists(os.path.join(manual, info.filename))
    }
    _check_reachable(builder.info.name, missing, manual)
    config = tfds.download.DownloadConfig(manual_dir=manual if os.path.isdir(manual) else None)
    try:
        with Interrupts.restored():
            builder.download_and_prepare(download_config=config)
    except Exception as error:  # TFDS raises the exceptions of every library it uses
        raise UserError(
            f"TFDS could not prepare {builder.info.name}: {type(error).__name__}: {_first_line(error)}. "
            f"{_advice(missing, manual)}"
        ) from error


def _check_reachable(name: str, urls: dict[str, str], manual: str) -> None:
    """Checks that the server of the first missing file answers: TFDS itself retries for over three minutes."""
    for url in list(urls)[:1]:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_REACH_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # the server answers; TFDS handles the error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise UserError(
                f"{name} can't be downloaded: {url} can't be reached ({reason}). {_advice(urls, manual)}"
            ) from error


def _advice(urls: dict[str, str], manual: str) -> str:
    if not urls:
        return "Check the network, or use a --data_dir that has the data set."
    return (
        f"Download {', '.join(urls)} on another machine, put the files into {manual} and run again; or use a "
        "--data_dir that has the data set."
    )


def _iterate(
    tfds: Any, builder: Any, splits: list[str], fields: set[str], encoded: set[str]
) -> Iterator[tuple[str, Any]]:
    """Yields examples in stored order with the requested fields; images are encoded bytes."""
    read_config = tfds.ReadConfig(interleave_cycle_length=1, add_tfds_id=True, try_autocache=False)
    decoders = tfds.decode.PartialDecoding(
        dict.fromkeys(fields, True), decoders={key: tfds.decode.SkipDecoding() for key in encoded}
    )
    for split in splits:
        data = builder.as_dataset(split=split, shuffle_files=False, decoders=decoders, read_config=read_config)
        for example in data.as_numpy_iterator():
            yield split, example


def _scan(tfds: Any, builder: Any, splits: list[str], label_key: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    ids: list[str] = []
    labels: Any = []
    given: Any = []
    for split, example in _iterate(tfds, builder, splits, {label_key}, set()):
        ids.append(example["tfds_id"].decode())
        labels.append(int(example[label_key]))
        given.append(_SPLIT_NAMES[split])
    labels, given = np.array(labels, np.int32), np.array(given, np.int8)
    given[labels < 0] = UNUSED  # secret test labels are -1
    return ids, labels, given


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
