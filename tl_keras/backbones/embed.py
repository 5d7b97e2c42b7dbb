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

VIEWS = ("", "flip")  # as the image is, mirrored
_ROUGH = ("bfloat16", "float16")
_READ_BATCH = 4096
_NO_TRUNK = EngineChoice("tensorflow", "float32", "the whole network is trained")

ReadEmbeddings = Callable[[np.ndarray], np.ndarray]  # positions, int `(m,)` → float32 `(m, dim)`
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
        exact: positions whose embeddings are float32 although the others are not, bool `(n,)`; None: there are none.
        exact_store: where those are.
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
        """The precision of the embeddings that figures are measured on."""
        return self.choice.precision if self.exact is None else "float32"

    @property
    def name(self) -> str:
        """What tells these embeddings from those of another network, size, cut, precision or engine."""
        names = [store.path.name for store in (self.store, self.exact_store) if store]
        return " ".join(names)

    def read(self, positions: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """Reads embeddings.

        Args:
            positions: int `(b,)`.
            views: int `(b,)`, index into `VIEWS`; the first where not given.

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
        exact: positions of images that are evaluated, int `(m,)`: in float32 whatever the precision of the others, so
            that what is measured is what is served.

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
    layers = ", ".join(one["cut"] for one in addresses)
    mixed = "; val and test in float32" if precise else ""
    show(
        f"embeddings of {layers}: {total:,} images to compute, {cached:,} cached, {megabytes:,.0f} MB to write; engine "
        f"{choice.engine}, {choice.precision} ({choice.reason}{mixed})"
    )
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
    """What one engine computes at one precision.

    Attributes:
        choice: the engine.
        stores: one for each trunk.
        missing: view → positions that a store lacks, int `(m,)`.
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
        """Images to compute."""
        return sum(map(len, self.missing.values()))

    def run(self, runner: Any, view: int, positions: np.ndarray, pixels: np.ndarray) -> None:
        """Embeds a batch of images, uint8 `(b, h, w, 3)`, and keeps the embeddings.

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
        """Positions that did not arrive, because they can't be decoded."""
        return {
            int(positions[index])
            for view, positions in self._wanted.items()
            for index in self.stores[-1].missing([_key(self._digests[position], view) for position in positions])
        }


def _divide(
    wanted: Mapping[int, np.ndarray], exact: np.ndarray | None
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Images that may be computed in a lower precision, and images in float32, of which there may be none."""
    if exact is None or not len(exact):
        return dict(wanted), {}
    rough = {view: np.setdiff1d(positions, exact) for view, positions in wanted.items()}
    precise = {view: np.intersect1d(positions, exact) for view, positions in wanted.items()}
    return rough, precise


def _take_runner(runner: Any, choice: EngineChoice, trunk: keras.Model | None) -> Any:
    """The engine at the precision of `choice`; it is built once, always for the same batch: its bits depend on that."""
    if runner is None:
        return build_engine(choice, trunk, batch_size=BATCH_SIZE)
    if getattr(runner, "precision", choice.precision) != choice.precision:
        return runner.at(choice.precision)
    return runner


def _check_finite(embeddings: np.ndarray, precision: str) -> None:
    if embeddings.dtype.kind == "f" and not np.isfinite(embeddings).all():
        advice = "Check that --weights fit the network" if precision == "float32" else "Use --precision=float32"
        raise UserError(
            f"the backbone gave NaN or infinity for an image, in {precision}. Nothing of that batch is kept. {advice}."
        )


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
) -> tuple[EngineChoice, Any]:
    if trunk is None:
        return _NO_TRUNK, PixelEngine()
    names = [hashlib.sha256(repr(sorted(address.items())).encode()).hexdigest()[:16] for address in addresses]
    notes = [store_dir / f"{name}.engine.json" for name in names]
    sample = next((pixels for _, pixels in images(positions[:BATCH_SIZE])), None)
    if sample is None:
        return EngineChoice("tensorflow", "float32", "no image could be decoded"), None
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
