"""The same figures for parts of the examples."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tl_keras.errors import UserError
from tl_keras.evaluation import slices
from tl_keras.evaluation.metrics import measure
from tl_keras.evaluation.slices import SLICES, Attributes, describe_worst, measure_slices, read_attributes, slice_cells

IDS = [f"{number}.jpg" for number in range(40)]
LABELS = np.arange(40) % 2
CORRECT = np.array([True] * 20 + [True] * 8 + [False] * 12)
PROBABILITIES = np.where((LABELS == CORRECT)[:, np.newaxis], [[0.2, 0.8]], [[0.8, 0.2]]).astype(np.float32)


def write(folder, text: str) -> str:
    (folder / "slices.csv").write_text(text, encoding="utf-8")
    return str(folder / "slices.csv")


def write_cameras(folder) -> str:
    rows = [f"{one},{'A' if number < 20 else 'B'},{number % 2}" for number, one in enumerate(IDS)]
    return write(folder, "\n".join(["id,camera,parity", *rows, "unknown.jpg,A,1"]) + "\n")


def measure_accuracy(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"n": len(labels), "accuracy": float((probabilities.argmax(1) == labels).mean()), "accuracy_ci95": [0, 1]}


def test_the_worst_is_named(tmp_path):
    found = measure_slices(read_attributes(write_cameras(tmp_path), IDS), IDS, PROBABILITIES, LABELS)
    assert found["columns"]["camera"]["A"]["accuracy"] == 1
    own = measure(PROBABILITIES[20:], LABELS[20:])
    assert found["columns"]["camera"]["B"] == own | {"p_value": found["worst"]["p_value"]}
    cells = dict(zip(SLICES, slice_cells(found)[1], strict=True))
    assert (cells["value"], cells["macro_f1"], cells["ece"]) == ("B", own["macro"]["f1"], own["ece"])
    worst = found["worst"]
    assert (worst["column"], worst["value"], worst["n"], worst["accuracy"]) == ("camera", "B", 20, 0.4)
    expected = 4 * stats.fisher_exact([[8, 12], [20, 0]]).pvalue
    assert worst["p_value"] == pytest.approx(expected)
    line = describe_worst(found, accuracy=0.7)
    assert line.startswith("slices: lowest accuracy for camera=B: 0.400 [0.219, 0.613] n=20, overall 0.700; p = ")
    assert set(found["columns"]["parity"]) == {"0", "1"}


def test_a_difference_that_may_be_chance_is_said_to_be(tmp_path):
    rows = "\n".join(f"{one},{number % 2}" for number, one in enumerate(IDS))
    found = measure_slices(read_attributes(write(tmp_path, f"id,parity\n{rows}\n"), IDS), IDS, PROBABILITIES, LABELS)
    assert "not significant, p = 1.00" in describe_worst(found, accuracy=0.7)


def test_few_examples_are_not_called_the_worst_and_missing_values_are_a_value(tmp_path):
    path = write(tmp_path, "path,label,split,site\n39.jpg,x,test,tiny\n0.jpg,x,test,\n")
    found = measure_slices(read_attributes(path, IDS), IDS, PROBABILITIES, LABELS)
    assert set(found["columns"]) == {"site"}
    assert {value: row["n"] for value, row in found["columns"]["site"].items()} == {"(none)": 39, "tiny": 1}
    assert found["worst"] is None  # nine others or fewer are no group to be compared with


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,camera\na,b\n", "has the columns name, camera. It needs id"),
        ("id,label\n0.jpg,x\n", "has the columns id, label. It needs id"),
        ("", r"has the columns \(none\)"),
        ("id,camera\n0.jpg,A\n1.jpg,A\n0.jpg,B\n", "line 4: 0.jpg is listed twice. Keep one row per image"),
        (
            "id,camera\nother/0.jpg,A\n",
            "contains none of the 40 examples. Its first id is 'other/0.jpg'; ids of the data look",
        ),
    ],
)
def test_files_that_are_of_no_use(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_attributes(write(tmp_path, text), IDS)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="can't be read: No such file or directory"):
        read_attributes(str(tmp_path / "nothing.csv"), IDS)


def test_a_column_with_too_many_values(tmp_path):
    ids = [str(number) for number in range(300)]
    rows = "\n".join(f"{one},{one}" for one in ids)
    with pytest.raises(UserError, match="column Serial has 300 values; at most 200 are allowed"):
        read_attributes(write(tmp_path, f"id,Serial\n{rows}\n"), ids)


@pytest.mark.parametrize(
    "content",
    [
        b"ID;Camera;label\n0.jpg;A;x\n1.jpg;B;y\n",
        "id\tCamera\n0.jpg\tA\n1.jpg\tB\n".encode("utf-16"),
        b"Path,Camera,id\n./0.jpg,A,7\n.\\1.jpg,B,7\n",
        b"path,label,split,id,Camera\n/photos/0.jpg,x,train,0.jpg,A\n/photos/1.jpg,y,train,1.jpg,B\n",
    ],
)
def test_whatever_can_be_a_manifest_can_be_given_as_it_is(tmp_path, content):
    (tmp_path / "slices.csv").write_bytes(content)
    found = read_attributes(str(tmp_path / "slices.csv"), IDS)
    assert found.columns == {"Camera": {"0.jpg": "A", "1.jpg": "B"}}
    assert found.count_unknown(IDS) == 38


def test_that_most_examples_are_not_in_the_file_is_said(tmp_path):
    path = write(tmp_path, "id,camera\n0.jpg,A\n")
    found = measure_slices(read_attributes(path, IDS), IDS, PROBABILITIES, LABELS)
    assert describe_worst(found, accuracy=0.7).endswith("; 39 examples are not in the file")


def test_among_many_columns_the_worst_value_is_seldom_no_chance(monkeypatch):
    """Without a bias in the data, one trial in twenty at most may call the worst of 48 values more than chance."""
    monkeypatch.setattr(slices, "measure", measure_accuracy)  # the other figures have no part in the test
    random, named = np.random.default_rng(0), 0
    for _ in range(100):
        columns = {
            f"c{number}": dict(zip(IDS, random.integers(0, 4, 40).astype(str), strict=True)) for number in range(12)
        }
        found = measure_slices(Attributes(columns), IDS, PROBABILITIES, LABELS)
        named += found["worst"]["p_value"] < 0.05
    assert named <= 8
