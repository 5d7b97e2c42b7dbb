"""Draw letters that look handwritten: the source task of the quick start.

    python examples/letters.py FOLDER

Each letter is drawn in fonts that matplotlib ships and thinned to a line. For each image, the line is slanted, rotated
and bent at random, scaled to the box of scikit-learn's digits and drawn again with a pen. The images are written as
`FOLDER/CLASS/NUMBER.png`, 8 x 8 pixels. The same arguments give the same images.
"""

from __future__ import annotations

import argparse
import shutil
import string
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONTS = (
    *("DejaVuSans", "DejaVuSans-Oblique", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Italic"),
    *("STIXGeneral", "STIXGeneralItalic", "cmr10", "cmss10", "cmmi10", "cmti10", "cmtt10"),
)
IMAGES_PER_CLASS = 200
FONT_SIZE = 48
GLYPH_SIDE = 72  # pixels; the widest letter has 56, the highest 50
SAME_IN_BOTH_CASES = "ckopsuvwxz"

# A digit of scikit-learn's set is a bitmap of 32 x 32 pixels, in which each block of 4 x 4 is counted
# (https://archive.ics.uci.edu/dataset/80). The next three are measured on its training images.
CANVAS = 32
BLOCK = 4
BOX_WIDTH = (20.0, 1.5)  # mean and standard deviation, pixels; the box is as high as the canvas
INK_FRACTION = (0.30, 0.03)  # mean and standard deviation of the share of black pixels
STRETCH = 1.6  # a narrow letter is stretched at most this much

# Random distortions, as standard deviations: chosen for the accuracy of transfers on val.
SLANT = 0.2
ROTATION = 0.12  # radians
WAVE = 0.1  # of the height; waves of half the length have half of it
PENS = (1.0, 1.5, 2.0, 2.3, 2.9, 3.2)  # radii in pixels: the one that fits the ink fraction best is used
MARGIN = 2.0  # pixels between the line and the edge, for the pen


def list_classes() -> dict[str, str]:
    """Class names and their letters.

    Letters with the same shape in both cases are one class. Names differ in more than case, because some file systems
    ignore it.
    """
    both = {small: small + small.upper() for small in SAME_IN_BOTH_CASES}
    others = [small for small in string.ascii_lowercase if small not in both]
    capital = {f"capital_{small.upper()}": small.upper() for small in others}
    return both | capital | {f"small_{small}": small for small in others}


def draw_glyphs(letters: str) -> np.ndarray:
    """Draw letters in all fonts.

    Args:
        letters: n letters.

    Returns:
        bool `(fonts * n, GLYPH_SIDE, GLYPH_SIDE)`, font by font.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    middle = GLYPH_SIDE // 2
    glyphs = []
    for name in FONTS:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), FONT_SIZE)
        for letter in letters:
            image = Image.new("L", (GLYPH_SIDE, GLYPH_SIDE))
            ImageDraw.Draw(image).text((middle, middle), letter, font=font, fill=255, anchor="mm")
            glyphs.append(np.asarray(image) > 127)
    return np.stack(glyphs)


def thin(glyphs: np.ndarray) -> np.ndarray:
    """Thin shapes to lines of one pixel (Zhang & Suen 1984, "A fast parallel algorithm for thinning digital patterns").

    Args:
        glyphs: bool `(n, height, width)`.

    Returns:
        bool `(n, height, width)`.
    """
    height, width = glyphs.shape[1:]
    thinned = np.pad(glyphs, ((0, 0), (1, 1), (1, 1)))
    clockwise = ((0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0), (0, 0))  # from the neighbour above
    before = -1
    while thinned.sum() != before:
        before = thinned.sum()
        for sides in (((0, 2, 4), (2, 4, 6)), ((0, 2, 6), (0, 4, 6))):
            ring = np.stack([thinned[:, y : y + height, x : x + width] for y, x in clockwise])
            count = ring.sum(0, dtype=np.uint8)
            rises = (~ring & np.roll(ring, -1, axis=0)).sum(0, dtype=np.uint8)
            removed = (count >= 2) & (count <= 6) & (rises == 1)
            for three in sides:
                removed &= ~ring[list(three)].all(0)
            thinned[:, 1:-1, 1:-1] &= ~removed
    return thinned[:, 1:-1, 1:-1]


def bend(points: np.ndarray, image_of: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Slant, rotate and bend lines at random, each image's line in its own way.

    Args:
        points: x and y, float `(p, 2)`, of lines that are 1 high or wide.
        image_of: the image of each point, int `(p,)`, from 0.
        rng: random numbers.

    Returns:
        float `(p, 2)`.
    """
    count = int(image_of.max()) + 1

    def draw_normal(deviation: float) -> np.ndarray:
        return rng.normal(0, deviation, count)[image_of]

    x, y = points.T - 0.5
    x = x + draw_normal(SLANT) * y
    angle = draw_normal(ROTATION)
    x, y = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
    for frequency in (1, 2, 3):
        shifts = []
        for _ in ("x", "y"):
            direction = rng.uniform(0, np.pi, count)[image_of]
            phase = rng.uniform(0, 2 * np.pi, count)[image_of]
            along = np.cos(direction) * x + np.sin(direction) * y
            shifts.append(draw_normal(WAVE / frequency) * np.sin(np.pi * frequency * along + phase))
        x, y = x + shifts[0], y + shifts[1]
    return np.stack([x, y], axis=1)


def fit_box(points: np.ndarray, image_of: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scale each image's line to the box of a digit, in the middle of the canvas.

    Args:
        points: x and y, float `(p, 2)`.
        image_of: the image of each point, int `(p,)`, ascending from 0.
        rng: random numbers.

    Returns:
        Pixels of the canvas, float `(p, 2)`.
    """
    starts = np.flatnonzero(np.diff(image_of, prepend=-1))
    low, high = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
    extent = np.maximum(high - low, 1e-6)
    height = CANVAS - 1 - 2 * MARGIN
    width = rng.normal(*BOX_WIDTH, len(starts)) - 2 * MARGIN
    width = np.clip(width, 0, STRETCH * height * extent[:, 0] / extent[:, 1])
    scale = np.stack([width, np.full(len(starts), height)], axis=1) / extent
    return (points - ((low + high) / 2)[image_of]) * scale[image_of] + (CANVAS - 1) / 2


def ink(points: np.ndarray, image_of: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw lines with a pen, as thick as digits are.

    Args:
        points: x and y in pixels of the canvas, float `(p, 2)`.
        image_of: the image of each point, int `(p,)`, from 0.
        rng: random numbers.

    Returns:
        Black pixels, bool `(n, CANVAS, CANVAS)`.
    """
    count, reach = int(image_of.max()) + 1, int(max(PENS))
    side = CANVAS + 2 * reach
    lines = np.zeros((count, side, side), bool)
    x, y = np.clip(np.rint(points).astype(int), 0, CANVAS - 1).T + reach
    lines[image_of, y, x] = True
    wanted = rng.normal(*INK_FRACTION, count) * CANVAS**2
    inked = np.zeros((count, CANVAS, CANVAS), bool)
    best = np.zeros_like(inked)
    error = np.full(count, np.inf)
    smaller = -1.0
    for pen in PENS:
        for down in range(2 * reach + 1):
            for right in range(2 * reach + 1):
                if smaller < np.hypot(down - reach, right - reach) <= pen:
                    inked |= lines[:, down : down + CANVAS, right : right + CANVAS]
        smaller = pen
        error_of_pen = np.abs(inked.sum((1, 2)) - wanted)
        is_better = error_of_pen < error
        best[is_better], error[is_better] = inked[is_better], error_of_pen[is_better]
    return best


def draw_letters(images_per_class: int, *, seed: int) -> dict[str, np.ndarray]:
    """Draw the images of all classes.

    Args:
        images_per_class: number of images per class.
        seed: random seed.

    Returns:
        Class name → uint8 `(images_per_class, 8, 8)`.
    """
    rng = np.random.default_rng(seed)
    letters = string.ascii_letters
    lines = []
    for line in thin(draw_glyphs(letters)):
        points = np.argwhere(line)[:, ::-1]
        points = points - points.min(0)
        lines.append(points / points.max())
    images = {}
    for name, shapes in list_classes().items():
        fonts = rng.integers(len(FONTS), size=images_per_class)
        drawn = rng.integers(len(shapes), size=images_per_class)
        chosen = [lines[f * len(letters) + letters.index(shapes[d])] for f, d in zip(fonts, drawn, strict=True)]
        image_of = np.repeat(np.arange(images_per_class), [len(line) for line in chosen])
        points = fit_box(bend(np.concatenate(chosen), image_of, rng), image_of, rng)
        side = CANVAS // BLOCK
        counts = ink(points, image_of, rng).reshape(-1, side, BLOCK, side, BLOCK).sum((2, 4))
        images[name] = np.rint(counts * (255 / BLOCK**2)).astype(np.uint8)
    return images


def write_letters(folder: Path, images: dict[str, np.ndarray]) -> None:
    """Write images as `folder/CLASS/NUMBER.png`; class folders from before are replaced."""
    for name, pixels in images.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
        for number, one in enumerate(pixels):
            Image.fromarray(one).save(folder / name / f"{number:04d}.png")


def main() -> None:
    """Parse the arguments, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the class folders")
    parser.add_argument("--images_per_class", type=int, default=IMAGES_PER_CLASS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    arguments = parser.parse_args()
    images = draw_letters(arguments.images_per_class, seed=arguments.seed)
    write_letters(arguments.folder, images)
    count = sum(map(len, images.values()))
    print(f"letters: {count:,} images of {len(images)} classes in {arguments.folder}")


if __name__ == "__main__":
    main()
