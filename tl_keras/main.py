"""The door: parse the flags, build the Config, call the mode. A user's mistake becomes one line."""

from __future__ import annotations

import _thread
import contextlib
import errno
import importlib
import io
import logging
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from tl_keras import __version__, config
from tl_keras.errors import UserError
from tl_keras.run import INTERRUPTED, Result, end_run, find_unfinished, has_ended, read_run_config

_MODULES = {mode: f"tl_keras.modes.{mode}" for mode in config.MODES}
_NOTHING_LOST = "nothing is lost: the same command with --resume continues the run"
_KEPT = {
    "audit": _NOTHING_LOST,
    "finetune": _NOTHING_LOST,
    "extract": _NOTHING_LOST,
    "predict": "no file of predictions was written",
    "evaluate": "no metrics were written",
    "export": "no version was exported",
}
_REPEAT_SECONDS = 0.05  # until what swallowed it has returned
_CHATTER = re.compile(
    r"^(WARNING: All log messages before|[IW]\d{4} |To enable the following instructions|.*failed call to cuInit)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: program name, then flags; the process's own where not given.

    Returns:
        The exit status: 0, 1 for a user's mistake, 130 where the user interrupted.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a file's name may be no UTF-8
    _treat_termination_as_interrupt()
    try:
        status = _run(list(sys.argv if argv is None else argv))
        print(end="", flush=True)  # Python does it after us, where nothing is left to catch a closed pipe
        return status
    except UserError as error:
        print(f"tl_keras: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tl_keras: interrupted before anything was done", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `predict | head` has read enough
        _silence_stdout()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _silence_stdout()
        print("tl_keras: error: the disk is full. What is complete is kept: free space, run again.", file=sys.stderr)
        return 1


def _treat_termination_as_interrupt() -> None:
    """SIGTERM ends a run as Ctrl-C does: Slurm, Kubernetes and spot instances send it before they kill."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: Any) -> None:
    """Hands SIGTERM to whoever handles SIGINT at the moment.

    Raises:
        KeyboardInterrupt: nobody does: a shell starts background jobs with SIGINT ignored.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        raise KeyboardInterrupt
    handler(number, frame)


def _repeat_interrupt(unraisable: sys.UnraisableHookArgs) -> None:
    """Python drops a Ctrl-C that comes while a destructor or a callback runs, of which TensorFlow has many."""
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(_REPEAT_SECONDS, _interrupt_main_thread).start()
    else:
        sys.__unraisablehook__(unraisable)


def _interrupt_main_thread() -> None:
    """Ctrl-C once more, also for a system call that waits; Windows can't interrupt one."""
    main_thread = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main_thread is not None:
        signal.pthread_kill(main_thread, signal.SIGINT)
    else:
        _thread.interrupt_main()


def _silence_stdout() -> None:
    """Python flushes standard output once more when it ends, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: list[str]) -> int:
    values = config.define_flags()
    try:
        rest = values(argv)[1:]
    except flags.Error as error:
        text = str(error).removeprefix("ERROR:: ").replace(" ?", "?").rstrip(".")
        raise UserError(f"{text}. `python -m tl_keras.main --help` lists all flags.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the flag file is not UTF-8: {error}. Save it as UTF-8.") from error
    if values["help"].value:
        print(config.help_text())
        return 0
    if values["version"].value:
        print(f"tl_keras {__version__}")
        return 0
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag. Every setting is a flag: --name=value.")
    settings = config.read_flags(values, earlier=_read_resumed(values))
    run_dir = settings.run.run_dir
    if settings.run.resume and run_dir and has_ended(Path(run_dir)):
        print(f"the run in {run_dir} is complete: there is nothing to resume")
        return 0
    if values["dry_run"].value:
        print(settings.as_flags(), end="")
        return 0
    with _quiet_tensorflow(level="2" if settings.mode == "doctor" else "3"):
        mode = importlib.import_module(_MODULES[settings.mode])
    try:
        result: Result = mode.run(settings)
        if result.run_dir and result.is_complete:
            _end(result)
        return result.exit_status
    except KeyboardInterrupt:
        print(f"tl_keras: interrupted; {_KEPT.get(settings.mode, 'nothing was lost')}", file=sys.stderr)
        return INTERRUPTED


def _end(result: Result) -> None:
    """Marks a run as complete; an earlier run that it replaces is deleted only if nothing went wrong."""
    for kept in end_run(Path(str(result.run_dir)), keep_replaced=bool(result.exit_status)):
        print(f"the earlier run is kept: {kept}")


def _has_settings(values: flags.FlagValues) -> bool:
    """Whether more is given than which run is to be resumed."""
    return any(values[name].present for name in values if name not in {"mode", "resume", "run_dir"})


def _read_resumed(values: flags.FlagValues) -> config.Config | None:
    """The settings of the run that --resume continues; None if it is not given, or there is no such run yet.

    Raises:
        UserError: --run_dir is missing, and there is no unfinished run to take in its place.
    """
    if not values["resume"].value:
        return None
    mode, run_dir = str(values["mode"].value), values["run_dir"].value
    if not run_dir:
        run_dir = find_unfinished(mode)
        if not run_dir:
            raise UserError(
                f"--resume: the folder runs has no unfinished run of --mode={mode}. Name the run with --run_dir."
            )
        values["run_dir"].value = run_dir
        values["run_dir"].present += 1
    found = read_run_config(os.path.expanduser(run_dir))
    if not found and not _has_settings(values):
        raise UserError(f"--resume: {run_dir} holds no run. Check --run_dir, or give the settings of a new run.")
    try:
        return config.from_dict(found) if found else None
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{run_dir}/config.json is not a run's. Give the folder of an unfinished run.") from error


@contextlib.contextmanager
def _quiet_tensorflow(*, level: str) -> Iterator[None]:
    """Keeps what TensorFlow's C++ writes to stderr while it is loaded off the screen; errors are shown all the same.

    TF_CPP_MIN_LOG_LEVEL alone does not: its first lines are written before the setting is read (TF 2.21). What goes
    wrong comes as an exception too; at level 2 each truncated JPEG would write a line.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", level)
    os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever the user's other programs run on
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.ERROR)
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
            _start_devices()
            _reset_keras()
        except ImportError as error:
            raise UserError(
                f"TensorFlow can't be imported: {error}. Try: pip install --force-reinstall tensorflow keras."
            ) from error
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            caught.seek(0)
            for line in caught.read().decode("utf-8", "replace").splitlines():
                if line.strip() and not _CHATTER.match(line):
                    print(line, file=sys.stderr)


def _start_devices() -> None:
    """Lets TensorFlow find its devices now, while its messages about them are caught."""
    if "tensorflow" in sys.modules:
        sys.modules["tensorflow"].config.list_logical_devices()


def _reset_keras() -> None:
    """Undoes what `~/.keras/keras.json` sets for other programs: our networks are float32, channels last."""
    if "keras" in sys.modules:
        sys.modules["keras"].config.set_image_data_format("channels_last")
        sys.modules["keras"].config.set_floatx("float32")


def entry_point() -> None:
    """The installed command `tl_keras`."""
    sys.unraisablehook = _repeat_interrupt
    sys.exit(main())


if __name__ == "__main__":
    entry_point()
