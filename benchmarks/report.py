"""Time that evaluation and report add to a run, size of the report, and calibration.

python -m benchmarks.report [--only=small,large,calibration]

Parts for `--only`:
    small: finetune on hymenoptera, as a user runs it, each time with an empty embedding store.
    large: 12,000 training images and 8,580 test images of 120 classes, made from flowers: 5 kinds in 24 tints, random
        crops.
    calibration: ECE on test before and after temperature scaling fitted on val; flowers, head and probes.

MobileNetV2, alpha=0.35, real ImageNet weights.
"""

from __future__ import annotations

import colorsys
import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measure import MOBILENET_WEIGHTS, parse, run_process, spread, write_results

TINTS, TRAIN, VAL, TEST, SIDE = 24, 10_800, 1_200, 8_580, 200


def main() -> None:
    arguments = parse()
    parts = arguments.only.split(",") if arguments.only else list(PARTS)
    write_results("report", {name: PARTS[name](arguments) for name in parts})


def run_mode(arguments: Any, mode: str, dataset: str, run: Path, *flags: str) -> tuple[float, dict[str, Any]]:
    network = ["--backbone=MobileNetV2", "--backbone_kwargs=alpha=0.35"]
    weights = f"--weights={arguments.data / MOBILENET_WEIGHTS}"
    places = [f"--run_dir={run}", "--overwrite", f"--export_dir={arguments.work / 'models'}"]
    command = ["-m", "tl_keras.main", f"--mode={mode}", f"--dataset={dataset}", *network, weights, *places, *flags]
    seconds, _ = run_process(command)
    return seconds, json.loads((run / "metrics.json").read_text())


def describe(seconds: float, metrics: dict[str, Any], run: Path) -> dict[str, float]:
    stages = metrics["timing"]["seconds"]
    added = stages["evaluation"] + stages["report"]
    return {
        "whole run, seconds": seconds,
        "evaluation and report, seconds": added,
        "evaluation and report, share of the rest": added / (seconds - added),
        "report.html, MB": (run / "report.html").stat().st_size / 1e6,
    }


def measure_small(arguments: Any) -> dict[str, Any]:
    runs, store, run = [], arguments.work / "report_store", arguments.work / "report_small"
    for _ in range(arguments.runs):
        shutil.rmtree(store, ignore_errors=True)
        dataset = f"folder:{arguments.data / 'hymenoptera'}"
        with_report = run_mode(arguments, "finetune", dataset, run, f"--store_dir={store}")
        found = describe(*with_report, run)
        shutil.rmtree(store, ignore_errors=True)
        without, _ = run_mode(
            arguments, "finetune", dataset, arguments.work / "report_none", f"--store_dir={store}", "--noreport"
        )
        runs.append(found | {"the same run with --noreport, seconds": without})
    return {name: spread([one[name] for one in runs]) for name in runs[0]}


def measure_large(arguments: Any) -> dict[str, Any]:
    manifest, run = make_large(arguments), arguments.work / "report_large"
    store = f"--store_dir={arguments.work / 'report_large_store'}"
    runs = [
        describe(*run_mode(arguments, "finetune", f"csv:{manifest}", run, store, "--noexport"), run)
        for _ in range(arguments.runs)
    ]
    return {name: spread([one[name] for one in runs]) for name in runs[0]}


def make_large(arguments: Any) -> Path:
    """Makes the tinted images, unless they exist, and returns their manifest."""
    root, random = arguments.work / "tinted_flowers", np.random.default_rng(0)
    manifest = root / "manifest.csv"
    if manifest.is_file():
        return manifest
    files = sorted((arguments.data / "flowers").glob("*/*.jpg"))
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(TRAIN + VAL + TEST):
        source, tint = files[number % len(files)], int(random.integers(TINTS))
        image = np.asarray(Image.open(io.BytesIO(source.read_bytes())).convert("RGB"), np.float32)
        height, width = image.shape[:2]
        side = int(min(height, width) * random.uniform(0.7, 1))
        top, left = (int(random.integers(0, length - side + 1)) for length in (height, width))
        colour = np.array(colorsys.hsv_to_rgb(tint / TINTS, 0.45, 1.0), np.float32)
        tinted = Image.fromarray((image[top : top + side, left : left + side] * colour).astype(np.uint8))
        label = f"{source.parent.name} {tint:02d}"
        path = root / label / f"{number:05d}.jpg"
        path.parent.mkdir(exist_ok=True)
        tinted.resize((SIDE, SIDE)).save(path, quality=85)
        rows.append((path, label, "train" if number < TRAIN else "val" if number < TRAIN + VAL else "test"))
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return manifest


def measure_calibration(arguments: Any) -> dict[str, Any]:
    dataset, results = f"folder:{arguments.data / 'flowers'}", {}
    store, run = f"--store_dir={arguments.work / 'store'}", arguments.work / "report_calibration"
    cases = {
        "finetune, 10 epochs": ("finetune",),
        "finetune, 60 epochs": ("finetune", "--epochs=60"),
        "extract, logistic_regression": ("extract",),
        "extract, logistic_regression, C=100": ("extract", "--probe_parameter=100"),
        "extract, ridge": ("extract", "--probe=ridge"),
    }
    for name, (mode, *flags) in cases.items():
        _, metrics = run_mode(arguments, mode, dataset, run, store, "--noexport", "--noreport", *flags)
        calibration = metrics["calibration"]
        results[name] = {
            "temperature": round(calibration["temperature"], 3),
            "test ece before": round(calibration["before"]["test"]["ece"], 4),
            "test ece after": round(metrics["test"]["ece"], 4),
            "test nll before": round(calibration["before"]["test"]["nll"], 4),
            "test nll after": round(metrics["test"]["nll"], 4),
            "n": metrics["test"]["n"],
        }
    return results


PARTS = {"small": measure_small, "large": measure_large, "calibration": measure_calibration}

if __name__ == "__main__":
    main()
