"""Filters standard error while the server decodes images."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import sys
import threading
import time
from collections.abc import Iterator

# libjpeg (jerror.h), libpng and TensorFlow write a line for each broken image
_OF_DECODERS = re.compile(
    rb"[IWE]\d{4} .*\b(jpeg|png|gif|webp|bmp|decode_image)\w*\.cc:|libpng |Corrupt JPEG|Premature end of|Bogus "
    rb"|Invalid (JPEG|SOS|component|progress|crop|memory|scan)|Unsupported |Input file read error|Empty (input|JPEG)"
    rb"|Not a JPEG|Warning: |Unknown Adobe|Inconsistent progression|Huffman |Quantization |Arithmetic |Missing Huffman"
    rb"|Sampling factors|Too many color|CCIR601|Fractional sampling|Maximum |Data precision|Suspension |Caution: "
    rb"|IDCT |DCT |Application transferred|Read (past|failed)|Insufficient memory"
)
_MOST_LINES, _SECONDS = 20, 60.0  # rate limit for other lines


@contextlib.contextmanager
def drop_decoder_lines() -> Iterator[None]:
    """Drops the lines that image decoders write to standard error, and limits the rate of other native lines.

    Otherwise any client could fill the log. Python's own messages bypass the filter.
    """
    sys.stderr.flush()
    saved, earlier = os.dup(2), sys.stderr
    reading, writing = os.pipe()
    forwarding = threading.Thread(target=_forward, args=(reading, saved), name="stderr", daemon=True)
    forwarding.start()
    with os.fdopen(os.dup(saved), "w", buffering=1) as own:
        os.dup2(writing, 2)
        os.close(writing)
        sys.stderr = own
        reports_crashes = faulthandler.is_enabled()
        if not reports_crashes:
            faulthandler.enable(own)  # crash reports bypass the filter, too
        try:
            yield
        finally:
            if not reports_crashes:
                faulthandler.disable()
            sys.stderr = earlier
            os.dup2(saved, 2)  # closes the pipe, which ends the thread
            forwarding.join(_SECONDS)
            os.close(saved)


def _forward(reading: int, saved: int) -> None:
    lines, left, until = 0, _MOST_LINES, time.monotonic() + _SECONDS
    with os.fdopen(reading, "rb") as pipe:
        for line in pipe:
            if _OF_DECODERS.match(line) or not line.strip():
                continue
            if time.monotonic() > until:
                left, until = _MOST_LINES, time.monotonic() + _SECONDS
                if lines:
                    os.write(saved, b"(%d more lines like these were left out)\n" % lines)
                    lines = 0
            if left:
                left -= 1
                os.write(saved, line)
            else:
                lines += 1
