"""Probes: accuracy of layers and probes on real photographs, time and peak memory of the search.

python -m benchmarks.probes

Parts for `--only`:
    layers: accuracy on hymenoptera (its own splits) and flowers (a stratified quarter held out), MobileNetV2 with real
        weights.
    sweep: the grid of each probe on 12,000 x 2,048 embeddings of 20 classes, selected on 1,200. The baseline is
        scikit-learn's GridSearchCV with the same values, scaler and split, stopped after LIMIT seconds. Neither refits
        the winner. tl_keras solves the linear SVM candidates only to a tolerance of 0.01, GridSearchCV solves all
        candidates to convergence.
    dual: the two solvers of the linear SVM, for a small C.
    large: the search for the C of logistic regression, and its last fit, on 12,000 x 4,096 embeddings of 120 classes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

from benchmarks.accuracy import write_quarter
from benchmarks.measure import MOBILENET_WEIGHTS, ROOT, clock, parse, run_process, write_results

LAYERS = "block_12_add,block_15_add,embedding_pool"
PROBES = ("logistic_regression", "linear_svm", "rbf_svm", "knn", "ridge")
LIMIT = 120
SWEEP = (12_000, 2048, 20)
LARGE = (12_000, 4096, 120)
VAL = 1200


def main() -> None:
    arguments = parse()
    parts = arguments.only.split(",") if arguments.only else list(PARTS)
    write_results("probes", {name: PARTS[name](arguments) for name in parts})


def measure_layers(arguments: Any) -> dict[str, Any]:
    data = {
        "hymenoptera": f"folder:{arguments.data / 'hymenoptera'}",
        "flowers, a quarter held out": f"csv:{write_quarter(arguments)}",
    }
    found = {}
    for name, dataset in data.items():
        run_dir = arguments.work / "layers_run"
        command = [
            *("-m", "tl_keras.main", "--mode=extract", f"--dataset={dataset}", "--backbone=MobileNetV2", "--overwrite"),
            *(
                "--backbone_kwargs=alpha=0.35",
                f"--weights={arguments.data / MOBILENET_WEIGHTS}",
                "--noexport",
                "--noreport",
            ),
            *(f"--run_dir={run_dir}", f"--store_dir={arguments.work / 'layers_store'}"),
        ]
        rows = {}
        for what, more in {
            "logistic regression alone": [],
            "all": [f"--feature_layer={LAYERS}", f"--probe={','.join(PROBES)}"],
        }.items():
            run_process([*command, *more])
            metrics = json.loads((run_dir / "metrics.json").read_text())
            split = "test" if "test" in metrics else "val"
            rows[what] = {
                "split": split,
                **{key: metrics[split][key] for key in ("n", "accuracy", "accuracy_ci95")},
                "candidates": [{k: v for k, v in one.items() if k != "tried"} for one in metrics["candidates"]],
            }
        found[name] = rows
    return found


def make_embeddings(count: int, dim: int, classes: int) -> Any:
    """Makes synthetic embeddings like those of a network: positive, correlated, with overlapping classes.

    Returns:
        Embeddings, float32 (count + VAL, dim), and labels.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, count + VAL)
    hidden = 0.6 * rng.normal(size=(classes, 64))[labels] + rng.normal(size=(len(labels), 64))
    mixed = hidden.astype(np.float32) @ rng.normal(size=(64, dim)).astype(np.float32) / 8
    return np.maximum(mixed + 0.5 * rng.standard_normal(mixed.shape, np.float32), 0), labels.astype(np.int32)


def search(name: str, count: int, dim: int, classes: int) -> float:
    """Runs the search of tl_keras and returns its duration in seconds."""
    from tl_keras.probes.estimators import Recipe
    from tl_keras.probes.search import choose_parameter

    embeddings, labels = make_embeddings(count, dim, classes)
    start = time.perf_counter()
    found = choose_parameter(
        name,
        (embeddings[:count], labels[:count]),
        (embeddings[count:], labels[count:]),
        recipe=Recipe(scale="standard", max_iter=1000, seed=0),
        choose_by="val",
        show_progress=lambda _: None,
    )
    print(json.dumps({"best": found.value, "accuracy": max(found.scores.values()), "values": sorted(found.scores)}))
    return time.perf_counter() - start


def grid_search(name: str, count: int, dim: int, classes: int, values: list[float]) -> float:
    """Runs scikit-learn's GridSearchCV and returns its duration in seconds."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression, RidgeClassifier
    from sklearn.model_selection import GridSearchCV, PredefinedSplit
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC, LinearSVC

    estimators = {
        "logistic_regression": (LogisticRegression(max_iter=1000), "C"),
        "linear_svm": (LinearSVC(), "C"),
        "rbf_svm": (SVC(cache_size=1000), "C"),
        "knn": (KNeighborsClassifier(), "n_neighbors"),
        "ridge": (RidgeClassifier(), "alpha"),
    }
    embeddings, labels = make_embeddings(count, dim, classes)
    estimator, parameter = estimators[name]
    split = PredefinedSplit(np.where(np.arange(len(labels)) < count, -1, 0))
    grid = {f"probe__{parameter}": [int(value) if name == "knn" else value for value in values]}
    start = time.perf_counter()
    pipeline = Pipeline([("scaler", StandardScaler()), ("probe", estimator)])
    found = GridSearchCV(pipeline, grid, cv=split, n_jobs=-1, refit=False).fit(embeddings, labels)
    print(json.dumps({"best": found.best_params_[f"probe__{parameter}"], "accuracy": found.best_score_}))
    return time.perf_counter() - start


def run_apart(call: str, limit: float | None) -> dict[str, Any]:
    """Runs a function above in its own process; returns its result, seconds, and peak memory including its children."""
    code = (
        "import json, resource; from benchmarks import probes; seconds = probes." + call + "\n"
        "peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))\n"
        "print(json.dumps({'seconds': round(seconds, 1), 'peak memory, MB': round(peak / 1024)}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # kills its workers too
        return {"seconds": f"over {limit:.0f}, stopped"}
    answer, cost = map(json.loads, output.splitlines()[-2:])
    return {**answer, **cost}


def measure_sweep(_: Any) -> dict[str, Any]:
    found = {}
    for name in PROBES:
        ours = run_apart(f"search({name!r}, *probes.SWEEP)", None)
        peer = run_apart(f"grid_search({name!r}, *probes.SWEEP, {ours.pop('values')})", LIMIT)
        found[name] = {"tl_keras": ours, "GridSearchCV": peer}
        print(name, found[name], flush=True)
    return found


def measure_large(_: Any) -> dict[str, Any]:
    answer = run_apart("search('logistic_regression', *probes.LARGE)", None)
    answer.pop("values")
    return answer


def measure_dual(_: Any) -> dict[str, Any]:
    """Times LinearSVC with dual coordinate descent and with the primal Newton method, tolerance 0.01."""
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    count, dim, classes = SWEEP
    embeddings, labels = make_embeddings(count, dim, classes)
    scaled = StandardScaler().fit_transform(embeddings[:count]).astype(float)
    found = {}
    for value in (1e-5, 1e-4):
        for name, dual in (("dual", True), ("primal", False)):
            estimator = LinearSVC(C=value, dual=dual, tol=1e-2, max_iter=100)
            found[f"C={value:g}, {name}, s"] = round(clock(lambda one=estimator: one.fit(scaled, labels[:count])), 1)
    return found


PARTS = {"layers": measure_layers, "sweep": measure_sweep, "large": measure_large, "dual": measure_dual}

if __name__ == "__main__":
    main()
