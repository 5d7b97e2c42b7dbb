"""Fitting one probe: what is scaled, what is calibrated, what is refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from tests.probes.test_search import RECIPE, TRAIN, VAL
from tl_keras import config
from tl_keras.errors import UserError
from tl_keras.probes.estimators import PROBES, RbfKernel, Recipe, check_probe, fit_probe, quiet, split_folds


def test_the_flag_and_the_table_name_the_same_probes():
    assert tuple(PROBES) == config.PROBES


def test_the_kernel_is_the_one_of_scikit_learns_own_svm():
    scaled = StandardScaler().fit_transform(TRAIN[0].astype(np.float64))
    kernel = RbfKernel().fit(scaled)
    ours = SVC(C=3, kernel="precomputed").fit(kernel.transform(scaled), TRAIN[1])
    theirs = SVC(C=3, kernel="rbf", gamma="scale").fit(scaled, TRAIN[1])
    assert kernel.gamma_ == pytest.approx(theirs._gamma)
    others = StandardScaler().fit(TRAIN[0]).transform(VAL[0].astype(np.float64))
    decisions = ours.decision_function(kernel.transform(others))
    np.testing.assert_allclose(decisions, theirs.decision_function(others), atol=1e-3)


def test_a_kernel_of_embeddings_that_do_not_vary_is_all_one():
    same = np.ones((4, 3))
    np.testing.assert_array_equal(RbfKernel().fit(same).transform(same), np.ones((4, 4)))


@pytest.mark.parametrize("name", PROBES)
def test_probabilities_are_of_all_classes_and_sum_to_one(name):
    fitted = fit_probe(name, 1.0, *TRAIN, RECIPE)
    probabilities = fitted.estimator.predict_proba(VAL[0].astype(np.float64))
    assert probabilities.shape == (len(VAL[1]), 3)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert fitted.converged


def test_calibration_has_five_folds_for_all_though_one_class_has_two_examples():
    labels = TRAIN[1][:62].copy()
    labels[:60] %= 2
    labels[60:62] = 2
    folds = split_folds(labels)
    assert len(folds) == 5
    assert all(set(labels[fitted]) == {0, 1, 2} for fitted, _ in folds)
    assert sorted(np.concatenate([predicted for _, predicted in folds])) == list(range(62))
    fitted = fit_probe("ridge", 1.0, TRAIN[0][:62], labels, RECIPE)
    assert fitted.estimator.predict_proba(TRAIN[0][:5].astype(np.float64)).shape == (5, 3)


@pytest.mark.parametrize("name", ["linear_svm", "rbf_svm", "ridge"])
def test_a_class_with_one_example_can_not_be_calibrated(name):
    labels = np.array([0, 0, 1], np.int32)
    with pytest.raises(UserError) as error:
        fit_probe(name, 1.0, TRAIN[0][:3], labels, RECIPE)
    assert str(error.value) == (
        f"--probe={name} needs at least two training images per class to calibrate its probabilities, but a class "
        "has only one. Add images, or use --probe=logistic_regression."
    )
    check_probe("logistic_regression", labels, value=None)


def test_more_neighbours_than_examples_are_refused():
    with pytest.raises(
        UserError, match=r"^--probe=knn can't use 151 neighbors: train has only 150 examples\. Use fewer neighbors\.$"
    ):
        check_probe("knn", TRAIN[1], value=151)
    check_probe("knn", TRAIN[1], value=150)


def test_a_solver_that_is_cut_short_is_told_and_warns_nobody():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cut = fit_probe("logistic_regression", 1e3, *TRAIN, Recipe(scale="none", max_iter=2, seed=0))
    assert not cut.converged


def test_other_warnings_are_let_through():
    with pytest.warns(UserWarning, match="something else"), quiet():
        warnings.warn("something else", UserWarning, stacklevel=1)


def test_the_same_seed_gives_the_same_probe():
    first, second = (fit_probe("linear_svm", 1.0, *TRAIN, RECIPE) for _ in range(2))
    np.testing.assert_array_equal(first.pipeline[-1].coef_, second.pipeline[-1].coef_)
