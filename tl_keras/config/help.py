"""The help that the command line shows: the modes, and the flags of one mode."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from tl_keras.config.flags import GENERAL, check_mode
from tl_keras.config.settings import (
    AUDIT,
    DOCTOR,
    EVALUATE,
    EXPORT,
    EXTRACT,
    FINETUNE,
    GROUPS,
    MODES,
    PREDICT,
    SERVE,
    find_default,
    find_help,
    list_fields,
    value_types,
)
from tl_keras.errors import UserError

EXAMPLES = {
    FINETUNE: "tl_keras finetune --dataset=folder:photos --backbone=MobileNetV2 --run_dir=runs/photos",
    EXTRACT: "tl_keras extract --dataset=folder:photos --backbone=ResNet50 --probe=logistic_regression,knn",
    EVALUATE: "tl_keras evaluate --classifier=runs/photos --dataset=folder:other_photos",
    PREDICT: "tl_keras predict --classifier=runs/photos --images=new_photos --output=predictions.csv",
    EXPORT: "tl_keras export --classifier=runs/photos --deploy=deployment",
    SERVE: "tl_keras serve --classifier=runs/photos",
    AUDIT: "tl_keras audit --dataset=folder:photos --backbone=MobileNetV2",
    DOCTOR: "tl_keras doctor",
}
_WIDEST = 100  # columns
_INDENT = 28
HELP = {"--help", "-help", "-h"}
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


@dataclasses.dataclass(frozen=True)
class HelpRequest:
    """A command line that asks for help.

    Attributes:
        mode: the mode whose flags are shown; None: the modes.
        everything: whether advanced flags are shown too.
    """

    mode: str | None
    everything: bool

    def text(self) -> str:
        """The help."""
        if self.mode:
            return mode_help(self.mode, everything=self.everything)
        return all_flags() if self.everything else overview()


def find_help_request(arguments: Sequence[str]) -> HelpRequest | None:
    """Whether a command line asks for help, and for which mode.

    Args:
        arguments: the command line, without the program's name.

    Raises:
        UserError: there is no such mode, or help is asked for something that there is no help for.
    """
    requests = [argument for argument in arguments if argument.partition("=")[0] in HELP]
    if not requests and arguments[0] != "help":
        return None
    values = {request.partition("=")[2] for request in requests} - {""}
    mode = _find_mode(arguments[1:] if arguments[0] == "help" else arguments)
    named = values - {"all", "true"}
    if named and mode is not None and named != {mode}:
        raise UserError(f"--help={named.pop()} is not known. Allowed: --help, --help=all.")
    if named:  # --help=finetune
        mode = named.pop()
    if mode is not None:
        check_mode(mode)
    return HelpRequest(mode, "all" in values)


def overview() -> str:
    """The modes, one line each."""
    lines = [
        "tl_keras: transfer learning for image classification, from labeled images to TensorFlow Serving",
        "",
        "  tl_keras MODE [--flag=value ...]",
        "",
        "Modes:",
        *(f"  {mode:<10} {text}" for mode, text in MODES.items()),
        "",
        "`tl_keras MODE --help` shows the flags of a mode, `tl_keras --version` the version;",
        "`tl_keras completion bash` (or zsh, fish) prints a script for the shell.",
    ]
    return "\n".join(lines)


def mode_help(mode: str, *, everything: bool = False) -> str:
    """The flags of a mode, by group, wrapped to the terminal.

    Args:
        mode: one of `MODES`.
        everything: whether advanced flags are shown too.
    """
    width = min(shutil.get_terminal_size((_WIDEST, 24)).columns, _WIDEST)
    lines = [*textwrap.wrap(f"tl_keras {mode}: {MODES[mode]}", width), "", f"  {EXAMPLES[mode]}"]
    for name, group in GROUPS.items():
        fields = [field for other, field in list_fields(mode) if other == name]
        shown = [field for field in fields if everything or mode in field.metadata["basic"]]
        if shown:
            title = (group.__doc__ or "").partition(":")[0]
            lines += ["", f"{title}:", *(line for field in shown for line in _describe_flag(field, mode, width))]
    lines += ["", "General:", *_wrap("--flagfile=FILE", "read flags from a file", width)]
    for flag, text in GENERAL.items():
        lines += _wrap(f"--{flag}", text, width)
    return "\n".join([*lines, *_describe_rest(mode, everything, width)])


def all_flags() -> str:
    """The flags of each mode, with its defaults."""
    return "\n\n\n".join(mode_help(mode, everything=True) for mode in MODES)


def show_flag(field: dataclasses.Field[Any]) -> str:
    """A flag as it is written: `--epochs=N`, `--[no]report`."""
    if isinstance(field.default, bool):
        return f"--[no]{field.name}" if field.default else f"--{field.name}"
    return f"--{field.name}={_metavar(field)}"


def show_default(field: dataclasses.Field[Any], mode: str) -> str:
    """The default of a setting in a mode, for people; empty for a switch and for what must be given."""
    default = find_default(field, mode)
    if default in {None, "", ()}:
        return str(field.metadata["default_help"])
    if isinstance(default, bool):
        return "on" if default else ""
    if isinstance(default, tuple):
        return ",".join(default)
    if isinstance(default, int) and field.metadata["metavar"] == "BYTES":
        return next(f"{default // size} {unit}" for size, unit in _UNITS if default >= size)
    return f"{default:,}" if isinstance(default, int) and default >= 1_000_000 else str(default)


def _describe_flag(field: dataclasses.Field[Any], mode: str, width: int) -> list[str]:
    default = show_default(field, mode)
    text = find_help(field, mode)
    text = f"{text} (default: {default})" if default else text
    return _wrap(show_flag(field), text, width)


def _wrap(flag: str, text: str, width: int) -> list[str]:
    """A flag and its description in two columns; a long flag has a line of its own."""
    indent = " " * _INDENT
    described = textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    if len(flag) + 4 > _INDENT:
        return [f"  {flag}", *described]
    return [f"  {flag:<{_INDENT - 2}}{described[0].strip()}", *described[1:]]


def _describe_rest(mode: str, everything: bool, width: int) -> Iterator[str]:
    hidden = sum(mode not in field.metadata["basic"] for _, field in list_fields(mode))
    if hidden and not everything:
        yield ""
        yield from textwrap.wrap(f"`tl_keras {mode} --help=all` shows {hidden} more.", width)


def _find_mode(arguments: Sequence[str]) -> str | None:
    """The mode of a command line that may have other mistakes."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0]
    for number, argument in enumerate(arguments):
        name, separator, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "mode":
            return value if separator else next(iter(arguments[number + 1 :]), None)
    return None


def _metavar(field: dataclasses.Field[Any]) -> str:
    choices, metavar = field.metadata["choices"], field.metadata["metavar"]
    if choices:
        return "|".join(choices)
    if metavar:
        return str(metavar)
    return "N" if value_types()[field.name] is int else "X"
