"""Accuracy of the quick start: transfer from letters to handwritten digits.

python -m benchmarks.quickstart

Parts for `--only`:
    seeds: letters and their network as in the quick start, then transfer and training from scratch with random seeds 0
        to 4. Each seed draws different training images.
    chain: the same transfers from the letters and networks of random seeds 1 and 2.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks.measure import ROOT, parse, run_process, write_results

SEEDS = range(5)


def main() -> None:
    arguments = parse()
    parts = arguments.only.split(",") if arguments.only else ["seeds", "chain"]
    results: dict[str, Any] = {}
    if "seeds" in parts:
        results["letters, test"] = pretrain(arguments.work, 0)
        results["transferred"] = summarize([transfer(arguments.work, 0, seed) for seed in SEEDS])
        results["from scratch"] = summarize([run(arguments.work, "quickstart_scratch", seed) for seed in SEEDS])
        results["gain"] = compare(results["transferred"], results["from scratch"])
    for letters_seed in (1, 2) if "chain" in parts else ():
        pretrain(arguments.work, letters_seed)
        transferred = [transfer(arguments.work, letters_seed, seed) for seed in SEEDS]
        results[f"transferred, letters and network of seed {letters_seed}"] = summarize(transferred)
    write_results("quickstart", results)


def pretrain(work: Path, seed: int) -> dict[str, Any]:
    letters = work / "letters"
    run_process([str(ROOT / "examples" / "letters.py"), str(letters), f"--seed={seed}"])
    return run(
        work, "quickstart_pretrain", seed, f"--dataset=folder:{letters}", f"--run_dir={work / f'letters_{seed}'}"
    )


def transfer(work: Path, letters_seed: int, seed: int) -> dict[str, Any]:
    return run(work, "quickstart", seed, f"--weights={work / f'letters_{letters_seed}'}", "--noexport", "--noreport")


def run(work: Path, step: str, seed: int, *flags: str) -> dict[str, Any]:
    """Runs a step; returns its test accuracy and 95 % confidence interval. The last of two equal flags counts."""
    folder = work / step
    places = (f"--run_dir={folder}", f"--store_dir={work / 'quickstart_store'}")
    flag_file = f"--flagfile={ROOT / 'flags' / step}.flags"
    arguments = ["-m", "tl_keras.main", flag_file, *places, f"--seed={seed}", *flags]
    run_process(arguments)
    given = [flag.partition("=")[2] for flag in arguments if flag.startswith("--run_dir=")]
    test = json.loads((Path(given[-1]) / "metrics.json").read_text())["test"]
    return {"accuracy": test["accuracy"], "interval": test["accuracy_ci95"]}


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns each seed with its confidence interval over test images, and the mean with its interval over seeds."""
    return {**average([one["accuracy"] for one in runs]), "seeds": list(runs)}


def compare(transferred: dict[str, Any], scratch: dict[str, Any]) -> dict[str, Any]:
    """Computes the gain in accuracy, paired by seed: both trainings of a seed use the same training images."""
    pairs = list(zip(transferred["seeds"], scratch["seeds"], strict=True))
    apart = sum(with_transfer["interval"][0] > without["interval"][1] for with_transfer, without in pairs)
    gains = [with_transfer["accuracy"] - without["accuracy"] for with_transfer, without in pairs]
    return {**average(gains), "seeds whose intervals are apart": apart}


def average(values: Sequence[float]) -> dict[str, Any]:
    """Computes the mean with its 95 % confidence interval (Student's t)."""
    mean = statistics.mean(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "interval of the mean": [mean - half, mean + half]}


if __name__ == "__main__":
    main()
