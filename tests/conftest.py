"""Images that a test makes, and a small run that many tests read."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from tl_keras.classifier import Classifier

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it: tests leave nothing in the user's cache
    _CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("MPLCONFIGDIR", str(_CACHE / "matplotlib"))  # its list of fonts takes long to make
    os.environ.setdefault("PIP_CACHE_DIR", str(_CACHE / "pip"))
    _own_cache = tempfile.TemporaryDirectory(prefix="tl_keras_cache_")
    os.environ["XDG_CACHE_HOME"] = _own_cache.name

COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (210, 50, 40)}
SMALL_NETWORK = ("--backbone=SmallConvNet", "--image_size=16", "--weights=none")
SMALL = (*SMALL_NETWORK, "--noreport")  # whose report is looked at says so
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
# where Chromium is missing such tests are left out, but for CI
in_chromium = pytest.mark.skipif(
    CHROMIUM is None and "TL_KERAS_NEEDS_CHROMIUM" not in os.environ, reason="no Chromium on this machine"
)


def make_image(
    seed: int, colour: tuple[int, int, int] = (128, 128, 128), size: tuple[int, int] = (24, 20)
) -> np.ndarray:
    """Noise around a colour, uint8 (height, width, 3)."""
    noise = np.random.default_rng(seed).normal(0, 40, (*size, 3))
    return np.clip(noise + colour, 0, 255).astype(np.uint8)


def write_image(path: Path, pixels: np.ndarray, **options: object) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def write_colour_folder(root: Path, each: int, first: int = 0) -> Path:
    """`root/CLASS/N.jpg`, so many a class; the same number gives the same image."""
    for name, colour in COLOURS.items():
        for number in range(first, first + each):
            seed = zlib.crc32(f"{name}{number}".encode())
            write_image(root / name / f"{number:03d}.jpg", make_image(seed, colour), quality=95)
    return root


def build_classifier(labels: tuple[str, ...], size: int = 12) -> Classifier:
    """A small network that has learnt nothing, but answers differently to images of different colours."""
    import keras

    from tl_keras.classifier import Classifier

    keras.utils.set_random_seed(len(labels))
    images = keras.Input((size, size, 3))
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(images)
    x = keras.layers.Conv2D(6, 3, name="conv")(x)
    x = keras.layers.BatchNormalization(name="bn")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    start = keras.initializers.RandomNormal(stddev=1.5, seed=1)
    network = keras.Model(images, keras.layers.Dense(len(labels), kernel_initializer=start, name="logits")(x))
    return Classifier(network, "toy-Net", labels, "Net", "pool", "squash")


def run_main(*arguments: str) -> int:
    from tl_keras.main import main

    return main(["tl_keras", *arguments])


def release_memory() -> None:
    """Clears the Keras session and returns free memory to the system."""
    from tl_keras.serving.workers import trim_memory

    if "keras" in sys.modules:
        sys.modules["keras"].backend.clear_session()
    gc.collect()
    trim_memory()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that no worker ends with one of them while the other is idle."""
    folders = ("contracts", "tests", "modes", "export", "serving", "training", "data")
    items.sort(key=lambda item: (*folders, item.path.parent.name).index(item.path.parent.name))


def pytest_collection_finish() -> None:
    """What the modules have loaded is never searched for garbage: that takes a second after each module."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _released() -> Iterator[None]:
    yield
    release_memory()


@pytest.fixture(scope="module")  # Playwright's event loop stays in this thread until it ends
def browser() -> Iterator[object]:
    """A Chromium; it is no Python package: `.ci/run` installs Debian's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=_CHROMIUM_FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def colour_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colour_folder(tmp_path_factory.mktemp("colours") / "colours", each=30)


@pytest.fixture(scope="session")
def store_dir(trained: tuple[Path, Path]) -> Path:
    """A store that has the embeddings of the colours."""
    return trained[0].parent / "store"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, colour_folder: Path) -> tuple[Path, Path]:
    """A run on three colours, and its exported model."""
    root = tmp_path_factory.mktemp("trained")
    status = run_main(
        "--mode=finetune",
        f"--dataset=folder:{colour_folder}",
        *SMALL_NETWORK,
        "--epochs=6",
        "--learning_rate=0.05",
        f"--run_dir={root / 'run'}",
        f"--store_dir={root / 'store'}",
        f"--export_dir={root / 'models'}",
    )
    assert status == 0
    return root / "run", next((root / "models").glob("*/1"))
