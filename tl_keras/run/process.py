"""The process that works on a run: whether it is alive, on this machine or on another one that shares the folder."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tl_keras.errors import LostRunError, UserError
from tl_keras.run.files import read_json, write_atomically

_HEARTBEAT_SECONDS = 10.0
_TIMEOUT_SECONDS = 60.0  # a process on another machine without a heartbeat for so long is considered dead
_beating: dict[int, list[tuple[Path, threading.Event]]] = {}  # thread → its runs: marker, and whether they have ended


def describe_process() -> dict[str, Any]:
    """Describes this process, for the file that marks a run as unfinished."""
    return dict(_describe(os.getpid()))


@functools.cache  # the name of a machine may change during a run
def _describe(process: int) -> Mapping[str, Any]:
    return {
        "id": process,
        "host": socket.gethostname(),
        "machine": _identify_machine(),
        "started": _start_time(process),
    }


def start_heartbeat(marker: Path) -> None:
    """Touches a file every ten seconds, until this thread calls `stop_heartbeats`.

    Another machine can't look for the process, but it sees that the file changes.

    Args:
        marker: the file that marks the run as unfinished.
    """
    stopped = threading.Event()
    _beating.setdefault(threading.get_ident(), []).append((marker, stopped))

    def beat() -> None:
        while not stopped.wait(_HEARTBEAT_SECONDS) and not _find_other(marker):
            with contextlib.suppress(OSError):  # a network disk may be away for a moment
                os.utime(marker)

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()


def stop_heartbeats() -> None:
    """Stops the heartbeats of this thread's runs, and records in their markers that no process works on them."""
    for marker, stopped in _beating.pop(threading.get_ident(), []):
        stopped.set()
        with contextlib.suppress(UserError, OSError):
            content = read_json(marker)
            if isinstance(content, dict) and content.get("process") == describe_process():
                write_atomically(marker, json.dumps({**content, "process": None}).encode())


def stop_heartbeat(marker: Path) -> None:
    """Stops the heartbeat of a run that has ended."""
    for runs in list(_beating.values()):
        for run in [one for one in runs if one[0] == marker]:
            run[1].set()
            runs.remove(run)


def check_owner(path: Path) -> None:
    """Checks, before something is written to a run of this process, that no other process has continued the run.

    A process that was suspended for more than a minute looks dead to another machine, and two processes may continue
    the same run at the same moment: the one that wrote the marker last owns the run.

    Args:
        path: the run folder, or a file or folder in it. Paths outside of the runs of this process pass.

    Raises:
        LostRunError: another process works on the run, or has ended it.
    """
    for marker in [marker for runs in list(_beating.values()) for marker, _ in runs]:
        if marker.parent in {path, *path.parents}:
            other = _find_other(marker)
            if other:
                raise LostRunError(
                    f"{other} has continued the run in {marker.parent}, so this process stops. Its result will be in "
                    "the folder."
                )


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
    return process.get("started") == _start_time(process.get("id")) is not None


def may_run_elsewhere(marker: Path, process: Any) -> bool:
    """Whether a process can't be looked for on this machine, and has touched its marker within the last minute."""
    own = describe_process()
    if not isinstance(process, Mapping) or process == own:
        return False
    if process.get("machine") == own["machine"] and own["started"] is not None:
        return False
    last = _modified(marker)
    return last is not None and _now_on_disk(marker.parent) - last <= _TIMEOUT_SECONDS


def _find_other(marker: Path) -> str:
    """Describes which other process works on a run of this process, or has; empty if none, or if it is unknown."""
    try:
        content = json.loads(marker.read_bytes())
    except FileNotFoundError:
        return "another process"  # and has completed it
    except (OSError, ValueError):  # a network disk is away for a moment
        return ""
    process = content.get("process") if isinstance(content, dict) else None
    own = describe_process()
    if not isinstance(process, Mapping):
        return "another process"  # and has left it
    is_own = all(process.get(key) == own[key] for key in ("id", "machine", "started"))
    return "" if is_own else f"process {process.get('id')} on {process.get('host')}"


def _identify_machine() -> str:
    """Identifies the boot of this machine and its namespace of processes: two containers may have one hostname."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


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
