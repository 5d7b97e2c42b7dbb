"""Images of 16 bits a channel, of which the network sees the upper 8."""

from __future__ import annotations

import tensorflow as tf

_PNG = b"\x89PNG\r\n\x1a\n"
_LOOKED_AT = 100  # enough to tell how a data set was made
_LEVELS = 2  # of the upper 8 bits: fewer than this are one blank image


class DepthCheck:
    """Counts images that are blank to the network, because only the lower 8 of their 16 bits vary."""

    def __init__(self) -> None:
        """Starts without an image."""
        self._seen, self._blank = 0, 0

    def look(self, content: bytes) -> None:
        """Takes note of an encoded image; other than PNG of 16 bits cost nothing."""
        if content[:8] != _PNG or content[24:25] != b"\x10" or self._seen >= _LOOKED_AT:
            return
        try:
            values = tf.io.decode_png(content, dtype=tf.uint16).numpy()
        except tf.errors.OpError:  # whoever decodes it later says so
            return
        upper, lower = values >> 8, values & 0xFF
        self._seen += 1
        self._blank += int(upper.max() - upper.min()) < _LEVELS <= int(lower.max() - lower.min())

    def notes(self) -> list[str]:
        """A warning, if there is reason for one."""
        if not self._blank:
            return []
        return [
            f"warning: {self._blank:,} of {self._seen:,} images with 16 bits a channel that were looked at vary in the "
            "lower 8 bits only. The upper 8 are used, so that these images are blank: convert them to 8 bits"
        ]
