"""The tables and sentences of a report."""

from __future__ import annotations

import numpy as np
import pytest

from tl_keras.evaluation.metrics import measure_classes
from tl_keras.report.contents import FULL_MATRIX, describe_run, make_classes, make_matrix


def fill(cells: dict[tuple[int, int], int]) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels of a matrix's cells."""
    pairs = np.array([pair for pair, count in cells.items() for _ in range(count)])
    return pairs[:, 1], pairs[:, 0]


def test_a_small_matrix_is_whole():
    predicted, labels = fill({(0, 0): 3, (0, 1): 1, (1, 1): 4})
    found = make_matrix(predicted, labels, ["ant", "bee", "none"], np.array([2, 1, 0]))
    assert found.whole
    assert [(row.label, row.counts, row.shares, row.others) for row in found.rows] == [
        ("ant", [3, 1, 0], [0.75, 0.25, 0], 0),
        ("bee", [0, 4, 0], [0.0, 1.0, 0], 0),
        ("none", [0, 0, 0], [0, 0, 0], 0),
    ]


def test_of_many_classes_the_confused_ones_are_shown_and_nothing_is_lost():
    count = FULL_MATRIX + 70
    cells = {(number, number): 20 for number in range(count)} | {(3, 90): 9, (50, 7): 8, (3, 4): 1}
    predicted, labels = fill(cells)
    names = [f"class {number}" for number in range(count)]
    found = make_matrix(predicted, labels, names, np.arange(count)[::-1])
    assert not found.whole
    assert {"class 3", "class 90", "class 50", "class 7"} <= set(found.names)
    assert len(found.names) <= 16
    assert found.names == sorted(found.names, key=names.index, reverse=True)
    for row in found.rows:
        assert sum(row.counts) + row.others == (labels == names.index(row.label)).sum()
    three = next(row for row in found.rows if row.label == "class 3")
    assert three.counts[found.names.index("class 90")] == 9


def test_the_worst_class_comes_first():
    classes = measure_classes(np.array([0, 0, 1, 2]), np.array([0, 0, 2, 2]), num_classes=3)
    rows = make_classes(classes, ["a", "b", "c"])
    assert [row["name"] for row in rows] == ["c", "a", "b"]  # of b there is no image
    assert (rows[0]["support"], rows[0]["recall"]["value"]) == (2, 0.5)


FIGURES = {"accuracy": 0.9, "accuracy_ci95": [0.8, 0.95], "n": 50}
CONFIG = {
    "mode": "finetune",
    "data": {"dataset": None},
    "backbone": {"weights": "/home/me/w.h5"},
    "training": {"trainable": "head", "epochs": 10},
    "probe": {"refit": "train"},
    "read": {"classifier": "runs/a"},
}
COUNTS = {"train": 1000, "val": 80, "test": 50}
PROBE = {"layer": "fc2", "probe": "logistic_regression", "chosen_by": "val"}
CROSS = PROBE | {"chosen_by": "5-fold cross-validation within train and val"}
ACCURACY = "Accuracy on 50 test images is 90.0 % (95 % confidence interval 80.0 to 95.0 %)."


@pytest.mark.parametrize(
    ("config", "metrics", "split", "parts"),
    [
        (
            {},
            {"test": FIGURES},
            "test",
            (
                "A new head was trained on ResNet50 (weights: w.h5) with 1,000 images, for at most 10 epochs per "
                "stage.",
                "All selections were made on 80 val images; test was evaluated once, at the end.",
                ACCURACY,
            ),
        ),
        ({}, {"test": FIGURES, "interrupted": True}, "test", ("epochs per stage. Training was interrupted.",)),
        (
            {},
            {"val": FIGURES},
            "val",
            (
                "All selections were made on 80 val images; there is no test split.",
                "Accuracy on 50 val images is 90.0 % (95 % confidence interval 80.0 to 95.0 %). Expect slightly less "
                "on new images: epochs were selected on val.",
            ),
        ),
        (
            {"training": {"trainable": "last:4", "epochs": 3}},
            {"test": FIGURES},
            "test",
            ("A new head and layers of the backbone (--trainable=last:4) were trained on ResNet50",),
        ),
        (
            {"mode": "extract"},
            {"test": FIGURES, "probe": PROBE},
            "test",
            (
                "A probe (logistic regression) was fitted on the embeddings of 1,000 training images, the outputs of "
                "layer fc2 of ResNet50 (weights: w.h5).",
                "All selections were made on 80 val images;",
            ),
        ),
        (
            {"mode": "extract", "probe": {"refit": "train+val"}},
            {"test": FIGURES, "probe": CROSS},
            "test",
            ("of 1,080 training and val images,", "were made by cross-validation within train and val; test was"),
        ),
        (
            {"mode": "evaluate"},
            {"val": FIGURES},
            "val",
            (
                "runs/a (ResNet50) was evaluated.",
                "These are the val images of its own run, which were used to select epochs or parameters.",
            ),
        ),
        (
            {"mode": "evaluate"},
            {"test": FIGURES, "leaks": {}},
            "test",
            ("These are the test images of its own run, which were not used to select anything.", ACCURACY),
        ),
        (
            {"mode": "evaluate"},
            {"test": FIGURES, "leaks": {"test": {"leaked": 15}}},
            "test",
            (
                "These are the test images of its own run. The classifier was trained on 15 of these images or on "
                "copies of them, so its metrics are too good.",
            ),
        ),
        (
            {"mode": "evaluate", "data": {"dataset": "folder:x"}},
            {"test": FIGURES, "leaks": None},
            "test",
            ("It is unknown whether the classifier was trained on some of these images.", ACCURACY),
        ),
        (
            {"mode": "evaluate", "data": {"dataset": "folder:x"}},
            {"test": FIGURES, "leaks": {"val": {"leaked": 3}}},
            "test",
            ("None of these images is identical to a training image of the classifier's run; modified", ACCURACY),
        ),
        (
            {"mode": "evaluate", "data": {"dataset": "folder:x"}},
            {"test": FIGURES, "leaks": {"test": {"leaked": 1200}}},
            "test",
            ("The classifier was trained on 1,200 of these images or on copies of them, so its metrics are", ACCURACY),
        ),
    ],
)
def test_three_sentences(config, metrics, split, parts):
    found = describe_run(CONFIG | config, metrics, split=split, counts=COUNTS, backbone="ResNet50")
    assert len(found) == 3
    assert all(part in " ".join(found) for part in parts), found
