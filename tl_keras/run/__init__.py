"""A run: its folder, files, screen output and threads."""

from tl_keras.run.console import Screen, Stopwatch, count_of
from tl_keras.run.files import (
    check_writable,
    csv_bytes,
    csv_writer,
    disk_errors,
    existing_parent,
    is_special,
    open_atomically,
    read_csv,
    read_json,
    replace_folder,
    sync_tree,
    write_atomically,
)
from tl_keras.run.folder import (
    INTERRUPTED,
    UNFINISHED,
    History,
    RunFolder,
    check_run_dir,
    end_run,
    find_unfinished,
    has_ended,
    name_run,
    read_run_config,
)
from tl_keras.run.interrupts import Interrupts, repeat_interrupt, repeat_printed_interrupt
from tl_keras.run.memory import free_memory_bytes
from tl_keras.run.owner import check_owner
from tl_keras.run.process import stop_heartbeats
from tl_keras.run.threads import map_ahead

__all__ = [
    "INTERRUPTED",
    "UNFINISHED",
    "History",
    "Interrupts",
    "RunFolder",
    "Screen",
    "Stopwatch",
    "check_owner",
    "check_run_dir",
    "check_writable",
    "count_of",
    "csv_bytes",
    "csv_writer",
    "disk_errors",
    "end_run",
    "existing_parent",
    "find_unfinished",
    "free_memory_bytes",
    "has_ended",
    "is_special",
    "map_ahead",
    "name_run",
    "open_atomically",
    "read_csv",
    "read_json",
    "read_run_config",
    "repeat_interrupt",
    "repeat_printed_interrupt",
    "replace_folder",
    "stop_heartbeats",
    "sync_tree",
    "write_atomically",
]
