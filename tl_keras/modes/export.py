"""`--mode=export`: exports the classifier of a run as the next version of a model for TensorFlow Serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tl_keras.classifier import find_folder, is_exported, load_samples, load_trained
from tl_keras.config import Config
from tl_keras.errors import UserError
from tl_keras.export.deploy import write_deployment
from tl_keras.export.saved_model import describe_request, export_saved_model
from tl_keras.export.warmup import BATCH_SIZES, make_photograph
from tl_keras.jobs.result import Result
from tl_keras.run import Screen, check_writable, read_json
from tl_keras.serving.measure import measure_speed

_PHOTOGRAPHS = 8


def run(config: Config, screen: Screen | None = None) -> Result:
    """Exports the classifier of a run, and compares it with the evaluated predictions for sample images of the run.

    With `--deploy` it also writes the files for TF Serving; for an exported model only these.
    """
    screen, path, metrics = screen or Screen(), Path(str(config.read.classifier)), dict[str, Any]()
    if config.serve.deploy:
        check_writable(Path(config.serve.deploy), f"--deploy={config.serve.deploy}")
    if is_exported(path):
        if not config.serve.deploy:
            raise UserError(f"{path} is already an exported model. Give a run folder, or --deploy=DIR.")
        exported_path = path.resolve()
        if not exported_path.name.isdecimal():
            raise UserError(f"{path} is not a version folder: its name must be a number, such as saved_models/NAME/1.")
        samples = [make_photograph(seed) for seed in range(_PHOTOGRAPHS)]
    else:
        classifier = load_trained(str(path))
        samples, expected = load_samples(str(path))
        exported = export_saved_model(
            classifier,
            export_dir=config.run.export_dir,
            name=config.run.model_name,
            samples=samples,
            expected=expected,
            precision=_read_precision(find_folder(str(path)).resolve().parent),
            max_pixels=config.run.max_pixels,
            show=screen.line,
        )
        exported_path, metrics = exported.path, {"export": exported.as_dict()}
        for line in describe_request(exported_path):
            screen.line(line)
    if config.serve.deploy:
        screen.line("deploy: benchmarking the model in each batch size")
        speed = measure_speed(exported_path, samples, batch_sizes=BATCH_SIZES)
        files = write_deployment(
            Path(config.serve.deploy),
            exported_path,
            batch_sizes=speed.batch_sizes,
            images_per_second=speed.images_per_second,
            bfloat16=speed.bfloat16,
            difference=speed.difference,
            cores=speed.cores,
        )
        screen.line(f"deploy: {config.serve.deploy}: {', '.join(files)}")
        if "models.config.new" in files:
            screen.line(
                f"deploy: {config.serve.deploy}/models.config differs and is kept; compare it with models.config.new"
            )
    screen.result(f"exported · {exported_path}" if metrics else f"deployment · {config.serve.deploy}")
    return Result(exported=exported_path, metrics=metrics)


def _read_precision(run_dir: Path) -> str:
    """Reads the precision of a run's evaluation; float32 since version 0.2, also for killed runs."""
    file = run_dir / "metrics.json"
    environment = read_json(file)["environment"] if file.is_file() else {}
    return str(environment.get("evaluated_precision", environment.get("precision", "float32")))
