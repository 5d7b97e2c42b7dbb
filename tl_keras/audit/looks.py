"""Properties of images' pixels for the search for duplicates, computed once for each image content and then cached."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import PIL
import scipy
from PIL import features

from tl_keras.audit.duplicates import Look
from tl_keras.audit.files import look_at
from tl_keras.audit.hashes import BITS, THUMB, VIEWS
from tl_keras.backbones.store import EmbeddingStore
from tl_keras.errors import UserError
from tl_keras.run import map_ahead

ContentStream = Callable[[np.ndarray], Iterator[tuple[int, bytes]]]
_VERSION = 1  # part of the address: increment it if `look_at` gives other values
_AHEAD, _BATCH = 32, 256
_HASHES = (VIEWS, BITS)
_DIGEST_BYTES, _HASH_BYTES = 32, -(-_HASHES[0] * _HASHES[1] // 8)


def find_looks(
    wanted: np.ndarray, *, digests: Sequence[bytes], read: ContentStream, store_dir: str | None
) -> dict[int, Look]:
    """Finds the properties of images' pixels: from the cache, or computed.

    Args:
        wanted: rows of the images, int64 `(m,)`.
        digests: SHA-256 of the bytes of each image.
        read: rows → pairs of row and encoded bytes.
        store_dir: folder of the embedding stores, where the cache is; None: no cache.

    Returns:
        Row → properties, without images that Pillow can't decode.
    """
    cache = _Cache(store_dir)
    looks = cache.read({int(row): digests[row] for row in wanted})
    missing = wanted[[int(row) not in looks for row in wanted]] if len(wanted) else wanted
    fresh = map_ahead(_look, read(missing), threads=os.cpu_count(), ahead=_AHEAD) if len(missing) else ()
    try:
        for row, (digest, look) in fresh:
            if look is not None:
                looks[row] = look
                if digest == digests[row]:  # otherwise the file was replaced in the meantime
                    cache.write(digest, look)
    finally:
        cache.flush()
    return looks


def _look(content: bytes) -> tuple[bytes, Look | None]:
    return hashlib.sha256(content).digest(), look_at(content)


class _Cache:
    """A store of properties, by content; where it can't be read or written, they are computed each time."""

    def __init__(self, store_dir: str | None) -> None:
        self._store: EmbeddingStore | None = None
        self._keys, self._rows = list[bytes](), list[np.ndarray]()
        codecs = {"turbo": features.version_feature("libjpeg_turbo")}
        codecs |= {name: features.version(name) for name in ("jpg", "zlib", "webp")}
        versions = {"pillow": PIL.__version__, "numpy": np.__version__, "scipy": scipy.__version__}
        address = {"backbone": "audit", "version": _VERSION, "sizes": [THUMB, VIEWS, BITS], **versions}
        if store_dir:
            try:
                self._store = EmbeddingStore(store_dir, {**address, **codecs})
            except UserError:
                self._store = None

    def read(self, wanted: dict[int, bytes]) -> dict[int, Look]:
        """Reads the properties that the store has: row → digest of the bytes gives row → properties."""
        if self._store is None or not wanted:
            return {}
        rows, keys = list(wanted), list(wanted.values())
        try:
            missing = set(self._store.missing(keys))
            known = [position for position in range(len(keys)) if position not in missing]
            looks = dict[int, Look]()
            for start in range(0, len(known), _BATCH):
                part = known[start : start + _BATCH]
                packed = self._store.read([keys[position] for position in part], keeps=False)
                looks |= {rows[position]: _unpack(one) for position, one in zip(part, packed, strict=True)}
            return looks
        except UserError:
            self._store = None
            return {}

    def write(self, digest: bytes, look: Look) -> None:
        """Adds the properties of an image."""
        self._keys.append(digest)
        self._rows.append(_pack(look))
        if len(self._keys) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        """Writes what was added."""
        if self._store is not None and self._keys:
            try:
                self._store.write(self._keys, np.stack(self._rows))
            except UserError:  # a full disk does not cost the audit
                self._store = None
        self._keys, self._rows = [], []


def _pack(look: Look) -> np.ndarray:
    """The properties as bytes, uint8 `(n,)`: digest, hashes, blank, thumbnail."""
    parts = (
        np.frombuffer(look.digest, np.uint8),
        np.packbits(look.hashes),
        np.array([look.blank], np.uint8),
        look.thumb.ravel(),
    )
    return np.concatenate(parts)


def _unpack(packed: np.ndarray) -> Look:
    digest, hashes, blank, thumb = np.split(packed.copy(), np.cumsum((_DIGEST_BYTES, _HASH_BYTES, 1)))
    bits = np.unpackbits(hashes, count=_HASHES[0] * _HASHES[1]).reshape(_HASHES).astype(bool)
    return Look(digest.tobytes(), bits, thumb.reshape(THUMB, THUMB), bool(blank[0]))
