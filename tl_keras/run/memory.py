"""Free memory of the machine."""

from __future__ import annotations

import math
from pathlib import Path


def free_memory_bytes() -> float:
    """Memory available to this process, according to Linux and its control group; infinite if it is unknown."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024.0
    except (OSError, KeyError, ValueError):
        free = math.inf
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text("ascii")) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    except (OSError, ValueError):  # no control group, or "max"
        pass
    return free
