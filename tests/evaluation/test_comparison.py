"""Two classifiers on the same examples."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from tl_keras.errors import UserError
from tl_keras.evaluation.comparison import find_shared, read_runs
from tl_keras.statistics.paired import adjust_p_values, compare_paired


def make(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    first = np.repeat([True, True, False, False], [both, only_first, only_second, neither])
    second = np.repeat([True, False, True, False], [both, only_first, only_second, neither])
    return first, second


def exact_p_value(only_first: int, only_second: int) -> float:
    """Twice the smaller tail of a fair coin, by hand."""
    count, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(fewer + 1)) / 2**count)


@pytest.mark.parametrize(("only_first", "only_second"), [(3, 14), (14, 3), (1, 0), (8, 8), (0, 6), (25, 41)])
def test_mcnemars_exact_test_by_hand(only_first, only_second):
    found = compare_paired(*make(100, only_first, only_second, 20))
    assert (found.only_first, found.only_second) == (only_first, only_second)
    assert found.p_value == pytest.approx(exact_p_value(only_first, only_second), rel=1e-9)
    assert found.difference == pytest.approx((only_second - only_first) / found.count)
    assert found.interval[0] <= found.difference <= found.interval[1]


def test_the_interval_of_the_difference_holds_the_truth():
    random, hits = np.random.default_rng(0), []
    for _ in range(2000):
        both, only_first, only_second, neither = random.multinomial(150, [0.7, 0.06, 0.12, 0.12])
        low, high = compare_paired(*make(both, only_first, only_second, neither)).interval
        hits.append(low <= 0.06 <= high)
    assert 0.93 <= np.mean(hits) <= 0.97


def test_a_sentence_for_everyone():
    assert (
        compare_paired(*make(100, 3, 14, 20))
        .describe("A", "B")
        .startswith("B is better: 14 images only B gets right, 3 only A, p = 0.013; difference +0.080 [")
    )
    assert (
        compare_paired(*make(100, 14, 3, 20)).describe("A", "B").startswith("A is better: 3 images only B gets right")
    )
    assert (
        compare_paired(*make(100, 5, 8, 20))
        .describe("A", "B")
        .startswith("A and B are not significantly different on these images")
    )
    assert compare_paired(*make(9, 0, 0, 1)).describe("A", "B") == "A and B get the same 10 images right and wrong"


def test_no_difference_has_an_interval():
    low, high = compare_paired(*make(30, 0, 0, 0)).interval
    assert low < 0 < high


def test_a_verdict_that_the_interval_seems_to_contradict_is_explained():
    one = compare_paired(np.arange(200) < 152, (np.arange(200) < 140) | (np.arange(200) > 195))  # 12 against 4
    assert one.p_value > 0.05
    told = dataclasses.replace(one, interval=(-0.08, -0.0001)).describe("A", "B")
    assert told.startswith(
        "A and B are not significantly different on these images: 4 images only B gets right, 12 only A, p = 0.077;"
    )
    assert told.endswith(
        "n=200. The interval excludes 0, but it is approximate and refers to this pair only: p decides"
    )


# Newcombe 1998, method 10: the CRAN package contingencytables' test, and the airway example of Fagerland et al. 2014
@pytest.mark.parametrize(
    ("table", "expected"), [((59, 6, 16, 80), (0.0046, 0.1186)), ((1, 1, 7, 12), (0.026, 0.507))], ids=str
)
def test_the_interval_is_that_of_published_tables(table, expected):
    both, only_first, only_second, neither = table
    first = np.repeat([True, True, False, False], [both, only_first, only_second, neither])
    second = np.repeat([True, False, True, False], [both, only_first, only_second, neither])
    assert compare_paired(first, second).interval == pytest.approx(expected, abs=6e-4)


def test_the_interval_holds_the_true_difference():
    """Where both are mostly right or mostly wrong together; method 8 holds it in 0.924 of the draws."""
    random, held = np.random.default_rng(0), 0
    for _ in range(1000):
        kind = random.choice(4, 60, p=(0.5, 0.05, 0.05, 0.4))
        low, high = compare_paired((kind == 0) | (kind == 1), (kind == 0) | (kind == 2)).interval
        held += low <= 0 <= high
    assert 0.945 <= held / 1000 <= 0.985


def write_compared(folder: Path, contents: list[bytes]) -> str:
    folder.mkdir()
    rows = [f"{number},test,a,a,0.9,0.9" for number in range(len(contents))]
    (folder / "predictions.csv").write_text(
        "\n".join(["id,split,label,predicted,probability,label_probability", *rows])
    )
    (folder / "splits.csv").write_text("\n".join(["id,split,label", *(f"{n},test,a" for n in range(len(contents)))]))
    np.save(folder / "digests.npy", np.array([np.frombuffer(one.ljust(32, b"."), np.uint8) for one in contents]))
    return str(folder)


def test_ids_that_stand_for_other_images_are_not_compared(tmp_path):
    contents = {"a": [b"1", b"2", b"3"], "b": [b"1", b"x", b"3"]}
    paths = [write_compared(tmp_path / name, own) for name, own in contents.items()]
    assert find_shared(read_runs(paths)) == ["0", "2"]
    other = write_compared(tmp_path / "c", [b"7", b"8", b"9"])
    with pytest.raises(UserError) as error:
        find_shared(read_runs([paths[0], other]))
    assert str(error.value) == (
        "--compare: all 3 ids that a, c have in common name different images: the content of the files differs. "
        "Compare runs on the same images."
    )


@pytest.mark.parametrize(("p_value", "text"), [(0.04999, "p < 0.050;"), (1e-300, "p < 0.001;"), (0.013, "p = 0.013;")])
def test_a_p_value_is_shown_on_its_own_side_of_five_percent(p_value, text):
    one = dataclasses.replace(compare_paired(*make(30, 9, 1, 0)), p_value=p_value)
    assert text in one.describe("A", "B")
    assert " is better: " in one.describe("A", "B")


def test_holms_adjustment():
    assert adjust_p_values([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert adjust_p_values([0.5, 0.9]) == [1.0, 1.0]
    assert adjust_p_values([0.02]) == [0.02]


def write_run(folder, rows) -> str:
    folder.mkdir()
    lines = ["id,split,label,predicted,probability,label_probability", *(f"{row},0.9,0.9" for row in rows)]
    (folder / "predictions.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_runs_are_compared_on_the_test_examples_that_all_have(tmp_path):
    first = write_run(tmp_path / "A", ["a,test,x,x", "b,test,y,x", "v,val,x,x"])
    second = write_run(tmp_path / "B", ["b,test,y,y", "c,test,x,x", "v,val,x,x"])
    runs = read_runs([first, second])
    assert [run.name for run in runs] == ["A", "B"]
    assert find_shared(runs) == ["b"]
    assert [run.correct(["b"]).tolist() for run in runs] == [[False], [True]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["z,test,x,x"], "have no test example in common"),
        (["a,test,y,x"], "a has the label 'x' in A and 'y' in B. Compare runs on the same labels"),
    ],
)
def test_runs_that_can_not_be_compared(tmp_path, rows, message):
    first, second = write_run(tmp_path / "A", ["a,test,x,x"]), write_run(tmp_path / "B", rows)
    with pytest.raises(UserError, match=message):
        find_shared(read_runs([first, second]))


def test_a_folder_without_predictions(tmp_path):
    with pytest.raises(UserError, match=r"predictions.csv can't be read: No such file"):
        read_runs([str(tmp_path)])
