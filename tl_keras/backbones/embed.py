"""Embedding: every image through the frozen trunk once, into the store."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tl_keras.backbones.engines import Choice, PixelEngine, TensorFlowEngine, build_engine, choose_engine
from tl_keras.backbones.store import EmbeddingStore, check_space, make_folder

VIEWS = ("", "flip")  # as the image is, mirrored
BATCH_SIZE = 32  # of the trunk, whatever the batch of training
_NO_TRUNK = Choice("tensorflow", "float32", "the whole network is trained")

ImageStream = Callable[[np.ndarray], Iterator[tuple[np.ndarray, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Embedded:
    """What the trunk gave, readable by position.

    Attributes:
        store: where the embeddings are.
        digests: each image's SHA-256, `(n,)` of 32 bytes.
        broken: positions of images that could not be decoded.
        computed: how many went through the trunk now; the rest came from the store.
        seconds: what that took.
        choice: the engine that ran the trunk, and its precision.
    """

    store: EmbeddingStore
    digests: np.ndarray
    broken: list[int]
    computed: int
    seconds: float
    choice: Choice

    @property
    def name(self) -> str:
        """What tells these embeddings from those of another network, size, cut, precision or engine."""
        return self.store.path.name

    def read(self, positions: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """Reads embeddings.

        Args:
            positions: int `(b,)`.
            views: int `(b,)`, index into `VIEWS`; the first where not given.

        Returns:
            `(b, ...)`: float32, bfloat16 or, for pixels, uint8.
        """
        views = np.zeros(len(positions), np.int64) if views is None else views
        return self.store.read([_key(self.digests[p], int(v)) for p, v in zip(positions, views, strict=True)])


def embed(
    trunks: Sequence[keras.Model],
    *,
    wanted: Mapping[int, np.ndarray],
    digests: np.ndarray,
    images: ImageStream,
    address: dict[str, Any],
    engine: str,
    precision: str,
    store_dir: str,
    show: Callable[[str], None],
    show_progress: Callable[[str], None],
) -> list[Embedded]:
    """Sends through the trunk what the store does not have yet.

    Several trunks are one backbone read at several layers: an image goes through it once for all of them.

    Args:
        trunks: each images, float32 `(batch, h, w, 3)` → embeddings, all of one backbone; none keeps the pixels.
        wanted: view → positions of images, int `(m,)`.
        digests: SHA-256 of each image's bytes, `(n,)` of 32 bytes.
        images: positions → batches of (positions, uint8 images); what can't be decoded does not arrive.
        address: what determines an embedding beside trunk, image, engine and precision.
        engine: `--engine`.
        precision: `--precision`.
        store_dir: the folder of stores.
        show: shows a line.
        show_progress: shows how far it is.

    Returns:
        The embeddings, for each trunk in order. Interrupted or killed, the store keeps what was complete.

    Raises:
        UserError: the disk is or will be full, or the store can't be used.
    """
    start = time.perf_counter()
    make_folder(store_dir)
    addresses = [{**address, **_identify(trunk)} for trunk in trunks] or [{**address, "cut": "none (pixels)"}]
    trunk = _join(trunks)
    choice, runner = _choose_engine(
        trunk, wanted[0], images, engine=engine, precision=precision, store_dir=Path(store_dir), addresses=addresses
    )
    stores = [EmbeddingStore(store_dir, {**one, **choice.address()}) for one in addresses]
    missing = {view: _missing(stores, digests, positions, view) for view, positions in wanted.items()}
    total = sum(len(positions) for positions in missing.values())
    bytes_each = sum(_embedding_bytes(one, choice.precision) for one in trunks) or int(np.prod(address["image_shape"]))
    check_space(store_dir, count=total, bytes_each=bytes_each)
    show(
        f"trunk: {', '.join(one['cut'] for one in addresses)}, {choice.engine}, {choice.precision} ({choice.reason}); "
        f"{total:,} images to compute, {sum(map(len, wanted.values())) - total:,} in the store, "
        f"{total * bytes_each / 1e6:,.0f} MB to write"
    )
    done, computing_since = 0, time.perf_counter()
    for view, positions in missing.items():
        for arrived, pixels in images(positions) if len(positions) else ():
            runner = runner or build_engine(choice, trunk, batch_size=min(BATCH_SIZE, len(positions)))
            pixels = pixels[:, :, ::-1] if VIEWS[view] == "flip" else pixels
            for part in _parts(len(pixels), getattr(runner, "batch_size", BATCH_SIZE)):
                keys = [_key(digests[position], view) for position in arrived[part]]
                for store, embeddings in zip(stores, runner.run(pixels[part]), strict=True):
                    store.write(keys, _as_stored(embeddings, choice.precision))
            done += len(arrived)
            rate = done / (time.perf_counter() - computing_since)
            show_progress(
                f"trunk: {done:,}/{total:,} images, {rate:,.0f} images/s, {(total - done) / rate:,.0f} s left"
            )
    broken = sorted({
        int(positions[index])
        for view, positions in wanted.items()
        for index in stores[-1].missing([_key(digests[position], view) for position in positions])
    })
    return [Embedded(store, digests, broken, done, time.perf_counter() - start, choice) for store in stores]


def embed_tail(
    embedded: Embedded,
    tail: keras.Model,
    *,
    wanted: Mapping[int, np.ndarray],
    show_progress: Callable[[str], None],
) -> Embedded:
    """Sends stored feature maps (or pixels) through the untrained tail, so that the head can be trained first.

    Args:
        embedded: what the trunk gave.
        tail: the rest of the backbone, embeddings of the trunk → `(batch, dim)`.
        wanted: view → positions, int `(m,)`.
        show_progress: shows how far it is.

    Returns:
        The backbone's embeddings, in a store of their own.

    Raises:
        UserError: the disk is full, or the store can't be used.
    """
    start, done = time.perf_counter(), 0
    choice = Choice("tensorflow", "float32", "")
    address = {"backbone": "tail", "behind": embedded.store.path.name, **_identify(tail), **choice.address()}
    store = EmbeddingStore(str(embedded.store.path.parent), address)
    engine = None
    lacking = {view: _missing([store], embedded.digests, positions, view) for view, positions in wanted.items()}
    bytes_each = 4 * int(tail.output_shape[1])
    check_space(str(store.path.parent), count=sum(map(len, lacking.values())), bytes_each=bytes_each)
    for view, missing in lacking.items():
        for part in _parts(len(missing), BATCH_SIZE):
            maps = embedded.read(missing[part], np.full(len(missing[part]), view))
            maps = maps if maps.dtype == np.uint8 else maps.astype(np.float32)
            engine = engine or TensorFlowEngine(tail, batch_size=len(maps), precision="float32", dtype=maps.dtype)
            store.write([_key(embedded.digests[p], view) for p in missing[part]], engine.run(maps)[0])
            done += len(maps)
            show_progress(f"head first: {done:,}/{len(missing):,} embeddings")
    return dataclasses.replace(embedded, store=store, computed=done, seconds=time.perf_counter() - start)


def hash_weights(model: keras.Model) -> str:
    """SHA-256 of all of a network's weights, in order."""
    digest = hashlib.sha256()
    for variable in model.weights:
        digest.update(np.ascontiguousarray(variable.numpy()).tobytes())
    return digest.hexdigest()


def _join(trunks: Sequence[keras.Model]) -> keras.Model | None:
    """One network with an output for each trunk; None for no trunk."""
    if len(trunks) < 2:
        return next(iter(trunks), None)
    return keras.Model(trunks[0].input, [trunk.output for trunk in trunks], name=trunks[0].name)


def _identify(trunk: keras.Model) -> dict[str, Any]:
    return {
        "cut": trunk.operations[-1].name,
        "layers": len(trunk.layers),  # Keras adds one to EfficientNet with ImageNet weights
        "weights": hash_weights(trunk),
        "device": "GPU" if tf.config.list_logical_devices("GPU") else "CPU",
    }


def _choose_engine(
    trunk: keras.Model | None,
    positions: np.ndarray,
    images: ImageStream,
    *,
    engine: str,
    precision: str,
    store_dir: Path,
    addresses: list[dict[str, Any]],
) -> tuple[Choice, Any]:
    if trunk is None:
        return _NO_TRUNK, PixelEngine()
    names = [hashlib.sha256(repr(sorted(address.items())).encode()).hexdigest()[:16] for address in addresses]
    notes = [store_dir / f"{name}.engine.json" for name in names]
    sample = next((pixels for _, pixels in images(positions[:BATCH_SIZE])), None)
    if sample is None:
        return Choice("tensorflow", "float32", "no image could be decoded"), None
    return choose_engine(engine, precision, trunk, sample, count=len(positions), notes=notes)


def _missing(stores: Sequence[EmbeddingStore], digests: np.ndarray, positions: np.ndarray, view: int) -> np.ndarray:
    """Positions that one of the stores lacks, each content once."""
    keys = [_key(digests[position], view) for position in positions]
    found = sorted(set().union(*(store.missing(keys) for store in stores)))
    once = {keys[index]: int(positions[index]) for index in reversed(found)}
    return np.array(sorted(once.values()), np.int64)


def _key(digest: Any, view: int) -> bytes:
    key: bytes = digest.tobytes() + bytes([view])
    return key


def _embedding_bytes(trunk: keras.Model, precision: str) -> int:
    shape = trunk.output_shape[1:]
    return int(np.prod(shape)) * (2 if len(shape) > 1 and precision == "bfloat16" else 4)


def _as_stored(embeddings: np.ndarray, precision: str) -> np.ndarray:
    """Feature maps that were computed in bfloat16 are kept so: half the disk; vectors and pixels as they are."""
    if embeddings.ndim > 2 and embeddings.dtype == np.float32 and precision == "bfloat16":
        bfloat16: np.ndarray = embeddings.astype(tf.bfloat16.as_numpy_dtype)
        return bfloat16
    return embeddings


def _parts(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)
