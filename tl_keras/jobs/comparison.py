"""`--mode=evaluate --compare`: comparison of finished runs."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

from tl_keras.config import Config
from tl_keras.evaluation.comparison import find_shared, read_runs
from tl_keras.evaluation.leaks import read_leaked
from tl_keras.evaluation.tables import format_table
from tl_keras.jobs.result import Result
from tl_keras.jobs.start import create_folder
from tl_keras.run import Screen
from tl_keras.statistics.intervals import accuracy_interval, with_interval
from tl_keras.statistics.paired import adjust_p_values, compare_paired


def compare_runs(config: Config, screen: Screen) -> Result:
    """Compares runs on the examples that all of them have predicted, without computing predictions again.

    The results are shown on the screen, and with --run_dir written to its `metrics.json`.
    """
    runs = read_runs(config.evaluation.compare)
    shared = find_shared(runs)
    for run, path in zip(runs, config.evaluation.compare, strict=True):
        leaked = read_leaked(Path(path), run.split)
        if leaked:
            screen.line(
                f"warning: {leaked:,} of the {run.split} images of {run.name}, or copies of them, are among its "
                "training images: its accuracy may be too good"
            )
    left_out = max(len(run.labels) for run in runs) - len(shared)
    if left_out:
        screen.line(f"note: {left_out:,} examples are left out, because not all runs have the same image for them")
    correct = [run.correct(shared) for run in runs]
    rows = []
    for run, right in zip(runs, correct, strict=True):
        shown = with_interval(right.mean(), accuracy_interval(int(right.sum()), len(shared)))
        rows.append((run.name, shown, f"n={len(shared):,}"))
    for line in format_table(("run", f"{runs[0].split} accuracy", ""), rows):
        screen.line(line)
    pairs = list(itertools.combinations(range(len(runs)), 2))
    found = [compare_paired(correct[first], correct[second]) for first, second in pairs]
    p_values = adjust_p_values([one.p_value for one in found])
    found = [dataclasses.replace(one, p_value=p) for one, p in zip(found, p_values, strict=True)]
    for (first, second), one in zip(pairs, found, strict=True):
        screen.result(one.describe(runs[first].name, runs[second].name))
    if len(pairs) > 1:
        screen.line(f"p values are adjusted for {len(pairs)} comparisons (Holm)")
    names = [[runs[first].name, runs[second].name] for first, second in pairs]
    compared = [{"runs": both, **dataclasses.asdict(one)} for both, one in zip(names, found, strict=True)]
    metrics = {"compared": compared}
    if not config.run.run_dir:
        return Result(metrics=metrics)
    folder = create_folder(config.run.run_dir, config, screen)
    folder.write_json("metrics.json", metrics)
    return Result(folder.path, metrics=metrics)
