"""Answers of the models that two checkouts export: python -m benchmarks.same_answers --other=CHECKOUT

Both export the same classifiers (random weights from one seed), and answer 500 images with `serving_default`: JPEG,
PNG, GIF, BMP and WebP, and files that are damaged, empty or not images. Prints and writes the largest differences.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import ROOT, parse, write_results

NETWORKS = ("ResNet50", "MobileNetV2", "EfficientNetB0")
PHOTOGRAPHS, CONVERTED, DAMAGED = 380, 20, 20
SIZE = 224
FORMATS = ("PNG", "GIF", "BMP", "WEBP")


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "answer":
        answer(*sys.argv[2:])
        return
    arguments = parse()
    images = arguments.work / "same_answers"
    images.mkdir(exist_ok=True)
    for number, content in enumerate(make_images(arguments.data / "flowers")):
        (images / f"{number:03d}").write_bytes(content)
    results: dict[str, Any] = {}
    for network in NETWORKS:
        ours, others = (run(Path(root), network, images) for root in (ROOT, arguments.other))
        results[network] = {
            "images": len(ours["valid"]),
            "invalid": int((~ours["valid"]).sum()),
            "valid agrees": bool((ours["valid"] == others["valid"]).all()),
            "labels agree": bool((ours["labels"] == others["labels"]).all()),
            "largest difference of a probability": float(np.abs(ours["probabilities"] - others["probabilities"]).max()),
        }
        print(network, results[network], flush=True)
    write_results("same_answers", results)


def make_images(folder: Path) -> Iterator[bytes]:
    """Photographs as they are, others in each format, and others that are cut off; then files that are not images."""
    from PIL import Image

    paths = sorted(folder.rglob("*.jpg"))
    chosen = [paths[at] for at in np.random.default_rng(0).permutation(len(paths))]
    yield from (path.read_bytes() for path in chosen[:PHOTOGRAPHS])
    others = iter(chosen[PHOTOGRAPHS:])
    for kind in FORMATS:
        for _ in range(CONVERTED):
            stream = io.BytesIO()
            Image.open(next(others)).convert("RGB").resize((300, 200)).save(stream, kind)
            yield stream.getvalue()
    for number in range(DAMAGED):
        content = next(others).read_bytes()
        yield content[: len(content) * (number + 1) // (2 * DAMAGED)]
    yield from (
        b"",
        b"no image",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        *[bytes([n]) * 99 for n in range(15)],
    )


def run(checkout: Path, network: str, images: Path) -> dict[str, np.ndarray]:
    """Exports a network with the package of a checkout, and reads its answers."""
    out = images.with_name(f"answers-{network}-{time.time_ns()}.npz")
    environment = {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{ROOT}", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-P", __file__, "answer", network, str(images), str(out)]  # -P: the checkout's tl_keras
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    with np.load(out) as found:
        return {name: found[name] for name in found.files}


def answer(network: str, images: str, out: str) -> None:
    """Exports a network, and writes its answers to the images of a folder, in the order of their names."""
    import keras
    import tensorflow as tf

    from tl_keras.backbones.zoo import BACKBONES, build_backbone
    from tl_keras.classifier import Classifier
    from tl_keras.export.saved_model import write_version
    from tl_keras.training.heads import attach, build_head

    keras.utils.set_random_seed(0)
    backbone = build_backbone(BACKBONES[network], weights="none", image_size=SIZE)
    head = build_head(backbone.output_shape[1], 5, dropout=0, standardize=None)
    classifier = Classifier(attach(head, backbone), "toy", tuple("abcde"), network, backbone.layers[-1].name, "crop")
    version = Path(out).with_suffix("") / "1"
    version.mkdir(parents=True)
    write_version(classifier, version, name="toy", max_pixels=50_000_000)
    serve = tf.saved_model.load(str(version)).signatures["serving_default"]
    contents = [path.read_bytes() for path in sorted(Path(images).iterdir())]
    parts = [serve(image_bytes=tf.constant(contents[at : at + 20])) for at in range(0, len(contents), 20)]
    found = {name: np.concatenate([part[name].numpy() for part in parts]) for name in parts[0]}
    np.savez(out, probabilities=found["probabilities"], valid=found["valid"], labels=found["labels"].astype("S9"))


if __name__ == "__main__":
    main()
