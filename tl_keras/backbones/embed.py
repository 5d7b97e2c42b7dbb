"""Embedding: computes the outputs of the frozen trunk once for every image, and stores them."""

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

from tl_keras.backbones.engines import (
    BATCH_SIZE,
    EngineChoice,
    PixelEngine,
    TensorFlowEngine,
    build_engine,
    choose_engine,
)
from tl_keras.backbones.store import EmbeddingStore, check_space, make_folder
from tl_keras.errors import UserError
from tl_keras.run import count_of

VIEWS = ("", "flip")  # original, mirrored
_ROUGH = ("bfloat16", "float16")
_READ_BATCH = 4096
_NO_TRUNK = EngineChoice("tensorflow", "float32", "the whole network is trained")

ReadEmbeddings = Callable[[np.ndarray], np.ndarray]  # positions, int `(m,)` → float32 `(m, dim)`
ImageStream = Callable[[np.ndarray], Iterator[tuple[np.ndarray, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Embeddings of a trunk, readable by position.

    Attributes:
        store: the store of the embeddings.
        digests: SHA-256 of each image, `(n,)` of 32 bytes.
        broken: positions of images that could not be decoded.
        computed: number of images that were computed; the others were in the store.
        seconds: time of the computation.
        choice: engine and precision of the trunk.
        exact: images with float32 embeddings although others have a lower precision, bool `(n,)`; None if there are
            none.
        exact_store: the store of these.
    """

    store: EmbeddingStore
    digests: np.ndarray
    broken: list[int]
    computed: int
    seconds: float
    choice: EngineChoice
    exact: np.ndarray | None = None
    exact_store: EmbeddingStore | None = None

    @property
    def evaluated_precision(self) -> str:
        """The precision of the embeddings that metrics are measured on."""
        return self.choice.precision if self.exact is None else "float32"

    @property
    def name(self) -> str:
        """A name that identifies network, image size, cut, precision and engine of the embeddings."""
        names = [store.path.name for store in (self.store, self.exact_store) if store]
        return " ".join(names)

    def read(self, positions: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """Reads embeddings.

        Args:
            positions: int `(b,)`.
            views: int `(b,)`, index into `VIEWS`; None for the first.

        Returns:
            `(b, ...)`: float32, bfloat16 or, for pixels, uint8.
        """
        views = np.zeros(len(positions), np.int64) if views is None else views
        keys = [_key(self.digests[p], int(v)) for p, v in zip(positions, views, strict=True)]
        if self.exact is None or self.exact_store is None:
            return self.store.read(keys)
        exact = self.exact[positions]
        if exact.all() or not exact.any():
            return (self.exact_store if exact.all() else self.store).read(keys)
        parts = [
            store.read([key for key, one in zip(keys, own, strict=True) if one]).astype(np.float32)
            for store, own in ((self.store, ~exact), (self.exact_store, exact))
        ]
        mixed = np.empty((len(keys), *parts[0].shape[1:]), np.float32)
        mixed[~exact], mixed[exact] = parts
        return mixed

    def read_float32(self, positions: np.ndarray) -> np.ndarray:
        """Reads the embeddings of any number of images.

        Args:
            positions: int `(m,)`.

        Returns:
            float32 `(m, dim)`.
        """
        parts = [positions[start : start + _READ_BATCH] for start in range(0, len(positions), _READ_BATCH)]
        return np.concatenate([self.read(part).astype(np.float32) for part in parts])


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
    exact: np.ndarray | None = None,
) -> list[Embedded]:
    """Computes the embeddings that are not in the store yet.

    Several trunks are one backbone read at several layers; they share one forward pass per image.

    Args:
        trunks: images, float32 `(batch, h, w, 3)` → embeddings, all of one backbone; empty to store pixels.
        wanted: view → positions of images, int `(m,)`.
        digests: SHA-256 of each image's bytes, `(n,)` of 32 bytes.
        images: positions → batches of (positions, uint8 images), without images that can't be decoded.
        address: everything else that determines an embedding, besides trunk, image, engine and precision.
        engine: value of `--engine`.
        precision: value of `--precision`.
        store_dir: folder of the stores.
        show: shows a line.
        show_progress: called with the progress as text.
        exact: positions of evaluated images, int `(m,)`; they are computed in float32 regardless of the precision of
            the others, so that the metrics hold for the served model.

    Returns:
        The embeddings of each trunk. If it is interrupted or killed, the store keeps all complete batches.

    Raises:
        UserError: the disk is full or will be, or the store can't be used.
    """
    start = time.perf_counter()
    make_folder(store_dir)
    addresses = [{**address, **_identify(trunk)} for trunk in trunks] or [{**address, "cut": "none (pixels)"}]
    trunk = _join(trunks)
    choice, runner = _choose_engine(
        trunk, wanted[0], images, engine=engine, precision=precision, store_dir=Path(store_dir), addresses=addresses
    )
    rough, precise = _divide(wanted, exact if choice.precision in _ROUGH else None)
    passes = [_Pass(choice, rough, addresses, store_dir, digests)]
    if precise:
        passes.append(_Pass(dataclasses.replace(choice, precision="float32"), precise, addresses, store_dir, digests))
    total = sum(one.count for one in passes)
    sizes = [sum(_embedding_bytes(trunk, one.choice.precision) for trunk in trunks) for one in passes]
    sizes = sizes if trunks else [int(np.prod(address["image_shape"]))]
    check_space(store_dir, needs=[(one.count, size) for one, size in zip(passes, sizes, strict=True)])
    cached = sum(map(len, wanted.values())) - total
    megabytes = sum(one.count * size for one, size in zip(passes, sizes, strict=True)) / 1e6
    counts = f"{cached:,} cached, {megabytes:,.0f} MB to write"
    if trunks:
        layers, mixed = ", ".join(one["cut"] for one in addresses), "; val and test in float32" if precise else ""
        reason = f"engine {choice.engine}, {choice.precision} ({choice.reason}{mixed})"
        show(f"embeddings of {layers}: {count_of(total, 'image')} to compute, {counts}; {reason}")
    else:
        show(f"pixels: {count_of(total, 'image')} to decode, {counts}")
    done, computing_since = 0, time.perf_counter()
    for one in passes:
        for view, positions in one.missing.items():
            for arrived, pixels in images(positions) if len(positions) else ():
                runner = _take_runner(runner, one.choice, trunk)
                one.run(runner, view, arrived, pixels)
                done += len(arrived)
                rate = done / (time.perf_counter() - computing_since)
                show_progress(
                    f"trunk: {done:,}/{total:,} images, {rate:,.0f} images/s, {(total - done) / rate:,.0f} s left"
                )
    broken = sorted(set().union(*(one.find_missing() for one in passes)))
    seconds = time.perf_counter() - start
    found = [Embedded(store, digests, broken, done, seconds, choice) for store in passes[0].stores]
    if not precise:
        return found
    is_exact = np.zeros(len(digests), bool)
    is_exact[exact] = True
    return [
        dataclasses.replace(one, exact=is_exact, exact_store=store)
        for one, store in zip(found, passes[1].stores, strict=True)
    ]


class _Pass:
    """The images that one engine computes at one precision.

    Attributes:
        choice: engine and precision.
        stores: one store for each trunk.
        missing: view → positions that are not in a store, int `(m,)`.
    """

    def __init__(
        self,
        choice: EngineChoice,
        wanted: Mapping[int, np.ndarray],
        addresses: Sequence[dict[str, Any]],
        store_dir: str,
        digests: np.ndarray,
    ) -> None:
        self.choice, self._wanted, self._digests = choice, wanted, digests
        self.stores = [EmbeddingStore(store_dir, {**one, **choice.address()}) for one in addresses]
        self.missing = {view: _missing(self.stores, digests, positions, view) for view, positions in wanted.items()}

    @property
    def count(self) -> int:
        """Number of images to compute."""
        return sum(map(len, self.missing.values()))

    def run(self, runner: Any, view: int, positions: np.ndarray, pixels: np.ndarray) -> None:
        """Embeds a batch of images, uint8 `(b, h, w, 3)`, and stores the embeddings.

        Raises:
            UserError: an embedding is NaN or infinite, or the disk is full.
        """
        pixels = pixels[:, :, ::-1] if VIEWS[view] == "flip" else pixels
        for part in _parts(len(pixels), getattr(runner, "batch_size", BATCH_SIZE)):
            keys = [_key(self._digests[position], view) for position in positions[part]]
            for store, embeddings in zip(self.stores, runner.run(pixels[part]), strict=True):
                _check_finite(embeddings, self.choice.precision)
                store.write(keys, _as_stored(embeddings, self.choice.precision))

    def find_missing(self) -> set[int]:
        """Finds positions that were not computed, because the images can't be decoded."""
        return {
            int(positions[index])
            for view, positions in self._wanted.items()
            for index in self.stores[-1].missing([_key(self._digests[position], view) for position in positions])
        }


def _divide(
    wanted: Mapping[int, np.ndarray], exact: np.ndarray | None
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Divides images into those that may have a lower precision, and those that need float32."""
    if exact is None or not len(exact):
        return dict(wanted), {}
    rough = {view: np.setdiff1d(positions, exact) for view, positions in wanted.items()}
    precise = {view: np.intersect1d(positions, exact) for view, positions in wanted.items()}
    return rough, precise


def _take_runner(runner: Any, choice: EngineChoice, trunk: keras.Model | None) -> Any:
    """Returns the engine at the precision of `choice`; always with the same batch size, which affects the results."""
    if runner is None:
        return build_engine(choice, trunk, batch_size=BATCH_SIZE)
    if getattr(runner, "precision", choice.precision) != choice.precision:
        return runner.at(choice.precision)
    return runner


def _check_finite(embeddings: np.ndarray, precision: str) -> None:
    if embeddings.dtype.kind == "f" and not np.isfinite(embeddings).all():
        advice = "Check that --weights fit the network" if precision == "float32" else "Use --precision=float32"
        raise UserError(
            f"the backbone computed NaN or infinity for an image, in {precision}. The batch is not stored. {advice}."
        )


def embed_tail(
    embedded: Embedded,
    tail: keras.Model,
    *,
    wanted: Mapping[int, np.ndarray],
    show_progress: Callable[[str], None],
) -> Embedded:
    """Computes the outputs of the pretrained tail from stored feature maps or pixels, to train the head first.

    Args:
        embedded: embeddings of the trunk.
        tail: the rest of the backbone, embeddings of the trunk → `(batch, dim)`.
        wanted: view → positions, int `(m,)`.
        show_progress: called with the progress as text.

    Returns:
        Embeddings of the backbone, in a separate store.

    Raises:
        UserError: the disk is full, or the store can't be used.
    """
    start, done = time.perf_counter(), 0
    choice = EngineChoice("tensorflow", "float32", "")
    address = {"backbone": "tail", "behind": embedded.name, **_identify(tail), **choice.address()}
    store = EmbeddingStore(str(embedded.store.path.parent), address)
    engine = None
    lacking = {view: _missing([store], embedded.digests, positions, view) for view, positions in wanted.items()}
    bytes_each = 4 * int(tail.output_shape[1])
    check_space(str(store.path.parent), needs=[(sum(map(len, lacking.values())), bytes_each)])
    for view, missing in lacking.items():
        for part in _parts(len(missing), BATCH_SIZE):
            maps = embedded.read(missing[part], np.full(len(missing[part]), view))
            maps = maps if maps.dtype == np.uint8 else maps.astype(np.float32)
            engine = engine or TensorFlowEngine(tail, batch_size=BATCH_SIZE, precision="float32", dtype=maps.dtype)
            (vectors,) = engine.run(maps)
            _check_finite(vectors, "float32")
            store.write([_key(embedded.digests[p], view) for p in missing[part]], vectors)
            done += len(maps)
            show_progress(f"head first: {done:,}/{len(missing):,} embeddings")
    seconds = time.perf_counter() - start
    return dataclasses.replace(embedded, store=store, computed=done, seconds=seconds, exact=None, exact_store=None)


def hash_weights(model: keras.Model) -> str:
    """SHA-256 of all weights of a network, in order."""
    digest = hashlib.sha256()
    for variable in model.weights:
        digest.update(np.ascontiguousarray(variable.numpy()).tobytes())
    return digest.hexdigest()


def _join(trunks: Sequence[keras.Model]) -> keras.Model | None:
    """Joins trunks into one network with several outputs; None without trunks."""
    if len(trunks) < 2:
        return next(iter(trunks), None)
    return keras.Model(trunks[0].input, [trunk.output for trunk in trunks], name=trunks[0].name)


def _identify(trunk: keras.Model) -> dict[str, Any]:
    return {
        "cut": trunk.operations[-1].name,
        "layers": len(trunk.layers),  # Keras adds a layer to EfficientNet with ImageNet weights
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
) -> tuple[EngineChoice, Any]:
    if trunk is None:
        return _NO_TRUNK, PixelEngine()
    names = [hashlib.sha256(repr(sorted(address.items())).encode()).hexdigest()[:16] for address in addresses]
    notes = [store_dir / f"{name}.engine.json" for name in names]

    def read_sample() -> np.ndarray | None:
        return next((pixels for _, pixels in images(positions[:BATCH_SIZE])), None)

    return choose_engine(engine, precision, trunk, read_sample, count=len(positions), notes=notes)


def _missing(stores: Sequence[EmbeddingStore], digests: np.ndarray, positions: np.ndarray, view: int) -> np.ndarray:
    """Finds positions that are missing in one of the stores, each content once."""
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
    """Converts feature maps that were computed in bfloat16 to bfloat16, for half the disk space."""
    if embeddings.ndim > 2 and embeddings.dtype == np.float32 and precision == "bfloat16":
        bfloat16: np.ndarray = embeddings.astype(tf.bfloat16.as_numpy_dtype)
        return bfloat16
    return embeddings


def _parts(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)
