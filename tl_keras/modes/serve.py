"""`--mode=serve`: serves exported models or a run with the REST and gRPC APIs of TF Serving, without Docker."""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tl_keras.classifier import find_folder, is_exported, load_samples, load_trained
from tl_keras.config import Config
from tl_keras.errors import UserError
from tl_keras.export.saved_model import name_model, write_version
from tl_keras.export.warmup import BATCH_SIZES, make_photograph, read_warmup
from tl_keras.jobs.result import Result
from tl_keras.run import INTERRUPTED, Screen

try:
    from tl_keras.serving.calls import Limits
    from tl_keras.serving.models import ModelEntry, find_models, list_versions
    from tl_keras.serving.reload import read_config_file
    from tl_keras.serving.server import Address, check_ports, serve
except ImportError as missing:
    raise UserError(
        f"--mode=serve needs a package that is not installed ({missing.name}). Install it: pip install "
        "'tl_keras[serving]'."
    ) from missing


_SAMPLES = 4
_REQUESTS_IN_FLIGHT = 16  # memory limit for all clients, in requests of the largest allowed size


def run(config: Config, screen: Screen | None = None) -> Result:
    """Serves models until the process ends with Ctrl-C or SIGTERM."""
    screen, settings = screen or Screen(), config.serve
    signal.signal(signal.SIGTERM, _end)  # while models are loading; the server installs its own handler
    address = Address(settings.host, settings.port, settings.grpc_port, settings.cors)
    check_ports(address)  # before a run is exported, which takes seconds
    with _find(config, screen) as (entries, roots, samples):
        interrupted = serve(
            entries,
            roots=roots,
            address=address,
            engine=config.engine.engine,
            precision=config.engine.precision,
            batch_sizes=[size for size in BATCH_SIZES if size <= settings.max_batch_size],
            max_queued=settings.max_queued_images,
            limits=Limits(
                request_bytes=settings.max_request_bytes,
                images=settings.max_request_images,
                seconds=settings.request_timeout_seconds,
                bytes_in_flight=_REQUESTS_IN_FLIGHT * settings.max_request_bytes,
            ),
            read_warmup=read_warmup,
            samples=samples,
            show=screen.result,  # the addresses, and what becomes of versions
        )
    return Result(exit_status=INTERRUPTED if interrupted else 0)


def _end(number: int, _: Any) -> NoReturn:
    """Exits through Python, so that temporary folders are removed."""
    del number
    sys.exit(0)


@contextlib.contextmanager
def _find(config: Config, screen: Screen) -> Iterator[tuple[Sequence[ModelEntry], list[Path], list[bytes]]]:
    """Finds the models to serve, the folders that they may be in, and images to compare engines on."""
    export_dir, samples = Path(config.run.export_dir), [make_photograph(seed) for seed in range(_SAMPLES)]
    if config.serve.models_config:
        entries = read_config_file(Path(config.serve.models_config))
        _check_no_name(config)
        yield entries, [export_dir, *(entry.base_path for entry in entries)], samples
    elif not config.read.classifier:
        _check_no_name(config)
        yield find_models(export_dir), [export_dir], samples
    elif is_exported(path := Path(config.read.classifier).resolve()):
        if not path.name.isdecimal():
            raise UserError(f"{path} is not a version folder: its name must be a number, such as saved_models/NAME/1.")
        yield (
            [ModelEntry(config.run.model_name or path.parent.name, path.parent, (int(path.name),))],
            [path.parent],
            samples,
        )
    elif path.is_dir() and list_versions(path):  # saved_models/NAME
        yield [ModelEntry(config.run.model_name or path.name, path)], [path], samples
    else:
        classifier = load_trained(config.read.classifier)
        with tempfile.TemporaryDirectory(prefix="tl_keras-serve-") as folder:
            model = Path(folder) / (config.run.model_name or name_model(classifier.name))
            (model / "1").mkdir(parents=True)
            screen.line(f"serving the run {config.read.classifier}: temporary export in {model}")
            write_version(classifier, model / "1", name=model.name, max_pixels=config.run.max_pixels)
            own, _ = load_samples(str(find_folder(config.read.classifier)))
            yield [ModelEntry(model.name, model)], [model], own


def _check_no_name(config: Config) -> None:
    """Checks that --model_name is not given for several models.

    Raises:
        UserError: it is given.
    """
    if config.run.model_name:
        raise UserError("--model_name names a single model. Give --classifier too, or leave --model_name out.")
