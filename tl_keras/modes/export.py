"""`--mode=export`: a run's classifier as the next version of a model for TensorFlow Serving."""

from __future__ import annotations

from pathlib import Path

from tl_keras.classifier import find_folder, load_samples, load_trained
from tl_keras.config import Config
from tl_keras.export.saved_model import describe_request, export_saved_model
from tl_keras.run import Result, Screen, read_json


def run(config: Config) -> Result:
    """Exports a run's classifier, compared with what the run evaluated on some of its real images."""
    screen, path = Screen(), str(config.read.classifier)
    classifier = load_trained(path)
    samples, expected = load_samples(path)
    metrics = read_json(find_folder(path).resolve().parent / "metrics.json")
    exported = export_saved_model(
        classifier,
        export_dir=config.run.export_dir,
        name=config.run.model_name,
        samples=samples,
        expected=expected,
        precision=metrics["environment"]["precision"],
        show=screen.line,
    )
    screen.line(f"try it: {describe_request(exported.path)}")
    screen.line(f"exported · {exported.path}")
    return Result(run_dir=Path(path), exported=exported.path, metrics={"export": exported.as_dict()})
