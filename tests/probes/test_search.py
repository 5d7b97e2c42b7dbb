"""The search for a probe's parameter, on Gaussian classes whose best value is known from scikit-learn itself."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from threadpoolctl import threadpool_info

from tl_keras.probes import search
from tl_keras.probes.estimators import PROBES, Recipe
from tl_keras.probes.search import choose_parameter

RECIPE = Recipe(scale="standard", max_iter=1000, seed=0)


def make(count: int, seed: int, classes: int = 3, dim: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes, float32 (n, dim), dimensions of very different size."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % classes
    means = np.random.default_rng(9).normal(size=(classes, dim))
    values = (0.7 * means[labels] + rng.normal(size=(count, dim))) * np.logspace(-2, 2, dim) + 5
    return values.astype(np.float32), labels


TRAIN, VAL = make(150, 0), make(120, 1)


def choose(name: str, train=TRAIN, val=VAL, choose_by="val", **recipe):
    lines: list[str] = []
    settings = Recipe(**{"scale": "standard", "max_iter": 1000, "seed": 0, **recipe})
    found = choose_parameter(name, train, val, recipe=settings, choose_by=choose_by, show_progress=lines.append)
    return found, lines


ESTIMATORS = {
    "logistic_regression": lambda value: LogisticRegression(C=value, max_iter=1000),
    "rbf_svm": lambda value: SVC(C=value),
    "knn": lambda value: KNeighborsClassifier(int(value)),
    "ridge": lambda value: RidgeClassifier(alpha=value),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_score_is_scikit_learns_own(name):
    found, _ = choose(name)
    scaler = StandardScaler().fit(TRAIN[0])
    train, val = scaler.transform(TRAIN[0]), scaler.transform(VAL[0])
    expected = [ESTIMATORS[name](value).fit(train, TRAIN[1]).score(val, VAL[1]) for value in found.scores]
    # warm starts and kernels computed otherwise may turn an image on the border
    np.testing.assert_allclose(list(found.scores.values()), expected, atol=1 / len(VAL[1]) + 1e-9)
    assert found.chosen_by == "val"
    assert max(expected) - min(expected) > 0.02  # the values do differ


@pytest.mark.parametrize("name", PROBES)
def test_the_best_is_taken_and_of_equals_the_simplest(name):
    found, lines = choose(name)
    best = max(found.scores.values())
    equals = [value for value, score in found.scores.items() if score == best]
    assert found.value == equals[0]
    values = list(found.scores)
    assert values == sorted(values, reverse=name in {"knn", "ridge"})
    assert lines[0].startswith(f"{name}: trying {PROBES[name].parameter} ")


@pytest.mark.parametrize("name", ["logistic_regression", "rbf_svm", "ridge"])
def test_the_grid_has_every_decade_and_thirds_around_the_best(name):
    found, _ = choose(name)
    decades = {
        round(np.log10(value), 6)
        for value in found.scores
        if np.log10(value) % 1 < 1e-6 or np.log10(value) % 1 > 1 - 1e-6
    }
    assert decades == (
        {float(power) for power in range(-5, 7)} if name == "ridge" else {float(p) for p in range(-6, 6)}
    )
    assert len(found.scores) == 16
    fine = sorted(np.log10(value) for value in found.scores if abs(np.log10(value) - round(np.log10(value))) > 0.1)
    middle = np.mean(fine)
    np.testing.assert_allclose(np.array(fine) - middle, [-2 / 3, -1 / 3, 1 / 3, 2 / 3], atol=1e-6)
    assert found.value == pytest.approx(10**middle, rel=10 ** (2 / 3))


def score_by(monkeypatch, scores: dict[int, float]) -> None:
    """Scores by the decade, in place of fits; between those given on a straight line."""
    powers = list(scores)
    monkeypatch.setattr(
        search._RegularizationPath,
        "_score_one",
        lambda self, value, fit, score: float(np.interp(np.log10(value), powers, list(scores.values()))),
    )


@pytest.mark.parametrize("cores", [1, 2])
def test_a_linear_svm_ends_its_path_after_two_decades_below_the_best(monkeypatch, cores):
    monkeypatch.setattr(search.joblib, "cpu_count", lambda: cores)
    score_by(monkeypatch, {-6: 0.5, -3: 0.9, 6: 0.1})
    found, _ = choose("linear_svm")
    assert found.value == pytest.approx(1e-3)
    decades = [power for power in range(-6, 6) if 10.0**power in found.scores]
    assert decades == [-6, -5, -4, -3, -2, -1]
    assert len(found.scores) == 6 + 4


def test_what_is_chosen_does_not_depend_on_the_machines_cores(monkeypatch):
    """A second peak behind two decades below the first is past the end of the path, however many are tried at once."""
    score_by(monkeypatch, {-6: 0.5, -3: 0.8, -2: 0.5, -1: 0.5, 2: 0.9, 6: 0.1})
    found = {}
    for cores in (1, 2, 4, 16):
        monkeypatch.setattr(search.joblib, "cpu_count", lambda cores=cores: cores)
        found[cores] = choose("linear_svm")[0].value
    assert found == dict.fromkeys(found, pytest.approx(found[1]))


@pytest.mark.parametrize("choose_by", ["val", "cv"])
@pytest.mark.parametrize("name", PROBES)
def test_nothing_is_warned_of_on_the_screen(name, choose_by):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _ = choose(name, choose_by=choose_by, scale="none", max_iter=20)
    assert found.scores


def test_a_linear_svm_is_scored_roughly_and_fitted_to_the_end():
    path = search._LowTolerancePath("linear_svm", RECIPE, 1)
    rough, final = path._build(1.0), PROBES["linear_svm"].build(1.0, RECIPE)
    assert (rough.max_iter, rough.tol) == (100, 0.01)
    assert (final.max_iter, final.tol) == (1000, 0.0001)


def test_neighbours_are_not_more_than_there_are_examples():
    train = TRAIN[0][:9], TRAIN[1][:9]
    found, _ = choose("knn", train)
    assert list(found.scores) == [7, 5, 3, 2, 1]


@pytest.mark.parametrize(
    ("train", "val", "chosen_by"),
    [
        (1100, 1000, "val"),
        (1100, 999, "5-fold cross-validation within train and val"),
        (150, 149, "5-fold cross-validation within train and val, 5 times"),
        (150, 150, "val"),  # folds would be larger than train, and their best value of larger data
    ],
)
def test_a_small_val_is_not_trusted_alone_where_train_is_larger(train, val, chosen_by):
    assert choose("knn", make(train, 0), make(val, 1), choose_by="auto")[0].chosen_by == chosen_by


def test_neighbours_are_not_more_than_train_has_however_large_the_folds():
    train = TRAIN[0][:9], TRAIN[1][:9]
    assert max(choose("knn", train, choose_by="cv")[0].scores) == 7


def test_a_train_smaller_than_val_is_not_chosen_for_by_folds_of_the_size_of_val():
    found, _ = choose("knn", train=make(30, 0), val=make(300, 1), choose_by="auto")
    assert found.chosen_by == "val"
    assert max(found.scores) == 30


def test_neighbours_are_not_more_than_train_has_though_folds_have_more():
    found, _ = choose("knn", train=make(15, 0), val=make(120, 1), choose_by="cv")
    assert max(found.scores) == 15


def test_the_number_of_threads_is_afterwards_what_it_was():
    def threads() -> list[int]:
        return [pool["num_threads"] for pool in threadpool_info()]

    before = threads()
    choose("ridge", choose_by="cv")
    assert threads() == before


def test_cross_validation_scores_every_example_as_often_as_the_folds_are_drawn():
    found, _ = choose("knn", choose_by="cv")
    assert found.chosen_by == "5-fold cross-validation within train and val, 5 times"
    every = np.concatenate([TRAIN[1], VAL[1]])
    assert found.scores[100.0] * len(every) * 5 == pytest.approx(round(found.scores[100.0] * len(every) * 5), abs=0.2)
    again, _ = choose("knn", choose_by="cv")
    assert again.scores == found.scores
    other, _ = choose("knn", choose_by="cv", seed=1)
    assert other.scores != found.scores


def test_a_class_with_few_examples_leaves_the_others_their_folds_and_one_with_one_leaves_val():
    labels = np.array([0] * 20 + [1] * 2, np.int32)
    train = TRAIN[0][: len(labels)], labels
    val = VAL[0][:20], np.zeros(20, np.int32)
    found, _ = choose("knn", train, val, choose_by="cv")
    assert found.chosen_by.startswith("5-fold cross-validation")
    labels[-1] = 0
    found, _ = choose("knn", train, val, choose_by="cv")
    assert found.chosen_by == "val"


def test_what_does_not_converge_is_named_by_its_value():
    found, _ = choose("logistic_regression", scale="none", max_iter=3)
    assert found.unconverged
    assert set(found.unconverged) <= set(found.scores)
    assert not choose("logistic_regression")[0].unconverged


def test_the_scaler_sees_what_is_fitted_on_alone():
    """A val of another place and size must not move the scale."""
    shifted = VAL[0] * 100 + 1000, VAL[1]
    found, _ = choose("ridge", val=shifted)
    scaler = StandardScaler().fit(TRAIN[0])
    value = found.value
    expected = RidgeClassifier(alpha=value).fit(scaler.transform(TRAIN[0]), TRAIN[1])
    assert found.scores[value] == pytest.approx(expected.score(scaler.transform(shifted[0]), VAL[1]))
