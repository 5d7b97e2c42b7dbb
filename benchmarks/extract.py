"""Extraction: throughput from files to embeddings, the article's job, and peak memory.

python -m benchmarks.extract --only=engines --torch=/path/to/python

Parts for `--only`:
    engines: throughput of the whole pipeline from files to the embedding store, for five networks with random weights
        and photographs of ImageNet's size. Baselines: bare OpenVINO on synthetic input with its best settings, decoding
        and resizing without a network, Keras `predict`, and PyTorch.
    article: VGG16's flattened last pooling layer and a logistic regression on three splits, compared with the article's
        loop.
    memory: peak memory of --embeddings_output on 1,000 and on 20,000 images.

`--torch` is a Python that has torch and torchvision. Without it, the baselines that need them are skipped.
"""

from __future__ import annotations

import functools
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import MOBILENET_WEIGHTS, ROOT, clock, measure_peak, parse, run_process, spread, write_results

IMAGES = {"MobileNetV2": 1024, "EfficientNetB0": 640, "ResNet50": 320, "ConvNeXtTiny": 192, "VGG16": 96}
PREDICT_IMAGES = {"ConvNeXtTiny": 64}  # Keras processes only five images per second
BATCHES = (4, 32)


def main() -> None:
    arguments = parse()
    parts = arguments.only.split(",") if arguments.only else list(PARTS)
    write_results("extract", {name: PARTS[name](arguments) for name in parts})


def write_photographs(arguments: Any, count: int) -> Path:
    """Writes JPEGs of 500 x 375 pixels made from the photographs of hymenoptera; no two files have the same bytes."""
    from PIL import Image, ImageEnhance

    folder = arguments.work / f"photographs_{count}" / "all"
    if folder.exists() and len(list(folder.iterdir())) == count:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sources = sorted((arguments.data / "hymenoptera").glob("*/*/*.jpg"))
    for number in range(count):
        image = Image.open(sources[number % len(sources)]).convert("RGB").resize((500, 375), Image.BICUBIC)
        image = ImageEnhance.Brightness(image).enhance(0.8 + 0.05 * (number // len(sources)))
        image.save(folder / f"{number:05d}.jpg", quality=90)
    return folder


def measure_engines(arguments: Any) -> dict[str, Any]:
    return {name: measure_network(arguments, name) for name in arguments.networks.split(",")}


def measure_network(arguments: Any, name: str) -> dict[str, Any]:
    import keras
    import numpy as np

    from tl_keras.backbones.embed import BATCH_SIZE, embed
    from tl_keras.backbones.engines import freeze
    from tl_keras.backbones.zoo import build_backbone, find_preset
    from tl_keras.data.examples import scan
    from tl_keras.data.images import make_images
    from tl_keras.data.sources import load_source

    folder = write_photographs(arguments, IMAGES[name])
    keras.utils.set_random_seed(0)
    backbone = build_backbone(find_preset(name), weights="none", image_size=224)
    source = load_source(f"folder:{folder}", data_dir=None, allow_unlabeled=True)
    positions = np.arange(len(source.ids))
    examples = scan(source, source.splits, max_broken_fraction=0, show_progress=quiet, report=quiet)
    images = functools.partial(make_images, source.read, image_size=224, resize="crop", batch_size=BATCH_SIZE)

    def decode() -> float:
        times = [time.perf_counter() for _ in images(positions)]
        return (len(positions) - BATCH_SIZE) / (times[-1] - times[0])

    def run_pipeline(engine: str, precision: str, run: int) -> float:
        batches: list[float] = []
        (embedded,) = embed(
            [backbone],
            wanted={0: positions},
            digests=examples.digests,
            images=images,
            address={"backbone": name, "image_shape": [224, 224, 3], "run": run},
            engine=engine,
            precision=precision,
            store_dir=str(arguments.work / "extract_store"),
            show=print,
            show_progress=lambda _: batches.append(time.perf_counter()),
        )
        embedded.store.close()
        return (len(positions) - BATCH_SIZE) / (batches[-1] - batches[0])

    shutil.rmtree(arguments.work / "extract_store", ignore_errors=True)
    frozen = {size: freeze(backbone, batch_size=size, dtype=np.uint8) for size in BATCHES}
    backbone.compile(jit_compile=False)
    found: dict[str, list[float]] = {}
    for run in range(arguments.runs):
        rates = {
            "decoding and resizing alone": decode(),
            "bare OpenVINO, bfloat16": max(run_openvino(graph, size) for size, graph in frozen.items()),
            "tl_keras, openvino": run_pipeline("openvino", "bfloat16", run),
            "tl_keras, tensorflow": run_pipeline("tensorflow", "bfloat16", run),
            "Keras predict": predict(backbone, [folder / path for path in source.ids][: PREDICT_IMAGES.get(name)]),
        }
        for how in ("eager", "compile") if arguments.torch else ():
            command = [arguments.torch, "benchmarks/torch_peer.py", "embed", name, how, str(folder)]
            rates[f"PyTorch {how}, bfloat16"] = run_torch(command)["images a second"]
        for what, rate in rates.items():
            found.setdefault(what, []).append(rate)
        print(name, {what: round(rate, 1) for what, rate in rates.items()}, flush=True)
    medians = {what: statistics.median(values) for what, values in found.items()}
    ours = medians["tl_keras, openvino"]
    allowed = 1 / (1 / medians["bare OpenVINO, bfloat16"] + 1 / medians["decoding and resizing alone"])
    return {
        "images": len(positions),
        "images a second": {what: spread(values) for what, values in found.items()},
        "of what the cores allow": ours / allowed,
        "times Keras predict": ours / medians["Keras predict"],
        "tensorflow engine, times Keras predict": medians["tl_keras, tensorflow"] / medians["Keras predict"],
        **{f"times {what}": ours / rate for what, rate in medians.items() if what.startswith("PyTorch")},
    }


def run_openvino(frozen: Any, batch_size: int) -> float:
    """Measures the images per second of bare OpenVINO on synthetic input, with the better of two performance hints."""
    import numpy as np
    import openvino

    path = Path("/tmp/tl_keras_bare.pb")
    path.write_bytes(frozen.graph.as_graph_def().SerializeToString())
    core, best = openvino.Core(), 0.0
    model = core.read_model(path)
    model.reshape([batch_size, 224, 224, 3])
    batch = np.random.default_rng(0).integers(0, 256, (batch_size, 224, 224, 3)).astype(np.uint8)
    for hint in ("THROUGHPUT", "LATENCY"):
        settings = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": hint}
        queue = openvino.AsyncInferQueue(core.compile_model(model, "CPU", settings))
        queue.start_async({0: batch})
        queue.wait_all()
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < 2:
            for _ in range(max(1, 16 // batch_size)):
                queue.start_async({0: batch})
                done += batch_size
            queue.wait_all()
        best = max(best, done / (time.perf_counter() - start))
    return best


def predict(backbone: Any, paths: list[Path]) -> float:
    import tensorflow as tf

    def load(path: Any) -> Any:
        pixels = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        return tf.image.resize(pixels, (224, 224))

    data = tf.data.Dataset.from_tensor_slices(list(map(str, paths))).map(load, num_parallel_calls=16)
    # with autotuning, the end of the baseline's pipeline waits up to half a minute for a sleeping thread (TF 2.21)
    options = tf.data.Options()
    options.autotune.enabled = False
    data = data.batch(32).prefetch(4).with_options(options)
    backbone.predict(data.take(1), verbose=0)  # warm-up: builds the graph
    return len(paths) / clock(lambda: backbone.predict(data, verbose=0))


def run_torch(command: list[str]) -> dict[str, Any]:
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if result.returncode:
        raise SystemExit(result.stderr[-3000:])
    return json.loads(result.stdout.splitlines()[-1])


def measure_article(arguments: Any) -> dict[str, Any]:
    """Runs the article's job and its loop with the same random weights: ImageNet weights can't be downloaded here."""
    import keras
    import numpy as np

    from tl_keras.backbones.zoo import build_backbone, find_preset

    folder = arguments.work / "article"
    shutil.rmtree(folder, ignore_errors=True)
    for label in ("ants", "bees"):
        files = sorted((arguments.data / "hymenoptera").glob(f"*/{label}/*.jpg"))
        for number, file in enumerate(files):
            split = ("train", "train", "train", "val", "test")[number % 5]
            (folder / split / label).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / split / label / file.name)
    keras.utils.set_random_seed(0)
    backbone = build_backbone(find_preset("VGG16"), weights="none", image_size=224)
    weights = arguments.work / "vgg16.weights.h5"
    backbone.save_weights(weights)
    layers = [layer for layer in backbone.layers if layer.weights]
    arrays = {
        f"{kind}_{number}": np.array(weight)
        for number, layer in enumerate(layers)
        for kind, weight in zip(("kernel", "bias"), layer.weights, strict=True)
    }
    np.savez(arguments.work / "vgg16.npz", **arrays)

    store, run_dir = arguments.work / "article_store", arguments.work / "article_run"
    command = [
        *("-m", "tl_keras.main", "--flagfile=flags/article_extract.flags", f"--dataset=folder:{folder}"),
        *(f"--weights={weights}", "--feature_layer=block5_pool", "--pooling=flatten", "--noexport"),
        *(f"--run_dir={run_dir}", "--overwrite", f"--store_dir={store}"),
    ]
    seconds: dict[str, list[float]] = {"cold": [], "warm": [], "the article's loop": []}
    fits, agreement = [], []
    for _ in range(arguments.runs):
        shutil.rmtree(store, ignore_errors=True)
        for name in ("cold", "warm"):
            seconds[name].append(run_process(command)[0])
        metrics = json.loads((run_dir / "metrics.json").read_text())
        fits.append(metrics["timing"]["seconds"]["probe"])
        if arguments.torch:
            peer = ["benchmarks/torch_peer.py", "article", str(folder), str(arguments.work / "vgg16.npz")]
            start = time.perf_counter()
            answer = run_torch([arguments.torch, *peer])
            seconds["the article's loop"].append(time.perf_counter() - start)
            rows = (run_dir / "predictions.csv").read_text().splitlines()[1:]
            pairs = zip((row.split(",")[3] for row in rows), answer["val"] + answer["test"], strict=True)
            agreement.append(float(np.mean([ours == theirs for ours, theirs in pairs])))
        print({name: round(values[-1], 1) for name, values in seconds.items() if values}, agreement[-1:], flush=True)
    loop = seconds["the article's loop"]
    return {
        "seconds": {name: spread(values) for name, values in seconds.items() if values},
        "of which the probe, warm": spread(fits),
        "decisions that agree": spread(agreement) if agreement else None,
        "times faster, cold": statistics.median(loop) / statistics.median(seconds["cold"]) if loop else None,
        "warm, less the probe, s": statistics.median(seconds["warm"]) - statistics.median(fits),
    }


def measure_memory(arguments: Any) -> dict[str, Any]:
    peaks = {}
    for count in (1000, 20000):
        folder = arguments.work / f"copies_{count}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        files = sorted((arguments.data / "flowers").glob("*/*.jpg"))
        for number in range(count):
            content = files[number % len(files)].read_bytes() + str(number).encode()  # after the end of the image
            (folder / f"{number:05d}.jpg").write_bytes(content)
        store = arguments.work / f"copies_store_{count}"
        shutil.rmtree(store, ignore_errors=True)
        command = [
            *(sys.executable, "-m", "tl_keras.main", "--mode=extract", f"--dataset=folder:{folder}"),
            *("--backbone=MobileNetV2", "--backbone_kwargs=alpha=0.35", "--precision=float32", f"--store_dir={store}"),
            *(f"--weights={arguments.data / MOBILENET_WEIGHTS}", f"--run_dir={arguments.work / 'memory_run'}"),
            *("--overwrite", f"--embeddings_output={arguments.work / 'copies.npz'}", f"--engine={arguments.engine}"),
        ]
        peaks[count] = measure_peak(command)
        shutil.rmtree(folder)
    return {
        "peak memory on 1,000 images, MB": round(peaks[1000]),
        "on 20,000, MB": round(peaks[20000]),
        "ratio": peaks[20000] / peaks[1000],
    }


def quiet(*_: Any) -> None:
    """Discards progress messages."""


PARTS = {"engines": measure_engines, "article": measure_article, "memory": measure_memory}

if __name__ == "__main__":
    main()
