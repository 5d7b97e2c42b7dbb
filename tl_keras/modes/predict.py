"""`--mode=predict`: classifies images and writes a CSV file, row by row."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from tl_keras.classifier import TOP_K, load
from tl_keras.config import Config
from tl_keras.data.sources import find_images, read_files
from tl_keras.errors import UserError
from tl_keras.jobs.result import Result
from tl_keras.run import Screen, count_of, csv_writer, disk_errors, is_special

_DIGITS = 6


def run(config: Config, screen: Screen | None = None) -> Result:
    """Classifies files, folders and glob patterns; the reason for a broken image is in the column `error`.

    The exit status is 1 if no image could be classified.
    """
    screen = Screen(sys.stderr, shows=screen.shows if screen else "all")  # standard output may be the CSV
    paths = find_images(config.read.images)
    classifier = load(str(config.read.classifier))
    broken = done = 0
    with _open(config.read.output) as file, disk_errors(str(config.read.output or "standard output")):
        writer = csv_writer(file)
        ranks = range(2, min(TOP_K, len(classifier.labels)) + 1)
        extra = [name for rank in range(2, TOP_K + 1) for name in (f"label_{rank}", f"probability_{rank}")]
        writer.writerow(["id", "predicted", "probability", *extra, "error"])
        contents = (content for _, content in read_files(paths, range(len(paths))))
        for batch in classifier.predict_batches(contents):
            for prediction in batch:
                writer.writerow(_row(paths[done], prediction, ranks))
                broken, done = broken + bool(prediction["error"]), done + 1
            file.flush()
            screen.progress(f"predicting {done:,}/{len(paths):,}")
    note = f", {broken:,} broken (see the column error)" if broken else ""
    where = f" · {config.read.output}" if config.read.output else ""
    screen.result(f"{count_of(done - broken, 'image')} classified{note}{where}")
    return Result(exit_status=int(bool(done) and broken == done))


def _row(path: str, prediction: dict[str, Any], ranks: Sequence[int]) -> list[Any]:
    if prediction["error"]:
        return [path, *[""] * (2 * TOP_K), prediction["error"]]
    row: list[Any] = [path, prediction["predicted"], round(prediction["probability"], _DIGITS)]
    for rank in ranks:
        row += [prediction["labels"][rank - 1], round(prediction["scores"][rank - 1], _DIGITS)]
    return [*row, *[""] * (2 * TOP_K + 1 - len(row)), ""]


@contextlib.contextmanager
def _open(output: str | None) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        return
    if os.path.isdir(output):
        raise UserError(f"--output={output} is a folder. Give the name of a file in it: predictions.csv.")
    if is_special(Path(output)):  # /dev/stdout, or a pipe
        with disk_errors(output), open(output, "a", encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield file
        return
    output = os.path.realpath(output)  # a link keeps leading to the file
    with disk_errors(output):  # unlike `open_atomically`, the rows so far can be read, and are kept on an interruption
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(output + ".unfinished")
        with unfinished.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield file
        unfinished.replace(output)
