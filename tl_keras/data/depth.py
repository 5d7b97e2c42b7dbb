"""Check of 16-bit images: the upper 8 bits are used, so images with only 8, 10 or 12 significant bits look black."""

from __future__ import annotations

import tensorflow as tf

_PNG = b"\x89PNG\r\n\x1a\n"
_LOOKED_AT = 100  # images; enough to see how a data set was made
_DARK = 32  # upper byte: an eighth of the range
_PIXELS_AT_MOST = 50_000_000


class DepthCheck:
    """Counts images that look nearly black to the network, because they use few of their 16 bits."""

    def __init__(self) -> None:
        """Starts with no images."""
        self._seen, self._dark = 0, 0

    def look(self, content: bytes) -> None:
        """Inspects an encoded image; only 16-bit PNG files are decoded."""
        if content[:8] != _PNG or content[24:25] != b"\x10" or self._seen >= _LOOKED_AT:
            return
        if int.from_bytes(content[16:20], "big") * int.from_bytes(content[20:24], "big") > _PIXELS_AT_MOST:
            return
        try:
            values = tf.io.decode_png(content, dtype=tf.uint16).numpy()
        except tf.errors.OpError:  # reported when it is decoded for training
            return
        self._seen += 1
        self._dark += 0 < int(values.max()) < _DARK << 8

    def notes(self) -> list[str]:
        """The warning, if any."""
        if not self._dark:
            return []
        return [
            f"warning: {self._dark:,} of {self._seen:,} inspected images with 16 bits per channel use less than an "
            "eighth of the range. Only the upper 8 bits are used, so these images look nearly black: rescale them, or "
            "convert them to 8 bits"
        ]
