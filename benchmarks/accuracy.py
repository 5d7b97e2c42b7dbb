"""Accuracy of the recipes on real photographs with real weights.

python -m benchmarks.accuracy

Parts for `--only`:
    hymenoptera: val accuracy on its 153 val photographs, only the head trained, 10 epochs; compared with plain Keras.
    flowers: accuracy on a stratified quarter held out as test, five random seeds; the default recipe, the article's
        head and scikit-learn's logistic regression.
    decode: predicted classes for all val photographs of hymenoptera, with JPEGs decoded at full size and at libjpeg's
        reduced scale.
"""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.measure import MOBILENET_WEIGHTS, parse, run_process, spread, write_results

SEEDS = range(5)
ARTICLE = ("--nostandardize", "--optimizer=sgd", "--learning_rate=0.001", "--momentum=0.9", "--schedule=constant")


def main() -> None:
    arguments = parse()
    parts = arguments.only.split(",") if arguments.only else ["hymenoptera", "flowers", "decode"]
    results: dict[str, Any] = {}
    if "hymenoptera" in parts:
        results["hymenoptera, val accuracy"] = measure_hymenoptera(arguments)
    if "flowers" in parts:
        results["flowers, accuracy on a stratified quarter"] = measure_flowers(arguments)
    if "decode" in parts:
        results["hymenoptera, JPEGs in full beside scaled"] = compare_decoding(arguments)
    write_results("accuracy", results)


def finetune(arguments: Any, dataset: str, seed: int, *flags: str) -> dict[str, Any]:
    run_dir = arguments.work / "accuracy_run"
    run_process([
        *(
            "-m",
            "tl_keras.main",
            "--mode=finetune",
            f"--dataset={dataset}",
            f"--seed={seed}",
            "--noexport",
            "--noreport",
        ),
        *("--backbone=MobileNetV2", "--backbone_kwargs=alpha=0.35"),
        f"--weights={arguments.data / MOBILENET_WEIGHTS}",
        *(f"--run_dir={run_dir}", "--overwrite", f"--store_dir={arguments.work / 'accuracy_store'}", *flags),
    ])
    return json.loads((run_dir / "metrics.json").read_text())


def measure_hymenoptera(arguments: Any) -> dict[str, Any]:
    data = arguments.data / "hymenoptera"
    best, last = [], []
    for seed in SEEDS:
        best.append(finetune(arguments, f"folder:{data}", seed)["val"]["accuracy"])
        with (arguments.work / "accuracy_run" / "history.csv").open() as file:
            last.append(float(list(csv.DictReader(file))[-1]["val_accuracy"]))
    weights = str(arguments.data / MOBILENET_WEIGHTS)
    peer = ["-m", "benchmarks.plain_keras", str(data / "train"), "MobileNetV2", weights, "10", str(data / "val")]
    peers = [json.loads(run_process(peer)[1].splitlines()[-1])["val_accuracy"] for _ in range(arguments.runs)]
    return {
        "tl_keras, best epoch on val, 5 seeds": spread(best),
        "tl_keras, last epoch, 5 seeds": spread(last),
        "plain Keras, best epoch on val, 3 runs": spread([max(accuracies) for accuracies in peers]),
        "plain Keras, last epoch, 3 runs": spread([accuracies[-1] for accuracies in peers]),
    }


def measure_flowers(arguments: Any) -> dict[str, Any]:
    manifest = write_quarter(arguments)
    default = [finetune(arguments, f"csv:{manifest}", seed)["test"]["accuracy"] for seed in SEEDS]
    article = [finetune(arguments, f"csv:{manifest}", seed, *ARTICLE)["test"]["accuracy"] for seed in SEEDS]
    return {
        "default recipe, 5 seeds": spread(default),
        "its mean": statistics.mean(default),
        "its standard deviation": statistics.stdev(default),
        "its largest less its smallest": max(default) - min(default),
        "the article's head, 5 seeds": spread(article),
        "scikit-learn's logistic regression, standardised": fit_logistic_regression(arguments),
    }


def hold_out_quarter(labels: Any) -> Any:
    """Splits into train and test positions with scikit-learn's stratified 75/25 split, random seed 0."""
    import numpy as np
    from sklearn.model_selection import train_test_split

    return train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0)


def write_quarter(arguments: Any) -> Path:
    """Writes a CSV manifest of flowers whose held-out quarter is test."""
    files = sorted((arguments.data / "flowers").glob("*/*.jpg"))
    held_out, manifest = set(hold_out_quarter([f.parent.name for f in files])[1]), arguments.work / "flowers.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        writer.writerows([f, f.parent.name, "test" if n in held_out else "train"] for n, f in enumerate(files))
    return manifest


def embed_photographs(arguments: Any, source: Any, positions: Any) -> tuple[Any, Any]:
    """Computes embeddings with MobileNetV2 and its ImageNet weights, float32 (n, 1280), and returns labels too."""
    import numpy as np

    from tl_keras.backbones.engines import TensorFlowEngine
    from tl_keras.backbones.zoo import build_backbone, find_preset
    from tl_keras.data.images import make_images

    weights = str(arguments.data / MOBILENET_WEIGHTS)
    backbone = build_backbone(find_preset("MobileNetV2"), weights=weights, image_size=224, kwargs={"alpha": 0.35})
    engine = TensorFlowEngine(backbone, batch_size=32, precision="float32")
    images = make_images(source.read, positions, image_size=224, resize="crop", batch_size=32)
    found = [(where, engine.run(pixels)[0]) for where, pixels in images]
    return np.concatenate([one[1] for one in found]), source.labels[np.concatenate([one[0] for one in found])]


def fit_logistic_regression(arguments: Any) -> float:
    """Scores scikit-learn's logistic regression on standardized embeddings, with C cross-validated on train."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from tl_keras.data.sources import load_source

    source = load_source(f"folder:{arguments.data / 'flowers'}", data_dir=None)
    train, test = (embed_photographs(arguments, source, positions) for positions in hold_out_quarter(source.labels))
    probe = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=(1e-4, 1e-3, 1e-2, 1e-1, 1), max_iter=1000))
    return float(probe.fit(*train).score(*test))


def compare_decoding(arguments: Any) -> dict[str, Any]:
    """Compares the predictions of the hymenoptera classifier on the same photographs, decoded in both ways."""
    import numpy as np
    import tensorflow as tf

    from tl_keras import classifier as classifiers
    from tl_keras.data import images

    finetune(arguments, f"folder:{arguments.data / 'hymenoptera'}", 0)
    servable = classifiers.Servable(classifiers.load_trained(str(arguments.work / "accuracy_run")))
    answers: dict[str, list[Any]] = {"full": [], "scaled": []}
    photographs = sorted((arguments.data / "hymenoptera").glob("val/*/*.jpg"))
    for path in photographs:
        content = tf.constant(path.read_bytes())
        full = images._resize(tf.io.decode_jpeg(content, channels=3), image_size=224, resize="crop")
        for name, pixels in (("full", full), ("scaled", images.decode(content, image_size=224, resize="crop"))):
            answer = servable.endpoints["pixels"](tf.cast(pixels, tf.float32)[tf.newaxis])
            answers[name].append(answer["probabilities"].numpy()[0])
    full, scaled = np.array(answers["full"]), np.array(answers["scaled"])
    labels = np.array([path.parent.name == "bees" for path in photographs])
    return {
        "photographs": len(full),
        "decisions that differ": int((full.argmax(1) != scaled.argmax(1)).sum()),
        "accuracy, full": float((full.argmax(1) == labels).mean()),
        "accuracy, scaled": float((scaled.argmax(1) == labels).mean()),
        "mean difference of a probability": float(np.abs(full - scaled).mean()),
    }


if __name__ == "__main__":
    main()
