"""Plots: they draw what they are given, alike each time, in the page's colours."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from tl_keras.report import plots
from tl_keras.statistics.calibration import reliability
from tl_keras.statistics.coverage import accuracy_by_coverage

HISTORY = [
    {"stage": stage, "accuracy": "0.5", "loss": "1.0", "val_accuracy": "0.4", "val_loss": "1.2"}
    for stage in ("head", "head", "tail")
]
RANDOM = np.random.default_rng(0)
PROBABILITIES, LABELS = RANDOM.dirichlet(np.ones(4), 300), RANDOM.integers(0, 4, 300)
ROWS = reliability(PROBABILITIES, LABELS)
SCORE = {"accuracy": 0.5, "accuracy_ci95": [0.4, 0.6]}


def coverage():
    _, share, accuracy = accuracy_by_coverage(PROBABILITIES, LABELS)
    return plots.draw_coverage(share, accuracy, target=0.9, reached=0.3)


DRAWN = {
    "history": lambda: plots.draw_history(HISTORY, "loss"),
    "one epoch": lambda: plots.draw_history(HISTORY[:1], "accuracy"),
    "reliability": lambda: plots.draw_reliability(ROWS, ROWS[:3]),
    "one bin": lambda: plots.draw_reliability(ROWS[:1]),
    "coverage": coverage,
    "robustness": lambda: plots.draw_robustness({"clean": SCORE, "corruptions": {"noise": [SCORE] * 5}}),
    "confusion": lambda: plots.draw_confusion(RANDOM.integers(0, 9, (40, 40)), np.arange(40)),
}


@pytest.mark.parametrize("name", DRAWN)
def test_each_plot_is_whole_svg_and_the_same_each_time(name):
    first, second = (plots.as_svg(DRAWN[name](), "plot") for _ in range(2))
    assert ET.fromstring(first).tag.endswith("svg")
    if name != "confusion":  # which is drawn of random numbers
        assert first == second


def test_two_plots_share_no_ids_and_find_their_own():
    seen: set[str] = set()
    for name in ("first", "second"):
        text = plots.for_page(plots.as_svg(DRAWN["reliability"](), name), name)
        ids = set(re.findall(r'\bid="([^"]*)"', text))
        assert len(ids) > 5
        assert not ids & seen
        assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text)) <= {(one, "") for one in ids} | {
            ("", one) for one in ids
        }
        seen |= ids


def test_in_the_page_colours_are_the_pages_and_screen_readers_skip_it():
    text = plots.for_page(plots.as_svg(DRAWN["history"](), "history"), "history")
    assert text.startswith('<svg aria-hidden="true"')
    assert "var(--first)" in text
    assert "var(--ink)" in text
    assert "#2563eb" not in text
    assert ">train<" in text  # text stays text


@pytest.mark.filterwarnings("error")
def test_any_name_of_a_class_can_stand_beside_the_matrix():
    names = ["100$_vs_$50", "\\foo{$", "cost $5 to $6", "\u65e5\u672c\u8a9e"]
    svg = plots.as_svg(plots.draw_confusion(np.eye(4, dtype=int), np.arange(4), names), "confusion")
    drawn = {element.text for element in ET.fromstring(svg).iter() if element.text}
    assert set(names) <= drawn


def test_the_matrix_of_thousands_of_classes_stays_small():
    matrix = np.eye(2500, dtype=int)
    assert len(plots.as_svg(plots.draw_confusion(matrix, np.arange(2500)), "confusion")) < 400_000


def test_classes_that_are_taken_for_each_other_stand_together():
    matrix = np.diag([10] * 6)
    matrix[0, 4] = matrix[4, 0] = 8
    matrix[1, 5] = 7
    order = plots.order_classes(matrix).tolist()
    assert sorted(order) == list(range(6))
    assert abs(order.index(0) - order.index(4)) == 1
    assert abs(order.index(1) - order.index(5)) == 1


@pytest.mark.parametrize("count", [1, 2])
def test_few_classes_keep_their_order(count):
    assert plots.order_classes(np.eye(count, dtype=int)).tolist() == list(range(count))
