"""Selection of the default learning rate and variance floor by cross-validation on training images only.

python -m benchmarks.recipe

The data are hymenoptera's train split, and flowers without the quarter that accuracy.py holds out. Cross-validation has
five folds and is repeated twice for the smaller data set. For each fold, the epoch is selected on a part of the other
four, and the fold is scored. The results are the mean log-loss and accuracy over the folds. The default is the setting
with the best accuracy, averaged over the two data sets. The images that accuracy.py scores are never used here.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
from scipy.special import softmax
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold, train_test_split

from benchmarks.accuracy import embed_photographs, hold_out_quarter
from benchmarks.measure import parse, write_results
from tl_keras.config import TrainingConfig
from tl_keras.data.sources import load_source
from tl_keras.training import heads
from tl_keras.training.batches import make_batches, predict_logits
from tl_keras.training.fit import Progress, fit_stage
from tl_keras.training.losses import build_loss

FLOORS = (0.001, 0.3, 3.0, 30.0)
LEARNING_RATES = (0.001, 0.002, 0.003, 0.004)


def main() -> None:
    arguments = parse()
    sets = {name: load_train(arguments, name) for name in ("hymenoptera", "flowers")}
    rows = [
        {"variance floor": floor, "learning rate": rate}
        | {name: cross_validate(*sets[name], floor, rate, 2 if name == "hymenoptera" else 1) for name in sets}
        for floor in FLOORS
        for rate in LEARNING_RATES
    ]
    write_results("recipe", {"five folds of the training images": rows})


def load_train(arguments: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Loads the embeddings and labels of the training images."""
    source = load_source(f"folder:{arguments.data / name}", data_dir=None)
    positions = np.flatnonzero(source.splits == 0)
    if name == "flowers":
        positions, _ = hold_out_quarter(source.labels)
    return embed_photographs(arguments, source, positions)


def cross_validate(
    embeddings: np.ndarray, labels: np.ndarray, floor: float, rate: float, repeats: int
) -> dict[str, float]:
    scores = []
    for seed in range(repeats):
        for train, fold in StratifiedKFold(5, shuffle=True, random_state=seed).split(embeddings, labels):
            scores.append(score_fold(embeddings, labels, train, fold, floor, rate, seed))
    loss, accuracy = np.mean(scores, axis=0)
    result = {"log-loss": round(float(loss), 4), "accuracy": round(float(accuracy), 4)}
    print(floor, rate, result, flush=True)
    return result


def score_fold(
    embeddings: np.ndarray,
    labels: np.ndarray,
    train: np.ndarray,
    fold: np.ndarray,
    floor: float,
    rate: float,
    seed: int,
) -> tuple[float, float]:
    keras.utils.set_random_seed(seed)
    train, val = train_test_split(train, test_size=0.12, stratify=labels[train], random_state=seed)

    def read(positions: np.ndarray, _: np.ndarray) -> np.ndarray:
        return embeddings[positions]

    classes = int(labels.max()) + 1
    batches = functools.partial(make_batches, read)
    heads._VARIANCE_FLOOR = floor
    standardize = heads.measure_embeddings(batches(train, labels[train], batch_size=256))
    head = heads.build_head(embeddings.shape[1], classes, dropout=0, standardize=standardize)
    with tempfile.TemporaryDirectory() as folder:
        fit_stage(
            head,
            batches(train, labels[train], batch_size=32, seed=seed),
            batches(val, labels[val], batch_size=128),
            name="head",
            loss=build_loss(classes, label_smoothing=0, class_weights=None),
            learning_rate=rate,
            training=TrainingConfig(),
            progress=Progress(Path(folder), quiet, quiet, quiet),
        )
    probabilities = softmax(predict_logits(head, read, fold, batch_size=256).astype(np.float64), axis=1)
    accuracy = float((probabilities.argmax(1) == labels[fold]).mean())
    return float(log_loss(labels[fold], probabilities, labels=range(classes))), accuracy


def quiet(*_: Any) -> None:
    """Discards progress messages."""


if __name__ == "__main__":
    main()
