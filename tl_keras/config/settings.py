"""Every setting: one dataclass field, from which its flag, its help and its entry in the reference are generated.

The settings of a mode are the fields whose `modes` name it.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import os
import shlex
import typing
from collections.abc import Iterator
from typing import Any

FINETUNE, EXTRACT, EVALUATE, PREDICT = "finetune", "extract", "evaluate", "predict"
EXPORT, SERVE, AUDIT, DOCTOR = "export", "serve", "audit", "doctor"
MODES: dict[str, str] = {
    FINETUNE: "train a head and, optionally, layers of the backbone on labeled images",
    EXTRACT: "train a scikit-learn classifier on the embeddings of a pretrained backbone",
    EVALUATE: "measure a trained classifier on labeled images, or compare finished runs",
    PREDICT: "classify images with a trained classifier",
    EXPORT: "export a trained classifier as a SavedModel, and write files for TensorFlow Serving",
    SERVE: "serve classifiers over REST and gRPC, with the API of TensorFlow Serving",
    AUDIT: "find duplicates, data leakage, label errors and outliers in a data set",
    DOCTOR: "check the installation, the devices and the caches",
}
FINDINGS = (
    "unreadable",
    "leak",
    "two_labels",
    "duplicate",
    "blank",
    "outlier",
    "label",
    "near_duplicate",
    "tiny",
    "huge",
    "aspect",
    "animated",
    "cmyk",
    "16-bit",
    "suffix",
    "rotated",
)
PROBES = ("logistic_regression", "linear_svm", "rbf_svm", "knn", "ridge")
_TRAIN = (FINETUNE,)
_PROBE = (EXTRACT,)
_MAKE = (FINETUNE, EXTRACT)
_SPLIT = (*_MAKE, AUDIT)
_DATA = (*_SPLIT, EVALUATE)
_READ = (EVALUATE, PREDICT, EXPORT)
_REPORT = (*_MAKE, EVALUATE)
_EXPORT = (*_MAKE, EXPORT)
PATHS = (
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
PATHS_OR_SOURCES = (*PATHS, "dataset")  # folder:PATH and csv:PATH have a path too
OUTPUTS = ("run_dir", "output", "embeddings_output", "write_clean_csv", "deploy")  # paths that a run writes to


def setting(
    default: Any,
    help: str,
    modes: tuple[str, ...],
    *,
    metavar: str = "",
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    mode_defaults: dict[str, Any] | None = None,
    default_help: str = "",
    mode_help: dict[str, str] | None = None,
    basic: tuple[str, ...] = (),
) -> Any:
    """Declares one setting.

    Args:
        default: value if the flag is not given.
        help: a noun phrase for people, without the default.
        modes: the modes that use it.
        metavar: placeholder of the value in the help (default: from the type).
        choices: allowed values.
        minimum: smallest allowed value.
        maximum: largest allowed value.
        above: lower limit of an open range: the value must be larger.
        mode_defaults: defaults that differ by mode.
        default_help: what a default of None or "" means.
        mode_help: help that differs by mode.
        basic: modes whose `--help` shows it; `--help=all` shows the others too.
    """
    metadata = {
        "help": help,
        "modes": modes,
        "metavar": metavar,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "mode_defaults": mode_defaults or {},
        "default_help": default_help,
        "mode_help": mode_help or {},
        "basic": basic,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Data: the labeled images and their splits."""

    dataset: str | None = setting(
        None,
        "labeled images: folder:PATH (one subfolder per class), csv:PATH (columns path,label[,split]), a TFDS data set "
        "(name or name/config:version), or digits",
        _DATA,
        metavar="SOURCE",
        mode_defaults={FINETUNE: "stanford_dogs", EXTRACT: "stanford_dogs", AUDIT: "stanford_dogs"},
        default_help="the data set of the classifier",
        basic=_DATA,
    )
    data_dir: str | None = setting(None, "data directory of TFDS", _DATA, metavar="DIR", default_help="that of TFDS")
    classes: tuple[str, ...] = setting(
        (), "classes to use, comma-separated", _DATA, metavar="NAMES", default_help="all"
    )
    val_fraction: float = setting(
        0.1, "fraction of train to hold out if the source has no val split", _SPLIT, minimum=0, maximum=0.9
    )
    test_fraction: float | None = setting(
        None,
        "fraction of train to hold out as a test split; by default only if the source has neither val nor test",
        _SPLIT,
        minimum=0,
        maximum=0.9,
        default_help="0.2",
    )
    shots: int | None = setting(
        None, "use only N training images per class", _MAKE, minimum=1, default_help="all", basic=_MAKE
    )
    max_broken_fraction: float = setting(
        0.01,
        "fraction of unreadable images beyond which the run stops",
        _DATA,
        minimum=0,
        maximum=1,
        mode_defaults={AUDIT: 1.0},
    )


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Backbone: the pretrained network and its input."""

    backbone: str | None = setting(
        None,
        "a network of keras.applications, in upper or lower case",
        _SPLIT,
        metavar="NAME",
        mode_defaults={FINETUNE: "ResNet50", EXTRACT: "VGG16", AUDIT: "ResNet50"},
        default_help="that of the run",
        basic=_SPLIT,
    )
    backbone_kwargs: str = setting(
        "", "constructor arguments of the network: alpha=0.35,...", _SPLIT, metavar="ARGUMENTS"
    )
    weights: str = setting(
        "imagenet",
        "imagenet, none (random weights), a weights file, or the folder of an earlier run",
        _SPLIT,
        metavar="WEIGHTS",
        basic=_SPLIT,
    )
    image_size: int | None = setting(
        None,
        "height and width of the network's input, in pixels",
        _SPLIT,
        minimum=1,
        maximum=4096,
        default_help="that of the network",
    )
    resize: str = setting(
        "crop",
        "how images are resized: crop (shorter side, then center crop), squash (both sides) or pad (longer side, then "
        "black borders); with --weights=RUN that of the run",
        _SPLIT,
        choices=("crop", "squash", "pad"),
    )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Training: which layers are trained, and how."""

    trainable: str = setting(
        "head",
        "layers to train: head, last:N (layers), from:LAYER, or all",
        _TRAIN,
        metavar="LAYERS",
        basic=_TRAIN,
    )
    epochs: int = setting(10, "number of epochs of each training stage", _TRAIN, minimum=1, basic=_TRAIN)
    batch_size: int = setting(32, "images per training step", _TRAIN, minimum=1, basic=_TRAIN)
    optimizer: str = setting("adamw", "optimizer", _TRAIN, choices=("sgd", "adam", "adamw"))
    learning_rate: float = setting(
        0.003,
        "peak learning rate while the head is trained (with --weights=none: while the whole network is)",
        _TRAIN,
        above=0,
        maximum=1000,
        basic=_TRAIN,
    )
    backbone_learning_rate: float = setting(
        0.0001, "peak learning rate while layers of the backbone are trained", _TRAIN, above=0, maximum=1000
    )
    momentum: float = setting(0.9, "momentum of sgd", _TRAIN, minimum=0, maximum=0.9999)
    weight_decay: float = setting(
        0.0, "decoupled weight decay of kernels (Loshchilov & Hutter 2019)", _TRAIN, minimum=0
    )
    schedule: str = setting("cosine", "learning rate schedule", _TRAIN, choices=("constant", "cosine"))
    warmup_epochs: float = setting(0.0, "epochs of linear learning rate warm-up", _TRAIN, minimum=0)
    label_smoothing: float = setting(
        0.0, "probability that label smoothing distributes over all classes", _TRAIN, minimum=0, maximum=0.9
    )
    class_weights: str = setting(
        "none",
        "weights of the classes in the loss; balanced gives rare classes a larger weight",
        _TRAIN,
        choices=("none", "balanced"),
    )
    augment: str = setting(
        "none",
        "data augmentation: flip (mirrored images, cached as embeddings) or crop (random crops and flips in every "
        "epoch; bypasses the embedding cache)",
        _TRAIN,
        choices=("none", "flip", "crop"),
        basic=_TRAIN,
    )
    standardize: bool = setting(
        True, "standardize embeddings in the head, with mean and variance of the training images", _TRAIN
    )
    dropout: float = setting(0.0, "dropout rate before the dense layer of the head", _TRAIN, minimum=0, maximum=0.95)
    monitor: str = setting(
        "accuracy",
        "metric on val that selects the best epoch; loss is less noisy on a small val split",
        _TRAIN,
        choices=("accuracy", "loss"),
    )
    patience: int | None = setting(
        None,
        "stop a stage after N epochs without improvement on val",
        _TRAIN,
        minimum=1,
        default_help="no early stopping",
    )


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """Probe: the embedding that is read, and the scikit-learn classifier trained on it."""

    feature_layer: tuple[str, ...] = setting(
        (),
        "layer whose output is the embedding; several, comma-separated, are compared on val",
        _PROBE,
        metavar="LAYERS",
        default_help="fc2 of VGG16 and VGG19, otherwise the pooled last layer",
        basic=_PROBE,
    )
    pooling: str = setting("avg", "pooling of feature maps", _PROBE, choices=("avg", "max", "flatten"))
    probe: tuple[str, ...] = setting(
        ("logistic_regression",),
        f"{', '.join(PROBES)}, or none (embeddings only); several, comma-separated, are compared on val",
        _PROBE,
        metavar="PROBES",
        basic=_PROBE,
    )
    scale: str = setting(
        "standard",
        "scaling of embeddings: standard (mean 0, variance 1 on train), l2 (unit length) or none",
        _PROBE,
        choices=("standard", "l2", "none"),
    )
    probe_parameter: float | None = setting(
        None,
        "value of the probe's regularization parameter: C, alpha of ridge, or number of neighbors of knn",
        _PROBE,
        minimum=1e-9,
        maximum=1e9,
        default_help="selected from a grid",
    )
    choose_by: str = setting(
        "auto",
        "how that value is selected: val, cv (stratified cross-validation within train and val), or auto (cv if val "
        "has fewer than 1,000 images and fewer than train)",
        _PROBE,
        choices=("auto", "val", "cv"),
    )
    refit: str = setting("train", "splits that the final probe is fitted on", _PROBE, choices=("train", "train+val"))
    max_iter: int = setting(1000, "maximum iterations of logistic_regression and linear_svm", _PROBE, minimum=1)
    repeats: int = setting(
        1,
        "number of random draws of --shots; reports mean and standard deviation",
        _PROBE,
        minimum=1,
        maximum=1000,
    )
    embeddings_output: str | None = setting(
        None,
        "file for id, split, label and embedding of every image (.npz or .parquet)",
        _PROBE,
        metavar="FILE",
        default_help="not written",
        basic=_PROBE,
    )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation: metrics, calibration and report."""

    calibrate: bool = setting(True, "calibrate probabilities with a temperature fitted on val (Guo et al. 2017)", _MAKE)
    target_accuracy: float = setting(
        0.95,
        "find the confidence threshold at which this accuracy is guaranteed with 95 % probability",
        _REPORT,
        minimum=0,
        maximum=1,
    )
    slices: str | None = setting(
        None,
        "CSV file with a column id (or path) and attributes; reports metrics for each value of each attribute",
        _REPORT,
        metavar="FILE",
        default_help="none",
    )
    seeds: int = setting(
        1,
        "train N times with different seeds; report mean and standard deviation",
        _TRAIN,
        minimum=1,
        maximum=100,
    )
    corruptions: bool = setting(
        False,
        "measure accuracy under noise, blur, brightness, compression, rotation and crops of five strengths",
        (EVALUATE,),
        basic=(EVALUATE,),
    )
    corruption_images: int = setting(200, "number of images for --corruptions", (EVALUATE,), minimum=1)
    compare: tuple[str, ...] = setting(
        (),
        "run folders to compare on the examples they share, comma-separated",
        (EVALUATE,),
        metavar="RUNS",
        default_help="none",
        basic=(EVALUATE,),
    )
    report: bool = setting(True, "write report.html and MODEL_CARD.md", _REPORT, basic=(EVALUATE,))
    card: str | None = setting(
        None,
        "JSON file with entries for the model card: intended use, limitations, license, ...",
        _REPORT,
        metavar="FILE",
        default_help="none",
    )


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Engine: the runtime of the frozen network, and the cache of its embeddings."""

    engine: str = setting(
        "auto",
        "runtime of the frozen network; auto selects the fastest that is installed",
        (*_SPLIT, SERVE),
        choices=("auto", "tensorflow", "openvino"),
        basic=(SERVE,),
    )
    precision: str = setting(
        "auto",
        "floating-point precision; auto uses bfloat16 for training images if it is at least 1.3 times as fast and "
        "agrees with float32 (serve: float32); float16 needs a GPU",
        (*_SPLIT, SERVE),
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    store_dir: str | None = setting(
        None, "folder of the embedding cache", (*_SPLIT, DOCTOR), metavar="DIR", default_help="tl_keras in ~/.cache"
    )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Output: what is written, and where."""

    run_dir: str | None = setting(
        None,
        "folder of the run",
        _DATA,
        metavar="DIR",
        default_help="runs/MODE-DATA-BACKBONE-TIME",
        basic=_DATA,
    )
    overwrite: bool = setting(
        False, "replace the run in --run_dir; the old run is kept until the new one is complete", _DATA, basic=_MAKE
    )
    export: bool = setting(True, "export a SavedModel at the end of the run", _MAKE, basic=_MAKE)
    export_dir: str = setting(
        "saved_models",
        "folder of exported models: NAME/VERSION",
        (*_EXPORT, SERVE),
        metavar="DIR",
        basic=(EXPORT, SERVE),
    )
    model_name: str | None = setting(
        None,
        "name of the exported model",
        (*_EXPORT, SERVE),
        metavar="NAME",
        default_help="from data set and backbone",
        basic=(EXPORT, SERVE),
    )
    seed: int = setting(0, "random seed", _SPLIT, minimum=0, maximum=2**31 - 1)
    max_pixels: int = setting(
        50_000_000, "pixel limit of an image; the exported model rejects larger ones", (*_EXPORT, SERVE), minimum=1
    )
    resume: bool = setting(
        False,
        "continue an unfinished run with its own settings (without --run_dir: the latest in the folder runs)",
        _DATA,
        basic=_MAKE,
    )


@dataclasses.dataclass(frozen=True)
class ReadConfig:
    """Classifier: the trained classifier and its input."""

    classifier: str | None = setting(
        None,
        "run folder or exported version folder",
        (*_READ, SERVE, AUDIT),
        metavar="DIR",
        mode_help={
            SERVE: "run folder, exported version folder, or saved_models/NAME for all its versions (if omitted: all "
            "models in --export_dir)",
            AUDIT: "run folder whose data is audited, with its network and its predictions",
        },
        basic=(*_READ, SERVE, AUDIT),
    )
    images: tuple[str, ...] = setting(
        (), "files, folders or glob patterns, comma-separated", (PREDICT,), metavar="PATHS", basic=(PREDICT,)
    )
    output: str | None = setting(
        None,
        "CSV file of predictions",
        (PREDICT,),
        metavar="FILE",
        default_help="standard output",
        basic=(PREDICT,),
    )


@dataclasses.dataclass(frozen=True)
class AuditConfig:
    """Cleaning: what to do with the findings."""

    write_clean_csv: str | None = setting(
        None,
        "manifest without the images that --clean names, for --dataset=csv:FILE",
        (AUDIT,),
        metavar="FILE",
        default_help="not written",
        basic=(AUDIT,),
    )
    clean: tuple[str, ...] = setting(
        ("unreadable", "leak", "two_labels", "duplicate", "blank"),
        "kinds of findings to leave out of that manifest, comma-separated",
        (AUDIT,),
        metavar="KINDS",
        basic=(AUDIT,),
    )


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Serving: the local server, and files for TensorFlow Serving."""

    deploy: str | None = setting(
        None,
        "folder for TensorFlow Serving's files: configuration, Compose, Kubernetes, client",
        (EXPORT,),
        metavar="DIR",
        default_help="not written",
        basic=(EXPORT,),
    )
    host: str = setting(
        "127.0.0.1",
        "address to listen on; 0.0.0.0 means all network interfaces",
        (SERVE,),
        metavar="ADDRESS",
        basic=(SERVE,),
    )
    port: int = setting(
        8501, "port of the REST API (0 picks a free one)", (SERVE,), minimum=0, maximum=65535, basic=(SERVE,)
    )
    grpc_port: int = setting(
        8500, "port of the gRPC API (0 picks a free one)", (SERVE,), minimum=0, maximum=65535, basic=(SERVE,)
    )
    models_config: str | None = setting(
        None,
        "list of models in the format of TensorFlow Serving's --model_config_file",
        (SERVE,),
        metavar="FILE",
        default_help="none",
        basic=(SERVE,),
    )
    max_batch_size: int = setting(32, "largest batch, in images: 1, 2, 4, 8, 16 or 32", (SERVE,), minimum=1, maximum=32)
    max_queued_images: int = setting(
        1024, "queue limit per model, in images; beyond it requests get HTTP 429", (SERVE,), minimum=1
    )
    max_request_bytes: int = setting(
        64 << 20,
        "size limit of a request, in bytes; beyond it requests get HTTP 413",
        (SERVE,),
        metavar="BYTES",
        minimum=1,
        maximum=2**31 - 1,
    )
    max_request_images: int = setting(
        256, "image limit of a request; beyond it requests get HTTP 400", (SERVE,), minimum=1
    )
    request_timeout_seconds: float = setting(
        30.0,
        "timeout of a request, in seconds; beyond it requests get HTTP 504",
        (SERVE,),
        metavar="SECONDS",
        minimum=0.001,
        maximum=3600,
    )
    cors: tuple[str, ...] = setting(
        (),
        "origins of web pages that may call the REST API, comma-separated (* allows any)",
        (SERVE,),
        metavar="ORIGINS",
        default_help="none",
    )


_OWN_TO_A_RUN = {"run_dir", "overwrite", "resume"}
GROUPS: dict[str, type[Any]] = {
    "read": ReadConfig,
    "data": DataConfig,
    "backbone": BackboneConfig,
    "training": TrainingConfig,
    "probe": ProbeConfig,
    "evaluation": EvaluationConfig,
    "engine": EngineConfig,
    "run": RunConfig,
    "audit": AuditConfig,
    "serve": ServeConfig,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of one invocation, not yet checked; `Config` is."""

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

    def as_flags(self) -> str:
        """The settings that the mode uses, as a flag file that reproduces the run."""
        lines = [f"--mode={self.mode}"]
        for group, field in list_fields(self.mode):
            value = getattr(getattr(self, group), field.name)
            if value not in {None, ()} and field.name != "resume":
                lines.append(_as_flag(field.name, value))
        return "\n".join(lines) + "\n"

    def as_command(self) -> str:
        """The command with the settings that differ from the mode's defaults, quoted for a shell.

        The run folder is left out: that of this run exists.
        """
        words = ["tl_keras", self.mode]
        for group, field in list_fields(self.mode):
            value = getattr(getattr(self, group), field.name)
            is_default = value in {None, (), find_default(field, self.mode)}
            if not is_default and field.name not in _OWN_TO_A_RUN:
                words.append(shlex.quote(_as_flag(field.name, value)))
        return " ".join(words)

    def as_dict(self) -> dict[str, Any]:
        """The settings as nested dictionaries, for `config.json`."""
        return dataclasses.asdict(self)


def list_fields(mode: str | None = None) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yields group and field of every setting, or of those that a mode uses."""
    for name, group in GROUPS.items():
        for field in dataclasses.fields(group):
            if mode is None or mode in field.metadata["modes"]:
                yield name, field


@functools.cache
def value_types() -> dict[str, type]:
    """Name of each setting → type of its value: `bool`, `int`, `float`, `str`, or `tuple` for a list of strings."""
    types: dict[str, type] = {}
    for group in GROUPS.values():
        for name, hint in typing.get_type_hints(group).items():
            allowed = {hint, *typing.get_args(hint)}
            types[name] = next((kind for kind in (bool, int, float) if kind in allowed), str)
            if hint == tuple[str, ...]:
                types[name] = tuple
    return types


def find_help(field: dataclasses.Field[Any], mode: str) -> str:
    """The help of a setting in a mode."""
    return str(field.metadata["mode_help"].get(mode, field.metadata["help"]))


def find_default(field: dataclasses.Field[Any], mode: str) -> Any:
    """The default of a setting in a mode."""
    return field.metadata["mode_defaults"].get(mode, field.default)


def default_store_dir() -> str:
    """`tl_keras` in the user's cache folder; a machine without a home has none.

    A relative `XDG_CACHE_HOME` is ignored, as the XDG Base Directory Specification (version 0.8) says.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    cache = cache if os.path.isabs(cache) else os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "tl_keras") if os.path.isabs(cache) else os.path.join(os.getcwd(), ".tl_keras_store")


def is_run(weights: str) -> bool:
    """Whether `--weights` names the run folder of an earlier run; a folder called `imagenet` or `none` is not asked."""
    return weights not in {"imagenet", "none"} and os.path.isdir(weights)


def _as_flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no{name}"
    if isinstance(value, tuple):
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow(value)
        return f"--{name}={text.getvalue()}"
    return f"--{name}={value}"
