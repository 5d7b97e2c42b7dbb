"""Images of 16 bits a channel, of which the network sees the upper 8: 8, 10 or 12 bits stored there look black."""

from __future__ import annotations

import tensorflow as tf

_PNG = b"\x89PNG\r\n\x1a\n"
_LOOKED_AT = 100  # enough to tell how a data set was made
_DARK = 32  # an upper byte below this throughout: an eighth of the range
_PIXELS_AT_MOST = 50_000_000


class DepthCheck:
    """Counts images that are black or nearly so to the network, because they use few of their 16 bits."""

    def __init__(self) -> None:
        """Starts without an image."""
        self._seen, self._dark = 0, 0

    def look(self, content: bytes) -> None:
        """Takes note of an encoded image; other than PNG of 16 bits cost nothing."""
        if content[:8] != _PNG or content[24:25] != b"\x10" or self._seen >= _LOOKED_AT:
            return
        if int.from_bytes(content[16:20], "big") * int.from_bytes(content[20:24], "big") > _PIXELS_AT_MOST:
            return
        try:
            values = tf.io.decode_png(content, dtype=tf.uint16).numpy()
        except tf.errors.OpError:  # whoever decodes it later says so
            return
        self._seen += 1
        self._dark += 0 < int(values.max()) < _DARK << 8

    def notes(self) -> list[str]:
        """A warning, if there is reason for one."""
        if not self._dark:
            return []
        return [
            f"warning: {self._dark:,} of {self._seen:,} images with 16 bits a channel that were looked at use less "
            "than an eighth of the range. The upper 8 bits are kept, so that these images are black or nearly so: "
            "rescale them, or convert them to 8 bits"
        ]
