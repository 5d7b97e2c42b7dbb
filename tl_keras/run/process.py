"""The process that works on a run: whether it still does, on this machine or on another one that shares the folder."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_INTERVAL = 10.0  # seconds between two signs of life
_SILENCE = 60.0  # seconds without a sign of life after which a process on another machine is considered dead
_working: list[threading.Event] = []  # the run of this process, if it is at work; set: it has ended


def describe_process() -> dict[str, Any]:
    """Describes this process, for the file that marks a run as unfinished."""
    return {"id": os.getpid(), "host": socket.gethostname(), "started": _start_time(os.getpid())}


def show_life(marker: Path) -> None:
    """Touches a file every ten seconds, until `end_life` is called or the file is removed.

    Another machine can't look for the process, but it sees that the file changes.
    """
    end_life()
    ended = threading.Event()
    _working.append(ended)

    def touch() -> None:
        while not ended.wait(_INTERVAL):
            try:
                os.utime(marker)
            except FileNotFoundError:
                return
            except OSError:  # a network disk that is away for a moment
                continue

    threading.Thread(target=touch, name="signs of life", daemon=True).start()


def end_life() -> None:
    """Ends the signs of life of this process's run."""
    while _working:
        _working.pop().set()


def find_process(marker: Path, process: Any, wait: Callable[[str], None]) -> str:
    """Finds another process that works on a run.

    On this machine, the process is looked for. On another machine, or on a system without `/proc`, it is alive if it
    touches the marker; this can take a minute.

    Args:
        marker: the file that marks the run as unfinished.
        process: `describe_process` of the process that wrote it, read from it.
        wait: shows why this takes a minute.

    Returns:
        The process in words; empty if it has ended.
    """
    if is_running_here(process):
        return f"process {process['id']}"
    own = describe_process()
    host = process.get("host") if isinstance(process, Mapping) and process != own else None
    if not host or (host == own["host"] and own["started"] is not None):
        return ""
    last = _modified(marker)
    if last is None or _now_on_disk(marker.parent) - last > _SILENCE:
        return ""
    wait(f"waiting up to {_SILENCE:.0f} s, to see whether the run is still running on {host}")
    end = time.monotonic() + _SILENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, _SILENCE / 10))
        if _modified(marker) != last:
            return f"a process on {host}"
    return ""


def is_running_here(process: Any) -> bool:
    """Whether a process is another one on this machine that is alive, see `describe_process`."""
    own = describe_process()
    if not isinstance(process, Mapping) or process == own or process.get("host") != own["host"]:
        return False
    return process.get("started") == _start_time(process.get("id")) is not None


def _modified(path: Path) -> float | None:
    """When a file was modified; it is opened, because network disks check their cache then."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return None


def _now_on_disk(folder: Path) -> float:
    """The time by the clock of the machine whose disk holds a folder; by this machine's if it can't be written."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def _start_time(process: Any) -> str | None:
    """Start time of a process, in clock ticks since boot; None if there is no such process, or no /proc.

    It distinguishes a process from a later one with the same id.
    """
    try:
        return Path(f"/proc/{int(process)}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, ValueError, TypeError, IndexError):
        return None
