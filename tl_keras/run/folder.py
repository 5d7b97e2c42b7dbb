"""The run folder: all files of one invocation; an interrupted run continues in its folder."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tl_keras.errors import UserError
from tl_keras.run.console import count_of
from tl_keras.run.files import csv_bytes, disk_errors, read_json, sync_folder, write_atomically
from tl_keras.run.owner import check_owner, describe_process
from tl_keras.run.process import find_process, is_running_here, may_run_elsewhere, start_heartbeat, stop_heartbeat

INTERRUPTED = 130  # exit status as in shells: 128 + SIGINT
UNFINISHED = "unfinished.json"  # in the folder of a run until it is complete
_CONFIG = "config.json"
# in the folder of a run that has computed nothing yet
_AT_START = frozenset((_CONFIG, "run.flags", "run.log", "broken.csv", UNFINISHED))
# settings that do not affect the results of a run
_HOW_STARTED = frozenset(("resume", "overwrite", "run_dir"))


class RunFolder:
    """The folder of one run.

    Attributes:
        path: path of the folder.
        run_id: a random id that the run keeps when it is resumed.
        resumed: whether an earlier process started the run.
    """

    def __init__(self, path: Path, *, run_id: str = "", resumed: bool = False) -> None:
        """Args: path: an existing folder."""
        self.path, self.run_id, self.resumed = path, run_id, resumed

    @classmethod
    def create(
        cls,
        path: str,
        *,
        overwrite: bool,
        config: dict[str, Any],
        flags: str,
        show: Callable[[str], None] = lambda _: None,
    ) -> RunFolder:
        """Creates the folder, or opens that of an interrupted run with the same settings, which then continues.

        Until `end_run`, the folder contains `unfinished.json`. An earlier run that is replaced is renamed to
        `PATH.replaced`, and deleted by `end_run`.

        Args:
            path: path of the folder; its parents are created too.
            overwrite: whether to replace an earlier run; an unfinished run with the same settings continues anyway, and
                one that has computed nothing is replaced in any case.
            config: content of `config.json`.
            flags: content of `run.flags`.
            show: called with a line if it takes a minute to find out whether another machine uses the folder.

        Raises:
            UserError: the folder already exists and is not empty, is used by a running process, or can't be written.
        """
        folder = Path(path)
        is_used = folder.is_dir() and any(folder.iterdir())
        if is_used:
            _check_not_running(folder, show)
        check_run_dir(path, overwrite=overwrite, config=config)
        if is_used and _is_same_run(folder, config):  # also with --overwrite: it would be the same run
            opened = cls._open(folder, config=config, flags=flags)
        else:
            replaced = _put_aside(folder) if is_used else []
            opened = cls._make(folder, replaced=replaced, config=config, flags=flags)
        start_heartbeat(folder / UNFINISHED)
        check_owner(folder)  # another process may have opened it at the same moment
        return opened

    @classmethod
    def _make(cls, folder: Path, *, replaced: list[str], config: dict[str, Any], flags: str) -> RunFolder:
        """Creates the folder of a new run."""
        with disk_errors(f"the run folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            made = cls(folder, run_id=uuid.uuid4().hex)
            try:
                with (folder / UNFINISHED).open("x", encoding="utf-8") as file:
                    json.dump(made._describe(replaced), file)
            except FileExistsError as error:
                raise UserError(f"the run folder {folder} was just created by another run. Run again.") from error
        made._write_settings(config, flags)
        return made

    @classmethod
    def _open(cls, folder: Path, *, config: dict[str, Any], flags: str) -> RunFolder:
        """Opens the folder of an interrupted run, to continue it."""
        marker = _read_marker(folder)
        opened = cls(folder, run_id=str(marker.get("run_id") or uuid.uuid4().hex), resumed=True)
        opened._mark_unfinished(list(marker.get("replaces") or []))
        for leftover in list(folder.rglob(".*.tmp")):  # from a killed process
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
        if not _is_run(folder):  # killed while the folder was created
            opened._write_settings(config, flags)
        return opened

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file, UTF-8."""
        write_atomically(self.path / name, text.encode("utf-8", "surrogateescape"))

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file; keys keep their order, NaN is not allowed."""
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def write_csv(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Writes a CSV file, UTF-8, one header line."""
        write_atomically(self.path / name, csv_bytes(header, rows))

    def write_broken(self, rows: Iterable[tuple[str, str]]) -> None:
        """Writes `broken.csv`: id and reason of each image that can't be read."""
        self.write_csv("broken.csv", ("id", "reason"), rows)

    def describe_broken(self, count: int) -> str:
        """Describes how many images are left out, for the screen."""
        return f"broken: {count_of(count, 'image')} left out, listed in {self.path}/broken.csv"

    def _write_settings(self, config: dict[str, Any], flags: str) -> None:
        self.write_json(_CONFIG, config)
        self.write_text("run.flags", flags)

    def _mark_unfinished(self, replaces: Sequence[str]) -> None:
        self.write_json(UNFINISHED, self._describe(replaces))

    def _describe(self, replaces: Sequence[str]) -> dict[str, Any]:
        """The content of `unfinished.json`."""
        return {"run_id": self.run_id, "replaces": list(replaces), "process": describe_process()}


class History:
    """`history.csv`: one row per epoch, written at the end of the epoch."""

    def __init__(self, folder: RunFolder, header: Sequence[str]) -> None:
        """Args: header: column names."""
        self._folder, self._header = folder, header
        self.rows: list[Sequence[Any]] = []

    def keep(self, *rows: Sequence[Any]) -> None:
        """Adds rows."""
        self.rows += rows
        self._folder.write_csv("history.csv", self._header, self.rows)


def check_run_dir(path: str, *, overwrite: bool, config: Mapping[str, Any]) -> None:
    """Checks that a run may use a folder: it is empty, is this run's, or may be replaced.

    Args:
        path: path of the folder.
        overwrite: whether to replace an earlier run.
        config: the settings of the run.

    Raises:
        UserError: it must not be replaced, or is not the folder of a run.
    """
    folder = Path(path)
    with disk_errors(f"the run folder {folder}"):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"the run folder {folder} can't be written: it is a file. Give the path of a folder.")
        if not (folder.is_dir() and any(folder.iterdir())) or _is_same_run(folder, config):
            return
    process = _read_marker(folder).get("process")
    if is_running_here(process) or may_run_elsewhere(folder / UNFINISHED, process):
        return  # `RunFolder.create` finds out, which may take a minute
    if not _is_run(folder):
        raise UserError(
            f"the folder {folder} already exists, and no run has written it. Give a new folder as --run_dir."
        )
    if overwrite or _has_nothing(folder):
        return
    if not has_ended(folder):
        differences = "; ".join(_find_differences(read_run_config(path) or {}, config)[:3])
        raise UserError(
            f"the run folder {folder} already exists. It contains an unfinished run with other settings "
            f"({differences}). Repeat its command to continue it, replace it with --overwrite, or give another "
            "--run_dir."
        )
    raise UserError(
        f"the run folder {folder} already exists. Give another --run_dir, or --overwrite to replace an earlier run."
    )


def end_run(folder: Path, *, keep_replaced: bool = False) -> list[Path]:
    """Marks a run as complete, and deletes the earlier run that it replaces.

    Args:
        folder: the run folder.
        keep_replaced: whether to keep the earlier run.

    Returns:
        Earlier runs that are kept.

    Raises:
        UserError: the folder can't be written.
        LostRunError: another process has continued the run.
    """
    check_owner(folder)
    replaced = [Path(path) for path in _read_marker(folder).get("replaces") or []]
    with disk_errors(f"the run folder {folder}"):
        for path in () if keep_replaced else replaced:
            if (path / _CONFIG).is_file():
                shutil.rmtree(path)
        stop_heartbeat(folder / UNFINISHED)
        (folder / UNFINISHED).unlink(missing_ok=True)
        sync_folder(folder)
    return [path for path in replaced if path.is_dir()]


def has_ended(folder: Path) -> bool:
    """Whether a run is complete; versions before 0.2 only have `metrics.json` to mark this."""
    return (folder / "metrics.json").is_file() and not (folder / UNFINISHED).is_file()


def read_run_config(path: str) -> dict[str, Any] | None:
    """Reads the settings in a run folder; None if there are none yet.

    Raises:
        UserError: `config.json` is damaged.
    """
    file = Path(path) / _CONFIG
    found = read_json(file) if file.is_file() and file.stat().st_size else None
    return found if isinstance(found, dict) else None


def find_unfinished(mode: str) -> str | None:
    """Finds the latest unfinished run of a mode in the folder `runs`."""
    markers = sorted(Path("runs").glob(f"*/{UNFINISHED}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for marker in markers:
        config, process = read_run_config(str(marker.parent)), _read_marker(marker.parent).get("process")
        is_running = is_running_here(process) or may_run_elsewhere(marker, process)
        if config and config.get("mode") == mode and not is_running:
            return str(marker.parent)
    return None


def name_run(mode: str, data: str, backbone: str) -> str:
    """Makes the name `runs/MODE-DATA-BACKBONE-TIME`, with a number if it exists (two runs in the same second)."""
    stem = os.path.join("runs", f"{mode}-{data}-{backbone}-{time.strftime('%Y%m%d-%H%M%S')}")
    path, number = stem, 2
    while os.path.exists(path):
        path, number = f"{stem}-{number}", number + 1
    return path


def _is_run(folder: Path) -> bool:
    """Whether a folder was created by a run, so that another run may replace it."""
    return all((folder / name).is_file() for name in (_CONFIG, "run.flags"))


def _has_nothing(folder: Path) -> bool:
    """Whether a run stopped before it computed anything that is kept in its folder."""
    return {UNFINISHED} <= {path.name for path in folder.iterdir()} <= _AT_START


def _clear(folder: Path) -> None:
    """Deletes the files of a run that has computed nothing.

    Raises:
        UserError: another process has just started a run there.
    """
    marker = _read_marker(folder)
    for name in _AT_START - {UNFINISHED}:
        (folder / name).unlink(missing_ok=True)
    if _read_marker(folder) != marker:
        raise UserError(f"the run folder {folder} was just created by another run. Run again.")
    (folder / UNFINISHED).unlink(missing_ok=True)


def _is_same_run(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a folder contains an unfinished run with these settings."""
    if has_ended(folder) or not _is_run(folder):
        return not _is_run(folder) and (folder / UNFINISHED).is_file()  # killed while it was created
    return not _find_differences(read_run_config(str(folder)) or {}, config)


def _find_differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lists the flags that differ between two configurations, with both values."""
    found = list[str]()
    for group, settings in json.loads(json.dumps(now)).items():  # converts tuples to lists
        before = earlier.get(group)
        if not isinstance(settings, dict):
            found += [] if before == settings else [f"--{group}: {before} there, {settings} here"]
            continue
        known = before if isinstance(before, dict) else {}
        found += [
            f"--{name}: {known[name]} there, {value} here"
            for name, value in settings.items()
            if name not in _HOW_STARTED and name in known and known[name] != value
        ]
    return found


def _put_aside(folder: Path) -> list[str]:
    """Renames the folder of an earlier run, so that it is kept until the new run is complete.

    The files of a run that has computed nothing are deleted instead.

    Returns:
        The folders that the new run replaces.
    """
    earlier = list(_read_marker(folder).get("replaces") or [])
    target, number = folder.with_name(f"{folder.name}.replaced"), 2
    while target.exists():
        target, number = folder.with_name(f"{folder.name}.replaced-{number}"), number + 1
    with disk_errors(f"the run folder {folder}"):
        if _has_nothing(folder):
            _clear(folder)
            return earlier
        os.rename(folder, target)
    return [*earlier, str(target.absolute())]


def _read_marker(folder: Path) -> dict[str, Any]:
    try:
        found = read_json(folder / UNFINISHED)
    except UserError:  # missing or damaged
        return {}
    return found if isinstance(found, dict) else {}


def _check_not_running(folder: Path, show: Callable[[str], None]) -> None:
    """Checks that no process uses the folder.

    Raises:
        UserError: a process uses it.
    """
    process = find_process(folder / UNFINISHED, _read_marker(folder).get("process"), show)
    if process:
        raise UserError(
            f"the run in {folder} is still running in {process}. Wait until it ends, or give another --run_dir."
        )
