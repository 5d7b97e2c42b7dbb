"""Command lines as processes of their own, forked from one that has imported TensorFlow: each saves those seconds.

A fork has executed nothing of TensorFlow before, and has its own file descriptors, signals, environment and memory.
What depends on the start of Python itself, on environment variables that imports read, or on what imports write, is
tested with `subprocess`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
_PRELOADED = [
    "tl_keras.main",
    *(f"tl_keras.modes.{mode}" for mode in ("finetune", "extract", "evaluate", "export", "serve")),
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOADED)
_started: weakref.WeakSet[Process] = weakref.WeakSet()


@atexit.register
def _kill_all() -> None:
    """Otherwise Python would wait for the processes that a failed test has left."""
    for process in list(_started):
        process.kill()


class Process:
    """A command line that runs; the interface is that of `subprocess.Popen`."""

    def __init__(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        output: Path | None = None,
        cwd: Path = ROOT,
        script: Path | None = None,
    ) -> None:
        """Starts the process.

        Args:
            *arguments: the command line.
            env: the environment; None: that of this process.
            output: file of stdout and stderr together, instead of one temporary file for each.
            cwd: the working directory.
            script: a Python file to run instead of a command line.
        """
        files = [output] if output else [make_file(), make_file()]
        self._files, self._is_temporary = [files[0], files[-1]], output is None
        self.args = arguments
        environment = dict(os.environ if env is None else env)
        self._process = _context.Process(
            target=_run, args=(arguments, environment, [*map(str, self._files)], str(cwd), script)
        )
        self._process.start()
        _started.add(self)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end; stdout and stderr."""
        self.wait(timeout)
        return tuple(
            path.read_text(encoding="utf-8", errors="replace") if path.exists() else "" for path in self._files
        )

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __del__(self) -> None:
        for path in self._files if self._is_temporary else ():
            path.unlink(missing_ok=True)


def make_file() -> Path:
    handle, path = tempfile.mkstemp(prefix="tl_keras_test_")
    os.close(handle)
    return Path(path)


def _run(
    arguments: tuple[str, ...], environment: dict[str, str], files: list[str], cwd: str, script: Path | None
) -> None:
    for number, path in zip((1, 2), files, strict=True):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, encoding="utf-8", closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    from tl_keras.main import entry_point

    sys.argv = ["tl_keras", *arguments]
    try:
        if script:
            runpy.run_path(str(script), run_name="__main__")
        else:
            entry_point()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
