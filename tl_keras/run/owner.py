"""The owner of a run: the one process that may write to its folder."""

from __future__ import annotations

import functools
import json
import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_keras.errors import LostRunError

# thread → its unfinished runs: the file that marks a run as unfinished, and whether the run has ended
beating: dict[int, list[tuple[Path, threading.Event]]] = {}


def describe_process() -> dict[str, Any]:
    """Describes this process, for the file that marks a run as unfinished."""
    return dict(_describe(os.getpid()))


@functools.cache  # the name of a machine may change during a run
def _describe(process: int) -> Mapping[str, Any]:
    return {
        "id": process,
        "host": socket.gethostname(),
        "machine": _identify_machine(),
        "started": start_time(process),
    }


def check_owner(path: Path) -> None:
    """Checks, before something in a run of this process is written, that no other process has continued the run.

    A process that was suspended for more than a minute looks dead to another machine, and two processes may continue
    the same run at the same moment: the one that wrote the marker last owns the run.

    Args:
        path: the run folder, or a file or folder in it. The marker itself passes, and so do paths outside of the runs
            of this process.

    Raises:
        LostRunError: another process works on the run, or has ended it.
    """
    path = Path(os.path.abspath(path))
    for marker in [marker for runs in list(beating.values()) for marker, _ in runs]:
        folder = Path(os.path.abspath(marker.parent))
        if path.is_relative_to(folder) and path != folder / marker.name:
            other = find_other(marker)
            if other:
                raise LostRunError(
                    f"{other} has continued the run in {marker.parent}, so this process stops. If that one does not "
                    "complete it, run the same command again."
                )


def find_other(marker: Path) -> str:
    """Describes which other process works on a run of this process, or has; empty if none, or if it is unknown."""
    try:
        content = json.loads(marker.read_bytes())
    except FileNotFoundError:
        return "another process"  # and has completed it
    except (OSError, ValueError):  # a network disk is away for a moment
        return ""
    process = content.get("process") if isinstance(content, dict) else None
    if not isinstance(process, Mapping):
        return "another process"  # and has left it
    return "" if process == describe_process() else f"process {process.get('id')} on {process.get('host')}"


def _identify_machine() -> str:
    """Identifies the boot of this machine and its namespace of processes: two containers may have one hostname."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def start_time(process: Any) -> str | None:
    """Start time of a process, in clock ticks since boot; None if there is no such process, or no /proc.

    It distinguishes a process from a later one with the same id.
    """
    try:
        return Path(f"/proc/{int(process)}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, ValueError, TypeError, IndexError):
        return None
