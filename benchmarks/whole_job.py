"""Whole jobs of the default command on flowers and hymenoptera, report included, compared with plain Keras.

python -m benchmarks.whole_job --only=flowers,hymenoptera,resnet [--other=/path/to/another/checkout]

Parts for `--only`: flowers and hymenoptera (MobileNetV2 alpha=0.35), resnet (ResNet50 on flowers). A job is timed from
the start of its process to its end; CPU seconds are those of the process and its children. With `--other` each run is
repeated with another checkout in alternation. Plain Keras is measured once, as it takes many times as long: it trains
three epochs (ResNet50: two), and the duration of the last is used for the others of the ten that the default command
trains.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

from benchmarks.measure import MOBILENET_WEIGHTS, ROOT, parse, run_process, spread, write_results

EPOCHS = 10


def main() -> None:
    arguments = parse()
    parts = arguments.only.split(",") if arguments.only else ["flowers", "hymenoptera", "resnet"]
    weights, results = str(arguments.data / MOBILENET_WEIGHTS), dict[str, Any]()
    small = ["--backbone=MobileNetV2", "--backbone_kwargs=alpha=0.35", f"--weights={weights}"]
    for data, peer in (("flowers", ["MobileNetV2", weights, "3"]), ("hymenoptera", [])):
        if data in parts:
            results[f"{data}, MobileNetV2 alpha=0.35"] = compare(arguments, data, small, peer)
    if "resnet" in parts:
        network = ["--backbone=ResNet50", "--weights=none"]
        results["flowers, ResNet50"] = compare(arguments, "flowers", network, ["ResNet50", "none", "2"])
    write_results("whole_job", results)


def compare(arguments: Any, data: str, network: list[str], peer: list[str]) -> dict[str, Any]:
    """Times cold and warm jobs, and plain Keras if `peer` names its network, weights and epochs."""
    folder, measured = arguments.data / data, dict[str, list[dict[str, Any]]]()
    checkouts = {"": ROOT, **({"earlier, ": Path(arguments.other)} if arguments.other else {})}
    for number in range(arguments.runs):
        for checkout, root in checkouts.items():
            store = arguments.work / "store"
            shutil.rmtree(store, ignore_errors=True)
            for name in ("cold", "warm"):
                job = run_job(arguments.work, root, folder, [*network, f"--store_dir={store}"])
                measured.setdefault(f"{checkout}{name}", []).append(job)
                print(data, checkout, name, job, flush=True)
        if peer and number == 0:
            seconds, output = run_process(["-m", "benchmarks.plain_keras", str(folder), *peer])
            last, left = json.loads(output.splitlines()[-1])["epoch_seconds"][-1], EPOCHS - int(peer[2])
            job = {"seconds": seconds + last * left}
            measured.setdefault("plain Keras", []).append(job)
            print(data, "plain Keras", job, flush=True)
    return summarize(measured)


def run_job(work: Path, root: Path, folder: Path, flags: list[str]) -> dict[str, Any]:
    """Runs the default command of a checkout; its seconds, its CPU seconds, and its seconds by stage."""
    places = [f"--run_dir={work / 'run'}", "--overwrite", f"--export_dir={work / 'models'}"]
    shutil.rmtree(work / "models", ignore_errors=True)
    command = ["-m", "tl_keras.main", "--mode=finetune", f"--dataset=folder:{folder}", *flags, *places]
    start = sum(os.times()[2:4])
    seconds, _ = run_process(command, root=root)
    stages = json.loads((work / "run" / "metrics.json").read_text())["timing"]["seconds"]
    return {"seconds": seconds, "CPU seconds": sum(os.times()[2:4]) - start, "stages": stages}


def summarize(measured: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, jobs in measured.items():
        results[name] = {
            key: spread([job[key] for job in jobs]) for key in ("seconds", "CPU seconds") if key in jobs[0]
        }
        if "stages" in jobs[0]:
            results[name]["seconds by stage"] = {
                stage: spread([job["stages"][stage] for job in jobs]) for stage in jobs[0]["stages"]
            }
    if "plain Keras" in measured:
        peers = [job["seconds"] for job in measured["plain Keras"]]
        results["median times faster"] = {
            name: statistics.median(peers) / statistics.median([job["seconds"] for job in measured[name]])
            for name in ("cold", "warm")
        }
    return results


if __name__ == "__main__":
    main()
