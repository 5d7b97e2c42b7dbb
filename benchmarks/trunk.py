"""Time and peak memory of single parts.

python -m benchmarks.trunk --only=tail

Parts for `--only`:
    tail: an epoch of training conv5 on stored feature maps, compared with an epoch of plain Keras with the same layers
        trained.
    precision: speedup and cosine similarity that --precision=auto measures on MobileNetV2 and ResNet50.
    decode: a photograph of 12 megapixels, decoded at full size and at libjpeg's reduced scale, and resized.
    memory: peak memory of a whole run on 400 and on 4,000 images.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import MOBILENET_WEIGHTS, clock, measure_peak, parse, run_process, spread, write_results


def main() -> None:
    arguments = parse()
    parts = arguments.only.split(",") if arguments.only else list(PARTS)
    write_results("trunk", {name: PARTS[name](arguments) for name in parts})


def measure_tail(arguments: Any) -> dict[str, Any]:
    """Times epochs, except the first one of each run, with 320 flowers as train and 40 as val."""
    folder = arguments.work / "few_flowers"
    shutil.rmtree(folder, ignore_errors=True)
    for split, first, last in (("train", 0, 64), ("val", 64, 72)):
        for label in sorted((arguments.data / "flowers").iterdir()):
            (folder / split / label.name).mkdir(parents=True)
            for file in sorted(label.iterdir())[first:last]:
                shutil.copy(file, folder / split / label.name)
    run_dir = arguments.work / "tail_run"
    ours, peer = [], []
    for _ in range(arguments.runs):
        run_process([
            *("-m", "tl_keras.main", "--mode=finetune", f"--dataset=folder:{folder}", "--backbone=ResNet50"),
            *("--weights=none", "--trainable=from:conv5_block1_1_conv", "--epochs=3", "--noexport", "--noreport"),
            *(f"--run_dir={run_dir}", "--overwrite", f"--store_dir={arguments.work / 'tail_store'}"),
        ])
        with (run_dir / "history.csv").open() as file:
            ours += [float(row["seconds"]) for row in csv.DictReader(file)][1:]
        peer += plain_tail_epochs(folder)
        print(ours[-2:], peer[-2:], flush=True)
    return {
        "conv5 on stored maps, seconds an epoch": spread(ours),
        "plain Keras, seconds an epoch": spread(peer),
        "times faster": statistics.median(peer) / statistics.median(ours),
    }


def plain_tail_epochs(folder: Path) -> list[float]:
    code = f"""
import json, time, keras, tensorflow as tf
load = dict(image_size=(224, 224), batch_size=32, seed=0, verbose=False)
train = keras.utils.image_dataset_from_directory({str(folder / "train")!r}, **load).prefetch(2)
val = keras.utils.image_dataset_from_directory({str(folder / "val")!r}, **load).prefetch(2)
base = keras.applications.ResNet50(include_top=False, weights=None, input_shape=(224, 224, 3))
for layer in base.layers: layer.trainable = layer.name.startswith("conv5")
inputs = keras.Input((224, 224, 3))
outputs = base(keras.applications.resnet50.preprocess_input(inputs), training=False)
outputs = keras.layers.Dense(5)(keras.layers.GlobalAveragePooling2D()(outputs))
model = keras.Model(inputs, outputs)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile("adam", loss, metrics=["accuracy"], jit_compile=False)
seconds = []
class Clock(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None): self.start = time.perf_counter()
    def on_epoch_end(self, epoch, logs=None): seconds.append(time.perf_counter() - self.start)
model.fit(train, validation_data=val, epochs=3, verbose=0, callbacks=[Clock()])
print(json.dumps(seconds[1:]))
"""
    return json.loads(run_process(["-c", code])[1].splitlines()[-1])


def measure_precision(arguments: Any) -> dict[str, Any]:
    import numpy as np

    from tl_keras.backbones import engines
    from tl_keras.backbones.zoo import build_backbone, find_preset
    from tl_keras.data.images import make_images
    from tl_keras.data.sources import load_source

    source = load_source(f"folder:{arguments.data / 'flowers'}", data_dir=None)
    positions = np.arange(0, len(source.ids), len(source.ids) // 32)[:32]
    _, sample = next(make_images(source.read, positions, image_size=224, resize="crop", batch_size=32))
    weights = str(arguments.data / MOBILENET_WEIGHTS)
    rows = {"MobileNetV2": (weights, {"alpha": 0.35}), "ResNet50": ("none", {})}
    found = {}
    for name, (weights, kwargs) in rows.items():
        backbone = build_backbone(find_preset(name), weights=weights, image_size=224, kwargs=kwargs)
        runs = [engines._measure("tensorflow", "auto", backbone, sample, 10**6) for _ in range(arguments.runs)]
        found[name] = [choice.reason for choice, _ in runs]
    return found


def measure_decode(arguments: Any) -> dict[str, Any]:
    import numpy as np
    import tensorflow as tf
    from PIL import Image

    from tl_keras.data import images

    photographs = sorted((arguments.data / "hymenoptera").glob("*/*/*.jpg"), key=lambda path: -path.stat().st_size)
    content = io.BytesIO()
    Image.open(photographs[0]).convert("RGB").resize((4000, 3000), Image.BICUBIC).save(content, "JPEG", quality=92)
    jpeg = tf.constant(content.getvalue())

    @tf.function(autograph=False)
    def decode_scaled(image_bytes: Any) -> Any:
        return images.decode(image_bytes, image_size=224, resize="crop")

    @tf.function(autograph=False)
    def decode_full(image_bytes: Any) -> Any:
        return images._resize(tf.io.decode_jpeg(image_bytes, channels=3), image_size=224, resize="crop")

    seconds: dict[str, list[float]] = {"full": [], "scaled": []}
    for _ in range(10):
        for name, decode in (("full", decode_full), ("scaled", decode_scaled)):
            seconds[name].append(clock(lambda decode=decode: decode(jpeg).numpy()))
    full, scaled = (np.median(seconds[name][1:]) for name in ("full", "scaled"))
    return {
        "12 megapixels in full, ms": spread([1000 * value for value in seconds["full"][1:]]),
        "at libjpeg's scale, ms": spread([1000 * value for value in seconds["scaled"][1:]]),
        "share": float(scaled / full),
    }


def measure_memory(arguments: Any) -> dict[str, Any]:
    peaks = {}
    for count in (400, 4000):
        folder = arguments.work / f"flowers_{count}"
        shutil.rmtree(folder, ignore_errors=True)
        files = sorted((arguments.data / "flowers").glob("*/*.jpg"))
        for file in files[:: len(files) // count][:count]:
            (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / file.parent.name)
        command = [
            *(sys.executable, "-m", "tl_keras.main", "--mode=finetune", f"--dataset=folder:{folder}"),
            *("--backbone=MobileNetV2", "--backbone_kwargs=alpha=0.35", "--precision=float32"),
            *(f"--weights={arguments.data / MOBILENET_WEIGHTS}", f"--run_dir={arguments.work / 'memory_run'}"),
            *("--overwrite", f"--store_dir={arguments.work / f'store_{count}'}", "--noexport", "--noreport"),
        ]
        shutil.rmtree(arguments.work / f"store_{count}", ignore_errors=True)
        peaks[count] = measure_peak(command)
    return {
        "peak memory on 400 images, MB": round(peaks[400]),
        "on 4,000, MB": round(peaks[4000]),
        "ratio": peaks[4000] / peaks[400],
    }


PARTS = {
    "tail": measure_tail,
    "precision": measure_precision,
    "decode": measure_decode,
    "memory": measure_memory,
}


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s")
