"""The modes as Python functions, with the settings of the command line as keywords."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

from tl_keras.config import Config, build_config, convert_keywords, from_dict
from tl_keras.config.keywords import (
    AuditKeywords,
    EvaluateKeywords,
    ExportKeywords,
    ExtractKeywords,
    FinetuneKeywords,
    PredictKeywords,
)
from tl_keras.errors import UserError
from tl_keras.jobs.result import Result
from tl_keras.run import INTERRUPTED, Screen, end_run, find_unfinished, has_ended, read_run_config, stop_heartbeats

_STDERR = threading.Lock()  # two threads that redirected it at once would lose it
_CHATTER = re.compile(
    r"^(WARNING: All log messages before|[IW]\d{4} |To enable the following instructions|.*failed call to cuInit)"
)


def finetune(*, verbose: bool = False, **settings: Unpack[FinetuneKeywords]) -> Result:
    """Trains a head, and the requested layers of a pretrained backbone, on labeled images.

    Args:
        verbose: whether the lines of the command line are shown; they are in `run.log` in any case.
        **settings: the settings of `tl_keras finetune --help=all`, with the same defaults.

    Returns:
        Metrics and paths of the run; `.classifier` is the trained classifier.

    Raises:
        UserError: a setting is wrong, or the data, the weights or the disk can't be used; one line says which.
        KeyboardInterrupt: the user interrupted the run; its folder is complete as far as it goes, and `resume=True`
            continues it.
    """
    return _call("finetune", settings, verbose=verbose)


def extract(*, verbose: bool = False, **settings: Unpack[ExtractKeywords]) -> Result:
    """Trains a scikit-learn classifier on the embeddings of a pretrained backbone.

    Args:
        verbose: see `finetune`.
        **settings: the settings of `tl_keras extract --help=all`, with the same defaults.

    Returns:
        See `finetune`.

    Raises:
        UserError: see `finetune`.
    """
    return _call("extract", settings, verbose=verbose)


def evaluate(*, verbose: bool = False, **settings: Unpack[EvaluateKeywords]) -> Result:
    """Measures a trained classifier on labeled images, or compares finished runs.

    Args:
        verbose: see `finetune`.
        **settings: the settings of `tl_keras evaluate --help=all`, with the same defaults.

    Returns:
        Metrics, and the folder of the evaluation.

    Raises:
        UserError: see `finetune`.
    """
    return _call("evaluate", settings, verbose=verbose)


def predict(*, verbose: bool = False, **settings: Unpack[PredictKeywords]) -> Result:
    """Classifies images, and writes a CSV file; `load_classifier(...).predict` returns predictions instead.

    Args:
        verbose: see `finetune`.
        **settings: the settings of `tl_keras predict --help=all`, with the same defaults.

    Returns:
        The exit status: 0, or 1 if no image could be classified.

    Raises:
        UserError: see `finetune`.
    """
    if not settings.get("output"):
        raise UserError("output is missing: the CSV file of predictions. load_classifier(...).predict returns them.")
    return _call("predict", settings, verbose=verbose)


def audit(*, verbose: bool = False, **settings: Unpack[AuditKeywords]) -> Result:
    """Finds duplicates, data leakage, label errors and outliers in a data set.

    Args:
        verbose: see `finetune`.
        **settings: the settings of `tl_keras audit --help=all`, with the same defaults.

    Returns:
        Counts of the findings as metrics, and the folder of the audit.

    Raises:
        UserError: see `finetune`.
    """
    return _call("audit", settings, verbose=verbose)


def export(*, verbose: bool = False, **settings: Unpack[ExportKeywords]) -> Result:
    """Exports a trained classifier as a SavedModel.

    Args:
        verbose: see `finetune`.
        **settings: the settings of `tl_keras export --help=all`, with the same defaults.

    Returns:
        The exported version folder as `.exported`.

    Raises:
        UserError: see `finetune`.
    """
    return _call("export", settings, verbose=verbose)


def run_mode(config: Config, screen: Screen, *, owns_process: bool = False) -> Result:
    """Runs a mode, and marks its run folder as complete.

    Args:
        config: the settings.
        screen: what the user sees.
        owns_process: whether the process does nothing else: the modules that are loaded for the mode are then never
            searched for garbage, which takes half a second each time.

    Raises:
        UserError: see `finetune`; the log of the run has its text too.
    """
    from tl_keras.jobs.inputs import check_inputs  # loads NumPy, which the help does without

    check_inputs(config)
    with screen.watch.stage("imports"), quiet_tensorflow(level="2" if config.mode == "doctor" else "3"):
        mode = importlib.import_module(f"tl_keras.modes.{config.mode}")
    if owns_process:
        gc.freeze()
    try:
        result: Result = mode.run(config, screen)
        if result.run_dir and result.is_complete:
            for kept in end_run(Path(str(result.run_dir)), keep_replaced=bool(result.exit_status)):
                screen.line(f"the earlier run is kept: {kept}")
    except UserError as error:
        screen.log(f"tl_keras: error: {' '.join(str(error).split())}")
        raise
    finally:
        stop_heartbeats()
    return result


@contextlib.contextmanager
def quiet_tensorflow(*, level: str = "3") -> Iterator[None]:
    """Hides what TensorFlow's C++ code writes to stderr while it is loaded; its errors are shown.

    TF_CPP_MIN_LOG_LEVEL alone does not: the first lines are written before the setting is read (TF 2.21). Failures are
    also raised as exceptions; at level 2 each truncated JPEG would write a line.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", level)
    os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever the user's other programs run on
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.ERROR)
    with _STDERR, _without_collector(), _filtered_stderr():
        try:
            yield
            _start_devices()
            _reset_keras()
        except ImportError as error:
            raise UserError(
                f"TensorFlow can't be imported: {error}. Try: pip install --force-reinstall tensorflow keras."
            ) from error


@contextlib.contextmanager
def _filtered_stderr() -> Iterator[None]:
    """Holds back what is written to stderr, and shows it at the end, without chatter."""
    try:
        sys.stderr.flush()
        saved = os.dup(2)
    except (AttributeError, OSError):  # a program without a console has no stderr
        yield
        return
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            caught.seek(0)
            for line in caught.read().decode("utf-8", "replace").splitlines():
                if line.strip() and not _CHATTER.match(line):
                    print(line, file=sys.stderr)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Disables the search for cyclic garbage while modules are loaded, of which it takes a seventh of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def find_resumed(mode: str, given: dict[str, Any]) -> Config | None:
    """The settings of the run that `resume` continues; None if there is no such run yet.

    Args:
        mode: the mode.
        given: the given settings; `run_dir` is added if it is missing.

    Raises:
        UserError: `run_dir` is missing, and there is no unfinished run to take in its place.
    """
    run_dir = given.get("run_dir") or find_unfinished(mode)
    if not run_dir:
        raise UserError(
            f"--resume: the folder runs has no unfinished run of --mode={mode}. Name the run with --run_dir."
        )
    given["run_dir"] = run_dir
    found = read_run_config(os.path.expanduser(run_dir))
    if not found and not given.keys() - {"resume", "run_dir"}:
        raise UserError(f"--resume: {run_dir} holds no run. Check --run_dir, or give the settings of a new run.")
    try:
        return from_dict(found) if found else None
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{run_dir}/config.json is not the configuration of a run. Give the folder of an unfinished run."
        ) from error


def is_finished(config: Config) -> bool:
    """Whether a run that is to be resumed is complete."""
    return config.run.resume and bool(config.run.run_dir) and has_ended(Path(str(config.run.run_dir)))


def _call(mode: str, settings: Mapping[str, Any], *, verbose: bool) -> Result:
    config = build_config(mode, convert_keywords(settings, mode=mode), find_earlier=find_resumed)
    if is_finished(config):
        raise UserError(f"the run in {config.run.run_dir} is complete: there is nothing to resume.")
    result = run_mode(config, Screen(shows="all" if verbose else "nothing"))
    if result.exit_status == INTERRUPTED:
        raise KeyboardInterrupt
    return result


def _start_devices() -> None:
    """Lets TensorFlow find its devices now, while its messages about them are hidden."""
    if "tensorflow" in sys.modules:
        sys.modules["tensorflow"].config.list_logical_devices()


def _reset_keras() -> None:
    """Resets what `~/.keras/keras.json` sets for other programs: our networks are float32, channels last."""
    if "keras" in sys.modules:
        sys.modules["keras"].config.set_image_data_format("channels_last")
        sys.modules["keras"].config.set_floatx("float32")
