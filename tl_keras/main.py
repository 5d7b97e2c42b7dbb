"""The command line: parses the flags, builds the Config, runs the mode. A user's mistake becomes one line."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence

from tl_keras import config
from tl_keras.api import find_resumed, is_finished, run_mode
from tl_keras.config.completion import COMPLETION_HELP, completion
from tl_keras.config.help import HELP, find_help_request, overview
from tl_keras.errors import LostRunError, UserError
from tl_keras.run import INTERRUPTED, Interrupts, Screen, repeat_interrupt, repeat_printed_interrupt
from tl_keras.version import __version__

_NOTHING_LOST = "nothing is lost: the same command with --resume continues the run"
_KEPT = {
    "audit": _NOTHING_LOST,
    "finetune": _NOTHING_LOST,
    "extract": _NOTHING_LOST,
    "predict": "no file of predictions was written",
    "evaluate": "no metrics were written",
    "export": "no version was exported",
}


def main(argv: Sequence[str] | None = None, *, owns_process: bool = False) -> int:
    """Runs the command line.

    Args:
        argv: program name, then flags; the process's own where not given.
        owns_process: see `run_mode`.

    Returns:
        The exit status: 0, 1 for a user's mistake, 130 where the user interrupted.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a file's name may be no UTF-8
    Interrupts.listen()
    try:
        status = _run(list(sys.argv if argv is None else argv), owns_process=owns_process)
        print(end="", flush=True)  # Python does it after us, where nothing is left to catch a closed pipe
        return status
    except (UserError, LostRunError) as error:
        print(f"tl_keras: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tl_keras: interrupted before anything was done", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `predict | head` has read enough
        _silence_stdout()
        return 0
    except OSError as error:
        if Interrupts.arrived:  # it came in a system call, or within a library
            print("tl_keras: interrupted; complete files are kept", file=sys.stderr)
            return INTERRUPTED
        if error.errno != errno.ENOSPC:
            raise
        _silence_stdout()
        print("tl_keras: error: the disk is full. What is complete is kept: free space, run again.", file=sys.stderr)
        return 1


def _silence_stdout() -> None:
    """Python flushes standard output once more when it ends, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: list[str], *, owns_process: bool) -> int:
    arguments = argv[1:]
    if not arguments:
        print(overview())
        return 0
    if arguments[0] == "completion":
        shell = arguments[1] if len(arguments) > 1 else ""
        print(COMPLETION_HELP if shell in HELP else completion(shell), end="")
        return 0
    request = find_help_request(arguments)
    if request:
        print(request.text())
        return 0
    values = config.define_flags()
    config.parse_flags(values, arguments)
    if values["version"].value:
        print(f"tl_keras {__version__}")
        return 0
    settings = config.read_flags(values, find_earlier=find_resumed)
    run_dir = settings.run.run_dir
    if is_finished(settings):
        print(f"the run in {run_dir} is complete: there is nothing to resume")
        return 0
    if values["dry_run"].value:
        print(settings.as_flags(), end="")
        return 0
    screen = Screen(shows="warnings" if values["quiet"].value else "all")
    if settings.run.resume and not values["run_dir"].present:
        screen.line(f"resuming {run_dir}")
    try:
        with Interrupts.restored():
            return run_mode(settings, screen, owns_process=owns_process).exit_status
    except KeyboardInterrupt:
        text = f"tl_keras: interrupted; {_KEPT.get(settings.mode, 'nothing was lost')}"
        screen.log(text)
        print(text, file=sys.stderr)
        return INTERRUPTED


def entry_point() -> None:
    """The installed command `tl_keras`."""
    sys.unraisablehook = repeat_interrupt
    sys.excepthook = repeat_printed_interrupt
    try:
        status = main(owns_process=True)
    finally:
        sys.excepthook = sys.__excepthook__
    sys.exit(status)


if __name__ == "__main__":
    entry_point()
