"""The process that works on a run: whether it is alive, on this machine or on another one that shares the folder."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tl_keras.errors import UserError
from tl_keras.run.files import read_json, write_atomically
from tl_keras.run.owner import beating, describe_process, find_other, start_time

_HEARTBEAT_SECONDS = 10.0
_TIMEOUT_SECONDS = 60.0  # a process on another machine without a heartbeat for so long is considered dead


def start_heartbeat(marker: Path) -> None:
    """Touches a file every ten seconds, until this thread calls `stop_heartbeats`.

    Another machine can't look for the process, but it sees that the file changes.

    Args:
        marker: the file that marks the run as unfinished.
    """
    stopped = threading.Event()
    beating.setdefault(threading.get_ident(), []).append((marker, stopped))

    def beat() -> None:
        while not stopped.wait(_HEARTBEAT_SECONDS) and not find_other(marker):
            with contextlib.suppress(OSError):  # a network disk may be away for a moment
                os.utime(marker)

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()


def stop_heartbeats() -> None:
    """Stops the heartbeats of this thread's runs, and records in their markers that no process works on them."""
    for marker, stopped in beating.pop(threading.get_ident(), []):
        stopped.set()
        with contextlib.suppress(UserError, OSError):
            content = read_json(marker)
            if isinstance(content, dict) and content.get("process") == describe_process():
                write_atomically(marker, json.dumps({**content, "process": None}).encode())


def stop_heartbeat(marker: Path) -> None:
    """Stops the heartbeat of a run that has ended."""
    for runs in list(beating.values()):
        for run in [one for one in runs if one[0] == marker]:
            run[1].set()
            runs.remove(run)


def find_process(marker: Path, process: Any, show: Callable[[str], None]) -> str:
    """Finds another process that works on a run.

    On this machine, `/proc` tells whether the process exists. On another machine, or on a system without `/proc`, it is
    alive if it touches the marker; checking this can take a minute.

    Args:
        marker: the file that marks the run as unfinished.
        process: `describe_process` of the process that wrote it, read from it; None if it has ended.
        show: called with a line before a wait of up to a minute.

    Returns:
        The process in words; empty if it has ended.
    """
    if is_running_here(process):
        return f"process {process['id']}"
    if not may_run_elsewhere(marker, process):
        return ""
    last, host = _modified(marker), process.get("host")
    show(f"checking for up to {_TIMEOUT_SECONDS:.0f} s whether the run is still running on {host}")
    end = time.monotonic() + _TIMEOUT_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, _TIMEOUT_SECONDS / 10))
        if _modified(marker) != last:
            return f"a process on {host}"
    return ""


def is_running_here(process: Any) -> bool:
    """Whether a process is another one on this machine that is alive, see `describe_process`."""
    own = describe_process()
    if not isinstance(process, Mapping) or process == own or process.get("machine") != own["machine"]:
        return False
    return process.get("started") == start_time(process.get("id")) is not None


def may_run_elsewhere(marker: Path, process: Any) -> bool:
    """Whether a process can't be looked for on this machine, and has touched its marker within the last minute."""
    own = describe_process()
    if not isinstance(process, Mapping) or process == own:
        return False
    if process.get("machine") == own["machine"] and own["started"] is not None:
        return False
    last = _modified(marker)
    return last is not None and _now_on_disk(marker.parent) - last <= _TIMEOUT_SECONDS


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
