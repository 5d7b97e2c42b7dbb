"""The served models and versions: found on disk, loaded, warmed up, and replaced without losing requests."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from tl_keras.errors import UserError
from tl_keras.serving.errors import RequestError, clear_tracebacks, hide_folders, invalid, not_found

_MOST_RETRIES, _RETRY_SECONDS = 5, 60.0
START, LOADING, AVAILABLE, UNLOADING, END = "START", "LOADING", "AVAILABLE", "UNLOADING", "END"


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """One model to serve.

    Attributes:
        name: name in URLs.
        base_path: folder of its version folders.
        versions: versions to serve; empty for the latest.
        latest: number of latest versions to serve, if no versions are named; 0 for all.
        labels: label → version.
    """

    name: str
    base_path: Path
    versions: tuple[int, ...] = ()
    latest: int = 1
    labels: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Version:
    """One version of a model, and its state."""

    def __init__(self, model: str, number: int, path: Path) -> None:
        """Args: model: name of the model; number: version number; path: version folder."""
        self.model, self.number, self.path = model, number, path
        self.state, self.error = START, ""
        self.served: Any = None
        self.stamp = _stamp(path)
        self.users = 0
        self.retries, self.retry_at = 0, 0.0

    def has_failed(self, path: Path) -> bool:
        """Whether loading failed and the folder has not changed since.

        Temporary failures are possible, so a few retries are allowed, as in TF Serving (`max_num_load_retries`).
        """
        if self.state != END or not self.error or self.path != path or self.stamp != _stamp(path):
            return False
        return self.retries >= _MOST_RETRIES or time.monotonic() < self.retry_at


class Models:
    """All models and their versions; thread-safe."""

    def __init__(
        self,
        *,
        load: Callable[[str, int, Path], Any],
        close: Callable[[Any], None],
        roots: Sequence[Path],
        drain_seconds: float,
        show: Callable[[str], None],
    ) -> None:
        """Starts without models.

        Args:
            load: name, version and folder → the loaded and warmed up version.
            close: releases its memory.
            roots: folders that models must be in.
            drain_seconds: maximum time that an unloaded version waits for its running requests.
            show: shows a line.
        """
        self._load, self._close, self._show, self._drain_seconds = load, close, show, drain_seconds
        self._roots = [root.resolve() for root in roots]
        self._entries: dict[str, ModelEntry] = {}
        self._versions: dict[str, dict[int, Version]] = {}
        self._failed: dict[tuple[str, int], Version] = {}  # replacements that could not be loaded
        self._lock = threading.RLock()
        self._left = threading.Condition(self._lock)
        self._polling = threading.Lock()

    @property
    def names(self) -> list[str]:
        """The models to serve, sorted by name."""
        with self._lock:
            return sorted(self._entries)

    def configure(self, entries: Sequence[ModelEntry], *, check_labels: bool = True) -> None:
        """Applies a new list of models; models that are not on it are unloaded.

        Args:
            entries: all models to serve.
            check_labels: whether labels must point to available versions (TF Serving's rule for a reload).

        Raises:
            RequestError: two models have the same name, a path is outside of `roots`, or a label is invalid.
        """
        names = [entry.name for entry in entries]
        for name in names:
            if names.count(name) > 1:
                raise invalid(f"Illegal to list model {name} multiple times in config list")
        for entry in entries:
            self._check_path(entry.name, entry.base_path)
            for label, number in entry.labels.items() if check_labels else ():
                version = self._versions.get(entry.name, {}).get(number)
                if version is None or version.state != AVAILABLE:
                    raise RequestError(
                        grpc.StatusCode.FAILED_PRECONDITION,
                        f"Request to assign label {label} to version {number} of model {entry.name}, which is not "
                        "currently available for inference",
                    )
        with self._lock:
            self._entries = {entry.name: entry for entry in entries}

    def poll(self) -> None:
        """Checks the disk: loads new versions, and unloads deleted or replaced ones."""
        with self._polling:
            with self._lock:
                entries, known = dict(self._entries), list(self._versions)
            for name in [*entries, *(name for name in known if name not in entries)]:
                self._update(name, entries.get(name))

    @contextlib.contextmanager
    def use(self, name: str, *, number: int | None = None, label: str = "") -> Iterator[tuple[Version, Any]]:
        """Provides the requested version, or the latest available one if the request names none.

        Yields:
            The version and its loaded graph, which is not closed before the block ends.

        Raises:
            RequestError: there is no such version.
        """
        with self._lock:
            version = self._find(name, number, label)
            version.users += 1
        try:
            yield version, version.served
        finally:
            with self._left:
                version.users -= 1
                self._left.notify_all()

    def find_missing(self) -> str:
        """Returns why requests cannot be answered; empty if every model has a loaded version."""
        with self._lock:
            missing = [name for name in self.names if not self._is_available(name)]
            if missing:
                return f"no version of {', '.join(missing)}"
            return "" if self._entries else "no model"

    def check_loaded(self, entries: Sequence[ModelEntry]) -> None:
        """Checks that each model is served from its configured folder.

        Raises:
            RequestError: a model is not, with the reason.
        """
        with self._lock:
            for entry in entries:
                versions = self._versions.get(entry.name, {}).values()
                if any(one.state == AVAILABLE and one.path.parent == entry.base_path for one in versions):
                    continue
                failed = [one for one in (*self._failed.values(), *versions) if one.model == entry.name and one.error]
                reason = f": {failed[0].error}" if failed else ""
                raise not_found(f"Servable not found for request: Latest({entry.name}){reason}")

    def has(self, name: str) -> bool:
        """Whether a model is on the list."""
        return name in self._entries

    def find_all(self, name: str, *, number: int | None = None, label: str = "") -> list[Version]:
        """Finds the versions of a status request, latest first, including unloaded ones.

        Raises:
            RequestError: there is no such version.
        """
        with self._lock:
            if label:
                return [self._find(name, None, label)]
            versions = sorted(self._versions.get(name, {}).values(), key=lambda one: -one.number)
        if number is not None:
            versions = [one for one in versions if one.number == number]
            if not versions:
                raise not_found(f"Could not find version {number} of model {name}")
        if not versions:
            raise not_found(f"Could not find any versions of model {name}")
        return versions

    def close(self) -> None:
        """Unloads all versions."""
        with self._polling:
            for versions in self._versions.values():
                for version in versions.values():
                    self._unload(version)

    def _find(self, name: str, number: int | None, label: str) -> Version:
        """See `use`; the caller holds the lock."""
        if label:
            labels = self._entries[name].labels if name in self._entries else {}
            if label not in labels:
                raise invalid(f"Unrecognized servable version label: {label}")
            number = labels[label]
        available = [one for one in self._versions.get(name, {}).values() if one.state == AVAILABLE]
        if number is not None:
            available = [one for one in available if one.number == number]
        if not available:
            wanted = f"Latest({name})" if number is None else f"Specific({name}, {number})"
            raise not_found(f"Servable not found for request: {wanted}")
        return max(available, key=lambda one: one.number)

    def _is_available(self, name: str) -> bool:
        return any(one.state == AVAILABLE for one in self._versions.get(name, {}).values())

    def _check_path(self, name: str, path: Path) -> None:
        """Checks that a path is inside of the allowed folders, following links.

        Raises:
            RequestError: it is not.
        """
        resolved = path.resolve()
        if not any(root == resolved or root in resolved.parents for root in self._roots):
            raise invalid(f"model {name}: base_path {path} is outside of what may be served")

    def _update(self, name: str, entry: ModelEntry | None) -> None:
        try:
            wanted = _choose_versions(entry) if entry else {}
        except OSError as error:  # loaded versions are kept if the disk can't be read
            self._show(f"warning: the folder of {name} can't be read: {error.strerror}")
            return
        with self._lock:
            versions = self._versions.setdefault(name, {})
        for number, path in sorted(wanted.items()):
            known = versions.get(number)
            if known is None or known.state != AVAILABLE:
                if known is None or not known.has_failed(path):
                    self._load_version(name, number, path)
            elif known.path != path or known.stamp != _stamp(path):
                self._replace_version(known, path)
            else:
                self._failed.pop((name, number), None)
        loaded = any(versions[number].state == AVAILABLE for number in wanted if number in versions)
        for number, version in list(versions.items()):
            # a replaced version stays until its replacement is loaded; a version without a folder is unloaded
            may_go = entry is None or loaded or not version.path.is_dir()
            if number not in wanted and version.state == AVAILABLE and may_go:
                self._unload(version)
                self._show(f"unloaded {name}/{number}")

    def _load_version(self, name: str, number: int, path: Path) -> None:
        """Loads a new version."""
        version, known = Version(name, number, path), self._versions[name].get(number)
        if known is not None and known.error and known.path == path and known.stamp == version.stamp:
            version.retries = known.retries + 1
        with self._lock:
            self._versions[name][number] = version
        self._load_into(version)

    def _replace_version(self, known: Version, path: Path) -> None:
        """Loads a version number again, from another folder or because its files changed.

        The old version answers until the new one is loaded, and stays if loading fails.
        """
        key = (known.model, known.number)
        earlier = self._failed.get(key)
        if earlier is not None and earlier.has_failed(path):
            return
        version = Version(known.model, known.number, path)
        if earlier is not None and earlier.path == path and earlier.stamp == version.stamp:
            version.retries = earlier.retries + 1
        self._load_into(version)
        if version.state != AVAILABLE:
            self._failed[key] = version
            return
        self._failed.pop(key, None)
        with self._lock:
            self._versions[known.model][known.number] = version
        self._unload(known)

    def _load_into(self, version: Version) -> None:
        name, number = version.model, version.number
        with self._lock:
            version.state = LOADING
        self._show(f"loading {name}/{number}")
        start = time.monotonic()
        try:
            self._check_path(name, version.path)
            version.served = self._load(name, number, version.path)
        except Exception as error:  # for damaged models TensorFlow raises exceptions of many types
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
            clear_tracebacks(error)
            with self._lock:
                version.state, version.error = END, _hide_paths(reason, version)
                version.retry_at = time.monotonic() + _RETRY_SECONDS
            self._show(f"{name}/{number} can't be loaded: {reason}")
            return
        with self._lock:
            version.state = AVAILABLE
        self._show(f"serving {name}/{number}: {version.served}, ready in {time.monotonic() - start:.1f} s")

    def _unload(self, version: Version) -> None:
        with self._left:
            if version.state != AVAILABLE:
                return
            version.state = UNLOADING
            self._left.wait_for(lambda: not version.users, self._drain_seconds)
        self._close(version.served)
        with self._lock:
            version.state, version.served = END, None


def find_models(export_dir: Path) -> list[ModelEntry]:
    """Finds all folders with version folders.

    Raises:
        UserError: there are none.
    """
    try:
        folders = sorted(path for path in export_dir.iterdir() if path.is_dir())
        entries = [ModelEntry(folder.name, folder) for folder in folders if list_versions(folder)]
    except OSError as error:
        raise UserError(
            f"--export_dir={export_dir} can't be read: {error.strerror}. Export a model, or check path and permissions."
        ) from error
    if not entries:
        raise UserError(
            f"--export_dir={export_dir} contains no exported model (NAME/VERSION/saved_model.pb). Export one, or give "
            "--classifier."
        )
    return entries


def list_versions(folder: Path) -> dict[int, Path]:
    """Lists the version folders: version → folder, for names that are numbers and contain a model; may be empty.

    Raises:
        OSError: the folder can't be read.
    """
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    numbers = [name for name in names if name.isascii() and name.isdecimal()]
    return {int(name): folder / name for name in numbers if (folder / name / "saved_model.pb").is_file()}


def _choose_versions(entry: ModelEntry) -> dict[int, Path]:
    found = list_versions(entry.base_path)
    if entry.versions:
        return {number: path for number, path in found.items() if number in entry.versions}
    kept = sorted(found)[-entry.latest :] if entry.latest else sorted(found)
    return {number: found[number] for number in {*kept, *entry.labels.values()} if number in found}


def _stamp(path: Path) -> tuple[int, int, int, int]:
    """Summarizes the files of a version folder. The value changes if any file is added, grows or is rewritten.

    A copy in place may write the model first and the other files seconds later. Sizes and inodes are included because
    some file systems have coarse timestamps.
    """
    newest = count = size = inodes = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                found = os.stat(os.path.join(folder, name))
            except OSError:
                continue
            newest, count, size = max(newest, found.st_mtime_ns), count + 1, size + found.st_size
            inodes += found.st_ino
    return newest, count, size, inodes


def _hide_paths(reason: str, version: Version) -> str:
    """Removes folder names from an error message for clients. The screen shows the full message."""
    for folder in (version.path, version.path.resolve()):
        reason = reason.replace(str(folder), f"{version.model}/{version.number}")
    return hide_folders(reason)
