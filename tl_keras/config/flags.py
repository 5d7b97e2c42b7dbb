"""Command-line flags: made from the settings, and read back into a Config."""

from __future__ import annotations

import dataclasses
import difflib
import json
import numbers
import os
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import flags

from tl_keras.config.checks import Config, check_choice, nearest
from tl_keras.config.settings import (
    AUDIT,
    FINETUNE,
    GROUPS,
    MODES,
    PATHS,
    find_default,
    is_run,
    list_fields,
    value_types,
)
from tl_keras.errors import UserError

GENERAL: dict[str, str] = {
    "dry_run": "print the resolved settings as a flag file and exit",
    "quiet": "show only warnings, errors and the last line",
    "version": "print the version and exit",
}
FindEarlier = Callable[[str, dict[str, Any]], Config | None]
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "tuple": "a sequence of strings",
}
_DEFINE: dict[type, Callable[..., Any]] = {
    bool: flags.DEFINE_boolean,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
    tuple: flags.DEFINE_list,
}
# what other tools call a mode or a flag
_OTHER_NAMES = {
    "train": "finetune",
    "fit": "finetune",
    "test": "evaluate",
    "eval": "evaluate",
    "validate": "evaluate",
    "infer": "predict",
    "classify": "predict",
    "embed": "extract",
    "arch": "backbone",
    "architecture": "backbone",
    "model": "backbone",
    "network": "backbone",
    "base_model": "backbone",
    "data": "dataset",
    "data_path": "dataset",
    "folder": "dataset",
    "train_dir": "dataset",
    "lr": "learning_rate",
    "bs": "batch_size",
    "wd": "weight_decay",
    "img_size": "image_size",
    "input_size": "image_size",
    "num_epochs": "epochs",
    "freeze": "trainable",
    "unfreeze": "trainable",
    "output_dir": "run_dir",
    "logdir": "run_dir",
    "checkpoint": "classifier",
}
_ILLEGAL = re.compile(r"flag --(\w+)=(.*?): ", re.DOTALL)


def define_flags() -> flags.FlagValues:
    """Defines a flag for every setting, in its own set of flags, separate from the flags of other packages."""
    values = flags.FlagValues()  # type: ignore[no-untyped-call]
    flags.DEFINE_string("mode", None, "what to do: " + ", ".join(MODES), flag_values=values)
    for name, text in GENERAL.items():
        flags.DEFINE_boolean(name, False, text, flag_values=values)
    for _, field in list_fields():
        _define_flag(values, field)
    return values


def parse_flags(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    """Parses the command line, where the mode may be the first word.

    Args:
        values: the flags.
        arguments: the command line, without the program's name.

    Raises:
        UserError: a word that is neither a mode nor a flag, an unknown flag, or a value of the wrong type.
    """
    arguments, mode = list(arguments), None
    if arguments and not arguments[0].startswith("-"):
        mode = arguments[0]
        check_mode(mode)
        arguments[0] = f"--mode={mode}"
    try:
        rest = values(["tl_keras", *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(_explain_unknown(error.flagname, values)) from error
    except flags.Error as error:
        raise UserError(f"{_explain_value(str(error), values)} {_suggest_help(values)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the flag file is not UTF-8: {error}. Save it as UTF-8.") from error
    if rest:
        raise UserError(_explain_word(rest[0]))
    if mode and values["mode"].value != mode:
        raise UserError(
            f"the mode is {mode!r} and --mode={values['mode'].value}, perhaps from a flag file. Give one of them."
        )


def check_mode(mode: str) -> None:
    """Checks a mode's name.

    Raises:
        UserError: there is no such mode.
    """
    if mode not in MODES:
        meant = _OTHER_NAMES.get(mode)
        tip = f"Did you mean: {meant}? " if meant in MODES else nearest(mode, MODES)
        raise UserError(f"{mode!r} is not a mode. {tip}Allowed: {', '.join(MODES)}.")


def read_flags(values: flags.FlagValues, *, find_earlier: FindEarlier | None = None) -> Config:
    """Builds the Config from parsed flags.

    Args:
        values: the flags.
        find_earlier: see `build_config`.

    Raises:
        UserError: no mode, a flag that the mode does not use, or a value that is not allowed.
    """
    mode = values["mode"].value
    if mode is None:
        raise UserError(f"--mode is missing. Allowed: {', '.join(MODES)}. For example: --mode={FINETUNE}.")
    check_choice("mode", mode, tuple(MODES))
    given = {
        field.name: _expand_path(field.name, values[field.name].value)
        for _, field in list_fields()
        if values[field.name].present
    }
    return build_config(mode, given, find_earlier=find_earlier)


def build_config(mode: str, given: dict[str, Any], *, find_earlier: FindEarlier | None = None) -> Config:
    """Builds the Config of a mode from the settings that are given; the others have the defaults of the mode.

    Args:
        mode: one of `MODES`.
        given: name of a setting → value.
        find_earlier: finds the settings of the run that is resumed, with which the given settings must agree; may
            add `run_dir` to them.

    Raises:
        UserError: a setting that the mode does not use, or a value that is not allowed.
    """
    earlier = find_earlier(mode, given) if find_earlier and given.get("resume") else None
    weights = str(given.get("weights", "imagenet"))
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for group, field in list_fields():
        if field.name in given:
            _check_used(field, mode)
            groups[group][field.name] = given[field.name]
            continue
        follows_run = (field.name == "backbone" and is_run(weights)) or (
            field.name in {"backbone", "dataset"} and mode == AUDIT and "classifier" in given
        )
        if mode in field.metadata["mode_defaults"] and not follows_run:
            groups[group][field.name] = find_default(field, mode)
        if field.name == "resize" and mode in field.metadata["modes"]:
            groups[group] |= _read_resize(weights)
    if earlier:
        return _continue(earlier, mode, groups)
    return Config(mode=mode, **{name: GROUPS[name](**values) for name, values in groups.items()})


def convert_keywords(given: Mapping[str, Any], *, mode: str = "MODE") -> dict[str, Any]:
    """Settings given as Python keywords, as the Config holds them: paths as text, sequences as tuples.

    None is the default of a setting; for `weights` it means random weights, as in `keras.applications`.

    Args:
        given: name of a setting → value.
        mode: the mode that errors refer to.

    Raises:
        UserError: there is no such setting, or a value is of the wrong type.
    """
    types, converted = value_types(), {}
    for name, value in given.items():
        if name not in types:
            meant = _OTHER_NAMES.get(name)
            tip = f"Did you mean: {meant}? " if meant in types else nearest(name, types)
            raise UserError(f"{name} is not a setting. {tip}See `tl_keras {mode} --help=all`.")
        if value is None and name == "weights":
            value = "none"
        if value is not None:
            converted[name] = _expand_path(name, _convert(name, value, types[name]))
    return converted


def _convert(name: str, value: Any, kind: type) -> Any:
    is_path = isinstance(value, os.PathLike)
    if kind is tuple:
        values = [value] if isinstance(value, (str, os.PathLike)) else value
        if isinstance(values, Iterable) and all(isinstance(one, (str, os.PathLike)) for one in values):
            return tuple(str(os.fspath(one)) for one in values)
    elif kind is str and (isinstance(value, str) or is_path):
        text = str(os.fspath(value))
        return _name_source(text) if is_path and name == "dataset" else text
    elif name == "backbone_kwargs" and isinstance(value, Mapping):
        return ",".join(f"{key}={one}" for key, one in value.items())
    elif isinstance(value, bool):
        if kind is bool:
            return value
    elif kind is int and isinstance(value, numbers.Integral):
        return int(value)
    elif kind is float and isinstance(value, numbers.Real):
        return float(value)
    raise UserError(f"{name}={value!r} is not {_KINDS[kind.__name__]}.")


def _name_source(path: str) -> str:
    """A path given as the data set: a folder, or a CSV file."""
    return f"csv:{path}" if path.lower().endswith(".csv") else f"folder:{path}"


def from_dict(values: dict[str, Any]) -> Config:
    """The Config that `as_dict` gave, read back from JSON; fields that this version does not know are left out."""
    groups = {
        name: group(**{
            field.name: tuple(values[name][field.name])
            if isinstance(values[name][field.name], list)
            else values[name][field.name]
            for field in dataclasses.fields(group)
            if field.name in values.get(name, {})
        })
        for name, group in GROUPS.items()
    }
    return Config(mode=values["mode"], **groups)


def _check_used(field: dataclasses.Field[Any], mode: str) -> None:
    modes = field.metadata["modes"]
    if mode not in modes:
        raise UserError(
            f"--{field.name} is not used by --mode={mode}. It belongs to: {', '.join(modes)}. Leave it out."
        )


def _read_resize(weights: str) -> dict[str, str]:
    """`resize` of the run that `--weights` names: its network was trained on images resized in this way."""
    for folder in (weights, os.path.join(weights, "classifier")) if is_run(weights) else ():
        try:
            with open(os.path.join(folder, "classifier.json"), encoding="utf-8") as file:
                return {"resize": str(json.load(file)["resize"])}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # whoever loads the run reports what is wrong with it
    return {}


def _continue(earlier: Config, mode: str, given: dict[str, dict[str, Any]]) -> Config:
    """The settings of a run that is resumed.

    Raises:
        UserError: a flag that was given differs from the run's.
    """
    if mode != earlier.mode:
        raise UserError(f"--resume: the run is one of --mode={earlier.mode}, not of --mode={mode}. Correct --mode.")
    started = {"run_dir", "resume", "overwrite"}
    fields = {field.name: field for _, field in list_fields()}
    for group, settings in given.items():
        for name, value in settings.items():
            own = getattr(getattr(earlier, group), name)
            is_default = value == fields[name].metadata["mode_defaults"].get(mode)
            if name not in started and value != own and not is_default:
                raise UserError(
                    f"--{name}={value} is not what the run was started with ({own}). --resume continues a run with its "
                    "own settings: leave the flag out, or start another run."
                )
    run_dir = given["run"].get("run_dir", earlier.run.run_dir)
    run = dataclasses.replace(earlier.run, run_dir=run_dir, resume=True, overwrite=False)
    return dataclasses.replace(earlier, run=run)


def _expand_path(name: str, value: Any) -> Any:
    """A flag's value as the Config holds it: lists as tuples, `~` in paths as the home folder, as a shell would."""
    if isinstance(value, (list, tuple)):
        return tuple(map(os.path.expanduser, value)) if name in PATHS else tuple(value)
    if not isinstance(value, str):
        return value
    if name == "dataset" and value.startswith(("folder:", "csv:")):
        kind, _, path = value.partition(":")
        return f"{kind}:{os.path.expanduser(path)}"
    return os.path.expanduser(value) if name in PATHS else value


def _define_flag(values: flags.FlagValues, field: dataclasses.Field[Any]) -> None:
    text, default = field.metadata["help"], typing.cast(Any, field.default)
    kind = value_types()[field.name]
    if kind is tuple:
        default = list(default) or None
    _DEFINE[kind](field.name, default, text, flag_values=values)


def _explain_unknown(name: str, values: flags.FlagValues) -> str:
    """Describes an unknown flag, and suggests the one that was probably meant."""
    words = name.replace("-", "_")
    positive = words.removeprefix("no_")
    if words in MODES:
        tip = f"Did you mean --mode={words}? "
    elif words in {"helpshort", "helpfull", "usage"}:
        tip = f"Did you mean {'--help=all' if words == 'helpfull' else '--help'}? "
    elif words in values:
        tip = f"Did you mean --{words}? "
    elif positive != words and positive in values and values[positive].boolean:
        tip = f"Did you mean --no{positive}? "
    else:
        tip = _suggest_flag(words, values)
    return f"--{name} is not a flag. {tip}{_suggest_help(values)}"


def _suggest_flag(name: str, values: flags.FlagValues) -> str:
    meant, mode = _OTHER_NAMES.get(name, ""), values["mode"].value
    known = {field.name for _, field in list_fields(mode if mode in MODES else None)}
    found = [meant] if meant in known else difflib.get_close_matches(name, list(values), n=1, cutoff=0.6)
    return f"Did you mean --{found[0]}? " if found else ""


def _explain_value(text: str, values: flags.FlagValues) -> str:
    """Rewords absl's message about a value."""
    found = _ILLEGAL.match(text)
    if found and found[1] in values:
        kind = _KINDS.get(values[found[1]].flag_type(), "such a value")
        return f"--{found[1]}={found[2]} is not {kind}."
    return text.removeprefix("ERROR:: ").rstrip(".") + "."


def _explain_word(word: str) -> str:
    """Describes a word where a flag is expected."""
    if word in MODES:
        return f"{word!r} is not a flag. The mode is the first word, or --mode={word}."
    return f"{word!r} is not a flag. Every setting is a flag: --name=value."


def _suggest_help(values: flags.FlagValues) -> str:
    mode = values["mode"].value
    return f"`tl_keras {mode if mode in MODES else 'MODE'} --help=all` lists all flags."
