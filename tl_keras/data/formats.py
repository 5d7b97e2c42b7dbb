"""Detection of file formats by content."""

from __future__ import annotations

_CONVERT = "convert it, for example with ImageMagick: magick IN OUT.jpg"
_READABLE = {"jpeg", "png", "gif", "bmp", "webp"}
_HEIF_BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF", b"avif": "AVIF", b"avis": "AVIF"}
_SIGNATURES = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "BigTIFF"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
    (b"\0\0\x01\0", "icon"),
)


def name_format(content: bytes) -> str:
    """Names the format: in lower case if TensorFlow reads it, `unknown` if no signature matches."""
    for signature, name in _SIGNATURES:
        if content.startswith(signature):
            return name
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        is_animated = content[12:16] == b"VP8X" and len(content) > 20 and content[20] & 0x02
        return "animated WebP" if is_animated else "webp"
    if content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS:
        return _HEIF_BRANDS[content[8:12]]
    if content.lstrip()[:5].lower() in {b"<?xml", b"<svg ", b"<!doc", b"<html"}:
        return "SVG or HTML text"
    return "unknown"


def explain_unreadable(content: bytes) -> str:
    """Explains why TensorFlow can't read a file, and how to convert it; empty if its format is supported."""
    if not content:
        return "empty or unreadable file"
    name = name_format(content)
    if name == "bmp":
        return _explain_bmp(content)
    if name in _READABLE:
        return ""
    if name == "unknown":
        return "not an image: supported formats are JPEG, PNG, GIF, BMP and WebP"
    return f"{name} is not supported by TensorFlow: {_CONVERT}"


def _explain_bmp(content: bytes) -> str:
    """Explains why a BMP file is not supported; empty if `bmp.decode_bmp` reads it."""
    if len(content) < 54:
        return "truncated BMP"
    size, bits, compression = (int.from_bytes(content[a:b], "little") for a, b in ((14, 18), (28, 30), (30, 34)))
    if size < 40:
        return f"OS/2 BMP is not supported: {_CONVERT}"
    if compression not in {0, 3, 6}:
        return f"compressed BMP is not supported: {_CONVERT}"
    if bits not in {1, 4, 8, 16, 24, 32}:
        return f"BMP with {bits} bits per pixel is not supported: {_CONVERT}"
    return ""
