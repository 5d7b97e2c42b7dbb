"""Which versions of which models are served: found on disk, loaded, warmed up, swapped without a request lost."""

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
from tl_keras.serving.errors import RequestError, invalid, not_found

START, LOADING, AVAILABLE, UNLOADING, END = "START", "LOADING", "AVAILABLE", "UNLOADING", "END"


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """One model to be served.

    Attributes:
        name: in addresses.
        base_path: the folder of its version folders.
        versions: these alone; empty: the latest.
        latest: how many of the latest, where no version is named; 0: all.
        labels: label → version.
    """

    name: str
    base_path: Path
    versions: tuple[int, ...] = ()
    latest: int = 1
    labels: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Version:
    """One version of a model, and where it is in its life."""

    def __init__(self, model: str, number: int, path: Path) -> None:
        """Args: model: its name; number: the version; path: its folder."""
        self.model, self.number, self.path = model, number, path
        self.state, self.error = START, ""
        self.served: Any = None
        self.stamp = _stamp(path)
        self.users = 0


class Models:
    """All models and their versions; threads may share it."""

    def __init__(
        self,
        *,
        load: Callable[[str, int, Path], Any],
        close: Callable[[Any], None],
        roots: Sequence[Path],
        drain_seconds: float,
        show: Callable[[str], None],
    ) -> None:
        """Starts without a model.

        Args:
            load: name, version and folder → what is served, warmed up.
            close: gives its memory back.
            roots: the folders that models may lie in.
            drain_seconds: how long a version that goes waits for the requests that it still has.
            show: shows a line.
        """
        self._load, self._close, self._show, self._drain_seconds = load, close, show, drain_seconds
        self._roots = [root.resolve() for root in roots]
        self._entries: dict[str, ModelEntry] = {}
        self._versions: dict[str, dict[int, Version]] = {}
        self._lock = threading.RLock()
        self._left = threading.Condition(self._lock)
        self._polling = threading.Lock()

    @property
    def names(self) -> list[str]:
        """The models that are to be served, in order of name."""
        with self._lock:
            return sorted(self._entries)

    def configure(self, entries: Sequence[ModelEntry], *, check_labels: bool = True) -> None:
        """Takes a new list of models: those that are not on it go.

        Args:
            entries: all that are to be served.
            check_labels: whether a label may only point at a version that is there (TF Serving's rule for a reload).

        Raises:
            RequestError: two of one name, a path outside the folders that may be served, or such a label.
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
        """Looks at the disk: loads what is new, and lets go what is gone or was replaced."""
        with self._polling:
            with self._lock:
                entries, known = dict(self._entries), list(self._versions)
            for name in [*entries, *(name for name in known if name not in entries)]:
                self._update(name, entries.get(name))

    @contextlib.contextmanager
    def use(self, name: str, *, number: int | None = None, label: str = "") -> Iterator[tuple[Version, Any]]:
        """The version that a request asks for; the latest that is available where it names none.

        Yields:
            The version, and what is served: it is not closed before the block ends.

        Raises:
            RequestError: there is none.
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

    def is_available(self, name: str) -> bool:
        """Whether a model has a version that answers."""
        with self._lock:
            return any(one.state == AVAILABLE for one in self._versions.get(name, {}).values())

    def has(self, name: str) -> bool:
        """Whether a model is to be served."""
        return name in self._entries

    def find_all(self, name: str, *, number: int | None = None, label: str = "") -> list[Version]:
        """The versions whose status is asked for, the latest first, those that have ended too.

        Raises:
            RequestError: there is none.
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
        """Lets go of everything."""
        with self._polling:
            for versions in self._versions.values():
                for version in versions.values():
                    self._unload(version)

    def _find(self, name: str, number: int | None, label: str) -> Version:
        """See `use`; the lock is held."""
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

    def _check_path(self, name: str, path: Path) -> None:
        """Raises: RequestError: it lies outside of what may be served, links followed."""
        resolved = path.resolve()
        if not any(root == resolved or root in resolved.parents for root in self._roots):
            roots = ", ".join(map(str, self._roots))
            raise invalid(f"model {name}: base_path {path} is outside of what may be served: {roots}")

    def _update(self, name: str, entry: ModelEntry | None) -> None:
        try:
            wanted = _choose_versions(entry) if entry else {}
        except OSError as error:  # a disk that does not answer is no reason to let go of what is loaded
            self._show(f"{name}: its folder can't be looked at: {error.strerror}")
            return
        with self._lock:
            versions = self._versions.setdefault(name, {})
        for number, path in sorted(wanted.items()):
            known = versions.get(number)
            has_failed = known is not None and known.error and known.stamp == _stamp(path)
            if known is None or known.path != path or (known.state == END and not has_failed):
                self._load_version(name, number, path)
                if known is not None:  # the same number in another folder
                    self._unload(known)
        loaded = any(versions[number].state == AVAILABLE for number in wanted if number in versions)
        for number, version in list(versions.items()):
            # a version that is replaced stays until what replaces it is there; one whose folder is gone does not
            may_go = entry is None or loaded or not version.path.is_dir()
            if number not in wanted and version.state == AVAILABLE and may_go:
                self._unload(version)
                self._show(f"unloaded {name}/{number}")

    def _load_version(self, name: str, number: int, path: Path) -> None:
        version = Version(name, number, path)
        with self._lock:
            self._versions[name][number] = version
            version.state = LOADING
        self._show(f"loading {name}/{number}")
        start = time.monotonic()
        try:
            self._check_path(name, path)
            version.served = self._load(name, number, path)
        except Exception as error:  # a damaged model makes TensorFlow raise whatever it likes
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
            with self._lock:
                version.state, version.error = END, reason
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
    """Every folder that holds version folders.

    Raises:
        UserError: there is none.
    """
    try:
        folders = sorted(path for path in export_dir.iterdir() if path.is_dir())
        entries = [ModelEntry(folder.name, folder) for folder in folders if list_versions(folder)]
    except OSError as error:
        raise UserError(
            f"--export_dir={export_dir} can't be read: {error.strerror}. Export a model, or check path and rights."
        ) from error
    if not entries:
        raise UserError(
            f"--export_dir={export_dir} holds no exported model (NAME/VERSION/saved_model.pb). Export one, or give "
            "--classifier."
        )
    return entries


def list_versions(folder: Path) -> dict[int, Path]:
    """Version → folder, of all that have a number for a name and a model inside; none where the folder is gone.

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


def _stamp(path: Path) -> tuple[int, int, int]:
    """Changes where a version folder was written anew; not every file system counts time finely."""
    try:
        found = (path / "saved_model.pb").stat()
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_size, found.st_ino
