"""Standard error while strangers' images are decoded."""

from __future__ import annotations

import os
import sys

from tl_keras.serving import stderr


def test_lines_of_decoders_are_left_out(capfd):
    with stderr.drop_decoder_lines():
        for line in (
            "Corrupt JPEG data: premature end of data segment",
            "libpng warning: bKGD: invalid",
            "Premature end of JPEG file",
            "E0000 00:00:1795804360.638864    2013 jpeg_mem.cc:331] Premature end of JPEG data.",
            "terminate called after throwing an instance of 'std::bad_alloc'",
        ):
            os.write(2, f"{line}\n".encode())
        sys.stderr.write("Python's own\n")
    os.write(2, b"afterwards\n")
    lines = capfd.readouterr().err.splitlines()
    assert sorted(lines[:2]) == ["Python's own", "terminate called after throwing an instance of 'std::bad_alloc'"]
    assert lines[2:] == ["afterwards"]


def test_other_lines_are_bounded(capfd):
    with stderr.drop_decoder_lines():
        os.write(2, b"something else\n" * 1000)
    assert capfd.readouterr().err.count("something else") == 20
