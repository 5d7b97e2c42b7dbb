"""Validation of settings: allowed values, and combinations that exclude each other."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import typing
from typing import Any

from tl_keras.config.settings import (
    AUDIT,
    EVALUATE,
    EXPORT,
    FINDINGS,
    MODES,
    OUTPUTS,
    PATHS,
    PREDICT,
    PROBES,
    SERVE,
    AuditConfig,
    BackboneConfig,
    DataConfig,
    EvaluationConfig,
    ProbeConfig,
    ReadConfig,
    Settings,
    default_store_dir,
    list_fields,
)
from tl_keras.errors import UserError

MODEL_NAME = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"  # TF Serving does not decode percent-encoded URLs


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The validated settings of one invocation."""

    def __post_init__(self) -> None:
        """Checks each setting, then settings that depend on each other.

        Raises:
            UserError: a value is not allowed, or two settings exclude each other.
        """
        check_choice("mode", self.mode, tuple(MODES))
        for group, field in list_fields():
            check_value(field, getattr(getattr(self, group), field.name))
        _check_together(self)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Suggests known names similar to `name`, ignoring case: `Did you mean: a, b? `; empty if there is none."""
    by_lower = {word.lower(): word for word in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    return f"Did you mean: {', '.join(by_lower[word] for word in found)}? " if found else ""


def parse_kwargs(text: str) -> dict[str, float | int | bool]:
    """Parses `--backbone_kwargs`: `alpha=0.35,minimalistic=True`.

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


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Checks a value that must be one of several names.

    Raises:
        UserError: it is not one of them; the message has the nearest names.
    """
    if value not in choices:
        raise UserError(f"--{name}={value} is not known. {nearest(value, choices)}Allowed: {', '.join(choices)}.")


def check_value(field: dataclasses.Field[Any], value: Any) -> None:
    """Checks the value of one setting.

    Raises:
        UserError: it is empty, out of range, or not one of the choices.
    """
    allowed = field.metadata
    if value is None:
        return
    if allowed["choices"]:
        check_choice(field.name, value, allowed["choices"])
    if isinstance(value, str) and not value and field.default != "":
        raise UserError(f"--{field.name} is empty. Give it a value, or leave it out.")
    if isinstance(value, tuple) and not all(value):
        raise UserError(f"--{field.name} has an empty part. Remove the extra comma.")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_range(field, value)


def _check_range(field: dataclasses.Field[Any], value: float) -> None:
    minimum, maximum, above = (field.metadata[name] for name in ("minimum", "maximum", "above"))
    is_low = (minimum is not None and value < minimum) or (above is not None and value <= above)
    if is_low or (maximum is not None and value > maximum) or not math.isfinite(value):
        raise UserError(f"--{field.name}={value} is out of range. Allowed: {describe_range(field)}.")


def describe_range(field: dataclasses.Field[Any]) -> str:
    """The range of a number, in words; empty if it has none."""
    minimum, maximum, above = (field.metadata[name] for name in ("minimum", "maximum", "above"))
    if above is not None:
        return f"above {above}" if maximum is None else f"above {above}, up to {maximum}"
    if minimum is None:
        return ""
    return f"{minimum} or more" if maximum is None else f"{minimum} to {maximum}"


def _check_together(config: Config) -> None:
    data, training = config.data, config.training
    parse_kwargs(config.backbone.backbone_kwargs)
    if data.val_fraction + (data.test_fraction or 0) >= 0.95:
        raise UserError(
            f"--val_fraction={data.val_fraction} and --test_fraction={data.test_fraction} leave nothing to train on. "
            "Their sum must be less than 0.95."
        )
    _check_probe(config)
    _check_audit(config)
    if config.evaluation.card and not config.evaluation.report:
        raise UserError("--card has entries for the report, which --noreport disables. Leave one of them out.")
    if training.warmup_epochs > training.epochs:
        raise UserError(
            f"--warmup_epochs={training.warmup_epochs:g} is more than --epochs={training.epochs}. Give fewer."
        )
    _check_compare(config)
    if (
        config.evaluation.corruption_images != EvaluationConfig().corruption_images
        and not config.evaluation.corruptions
    ):
        raise UserError("--corruption_images has no effect without --corruptions. Give both, or leave it out.")
    if config.mode in {EVALUATE, PREDICT, EXPORT} and not config.read.classifier and not config.evaluation.compare:
        raise UserError(
            f"--classifier is missing. --mode={config.mode} reads a run folder or an exported version folder: "
            "--classifier=runs/NAME or --classifier=saved_models/NAME/1."
        )
    if config.mode == PREDICT and not config.read.images:
        raise UserError(
            "--images is missing. Give files, folders or glob patterns, comma-separated: --images=photo.jpg."
        )
    _check_serve(config)
    if config.run.model_name and not re.fullmatch(MODEL_NAME, config.run.model_name):
        raise UserError(
            f"--model_name={config.run.model_name} can't be part of a TF Serving URL. Allowed: letters a to z, digits, "
            "'_', '-' and '.', but not '.' at the start."
        )
    _check_overwrite(config)


def _check_compare(config: Config) -> None:
    compare = config.evaluation.compare
    if not compare:
        return
    if len(compare) < 2:
        raise UserError("--compare needs at least two run folders: --compare=runs/A,runs/B.")
    if len({os.path.realpath(path) for path in compare}) < len(compare):
        raise UserError(f"--compare={','.join(compare)} lists a run twice. List each run once.")
    rest = dataclasses.replace(config.evaluation, compare=(), report=True)
    for given, default in ((config.data, DataConfig()), (config.read, ReadConfig()), (rest, EvaluationConfig())):
        for field in dataclasses.fields(given):
            if getattr(given, field.name) != getattr(default, field.name):
                raise UserError(f"--compare reads existing predictions and computes nothing. Leave out --{field.name}.")


def _check_serve(config: Config) -> None:
    serve = config.serve
    if serve.models_config and config.read.classifier:
        raise UserError("--models_config already lists the models to serve. Leave --classifier out.")
    if config.mode == SERVE and config.engine.precision == "float16":
        raise UserError("--precision=float16 is not available for serving. Use --precision=auto, float32 or bfloat16.")
    for origin in serve.cors:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#]+", origin):
            raise UserError(
                f"--cors={origin} is not the origin of a web page. Allowed: scheme://host[:port] without a path, or *."
            )
    if serve.max_batch_size & (serve.max_batch_size - 1):
        raise UserError(
            f"--max_batch_size={serve.max_batch_size} is not a batch size of the warm-up. Allowed: 1, 2, 4, 8, 16, 32."
        )
    if serve.max_queued_images < serve.max_request_images:
        raise UserError(
            f"--max_queued_images={serve.max_queued_images} is less than --max_request_images="
            f"{serve.max_request_images}, so the largest request can never be queued. Increase the first or reduce the "
            "second."
        )


def _check_audit(config: Config) -> None:
    for kind in config.audit.clean:
        if kind not in FINDINGS:
            raise UserError(f"--clean={kind} is not known. {nearest(kind, FINDINGS)}Allowed: {', '.join(FINDINGS)}.")
    if config.audit.clean != AuditConfig().clean and not config.audit.write_clean_csv:
        raise UserError("--clean has no effect without --write_clean_csv=FILE. Give both, or leave --clean out.")
    if config.audit.write_clean_csv and not (config.data.dataset or "folder:").startswith(("folder:", "csv:")):
        raise UserError(
            f"--write_clean_csv lists image files, but {config.data.dataset} has none. Leave it out, or use "
            "--dataset=folder: or csv:."
        )
    if config.mode == AUDIT and config.read.classifier and config.backbone != BackboneConfig():
        raise UserError(
            "--classifier has its own backbone, weights, image size and resizing. Leave out the flags for them."
        )


def _check_probe(config: Config) -> None:
    probe = config.probe
    if not probe.probe:
        raise UserError(f"--probe is empty. Allowed: {', '.join(PROBES)}, none.")
    for name in probe.probe:
        check_choice("probe", name, (*PROBES, "none"))
    for name, values in (("probe", probe.probe), ("feature_layer", probe.feature_layer)):
        if len(set(values)) < len(values):
            raise UserError(f"--{name}={','.join(values)} lists a name twice. List each once.")
    if probe.probe_parameter is not None:
        if len(probe.probe) > 1:
            raise UserError("--probe_parameter applies to a single probe. Give one --probe, or leave it out.")
        if probe.probe == ("knn",) and probe.probe_parameter != int(probe.probe_parameter):
            raise UserError(
                f"--probe_parameter={probe.probe_parameter:g} is not a number of neighbors. Give a whole number."
            )
    if probe.repeats > 1 and config.data.shots is None:
        raise UserError("--repeats draws --shots several times. Give --shots too, or leave --repeats out.")
    _check_embeddings_output(probe, config.data.shots)


def _check_embeddings_output(probe: ProbeConfig, shots: int | None) -> None:
    output = probe.embeddings_output
    if "none" in probe.probe and shots is not None:
        raise UserError(
            "--shots selects training images of a probe, which --probe=none does not fit. Leave --shots out."
        )
    if "none" in probe.probe and (len(probe.probe) > 1 or not output):
        raise UserError("--probe=none only computes embeddings. Give it --embeddings_output, and no other probe.")
    if output and len(probe.feature_layer) > 1:
        raise UserError("--embeddings_output writes embeddings of a single layer. Give one --feature_layer.")
    if output and not output.endswith((".npz", ".parquet")):
        raise UserError(
            f"--embeddings_output={output} has an unknown suffix. Allowed: .npz, .parquet. Rename the file."
        )


def check_classifier_path(path: str | None) -> None:
    """Checks that the folder of a classifier exists.

    Raises:
        UserError: it does not exist.
    """
    if path and not os.path.exists(path):
        raise UserError(f"{path} does not exist. Give a run folder (runs/NAME) or an exported version folder.")


def lies_in(path: str, folder: str) -> bool:
    """Whether a path is a folder or inside it; both are absolute."""
    try:
        return os.path.commonpath([folder, path]) == folder
    except ValueError:  # Windows: different drives
        return False


def _check_overwrite(config: Config) -> None:
    """Checks that --overwrite does not delete an input or the cache.

    Raises:
        UserError: an input or the cache is inside --run_dir.
    """
    if not config.run.overwrite or not config.run.run_dir:
        return
    folder = os.path.realpath(config.run.run_dir)
    kept: dict[str, str | tuple[str, ...] | None] = {
        field.name: getattr(getattr(config, group), field.name)
        for group, field in list_fields()
        if field.name in PATHS and field.name not in OUTPUTS
    }
    kept |= {"dataset": (config.data.dataset or "").partition(":")[2]}
    kept |= {"store_dir": config.engine.store_dir or default_store_dir()}
    paths = [(name, path) for name, one in kept.items() for path in (one if isinstance(one, tuple) else (one,))]
    for name, path in paths:
        if path and os.path.exists(path) and lies_in(os.path.realpath(path), folder):
            raise UserError(
                f"--overwrite would delete --{name}={path}, which is inside --run_dir={config.run.run_dir}. Give "
                "another --run_dir."
            )
