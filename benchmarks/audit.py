"""Detection rates of an audit for errors planted in flowers, and the time of the nearest neighbor search.

python -m benchmarks.audit [--only=planted,labels,neighbours,libraries,gif]

Parts for `--only`:
    planted: 5 % of the labels flipped, 100 exact copies across splits, 100 near copies (resized, recompressed, cropped
        by 5 %, mirrored). MobileNetV2, alpha=0.35, real ImageNet weights.
    labels: precision among as many suspects as labels were flipped, and time, by regularization and for a discriminant
        analysis; precision by margin.
    neighbours: time of the search in 100,000 embeddings with 2,048 dimensions, drawn in clusters.
    libraries: scikit-learn, FAISS and hnswlib on the 128 principal components of these embeddings
        (pip install faiss-cpu hnswlib).
    gif: rank of hymenoptera's GIF that shows no ant among the findings.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from benchmarks.measure import MOBILENET_WEIGHTS, clock, parse, run_process, spread, write_results

FLIPPED, COPIES = 0.05, 100
SEEDS = (0, 1, 2)
COPY_KINDS = {"leak", "two_labels", "duplicate", "near_duplicate"}


def main() -> None:
    arguments = parse()
    parts = arguments.only.split(",") if arguments.only else list(PARTS)
    write_results("audit", {name: PARTS[name](arguments) for name in parts})


def audit(arguments: Any, dataset: str, run: Path, *flags: str) -> tuple[float, list[dict[str, str]], dict[str, Any]]:
    network = ["--backbone=MobileNetV2", "--backbone_kwargs=alpha=0.35"]
    places = [f"--run_dir={run}", "--overwrite", f"--store_dir={arguments.work / 'audit_store'}"]
    weights = f"--weights={arguments.data / MOBILENET_WEIGHTS}"
    command = ["-m", "tl_keras.main", "--mode=audit", f"--dataset={dataset}", *network, weights, *places, *flags]
    seconds, _ = run_process(command)
    with (run / "audit.csv").open(newline="") as file:
        return seconds, list(csv.DictReader(file)), json.loads((run / "metrics.json").read_text())


def measure_planted(arguments: Any) -> dict[str, Any]:
    runs = [measure_seed(arguments, seed) for seed in SEEDS[: arguments.runs]]
    return {name: spread([run[name] for run in runs]) for name in runs[0] if name != "curve"} | {
        "precision and recall at shares of the number planted, first seed": runs[0]["curve"]
    }


def measure_seed(arguments: Any, seed: int) -> dict[str, Any]:
    random, root = np.random.default_rng(seed), arguments.work / "audit_flowers"
    shutil.rmtree(root, ignore_errors=True)
    files = sorted((arguments.data / "flowers").glob("*/*.jpg"))
    names = sorted({path.parent.name for path in files})
    order = random.permutation(len(files))
    split_of = dict.fromkeys(order[: len(files) // 5].tolist(), "test")
    rows, flipped = [], set()
    planted = set(random.choice(len(files), round(FLIPPED * len(files)), replace=False).tolist())
    for number, path in enumerate(files):
        label = path.parent.name
        if number in planted:
            label = str(random.choice([name for name in names if name != label]))
            flipped.add(str(path))
        rows.append((str(path), label, split_of.get(number, "train")))
    tested = [number for number in order[: len(files) // 5] if number not in planted]
    copied = {"exact": tested[:COPIES], "near": tested[COPIES : 2 * COPIES]}
    pairs: dict[str, set[frozenset[str]]] = {"exact": set(), "near": set()}
    (root / "copies").mkdir(parents=True)
    for kind, numbers in copied.items():
        for place, number in enumerate(numbers):
            source = files[number]
            copy = root / "copies" / f"{kind}_{place}.jpg"
            copy.write_bytes(source.read_bytes() if kind == "exact" else alter(source.read_bytes(), place))
            rows.append((str(copy), source.parent.name, "train"))
            pairs[kind].add(frozenset((str(source), str(copy))))
    manifest = root / "manifest.csv"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    seconds, findings, _ = audit(arguments, f"csv:{manifest}", root / "run")
    return score(findings, pairs, flipped, total=len(rows)) | {"seconds": seconds}


def alter(content: bytes, number: int) -> bytes:
    """Applies one of four changes to an image and recompresses it."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    width, height = image.size
    kind, quality = number % 4, 60 if number % 4 == 1 else 90
    if kind == 0:
        image = image.resize((width * 3 // 4, height * 3 // 4))
    elif kind == 2:
        cut_x, cut_y = round(width * 0.025), round(height * 0.025)
        image = image.crop((cut_x, cut_y, width - cut_x, height - cut_y))
    elif kind == 3:
        image = ImageOps.mirror(image)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def score(
    findings: list[dict[str, str]], pairs: dict[str, set[frozenset[str]]], flipped: set[str], *, total: int
) -> dict[str, Any]:
    """Scores the findings of an audit. The ids in a manifest with absolute paths are these paths."""
    alike = {frozenset((row["id"], row["other_id"])) for row in findings if row["finding"] in COPY_KINDS}
    leaks = {frozenset((row["id"], row["other_id"])) for row in findings if row["finding"] == "leak"}
    found: dict[str, Any] = {f"recall, {kind} copies": len(own & leaks) / len(own) for kind, own in pairs.items()}
    others = alike - pairs["exact"] - pairs["near"]
    found["pairs that were not planted, within a split or across, share of all images"] = len(others) / total
    own = [Path(one).name.split("_")[0] for pair in others for one in pair]
    found["of these, with one Flickr number: flowers' own copies"] = sum(
        first == second for first, second in zip(own[::2], own[1::2], strict=True)
    ) / max(len(others), 1)
    suspects = [row["id"] for row in findings if row["finding"] == "label"]
    hits = np.cumsum([one in flipped for one in suspects])
    count = len(flipped)
    at = min(count, len(suspects))
    found["label: precision at the number planted"] = float(hits[at - 1] / at)
    found["label: recall at the number planted"] = float(hits[at - 1] / count)
    found["label: times random"] = found["label: precision at the number planted"] / (count / total)
    shares = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    found["curve"] = {
        str(share): [round(float(hits[n - 1] / n), 3), round(float(hits[n - 1] / count), 3)]
        for share in shares
        if (n := min(round(share * count), len(suspects)))
    }
    return found


def measure_labels(arguments: Any) -> dict[str, Any]:
    """Compares models for label errors on the last planted draw, with the points that the audit uses."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from tl_keras.audit import labels as module
    from tl_keras.audit.neighbors import find_neighbors

    root = arguments.work / "audit_flowers"
    manifest = list(csv.DictReader((root / "manifest.csv").open(newline="")))
    npz = root / "embeddings.npz"
    flags = ["--probe=none", f"--embeddings_output={npz}", f"--run_dir={root / 'embeddings'}", "--overwrite"]
    network = [
        "--backbone=MobileNetV2",
        "--backbone_kwargs=alpha=0.35",
        f"--weights={arguments.data / MOBILENET_WEIGHTS}",
    ]
    npz.unlink(missing_ok=True)
    run_process(["-m", "tl_keras.main", "--mode=extract", f"--dataset=csv:{root / 'manifest.csv'}", *network, *flags])
    with np.load(npz) as arrays:
        names, points = arrays["id"].tolist(), find_neighbors(arrays["embedding"]).points
    label_of = {row["path"]: row["label"] for row in manifest}
    classes = sorted(set(label_of.values()))
    labels = np.array([classes.index(label_of[name]) for name in names])
    planted = np.array(["/copies/" not in name and Path(name).parent.name != label_of[name] for name in names])
    models = {
        f"logistic regression, C={c:g}": make_pipeline(
            StandardScaler(), LogisticRegression(C=c, tol=1e-3, max_iter=300)
        )
        for c in (0.001, 0.003, 0.01, 0.03, 0.1)
    }
    models["the same, C=0.01, tolerance 1e-4"] = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.01, max_iter=300)
    )
    models["linear discriminant analysis"] = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    folds, results = StratifiedKFold(5, shuffle=True, random_state=0), dict[str, Any]()
    for name, model in models.items():
        found: list[np.ndarray] = []
        seconds = clock(
            lambda model=model, found=found: found.append(
                cross_val_predict(model, points, labels, cv=folds, method="predict_proba")
            )
        )
        rows, _, margins = module.find_label_issues(found[0], labels)
        hits = planted[rows]
        results[name] = {
            "precision at the number planted": round(float(hits[: planted.sum()].mean()), 3),
            "seconds": round(seconds, 1),
        }
        if name.endswith("C=0.01"):
            results["precision of suspects, by margin"] = {
                f"{low:g} or more": [int((margins >= low).sum()), round(float(hits[margins >= low].mean()), 3)]
                for low in (0.3, 0.5, 0.7)
            }
    return results


def draw_embeddings() -> np.ndarray:
    random = np.random.default_rng(0)
    centres = random.normal(size=(500, 2048)).astype(np.float32)
    embeddings = centres[random.integers(0, 500, 100_000)]
    embeddings += 0.7 * random.normal(size=embeddings.shape).astype(np.float32)
    return embeddings


def measure_neighbours(arguments: Any) -> dict[str, Any]:
    from tl_keras.audit.neighbors import find_neighbors

    embeddings = draw_embeddings()
    return {"seconds": spread([clock(lambda: find_neighbors(embeddings)) for _ in range(arguments.runs)])}


def measure_libraries(_: Any) -> dict[str, Any]:
    """Finds ten neighbors of each embedding on the principal components; those of hnswlib are approximate."""
    import faiss
    import hnswlib
    from sklearn.neighbors import NearestNeighbors

    from tl_keras.audit.neighbors import find_neighbors

    found = find_neighbors(draw_embeddings())
    points, count = found.points, len(found.points)

    def search_faiss() -> np.ndarray:
        index = faiss.IndexFlatL2(points.shape[1])
        index.add(points)
        return index.search(points, 11)[1]

    def search_hnsw() -> np.ndarray:
        index = hnswlib.Index(space="l2", dim=points.shape[1])
        index.init_index(max_elements=count, ef_construction=200, M=16)
        index.add_items(points)
        index.set_ef(50)
        return index.knn_query(points, k=11)[0]

    def search_sklearn() -> np.ndarray:
        return NearestNeighbors(n_neighbors=11, algorithm="brute").fit(points).kneighbors(points)[1]

    results: dict[str, Any] = {}
    for name, search in (
        ("scikit-learn, exact", search_sklearn),
        ("FAISS, exact", search_faiss),
        ("hnswlib", search_hnsw),
    ):
        kept: list[np.ndarray] = []
        seconds = clock(lambda search=search, kept=kept: kept.append(search()))
        same = [len(set(row.tolist()) & set(own.tolist())) for row, own in zip(kept[0], found.indices, strict=True)]
        results[name] = {"seconds": round(seconds, 1), "share of the exact ten": round(sum(same) / 10 / count, 4)}
    return results


def measure_gif(arguments: Any) -> dict[str, Any]:
    seconds, findings, _ = audit(arguments, f"folder:{arguments.data / 'hymenoptera'}", arguments.work / "audit_ants")
    places = [number for number, row in enumerate(findings, start=1) if row["id"].endswith("imageNotFound.gif")]
    return {"findings": len(findings), "places of the GIF": places, "seconds": round(seconds, 1)}


PARTS = {
    "planted": measure_planted,
    "labels": measure_labels,
    "neighbours": measure_neighbours,
    "libraries": measure_libraries,
    "gif": measure_gif,
}

if __name__ == "__main__":
    main()
