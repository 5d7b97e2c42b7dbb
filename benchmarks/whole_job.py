"""Whole jobs of 10 epochs on flowers, including the process start, compared with plain Keras.

python -m benchmarks.whole_job --only=mobilenet

Parts for `--only`: mobilenet, resnet. With ResNet50, plain Keras runs two epochs, and the duration of the second is
used for the remaining ones: ten epochs take half an hour.
"""

from __future__ import annotations

import json
import shutil
import statistics
from typing import Any

from benchmarks.measure import MOBILENET_WEIGHTS, parse, run_process, spread, write_results

EPOCHS = 10


def main() -> None:
    arguments = parse()
    parts = arguments.only.split(",") if arguments.only else ["mobilenet", "resnet"]
    results: dict[str, Any] = {}
    if "mobilenet" in parts:
        weights = str(arguments.data / MOBILENET_WEIGHTS)
        ours = ["--backbone=MobileNetV2", "--backbone_kwargs=alpha=0.35", f"--weights={weights}"]
        results["MobileNetV2 alpha=0.35"] = compare(arguments, "MobileNetV2", weights, ours, peer_epochs=EPOCHS)
    if "resnet" in parts:
        ours = ["--backbone=ResNet50", "--weights=none"]
        results["ResNet50"] = compare(arguments, "ResNet50", "none", ours, peer_epochs=2)
    write_results("whole_job", results)


def compare(arguments: Any, backbone: str, weights: str, flags: list[str], *, peer_epochs: int) -> dict[str, Any]:
    flowers, store, seconds = str(arguments.data / "flowers"), arguments.work / "store", {}
    for name in ("cold", "warm", "plain Keras"):
        seconds[name] = []
    for _ in range(arguments.runs):
        shutil.rmtree(store, ignore_errors=True)
        for name in ("cold", "warm"):
            command = ["-m", "tl_keras.main", "--mode=finetune", f"--dataset=folder:{flowers}", *flags]
            places = [f"--run_dir={arguments.work / 'run'}", "--overwrite", f"--store_dir={store}"]
            export = [
                f"--export_dir={arguments.work / 'models'}",
                "--val_fraction=0.1",
                f"--epochs={EPOCHS}",
                "--noreport",
            ]
            seconds[name].append(run_process([*command, *places, *export])[0])
        whole, output = run_process(["-m", "benchmarks.plain_keras", flowers, backbone, weights, str(peer_epochs)])
        last = json.loads(output.splitlines()[-1])["epoch_seconds"][-1]
        seconds["plain Keras"].append(whole + last * (EPOCHS - peer_epochs))
        print(backbone, {name: round(values[-1], 1) for name, values in seconds.items()}, flush=True)
    ratios = {
        name: spread([peer / own for peer, own in zip(seconds["plain Keras"], seconds[name], strict=True)])
        for name in ("cold", "warm")
    }
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times faster": ratios,
        "median times faster": {
            name: statistics.median(seconds["plain Keras"]) / statistics.median(seconds[name]) for name in ratios
        },
        "plain Keras's epochs measured": peer_epochs,
    }


if __name__ == "__main__":
    main()
