"""The reference page of all backbones, generated from the zoo.

`python -m tl_keras.backbones.reference` writes it; a test compares it.
"""

from __future__ import annotations

from pathlib import Path

from tl_keras.backbones.zoo import BACKBONES, Preset

BACKBONES_FILE = Path(__file__).parent.parent.parent / "docs" / "reference" / "backbones.md"
_HEAD = """# Backbones

The networks of `keras.applications`, by the name that `--backbone` takes, and a small network of tl_keras that needs no
download.

- **Image size** is that of the ImageNet weights, and the default of `--image_size`. Any size from the minimum upward
  works.
- **Layers** are names for `--feature_layer`: the ends of the network's stages, and the top layers of VGG. Other layers
  work too if the network can be cut there; an error names the nearest ones. A NASNet can only be read at its end.
- **License** is that of the ImageNet weights.

This page is generated from `tl_keras/backbones/zoo.py`.

| backbone | image size | minimum | `--backbone_kwargs` | layers | license | paper |
|---|---|---|---|---|---|---|"""


def backbones_page() -> str:
    """The page, in Markdown."""
    return "\n".join([_HEAD, *map(_describe, BACKBONES.values())]) + "\n"


def _describe(preset: Preset) -> str:
    authors, separator, address = preset.paper.partition(", http")
    cells = (
        f"`{preset.name}`",
        str(preset.image_size),
        str(preset.min_image_size),
        ", ".join(f"`{name}`" for name in preset.kwargs),
        ", ".join(f"`{name}`" for name in (*preset.cuts, *preset.top)),
        preset.licence if preset.imagenet else "no ImageNet weights",
        f"[{authors}](http{address})" if separator else "",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    BACKBONES_FILE.write_text(backbones_page(), encoding="utf-8")
