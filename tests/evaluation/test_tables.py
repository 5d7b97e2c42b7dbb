"""The files of an evaluation: the same examples, row by row, in all of them."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tl_keras.data.examples import Examples
from tl_keras.data.sources import Source
from tl_keras.data.splits import UNUSED
from tl_keras.errors import UserError
from tl_keras.evaluation.metrics import measure
from tl_keras.evaluation.tables import (
    describe_device,
    describe_environment,
    describe_evaluation,
    format_table,
    write_evaluation,
    write_examples,
    write_predictions,
)
from tl_keras.run import RunFolder
from tl_keras.statistics.coverage import measure_threshold

NAMES = ("blue", 'a "b", c', "红 色")
IDS = ["0.jpg", 'x, "y".jpg', "红/二.jpg", "3\n.jpg", "caf\udce9.jpg", "5.jpg", "6.jpg"]
SPLITS = np.array([0, 2, 1, 2, 1, UNUSED, 2], np.int8)
LABELS = np.array([0, 1, 2, 0, 1, 2, 2], np.int32)
PROBABILITIES = {
    "val": np.array([[0.2, 0.2, 0.6], [0.5, 0.3, 0.2]], np.float32),
    "test": np.array([[0.1, 0.7654321, 0.1345679], [0.9, 0.05, 0.05], [1 / 3, 1 / 3, 1 / 3]], np.float32),
}


def examples() -> Examples:
    source = Source("mine", IDS, LABELS, NAMES, np.zeros(7, np.int8), lambda positions: iter(()))
    return Examples(source, SPLITS, np.repeat(np.arange(7, dtype=np.uint8), 32).view("V32"), {5: "broken"})


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def test_splits_say_what_was_used_for_what_in_the_sources_order(folder, tmp_path):
    write_examples(folder, examples())
    found = rows(tmp_path / "splits.csv")
    assert list(found[0]) == ["id", "split", "label"]
    assert [row["id"] for row in found] == [one for one in IDS if one != "5.jpg"]
    assert [row["split"] for row in found] == ["train", "test", "val", "test", "val", "test"]
    assert [row["label"] for row in found] == [NAMES[label] for label in (0, 1, 2, 0, 1, 2)]
    assert np.load(tmp_path / "digests.npy").tolist() == [[number] * 32 for number in range(7) if number != 5]


def test_predictions_are_val_before_test_each_with_its_own_label(folder, tmp_path):
    write_predictions(folder, examples(), PROBABILITIES)
    found = rows(tmp_path / "predictions.csv")
    assert list(found[0]) == ["id", "split", "label", "predicted", "probability", "label_probability"]
    assert [tuple(row.values()) for row in found] == [
        ("红/二.jpg", "val", "红 色", "红 色", "0.6", "0.6"),
        ("caf\udce9.jpg", "val", 'a "b", c', "blue", "0.5", "0.3"),
        ('x, "y".jpg', "test", 'a "b", c', 'a "b", c', "0.765432", "0.765432"),
        ("3\n.jpg", "test", "blue", "blue", "0.9", "0.9"),
        ("6.jpg", "test", "红 色", "blue", "0.333333", "0.333333"),
    ]


def test_probabilities_are_the_rows_of_predictions_unrounded(folder, tmp_path):
    write_predictions(folder, examples(), PROBABILITIES)
    found = np.load(tmp_path / "probabilities.npy", allow_pickle=False)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.concatenate([PROBABILITIES["val"], PROBABILITIES["test"]]))


def test_each_split_is_measured_alone_and_labels_are_one_a_line(folder, tmp_path):
    found = write_evaluation(folder, examples(), PROBABILITIES, target_accuracy=0.9)
    assert list(found) == ["val", "test", "reject"]
    for split, labels in (("val", np.array([2, 1])), ("test", np.array([1, 0, 2]))):
        expected = measure(PROBABILITIES[split], labels)
        assert {name: found[split][name] for name in expected} == expected
    assert (tmp_path / "labels.txt").read_text(encoding="utf-8") == "".join(f"{name}\n" for name in NAMES)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("splits.csv", "digests.npy", "predictions.csv", "probabilities.npy", "labels.txt"),
        *("per_class.csv", "confusion.csv", "reliability.csv", "coverage.csv"),
    }


def test_the_tables_by_hand(folder, tmp_path):
    found = write_evaluation(folder, examples(), PROBABILITIES, target_accuracy=0.9)
    # val: class 2 rightly with 0.6, class 1 taken for 0 with 0.5; test: classes 1 and 0 rightly, class 2 for 0
    by_class = [row for row in rows(tmp_path / "per_class.csv") if row["split"] == "test"]
    assert [(row["label"], row["support"], row["predicted"], row["recall"]) for row in by_class] == [
        (NAMES[0], "1", "2", "1.0"),
        (NAMES[1], "1", "1", "1.0"),
        (NAMES[2], "1", "0", "0.0"),
    ]
    confused = {tuple(row.values()) for row in rows(tmp_path / "confusion.csv") if row["split"] == "test"}
    assert confused == {
        ("test", NAMES[0], NAMES[0], "1"),
        ("test", NAMES[1], NAMES[1], "1"),
        ("test", NAMES[2], NAMES[0], "1"),
    }
    assert found["test"]["most_confused"] == [{"label": NAMES[2], "predicted": NAMES[0], "count": 1}]
    assert found["reject"] == {
        "target_accuracy": 0.9,
        "threshold": None,  # two images guarantee nothing
        "threshold_confidence": 0.95,
        "val_images": 2,
        "val_images_needed": 29,
    }
    assert [float(row["threshold"]) for row in rows(tmp_path / "coverage.csv") if row["split"] == "val"] == [0.6, 0.5]
    assert sum(int(row["n"]) for row in rows(tmp_path / "reliability.csv") if row["split"] == "test") == 3


def test_lines_for_the_screen(folder):
    found = write_evaluation(folder, examples(), PROBABILITIES, target_accuracy=0.9)
    found["calibration"] = {"temperature": 1.5, "before": {"test": {"ece": 0.2}}}
    ece = found["test"]["ece"]
    assert describe_evaluation(found) == [
        f"calibration: temperature 1.50, fitted on val; test ECE 0.200 → {ece:.3f}",
        f"most frequent errors on test: {NAMES[2]} predicted as {NAMES[0]} (1)",
        "no confidence threshold guarantees an accuracy of 90 %: val has 2 images, and at least 29 are needed",
    ]
    found["calibration"] = {"temperature": 1.0, "supported": False, "before": {}}
    assert describe_evaluation(found)[0] == "calibration: none; val does not determine a temperature"
    del found["reject"]["val_images_needed"]
    assert describe_evaluation(found)[-1] == "no confidence threshold on val guarantees an accuracy of 90 %"
    found["reject"] |= {"threshold": 0.6, "test": measure_threshold(PROBABILITIES["test"], np.array([1, 0, 2]), 0.6)}
    assert describe_evaluation(found)[-1] == (
        "at confidence ≥ 0.600 (chosen on val for an accuracy of 90 % or more, with 95 % certainty): covers 67 % of "
        "test, accuracy 1.000 [0.342, 1.000]"
    )


def test_a_source_without_test_has_val_alone(folder, tmp_path):
    found = write_evaluation(folder, examples(), {"val": PROBABILITIES["val"]}, target_accuracy=0.9)
    assert list(found) == ["val", "reject"]
    assert len(rows(tmp_path / "predictions.csv")) == len(np.load(tmp_path / "probabilities.npy")) == 2


def test_a_disk_that_fails_is_one_line(folder, tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=f"^the disk is full: {tmp_path}/splits.csv could not be written"):
        write_evaluation(folder, examples(), PROBABILITIES, target_accuracy=0.9)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_has_versions_device_engine_and_precision():
    found = describe_environment(engine="tensorflow", precision="bfloat16")
    assert list(found) == [
        *("tl_keras", "python", "tensorflow", "keras", "scikit-learn", "device", "engine", "precision")
    ]
    assert (found["tensorflow"], found["engine"], found["precision"]) == (tf.__version__, "tensorflow", "bfloat16")
    assert found["device"] == describe_device()


def test_the_device_is_the_cpu_or_the_gpus_by_name(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    assert describe_device().startswith("CPU (")
    details = {"gpu0": {"device_name": "NVIDIA L4"}, "gpu1": {}}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: list(details))
    monkeypatch.setattr(tf.config.experimental, "get_device_details", details.get)
    assert describe_device() == "NVIDIA L4, GPU"


def test_a_table_without_rows_is_its_header():
    assert format_table(("a", "long", ""), []) == ["a  long"]


def test_a_tables_columns_are_as_wide_as_their_widest_cell():
    assert format_table(("a", "long", ""), [("xyz", "1", "best"), ("x", "22", "")]) == [
        "a    long",
        "xyz  1     best",
        "x    22",
    ]
