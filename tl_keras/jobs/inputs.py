"""Checks of the files and names that a mode reads, before TensorFlow is loaded, which takes seconds."""

from __future__ import annotations

from tl_keras.backbones.zoo import check_backbone, find_preset
from tl_keras.config import AUDIT, EXTRACT, FINETUNE, Config, check_classifier_path, is_run, parse_kwargs
from tl_keras.data.sources import check_images, check_path
from tl_keras.report.card import load_card
from tl_keras.run import check_run_dir


def check_inputs(config: Config) -> None:
    """Checks what can be checked without TensorFlow: paths, the backbone and its weights, and the run folder.

    Raises:
        UserError: a path or a backbone does not exist, or the run folder must not be written.
    """
    check_path(config.data.dataset or "")
    check_classifier_path(config.read.classifier)
    check_images(config.read.images)
    load_card(config.evaluation.card)
    if config.mode in {FINETUNE, EXTRACT} or (config.mode == AUDIT and not config.read.classifier):
        _check_backbone(config)
    if config.run.run_dir:
        check_run_dir(config.run.run_dir, overwrite=config.run.overwrite, config=config.as_dict())


def _check_backbone(config: Config) -> None:
    wanted = config.backbone
    if is_run(wanted.weights):
        return
    preset = find_preset(wanted.backbone or "")
    check_backbone(
        preset,
        weights=wanted.weights,
        image_size=wanted.image_size or preset.image_size,
        kwargs=parse_kwargs(wanted.backbone_kwargs),
    )
