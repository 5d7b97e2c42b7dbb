"""Sources of labeled images: a folder of class folders, a CSV manifest, digits, or a TFDS data set."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from tl_keras.config import nearest
from tl_keras.data.manifests import Table, has_control, one_spelling, read_table
from tl_keras.data.splits import SPLIT_NAMES
from tl_keras.errors import UserError
from tl_keras.run import count_of, map_ahead

_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "gif",
        "bmp",
        "webp",
        # not supported by TensorFlow: these images are listed as broken, with advice on conversion
        "tif",
        "tiff",
        "heic",
        "heif",
        "avif",
        "jxl",
        "jp2",
        "ico",
        "svg",
        "psd",
        "raw",
        "dng",
    )
)
# folders that operating systems create: archives of macOS, thumbnails and trash of NAS and Windows
_OF_SYSTEMS = frozenset(
    ("__macosx", "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin")
    + ("system volume information", "lost+found", "thumbs.db", "desktop.ini", "__pycache__")
)
_NOTHING = frozenset(("nan", "none", "null", "n/a", "na", "unknown", "unlabelled", "unlabeled"))
_STRAY_IMAGES = 2  # images in a folder of folders that are ignored, such as a preview
_READERS = 4
_READ_AHEAD = 64
_NAMED = 5
_NO_MATCH = "--images={pattern} matches no image. Give files, folders or glob patterns, comma-separated."


@dataclasses.dataclass(frozen=True)
class Source:
    """Labeled images that are not read yet.

    Attributes:
        name: name of the data set, used for the run folder and the exported model.
        ids: n unique ids.
        labels: int32 `(n,)`, index into `class_names`.
        class_names: sorted names of the classes of all splits.
        splits: splits of the source, int8 `(n,)`: 0 train, 1 val, 2 test.
        read: positions → pairs of position and encoded bytes; unreadable files give b"".
        notes: remarks on the data to show to the user.
        paths: n paths of the files; empty if the images are not files of the user.
    """

    name: str
    ids: Sequence[str]
    labels: np.ndarray
    class_names: tuple[str, ...]
    splits: np.ndarray
    read: Callable[[Iterable[int]], Iterator[tuple[int, bytes]]]
    notes: tuple[str, ...] = ()
    paths: Sequence[str] = ()


def load_source(
    dataset: str, *, data_dir: str | None, classes: Sequence[str] = (), allow_unlabeled: bool = False
) -> Source:
    """Finds the labeled images of `--dataset` without reading their pixels.

    Args:
        dataset: `folder:PATH`, `csv:PATH`, `digits`, or a TFDS data set.
        data_dir: data directory of TFDS.
        classes: classes to use; empty for all.
        allow_unlabeled: whether a folder without class folders, or a manifest without labels, is allowed.

    Returns:
        The source; without labels it has no classes.

    Raises:
        UserError: the data can't be found or downloaded, or its layout is not understood.
    """
    check_path(dataset)
    kind, separator, path = dataset.partition(":")
    if kind in _LOCAL and separator and not path:
        raise UserError(f"--dataset={dataset} has no path. Add it: --dataset={dataset}PATH.")
    if kind in _LOCAL and separator:
        source = _LOCAL[kind](path, allow_unlabeled=allow_unlabeled)
    elif dataset == "digits":
        source = _load_digits()
    else:
        from tl_keras.data import tfds_source  # imported late: other sources work without TFDS

        source = Source(**tfds_source.load(dataset, data_dir=data_dir))
    return _only(source, classes) if classes else source


def check_path(dataset: str) -> None:
    """Checks that the path of `--dataset` exists, before anything is downloaded or computed.

    Raises:
        UserError: it does not exist, or `--dataset` is a path without its kind.
    """
    kind, separator, path = dataset.partition(":")
    if kind == "folder" and separator and path:
        _check_folder(Path(path), "--dataset=folder:")
    elif kind == "csv" and separator and path:
        if not os.path.isfile(path):
            read_table(Path(path), asked=f"--dataset=csv:{path}")  # says what is wrong
    elif os.path.isabs(dataset) or (os.sep in dataset and os.path.exists(dataset)):
        kind = "csv" if os.path.isfile(dataset) else "folder"
        raise UserError(f"--dataset={dataset} is a path. For your own data: --dataset={kind}:{dataset}.")


def find_images(patterns: Sequence[str]) -> list[str]:
    """Finds the images of `--images`: files as given, and the images of folders and glob patterns, sorted by name.

    Raises:
        UserError: a pattern matches no image.
    """
    found: list[str] = []
    for pattern in patterns:
        path = Path(pattern)
        if os.path.isdir(path):
            matches = [str(file) for file in list_image_files(path)]
        elif os.path.exists(path):
            matches = [str(path)]
        else:
            matches = [name for name in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(name)]
        if not matches:
            raise UserError(_NO_MATCH.format(pattern=pattern))
        found += matches
    return list(dict.fromkeys(found))


def check_images(patterns: Sequence[str]) -> None:
    """Checks that the files and folders of `--images` exist, without listing them.

    Raises:
        UserError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not os.path.exists(pattern) and not any(glob.iglob(pattern, recursive=True)):
            raise UserError(_NO_MATCH.format(pattern=pattern))


def list_image_files(folder: Path, skipped: Counter[str] | None = None) -> list[Path]:
    """Lists all files below a folder that have an image suffix, sorted; links are followed.

    Hidden files, folders of operating systems (thumbnails, trash), run folders and exported models are left out.

    Args:
        folder: the folder.
        skipped: counter to which the suffixes of other files are added.

    Raises:
        UserError: the folder can't be read.
    """
    found: list[Path] = []
    _walk(folder, {os.path.realpath(folder)}, found, Counter() if skipped is None else skipped)
    return sorted(found)


def read_files(paths: Sequence[str], positions: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """Reads files in background threads, ahead of the consumer; an unreadable file gives b""."""
    items = ((int(position), paths[position]) for position in positions)
    return map_ahead(_read_file, items, threads=_READERS, ahead=_READ_AHEAD)


def _read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _load_folder(text: str, *, allow_unlabeled: bool) -> Source:
    root = Path(text)
    _check_folder(root, "--dataset=folder:")
    folders, skipped = _subfolders(root), Counter[str]()
    by_split = {folder.name: folder for folder in folders if folder.name.lower() in SPLIT_NAMES}
    has_splits = bool(by_split) and any(map(_subfolders, by_split.values()))  # a class named "train" has no subfolders
    if has_splits:
        others = [folder.name for folder in folders if folder.name not in by_split]
        if others:
            raise UserError(
                f"{root} has splits ({', '.join(sorted(by_split))}) and other folders "
                f"({', '.join(others[:_NAMED])}). Move the other folders away, or list the images with csv:PATH."
            )
        labeled = [
            (path, SPLIT_NAMES[name.lower()], label.name)
            for name, split in sorted(by_split.items())
            for label in _subfolders(split)
            for path in list_image_files(label, skipped)
        ]
    else:
        _check_no_splits(root, folders)
        labeled = [(path, 0, label.name) for label in folders for path in list_image_files(label, skipped)]
    if not labeled and allow_unlabeled and (images := list_image_files(root, skipped)):
        ids, paths = (
            [one_spelling(path.relative_to(root).as_posix()) for path in images],
            [str(path) for path in images],
        )
        source = _from_files(_name_of(root), ids, paths=paths, class_of=None, splits=[0] * len(ids))
        return dataclasses.replace(source, notes=_describe_skipped(skipped))
    if not labeled:
        flat = len(list_image_files(root))
        if flat:
            raise UserError(
                f"no images in class folders, but {flat:,} directly in {root}. Expected {root}/CLASS/*.jpg. For "
                "embeddings without labels: --mode=extract --embeddings_output=FILE.npz."
            )
        raise UserError(
            f"no images in {root}. Expected {root}/CLASS/*.jpg, or {root}/train/CLASS/*.jpg, also for val and test."
        )
    names = {label for _, _, label in labeled}
    if len(names) == 1 and not has_splits:
        _check_not_wrapped(root, names.pop())
    ids = [one_spelling(path.relative_to(root).as_posix()) for path, _, _ in labeled]
    empty = sorted({folder.name for folder in folders} - {label for _, _, label in labeled} - set(by_split))
    source = _from_files(
        _name_of(root),
        ids,
        paths=[str(path) for path, _, _ in labeled],
        class_of=[one_spelling(label) for _, _, label in labeled],
        splits=[split for _, split, _ in labeled],
    )
    named = ", ".join(empty[:_NAMED]) + (f" and {len(empty) - _NAMED} more" if len(empty) > _NAMED else "")
    note = f"warning: folders without image files (.jpg, .png, ...) are not used as classes: {named}"
    flat_notes = _describe_flat(by_split) if has_splits else ()
    notes = (*((note,) if empty else ()), *flat_notes, *_describe_skipped(skipped), *_describe_labels(source))
    return dataclasses.replace(source, notes=notes)


def _check_no_splits(root: Path, folders: Sequence[Path]) -> None:
    """Checks that the folders are classes, and not splits with unknown names.

    Raises:
        UserError: all folders contain subfolders instead of images, mostly with the same names.
    """
    inner = {folder.name: _list_inner(folder) for folder in folders}
    inner = {name: found for name, found in inner.items() if found}
    if len(inner) < 2 or any(_count_images(folder) > _STRAY_IMAGES for folder in folders):
        return
    first, *others = ({name.casefold() for name in found} for found in inner.values())
    if any(2 * len(first & found) < max(2, min(len(first), len(found))) for found in others):
        return
    shown, classes = ", ".join(sorted(inner)[:_NAMED]), ", ".join(sorted(next(iter(inner.values())))[:_NAMED])
    raise UserError(
        f"the folders {shown} in {root} all contain the same folders ({classes}), like splits. If they are splits, "
        "rename them to train, val and test. If they are classes, list the images with --dataset=csv:PATH."
    )


def _list_inner(folder: Path) -> list[str]:
    """Names of the subfolders; if there is only one subfolder with subfolders, names of those."""
    found = _subfolders(folder)
    deeper = _subfolders(found[0]) if len(found) == 1 else []
    return [path.name for path in deeper or found]


def _check_not_wrapped(root: Path, name: str) -> None:
    """Checks that the only class is not a folder that contains the classes.

    Raises:
        UserError: it contains at least two folders.
    """
    inner = [folder.name for folder in _subfolders(root / name)]
    if len(inner) >= 2:
        raise UserError(
            f"only one class: {name}. It contains {len(inner):,} folders ({', '.join(inner[:_NAMED])}). Did you mean "
            f"--dataset=folder:{root / name}?"
        )


def _describe_flat(by_split: Mapping[str, Path]) -> tuple[str, ...]:
    """Describes images of a split outside of class folders, as in data sets with secret test labels."""
    notes = []
    for folder in sorted(by_split.values()):
        count = _count_images(folder)
        if count:
            notes.append(
                f"warning: {count:,} images in {folder} are not in a class folder and are left out, because they have "
                "no label. Classify them with --mode=predict. A split without class folders is held out from train"
            )
    return tuple(notes)


def _describe_skipped(skipped: Mapping[str, int]) -> tuple[str, ...]:
    """Describes files without an image suffix."""
    if not skipped:
        return ()
    shown = ", ".join(f"{suffix} ({count:,})" for suffix, count in Counter(skipped).most_common(_NAMED))
    return (f"note: {count_of(sum(skipped.values()), 'file')} with other suffixes left out: {shown}",)


def _describe_labels(source: Source) -> tuple[str, ...]:
    """Describes class names that may be mistakes: names that differ only in case, or that mean "no label"."""
    groups: dict[str, list[str]] = {}
    for name in source.class_names:
        groups.setdefault(name.casefold(), []).append(name)
    alike = [" and ".join(names) for names in groups.values() if len(names) > 1]
    notes = [f"warning: classes differ only in upper and lower case: {', '.join(alike[:_NAMED])}"] if alike else []
    empty = [name for name in source.class_names if name.casefold() in _NOTHING]
    if empty:
        notes.append(f"warning: the class {', '.join(empty)} may mean images without a label")
    return tuple(notes)


def _load_csv(text: str, *, allow_unlabeled: bool) -> Source:
    manifest = Path(text)
    table = read_table(manifest, asked=f"--dataset=csv:{manifest}")
    if not ({"path"} if allow_unlabeled else {"path", "label"}) <= table.names.keys():
        raise UserError(f"{manifest} begins with {table.header[:80]!r}. Expected the columns path,label[,split].")
    labeled = not table.rows or "label" in table.names
    _check_listed_once(table)
    ids, paths, class_of, splits = table.ids(), list[str](), list[str](), list[int]()
    for row, (number, _) in enumerate(table.rows):
        path, label = table.file(row), table.cell(row, "label")
        split = (table.cell(row, "split") or "train").lower()
        if not path or (labeled and not label):
            raise UserError(f"{manifest} line {number} has no {'label' if path else 'path'}. Fill it in or delete it.")
        if split not in SPLIT_NAMES:
            raise UserError(f"{manifest} line {number}: split {split!r} is not known. Allowed: train, val, test.")
        if "://" in path:
            raise UserError(
                f"{manifest} line {number}: {path} is a URL. Images are not downloaded: give paths of files."
            )
        paths.append(str(manifest.parent / path))
        class_of.append(one_spelling(label))
        splits.append(SPLIT_NAMES[split])
    if not ids:
        raise UserError(f"{manifest} has no rows. Expected a header path,label[,split], then one line per image.")
    missing = [path for path in paths if not os.path.exists(path)]
    if len(missing) == len(paths):
        raise UserError(
            f"none of the {len(paths)} files in {manifest} exists; the first is {missing[0]}. Paths are relative to "
            "the folder of the manifest."
        )
    classes = class_of if labeled else None
    source = _from_files(_name_of(manifest.with_suffix("")), ids, paths=paths, class_of=classes, splits=splits)
    return dataclasses.replace(source, notes=_describe_labels(source))


def _check_listed_once(table: Table) -> None:
    """Checks that no file is listed twice.

    Raises:
        UserError: two lines name the same file.
    """
    seen: dict[str, int] = {}
    for row, (number, _) in enumerate(table.rows):
        path = os.path.normpath(table.file(row))
        if path in seen and table.file(row):
            first = seen[path]
            lines = f"lines {table.rows[first][0]} and {number} name {path}"
            labels = [table.cell(one, "label") for one in (first, row)]
            if labels[0] != labels[1]:
                raise UserError(
                    f"{table.path}: {lines}, with the labels {labels[0]} and {labels[1]}. Keep the correct one."
                )
            raise UserError(f"{table.path}: {lines}. Delete one of them.")
        seen[path] = row


def _load_digits() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()

    def read(positions: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        import tensorflow as tf

        for position in positions:
            pixels = np.round(digits.images[position] * (255 / 16)).astype(np.uint8)[..., np.newaxis]
            yield int(position), tf.io.encode_png(pixels).numpy()

    return Source(
        name="digits",
        ids=[f"digits/{number:04d}" for number in range(len(digits.target))],
        labels=digits.target.astype(np.int32),
        class_names=tuple("0123456789"),
        splits=np.zeros(len(digits.target), np.int8),
        read=read,
    )


def _from_files(
    name: str, ids: list[str], *, paths: list[str], class_of: list[str] | None, splits: list[int]
) -> Source:
    seen: dict[str, str] = {}
    for one_id, path in zip(ids, paths, strict=True):
        if one_id in seen:
            raise UserError(
                f"two images have the id {one_id}: {seen[one_id]} and {path}. Ids must be unique: remove or rename one."
            )
        seen[one_id] = path
    class_names = tuple(sorted(set(class_of or ())))
    for label in class_names:
        if has_control(label):  # labels.txt has one label per line
            raise UserError(f"the class name {label!r} has a line break or control character. Rename it.")
    numbers = {label: number for number, label in enumerate(class_names)}
    return Source(
        name=name,
        ids=ids,
        labels=np.array([numbers[label] for label in class_of] if class_of else np.zeros(len(ids)), np.int32),
        class_names=class_names,
        splits=np.array(splits, np.int8),
        read=lambda positions: read_files(paths, positions),
        paths=paths,
    )


def _only(source: Source, classes: Sequence[str]) -> Source:
    """Keeps only some classes of a source."""
    if not source.class_names:
        raise UserError("--classes: the data has no labels. Leave it out.")
    wanted = [one_spelling(name.strip()) for name in classes]
    for name in wanted:
        if name not in source.class_names:
            known = ", ".join(source.class_names[:10]) + (", ..." if len(source.class_names) > 10 else "")
            raise UserError(
                f"--classes: the data has no class {name!r}. {nearest(name, source.class_names)}Classes: {known}."
            )
    kept_names = tuple(sorted(set(wanted)))
    numbers = np.full(len(source.class_names), -1, np.int32)
    for new, name in enumerate(kept_names):
        numbers[source.class_names.index(name)] = new
    kept = np.flatnonzero(numbers[source.labels] >= 0)
    new_positions = {int(position): new for new, position in enumerate(kept)}

    def read(positions: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        for position, content in source.read(kept[np.asarray(list(positions), np.int64)]):
            yield new_positions[position], content

    return dataclasses.replace(
        source,
        ids=[source.ids[position] for position in kept.tolist()],
        labels=numbers[source.labels[kept]],
        class_names=kept_names,
        splits=source.splits[kept],
        read=read,
        paths=[source.paths[position] for position in kept.tolist()] if source.paths else (),
    )


def _walk(folder: Path, parents: set[str], found: list[Path], skipped: Counter[str]) -> None:
    for path in _children(folder):
        if os.path.isdir(path):
            real = os.path.realpath(path)
            if real not in parents and not _is_ours(path):  # a link to a parent folder would never end
                _walk(path, parents | {real}, found, skipped)
        elif path.suffix.lower() in _SUFFIXES:
            found.append(path)
        else:
            skipped[path.suffix.lower() or "no suffix"] += 1


def _is_ours(folder: Path) -> bool:
    """Whether a folder was created by a run or an export; its plots are not images of the data set."""
    is_run = os.path.isfile(folder / "config.json") and os.path.isfile(folder / "run.flags")
    return is_run or os.path.isfile(folder / "saved_model.pb")


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in _children(folder) if os.path.isdir(path) and not _holds_ours(path)]


def _holds_ours(folder: Path) -> bool:
    """Whether a folder contains only runs, or exported models and their versions."""
    inner = [path for path in _children(folder) if os.path.isdir(path)]
    return _is_ours(folder) or (bool(inner) and not _count_images(folder) and all(map(_holds_ours, inner)))


def _count_images(folder: Path) -> int:
    """Number of images directly in a folder."""
    return sum(path.suffix.lower() in _SUFFIXES for path in _children(folder))


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(
            path for path in folder.iterdir() if not path.name.startswith(".") and path.name.lower() not in _OF_SYSTEMS
        )
    except OSError as error:
        raise UserError(f"the folder {folder} can't be read: {error.strerror}. Check its permissions.") from error


def _check_folder(folder: Path, flag: str) -> None:
    if not os.path.exists(folder):
        raise UserError(f"{flag}{folder} does not exist. Check the path.")
    if not os.path.isdir(folder):
        raise UserError(f"{flag}{folder} is not a folder. Give a folder with one subfolder per class.")


def _name_of(path: Path) -> str:
    name = path.resolve().name or "data"
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name).lstrip(".") or "data"


_LOCAL: dict[str, Callable[..., Source]] = {"folder": _load_folder, "csv": _load_csv}
