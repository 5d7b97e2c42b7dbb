"""Every setting: one dataclass field each, from which its command-line flag is made.

A mode's settings are the fields whose `modes` name it. `Config` is checked whole, once, before anything is loaded.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import json
import math
import os
import re
import typing
from typing import Any

from absl import flags

from tl_keras.errors import UserError

MODEL_NAME = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"  # TF Serving does not undo the escapes of an address
MODES = ("finetune", "extract", "evaluate", "predict", "export", "serve", "audit", "doctor")
FINDINGS = (
    *("unreadable", "leak", "two_labels", "duplicate", "blank", "outlier", "label", "near_duplicate"),
    *("tiny", "huge", "aspect", "animated", "cmyk", "16-bit", "suffix", "rotated"),
)
PROBES = ("logistic_regression", "linear_svm", "rbf_svm", "knn", "ridge")
_TRAIN = ("finetune",)
_PROBE = ("extract",)
_MAKE = (*_TRAIN, *_PROBE)
_AUDIT = ("audit",)
_SPLIT = (*_MAKE, *_AUDIT)
_DATA = (*_SPLIT, "evaluate")
_READ = ("evaluate", "predict", "export")
_REPORT = (*_MAKE, "evaluate")
_SERVE = ("serve",)
_EXPORT = (*_MAKE, "export")
_RUN = (*_SPLIT, "evaluate")
_PATHS = (
    "data_dir",
    "weights",
    "store_dir",
    "run_dir",
    "export_dir",
    "classifier",
    "images",
    "output",
    "embeddings_output",
    "slices",
    "compare",
    "write_clean_csv",
    "card",
    "models_config",
    "deploy",
)
_WRITTEN = ("run_dir", "output", "embeddings_output", "write_clean_csv", "deploy")  # what a run makes itself


def _setting(
    default: Any,
    help: str,
    modes: tuple[str, ...],
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    mode_defaults: dict[str, Any] | None = None,
) -> Any:
    """One setting: default, help, the modes that use it, what is allowed, and defaults that differ by mode."""
    metadata = {
        "help": help,
        "modes": modes,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "mode_defaults": mode_defaults or {},
    }
    return dataclasses.field(default=default, metadata=metadata)


def default_store_dir() -> str:
    """`tl_keras` in the user's cache folder; a machine without a home has none.

    A relative `XDG_CACHE_HOME` is ignored, as the XDG Base Directory Specification (version 0.8) says.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    cache = cache if os.path.isabs(cache) else os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "tl_keras") if os.path.isabs(cache) else os.path.join(os.getcwd(), ".tl_keras_store")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where labelled images come from and how they are split."""

    dataset: str | None = _setting(
        None,
        "a TFDS classification set (name, name/config:version), folder:PATH, csv:PATH or digits (stanford_dogs; "
        "evaluate: the classifier's own)",
        _DATA,
        mode_defaults={"finetune": "stanford_dogs", "extract": "stanford_dogs", "audit": "stanford_dogs"},
    )
    data_dir: str | None = _setting(None, "where TFDS keeps its data (TFDS's own default)", _DATA)
    classes: tuple[str, ...] = _setting((), "only these classes, comma-separated (all)", _DATA)
    val_fraction: float = _setting(0.1, "carved from train where the source has no val", _SPLIT, minimum=0, maximum=0.9)
    test_fraction: float | None = _setting(
        None,
        "carved from train where the source has neither val nor test (0.2); given, it is carved from a source with "
        "train and val too",
        _SPLIT,
        minimum=0,
        maximum=0.9,
    )
    shots: int | None = _setting(None, "so many training examples a class (all)", _MAKE, minimum=1)
    max_broken_fraction: float = _setting(
        0.01,
        "more broken files than this stop the run (audit: 1)",
        _DATA,
        minimum=0,
        maximum=1,
        mode_defaults={"audit": 1.0},
    )


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """The pretrained network and how images are brought to its size."""

    backbone: str | None = _setting(
        None,
        "any network of keras.applications, in any case (finetune, audit: ResNet50, extract: VGG16; with --weights=RUN "
        "that run's)",
        _SPLIT,
        mode_defaults={"finetune": "ResNet50", "extract": "VGG16", "audit": "ResNet50"},
    )
    backbone_kwargs: str = _setting("", "arguments of the network's constructor: alpha=0.35,...", _SPLIT)
    weights: str = _setting("imagenet", "imagenet, none, a weights file, or the run folder of an earlier run", _SPLIT)
    image_size: int | None = _setting(None, "pixels a side (the network's own)", _SPLIT, minimum=1, maximum=4096)
    resize: str = _setting(
        "crop",
        "crop: shortest side, then centre crop; squash: both sides; pad: longest side, then black borders (with "
        "--weights=RUN that run's)",
        _SPLIT,
        choices=("crop", "squash", "pad"),
    )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """What is trained, and how."""

    trainable: str = _setting("head", "head, last:N layers, from:LAYER, all", _TRAIN)
    epochs: int = _setting(10, "epochs of each stage", _TRAIN, minimum=1)
    batch_size: int = _setting(32, "examples a training step", _TRAIN, minimum=1)
    optimizer: str = _setting("adamw", "of both stages", _TRAIN, choices=("sgd", "adam", "adamw"))
    learning_rate: float = _setting(0.003, "of the head's stage; of the only stage with --weights=none", _TRAIN)
    backbone_learning_rate: float = _setting(0.0001, "of the stage that trains layers of the backbone", _TRAIN)
    momentum: float = _setting(0.9, "of sgd", _TRAIN, minimum=0, maximum=0.9999)
    weight_decay: float = _setting(0.0, "decoupled, on kernels (Loshchilov & Hutter 2019)", _TRAIN, minimum=0)
    schedule: str = _setting("cosine", "of the learning rate", _TRAIN, choices=("constant", "cosine"))
    warmup_epochs: float = _setting(0.0, "epochs in which the learning rate rises from 0", _TRAIN, minimum=0)
    label_smoothing: float = _setting(0.0, "share of probability given to all classes", _TRAIN, minimum=0, maximum=0.9)
    class_weights: str = _setting(
        "none", "balanced: rare classes weigh more in the loss", _TRAIN, choices=("none", "balanced")
    )
    augment: str = _setting(
        "none",
        "flip: mirrored images, kept in the store; crop: random crops and mirrors of the resized image, new in each "
        "epoch, through the whole network",
        _TRAIN,
        choices=("none", "flip", "crop"),
    )
    standardize: bool = _setting(True, "the head standardises embeddings by train's mean and variance", _TRAIN)
    dropout: float = _setting(0.0, "before the head's dense layer", _TRAIN, minimum=0, maximum=0.95)
    monitor: str = _setting(
        "accuracy",
        "what of val decides which epoch is kept: the accuracy, or the loss, which is less noisy on a small val",
        _TRAIN,
        choices=("accuracy", "loss"),
    )
    patience: int | None = _setting(None, "epochs without a better one that end a stage", _TRAIN, minimum=1)


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """What is read of the backbone, and the scikit-learn classifier that is fitted on it."""

    feature_layer: tuple[str, ...] = _setting(
        (),
        "the layer that is read; several, comma-separated, are compared on val (VGG16 and VGG19: fc2; else the pooled "
        "last layer)",
        _PROBE,
    )
    pooling: str = _setting("avg", "of a layer that gives a feature map", _PROBE, choices=("avg", "max", "flatten"))
    probe: tuple[str, ...] = _setting(
        ("logistic_regression",),
        f"{', '.join(PROBES)}; several, comma-separated, are compared on val; none: embeddings alone",
        _PROBE,
    )
    scale: str = _setting(
        "standard",
        "standard: mean 0, variance 1 in train; l2: each embedding to length 1",
        _PROBE,
        choices=("standard", "l2", "none"),
    )
    probe_parameter: float | None = _setting(
        None,
        "the one value of the probe's parameter: C, ridge's alpha or knn's neighbours (chosen from a grid)",
        _PROBE,
        minimum=1e-9,
        maximum=1e9,
    )
    choose_by: str = _setting(
        "auto",
        "what decides that value: val; cv: stratified cross-validation within train and val; auto: cv where val has "
        "fewer than 1,000 images and fewer than train",
        _PROBE,
        choices=("auto", "val", "cv"),
    )
    refit: str = _setting("train", "what the winner is fitted on in the end", _PROBE, choices=("train", "train+val"))
    max_iter: int = _setting(1000, "iterations of logistic_regression and linear_svm", _PROBE, minimum=1)
    repeats: int = _setting(1, "with --shots: so many draws; mean and spread", _PROBE, minimum=1, maximum=1000)
    embeddings_output: str | None = _setting(
        None, "FILE.npz or FILE.parquet: id, split, label and embedding of every image", _PROBE
    )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How what was trained is judged."""

    calibrate: bool = _setting(
        True, "divide logits by the temperature that fits val, in the exported model too (Guo et al. 2017)", _MAKE
    )
    target_accuracy: float = _setting(
        0.95,
        "find the confidence threshold that guarantees this accuracy, with 95 % certainty",
        _REPORT,
        minimum=0,
        maximum=1,
    )
    slices: str | None = _setting(
        None, "a CSV of id (or path) and attributes: the same figures for each of their values", _REPORT
    )
    seeds: int = _setting(
        1, "train so often, each time with another seed; mean and spread", _TRAIN, minimum=1, maximum=100
    )
    corruptions: bool = _setting(
        False, "accuracy under noise, blur, light, compression, rotation and crop, at five strengths", ("evaluate",)
    )
    report: bool = _setting(True, "write report.html and MODEL_CARD.md, with pictures of what went wrong", _REPORT)
    card: str | None = _setting(
        None, "a JSON file of what the report's model card can't know: intended use, limits, licence, ...", _REPORT
    )
    corruption_images: int = _setting(200, "drawn for --corruptions", ("evaluate",), minimum=1)
    compare: tuple[str, ...] = _setting(
        (),
        "run folders, comma-separated: which is better on the examples that all have, and how sure that is",
        ("evaluate",),
    )


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """What runs the frozen trunk, and where its embeddings are kept."""

    engine: str = _setting(
        "auto",
        "what runs the trunk, or the served network; auto: what is installed and fastest here",
        (*_SPLIT, *_SERVE),
        choices=("auto", "tensorflow", "openvino"),
    )
    precision: str = _setting(
        "auto",
        "auto: bfloat16 for training images where it is 1.3 times as fast and true to float32 (serve: float32); "
        "float16 needs a GPU",
        (*_SPLIT, *_SERVE),
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    store_dir: str | None = _setting(None, "the embedding store (tl_keras in the user's cache)", (*_SPLIT, "doctor"))


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What is written, and where."""

    run_dir: str | None = _setting(None, "the run folder (runs/MODE-DATA-BACKBONE-TIME)", _RUN)
    overwrite: bool = _setting(
        False, "replace the run folder of an earlier run, which is kept until the new run is complete", _RUN
    )
    export: bool = _setting(True, "export a SavedModel when the run ends", _MAKE)
    export_dir: str = _setting("saved_models", "where exported models land: NAME/VERSION", (*_EXPORT, *_SERVE))
    model_name: str | None = _setting(None, "NAME (from the data set and the backbone)", (*_EXPORT, *_SERVE))
    seed: int = _setting(0, "of everything random", _SPLIT, minimum=0, maximum=2**31 - 1)
    max_pixels: int = _setting(
        50_000_000, "larger images are invalid to the exported model", (*_EXPORT, *_SERVE), minimum=1
    )
    resume: bool = _setting(
        False,
        "continue an unfinished run, with its own settings: that of --run_dir, or the latest in the folder runs",
        _RUN,
    )


@dataclasses.dataclass(frozen=True)
class ReadConfig:
    """What a finished classifier is used on."""

    classifier: str | None = _setting(
        None,
        "a run folder or an exported version folder (serve: saved_models/NAME too; left out: all in --export_dir; "
        "audit: a run folder, whose data is looked at with its network)",
        (*_READ, *_SERVE, *_AUDIT),
    )
    images: tuple[str, ...] = _setting((), "files, folders or globs, comma-separated", ("predict",))
    output: str | None = _setting(None, "the CSV of predictions (standard output)", ("predict",))


@dataclasses.dataclass(frozen=True)
class AuditConfig:
    """What becomes of an audit's findings."""

    write_clean_csv: str | None = _setting(
        None, "a manifest without the images of the findings that --clean names, for --dataset=csv:", _AUDIT
    )
    clean: tuple[str, ...] = _setting(
        ("unreadable", "leak", "two_labels", "duplicate", "blank"), "kinds of findings that it leaves out", _AUDIT
    )


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """The local server, and what TensorFlow Serving is started with."""

    deploy: str | None = _setting(
        None,
        "folder for TensorFlow Serving's files: configuration, Compose, Kubernetes, a client (default: not written)",
        ("export",),
    )
    host: str = _setting("127.0.0.1", "address to listen on; 0.0.0.0 means every network", _SERVE)
    port: int = _setting(8501, "port of the REST API (0 picks a free one)", _SERVE, minimum=0, maximum=65535)
    grpc_port: int = _setting(8500, "port of the gRPC API (0 picks a free one)", _SERVE, minimum=0, maximum=65535)
    models_config: str | None = _setting(
        None, "list of models in the format of TensorFlow Serving's --model_config_file", _SERVE
    )
    max_batch_size: int = _setting(32, "largest batch, in images: 1, 2, 4, 8, 16 or 32", _SERVE, minimum=1, maximum=32)
    max_queued_images: int = _setting(
        1024, "queue limit per model, in images; beyond it requests get HTTP 429", _SERVE, minimum=1
    )
    max_request_bytes: int = _setting(
        64 << 20,
        "size limit of a request, in bytes; beyond it requests get HTTP 413",
        _SERVE,
        minimum=1,
        maximum=2**31 - 1,
    )
    max_request_images: int = _setting(
        256, "limit of images in one request; beyond it requests get HTTP 400", _SERVE, minimum=1
    )
    request_timeout_seconds: float = _setting(
        30.0, "timeout of a request, in seconds; beyond it requests get HTTP 504", _SERVE, minimum=0.001, maximum=3600
    )
    cors: tuple[str, ...] = _setting(
        (), "origins of other web pages that may call the REST API, comma-separated; * means any (none)", _SERVE
    )


_GROUPS: dict[str, type[Any]] = {
    "data": DataConfig,
    "backbone": BackboneConfig,
    "training": TrainingConfig,
    "probe": ProbeConfig,
    "evaluation": EvaluationConfig,
    "engine": EngineConfig,
    "run": RunConfig,
    "read": ReadConfig,
    "audit": AuditConfig,
    "serve": ServeConfig,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of one invocation, checked."""

    mode: str
    data: DataConfig = DataConfig()
    backbone: BackboneConfig = BackboneConfig()
    training: TrainingConfig = TrainingConfig()
    probe: ProbeConfig = ProbeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineConfig = EngineConfig()
    run: RunConfig = RunConfig()
    read: ReadConfig = ReadConfig()
    audit: AuditConfig = AuditConfig()
    serve: ServeConfig = ServeConfig()

    def __post_init__(self) -> None:
        """Checks each setting alone, then those that depend on each other.

        Raises:
            UserError: a value that is not allowed, or two that exclude each other.
        """
        _check_choice("mode", self.mode, MODES)
        for group, field in _fields():
            _check_value(field, getattr(getattr(self, group), field.name))
        _check_together(self)

    def as_flags(self) -> str:
        """The settings that the mode uses, as a flag file that runs it again."""
        lines = [f"--mode={self.mode}"]
        for group, field in _fields():
            value = getattr(getattr(self, group), field.name)
            if self.mode in field.metadata["modes"] and value not in {None, ()} and field.name != "resume":
                lines.append(_as_flag(field.name, value))
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """The settings as nested dictionaries, for `config.json`."""
        return dataclasses.asdict(self)


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
        for name, group in _GROUPS.items()
    }
    return Config(mode=values["mode"], **groups)


def is_run(weights: str) -> bool:
    """Whether `--weights` names the run folder of an earlier run; a folder called `imagenet` or `none` is not asked."""
    return weights not in {"imagenet", "none"} and os.path.isdir(weights)


def parse_kwargs(text: str) -> dict[str, float | int | bool]:
    """Reads `--backbone_kwargs`: `alpha=0.35,minimalistic=True`.

    Raises:
        UserError: a part is not name=value, or a value is neither a number nor True or False.
    """
    values: dict[str, float | int | bool] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, separator, value = (piece.strip() for piece in part.partition("="))
        try:
            if not separator or not name:
                raise ValueError
            words = {"true": True, "false": False}
            values[name] = words[value.lower()] if value.lower() in words else _number(value)
        except ValueError as error:
            raise UserError(
                f"--backbone_kwargs: {part!r} is not name=value with a number, True or False. For example: alpha=0.35."
            ) from error
    return values


def _number(text: str) -> float | int:
    try:
        return int(text)
    except ValueError:
        return float(text)


def define_flags() -> flags.FlagValues:
    """Makes every setting's flag, in a set of flags of its own: other packages' flags do not mix with ours."""
    values = flags.FlagValues()  # type: ignore[no-untyped-call]
    flags.DEFINE_string("mode", None, "what to do: " + ", ".join(MODES), flag_values=values)
    flags.DEFINE_boolean("dry_run", False, "print the resolved settings as flags and stop", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this help and stop", short_name="h", flag_values=values)
    flags.DEFINE_boolean("version", False, "show the version and stop", flag_values=values)
    for group, field in _fields():
        _define_flag(values, group, field)
    return values


def read_flags(values: flags.FlagValues, *, earlier: Config | None = None) -> Config:
    """Builds the Config from parsed flags.

    Args:
        values: the flags.
        earlier: the settings of a run that is resumed; flags that are given must agree with them.

    Raises:
        UserError: no mode, a flag that the mode does not use, or a value that is not allowed.
    """
    if values["mode"].value is None:
        raise UserError(f"--mode is missing. Allowed: {', '.join(MODES)}. For example: --mode=finetune.")
    mode = values["mode"].value
    _check_choice("mode", mode, MODES)
    given: dict[str, dict[str, Any]] = {group: {} for group in _GROUPS}
    for group, field in _fields():
        flag = values[field.name]
        if not flag.present:
            follows_run = (field.name == "backbone" and is_run(os.path.expanduser(str(values["weights"].value)))) or (
                field.name in {"backbone", "dataset"} and mode == "audit" and values["classifier"].present
            )
            if mode in field.metadata["mode_defaults"] and not follows_run:
                given[group][field.name] = field.metadata["mode_defaults"][mode]
            if field.name == "resize" and mode in field.metadata["modes"]:
                given[group] |= _read_resize(os.path.expanduser(str(values["weights"].value)))
            continue
        if mode not in field.metadata["modes"]:
            used_by = ", ".join(field.metadata["modes"])
            raise UserError(f"--{field.name} is not used by --mode={mode}. It belongs to: {used_by}. Leave it out.")
        given[group][field.name] = _read_value(field.name, flag.value)
    if earlier:
        return _continue(earlier, mode, given)
    return Config(mode=mode, **{name: _GROUPS[name](**values) for name, values in given.items()})


def _read_resize(weights: str) -> dict[str, str]:
    """`resize` as the earlier run has it that `--weights` names: its network knows no other pictures."""
    for folder in (weights, os.path.join(weights, "classifier")) if is_run(weights) else ():
        try:
            with open(os.path.join(folder, "classifier.json"), encoding="utf-8") as file:
                return {"resize": str(json.load(file)["resize"])}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # whoever loads the run says what is wrong with it
    return {}


def _continue(earlier: Config, mode: str, given: dict[str, dict[str, Any]]) -> Config:
    """The settings of a run that is resumed.

    Raises:
        UserError: a flag that was given differs from the run's.
    """
    if mode != earlier.mode:
        raise UserError(f"--resume: the run is one of --mode={earlier.mode}, not of --mode={mode}. Correct --mode.")
    started = {"run_dir", "resume", "overwrite"}
    for group, settings in given.items():
        for name, value in settings.items():
            own = getattr(getattr(earlier, group), name)
            is_default = value == _field(group, name).metadata["mode_defaults"].get(mode)
            if name not in started and value != own and not is_default:
                raise UserError(
                    f"--{name}={value} is not what the run was started with ({own}). --resume continues a run with its "
                    "own settings: leave the flag out, or start another run."
                )
    run_dir = given["run"].get("run_dir", earlier.run.run_dir)
    run = dataclasses.replace(earlier.run, run_dir=run_dir, resume=True, overwrite=False)
    return dataclasses.replace(earlier, run=run)


def _field(group: str, name: str) -> dataclasses.Field[Any]:
    return next(field for field in dataclasses.fields(_GROUPS[group]) if field.name == name)


def _read_value(name: str, value: Any) -> Any:
    """A flag's value as the Config holds it: lists as tuples, `~` in paths as the home folder, as a shell would."""
    if isinstance(value, list):
        return tuple(map(os.path.expanduser, value)) if name in _PATHS else tuple(value)
    if name == "dataset" and value.startswith(("folder:", "csv:")):
        kind, _, path = value.partition(":")
        return f"{kind}:{os.path.expanduser(path)}"
    return os.path.expanduser(value) if name in _PATHS else value


def help_text() -> str:
    """All flags by group, with their defaults and the modes that use them."""
    lines = [
        "tl_keras: transfer learning for image classification, from labelled images to TensorFlow Serving.",
        "",
        "  python -m tl_keras.main --mode=MODE [--flag=value ...] [--flagfile=flags/X.flags]",
        "",
        f"  --mode: {', '.join(MODES)}",
        "  --dry_run: print the resolved settings as flags and stop",
        "  --version, --help",
    ]
    for name, group in _GROUPS.items():
        lines += ["", f"{name}: {(group.__doc__ or '').rstrip('.')}"]
        for field in dataclasses.fields(group):
            lines.append(_help_line(field))
    return "\n".join(lines)


def _help_line(field: dataclasses.Field[Any]) -> str:
    choices = field.metadata["choices"]
    allowed = f" [{', '.join(choices)}]" if choices else ""
    shown = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    default = "" if shown in {None, ""} else f" (default: {shown})"
    return f"  --{field.name}{allowed}: {field.metadata['help']}{default}; {', '.join(field.metadata['modes'])}"


def _fields() -> list[tuple[str, dataclasses.Field[Any]]]:
    return [(name, field) for name, group in _GROUPS.items() for field in dataclasses.fields(group)]


def _define_flag(values: flags.FlagValues, group: str, field: dataclasses.Field[Any]) -> None:
    kind = typing.get_type_hints(_GROUPS[group])[field.name]
    text, default = field.metadata["help"], typing.cast(Any, field.default)
    if kind is bool:
        flags.DEFINE_boolean(field.name, default, text, flag_values=values)
    elif kind == tuple[str, ...]:
        flags.DEFINE_list(field.name, list(default) or None, text, flag_values=values)
    elif int in {kind, *typing.get_args(kind)}:
        flags.DEFINE_integer(field.name, default, text, flag_values=values)
    elif float in {kind, *typing.get_args(kind)}:
        flags.DEFINE_float(field.name, default, text, flag_values=values)
    else:
        flags.DEFINE_string(field.name, default, text, flag_values=values)


def _as_flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no{name}"
    if isinstance(value, tuple):
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow(value)
        return f"--{name}={text.getvalue()}"
    return f"--{name}={value}"


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`Did you mean: a, b? ` for the known names most like `name`, ignoring case; empty where none is."""
    by_lower = {word.lower(): word for word in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.4)
    return f"Did you mean: {', '.join(by_lower[word] for word in found)}? " if found else ""


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"--{name}={value} is not known. {nearest(value, choices)}Allowed: {', '.join(choices)}.")


def _check_value(field: dataclasses.Field[Any], value: Any) -> None:
    allowed = field.metadata
    if value is None:
        return
    if allowed["choices"]:
        _check_choice(field.name, value, allowed["choices"])
    if isinstance(value, str) and not value and field.default != "":
        raise UserError(f"--{field.name} is empty. Give it a value, or leave it out.")
    if isinstance(value, tuple) and not all(value):
        raise UserError(f"--{field.name} has an empty part: is there a comma too many? Take it out.")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_range(field.name, value, allowed["minimum"], allowed["maximum"])


def _check_range(name: str, value: float, minimum: float | None, maximum: float | None) -> None:
    low, high = -math.inf if minimum is None else minimum, math.inf if maximum is None else maximum
    if not low <= value <= high or not math.isfinite(value):
        bounds = f"{minimum} or more" if maximum is None else f"{minimum} to {maximum}"
        raise UserError(f"--{name}={value} is out of range. Allowed: {bounds}.")


def _check_together(config: Config) -> None:
    data, training = config.data, config.training
    parse_kwargs(config.backbone.backbone_kwargs)
    for name in ("learning_rate", "backbone_learning_rate"):
        value = getattr(training, name)
        if not 0 < value <= 1000:
            raise UserError(f"--{name}={value} is out of range. Allowed: above 0, up to 1000.")
    if data.val_fraction + (data.test_fraction or 0) >= 0.95:
        raise UserError(
            f"--val_fraction={data.val_fraction} and --test_fraction={data.test_fraction} leave nothing to train on. "
            "Together they may take less than 0.95."
        )
    _check_probe(config)
    _check_audit(config)
    if config.evaluation.card and not config.evaluation.report:
        raise UserError("--card fills in the report: leave out --noreport with it, or leave --card out.")
    if training.warmup_epochs > training.epochs:
        raise UserError(
            f"--warmup_epochs={training.warmup_epochs:g} is more than --epochs={training.epochs}. Give fewer."
        )
    _check_compare(config)
    if (
        config.evaluation.corruption_images != EvaluationConfig().corruption_images
        and not config.evaluation.corruptions
    ):
        raise UserError("--corruption_images is how many --corruptions draws: give both, or leave it out.")
    if config.mode in _READ and not config.read.classifier and not config.evaluation.compare:
        raise UserError(
            f"--classifier is missing. --mode={config.mode} reads a run folder or an exported version folder: "
            "--classifier=runs/NAME or --classifier=saved_models/NAME/1."
        )
    if config.mode == "predict" and not config.read.images:
        raise UserError("--images is missing. Give files, folders or globs, comma-separated: --images=photo.jpg.")
    _check_serve(config)
    if config.run.model_name and not re.fullmatch(MODEL_NAME, config.run.model_name):
        raise UserError(
            f"--model_name={config.run.model_name} is not a name that TF Serving's addresses can hold. Allowed: "
            "letters a to z, digits, '_', '-' and '.', but not '.' at the start."
        )
    _check_overwrite(config)


def _check_compare(config: Config) -> None:
    compare = config.evaluation.compare
    if not compare:
        return
    if len(compare) < 2:
        raise UserError("--compare takes two run folders or more: --compare=runs/A,runs/B.")
    if len({os.path.realpath(path) for path in compare}) < len(compare):
        raise UserError(f"--compare={','.join(compare)} names one run twice. Name each once.")
    rest = dataclasses.replace(config.evaluation, compare=(), report=True)
    for given, default in ((config.data, DataConfig()), (config.read, ReadConfig()), (rest, EvaluationConfig())):
        for field in dataclasses.fields(given):
            if getattr(given, field.name) != getattr(default, field.name):
                raise UserError(
                    f"--compare reads what runs have predicted, and computes nothing anew: leave out --{field.name}."
                )


def _check_serve(config: Config) -> None:
    serve = config.serve
    if serve.models_config and config.read.classifier:
        raise UserError("--models_config lists what is served: leave --classifier out with it.")
    if config.mode == "serve" and config.engine.precision == "float16":
        raise UserError("--precision=float16 is the trunk's on a GPU. Use --precision=auto, float32 or bfloat16.")
    for origin in serve.cors:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#]+", origin):
            raise UserError(
                f"--cors={origin} is not the origin of a web page. Allowed: scheme://host[:port] without a path, or *."
            )
    if serve.max_batch_size & (serve.max_batch_size - 1):
        raise UserError(
            f"--max_batch_size={serve.max_batch_size} is no size that models are warmed up for. Allowed: 1, 2, 4, 8, "
            "16, 32."
        )
    if serve.max_queued_images < serve.max_request_images:
        raise UserError(
            f"--max_queued_images={serve.max_queued_images} is less than --max_request_images="
            f"{serve.max_request_images}: such a request could never wait. Give more, or fewer images a request."
        )


def _check_audit(config: Config) -> None:
    for kind in config.audit.clean:
        if kind not in FINDINGS:
            raise UserError(f"--clean={kind} is not known. {nearest(kind, FINDINGS)}Allowed: {', '.join(FINDINGS)}.")
    if config.audit.clean != AuditConfig().clean and not config.audit.write_clean_csv:
        raise UserError("--clean says what --write_clean_csv=FILE leaves out: give both, or leave --clean out.")
    if config.audit.write_clean_csv and not (config.data.dataset or "folder:").startswith(("folder:", "csv:")):
        raise UserError(
            f"--write_clean_csv lists files, and {config.data.dataset} has none of its own. Leave it out, or give "
            "--dataset=folder: or csv:."
        )
    if config.mode == "audit" and config.read.classifier and config.backbone != BackboneConfig():
        raise UserError(
            "--classifier brings its own backbone, weights, image size and resizing: leave out these flags with it."
        )


def _check_probe(config: Config) -> None:
    probe = config.probe
    if not probe.probe:
        raise UserError(f"--probe is empty. Allowed: {', '.join(PROBES)}, none.")
    for name in probe.probe:
        _check_choice("probe", name, (*PROBES, "none"))
    for name, values in (("probe", probe.probe), ("feature_layer", probe.feature_layer)):
        if len(set(values)) < len(values):
            raise UserError(f"--{name}={','.join(values)} names one twice. Name each once.")
    if probe.probe_parameter is not None:
        if len(probe.probe) > 1:
            raise UserError("--probe_parameter is one probe's: give one --probe with it, or leave it out.")
        if probe.probe == ("knn",) and probe.probe_parameter != int(probe.probe_parameter):
            raise UserError(
                f"--probe_parameter={probe.probe_parameter:g} is no number of neighbours. Give a whole one."
            )
    if probe.repeats > 1 and config.data.shots is None:
        raise UserError("--repeats draws training examples anew, so many a class: give --shots with it.")
    _check_embeddings_output(probe, config.data.shots)


def _check_embeddings_output(probe: ProbeConfig, shots: int | None) -> None:
    output = probe.embeddings_output
    if "none" in probe.probe and shots is not None:
        raise UserError("--shots draws what a probe is fitted on: leave it out with --probe=none.")
    if "none" in probe.probe and (len(probe.probe) > 1 or not output):
        raise UserError("--probe=none gives embeddings alone: give it without another probe, with --embeddings_output.")
    if output and len(probe.feature_layer) > 1:
        raise UserError("--embeddings_output is of one layer: give one --feature_layer with it.")
    if output and not output.endswith((".npz", ".parquet")):
        raise UserError(f"--embeddings_output={output}: allowed are files that end in .npz or .parquet. Rename it.")


def _lies_in(path: str, folder: str) -> bool:
    """Whether a path is a folder or lies in it; both are absolute."""
    try:
        return os.path.commonpath([folder, path]) == folder
    except ValueError:  # Windows: two drives
        return False


def _check_overwrite(config: Config) -> None:
    """What is read or kept may not lie in what is deleted."""
    if not config.run.overwrite or not config.run.run_dir:
        return
    folder = os.path.realpath(config.run.run_dir)
    kept: dict[str, str | tuple[str, ...] | None] = {
        field.name: getattr(getattr(config, group), field.name)
        for group, field in _fields()
        if field.name in _PATHS and field.name not in _WRITTEN
    }
    kept |= {"dataset": (config.data.dataset or "").partition(":")[2]}
    kept |= {"store_dir": config.engine.store_dir or default_store_dir()}
    paths = [(name, path) for name, one in kept.items() for path in (one if isinstance(one, tuple) else (one,))]
    for name, path in paths:
        if path and os.path.exists(path) and _lies_in(os.path.realpath(path), folder):
            raise UserError(
                f"--overwrite would delete --{name}={path}: it lies in --run_dir={config.run.run_dir}. Give another "
                "--run_dir."
            )
