"""The exported model: the contract of its signatures, and a folder that is whole or not there."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorflow.core.protobuf import saved_model_pb2

from tests.conftest import COLOURS, build_classifier, make_image
from tl_keras.classifier import load_samples, load_trained
from tl_keras.errors import UserError
from tl_keras.export import saved_model
from tl_keras.export.parity import Agreement
from tl_keras.export.saved_model import check_agreement, describe_request, export_saved_model

LABELS = ("älg", "b,c", 'd "e"', "f g", "红 色", "🐶", "עברית")
AGREED = Agreement(count=16, decisions=1.0, largest_difference=1e-6, batch_difference=1e-7)


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


IMAGES = [encode(make_image(number, list(COLOURS.values())[number % 3])) for number in range(9)]
BROKEN = [b"", b"no image", b"\xff\xd8\xff", IMAGES[0][:200], encode(make_image(1), "TIFF")]


class Parity:
    """Stands for the fresh process, which takes seconds, and gives the agreement that a test wants."""

    def __init__(self, compare=lambda folder: AGREED):
        self._compare = compare

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def compare(self, folder, samples, expected):
        return self._compare(folder)


def export(root: Path, *, name: str = "m", precision: str = "float32", lines=None, **changes):
    given = {"classifier": build_classifier(("a", "b")), "samples": IMAGES[:1], "expected": np.ones((1, 2))} | changes
    given = {"max_pixels": 10**6} | given
    lines = [] if lines is None else lines
    return export_saved_model(
        given.pop("classifier"), export_dir=str(root), name=name, precision=precision, show=lines.append, **given
    )


@pytest.fixture
def quick(monkeypatch):
    """Exports without a fresh process and without a graph: an empty file in its place."""
    monkeypatch.setattr(saved_model, "ParityProcess", Parity)

    def write(classifier, folder, **settings) -> None:
        (folder / "saved_model.pb").write_bytes(b"")

    monkeypatch.setattr(saved_model, "write_version", write)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# what TF Serving sees


class Served:
    """An exported model in a TF1 session, as TF Serving's C++ has it."""

    def __init__(self, folder: Path):
        self.graph = tf.Graph()
        with self.graph.as_default():
            self.session = tf.compat.v1.Session()
            meta = tf.compat.v1.saved_model.load(self.session, ["serve"], str(folder))
        self.signatures = {name: one for name, one in meta.signature_def.items() if not name.startswith("__")}

    def run(self, images, signature: str = "serving_default") -> dict[str, np.ndarray]:
        one = self.signatures[signature]
        (feed,) = one.inputs.values()
        fetches = {name: output.name for name, output in one.outputs.items()}
        return self.session.run(fetches, {feed.name: images})


@pytest.fixture(scope="module")
def classifier():
    return build_classifier(LABELS)


@pytest.fixture(scope="module")
def folder(classifier, tmp_path_factory) -> Path:
    """Seven classes in seven scripts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved_model, "ParityProcess", Parity)
        # kernels are variables, as in real networks
        patch.setattr("tl_keras.classifier.graph._LARGEST_CONSTANT_BYTES", 100)
        return export(tmp_path_factory.mktemp("models"), classifier=classifier).path


@pytest.fixture(scope="module")
def served(folder) -> Served:
    return Served(folder)


@pytest.fixture(scope="module")
def three(trained) -> Served:
    return Served(trained[1])


def describe(tensors) -> dict[str, tuple[str, list[int]]]:
    return {
        name: (tf.dtypes.as_dtype(tensor.dtype).name, [dim.size for dim in tensor.tensor_shape.dim])
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(("which", "size", "classes", "k", "dim"), [("three", 16, 3, 3, 128), ("served", 12, 7, 5, 6)])
def test_the_signatures_are_those_of_the_contract(which, size, classes, k, dim, request):
    signatures = request.getfixturevalue(which).signatures
    answers = {
        "probabilities": ("float32", [-1, classes]),
        "labels": ("string", [-1, k]),
        "scores": ("float32", [-1, k]),
        "class_ids": ("int64", [-1, k]),
        "valid": ("bool", [-1]),
    }
    found = {name: (describe(one.inputs), describe(one.outputs)) for name, one in signatures.items()}
    assert found == {
        "serving_default": ({"image_bytes": ("string", [-1])}, answers),
        "pixels": ({"images": ("float32", [-1, size, size, 3])}, answers),
        "embeddings": ({"image_bytes": ("string", [-1])}, {"embeddings": ("float32", [-1, dim])}),
        "classify": ({"inputs": ("string", [-1])}, {"classes": ("string", [-1, k]), "scores": ("float32", [-1, k])}),
    }
    assert {one.method_name for one in signatures.values()} == {"tensorflow/serving/predict"}


def check_consistent(answer: dict[str, np.ndarray], labels: tuple[str, ...], valid: list[bool]) -> None:
    """Every output says the same of every image."""
    k = min(5, len(labels))
    assert answer["valid"].tolist() == valid
    assert {name: (values.shape, values.dtype.name) for name, values in answer.items()} == {
        "probabilities": ((len(valid), len(labels)), "float32"),
        "labels": ((len(valid), k), "object"),
        "scores": ((len(valid), k), "float32"),
        "class_ids": ((len(valid), k), "int64"),
        "valid": ((len(valid),), "bool"),
    }
    for row, is_valid in enumerate(valid):
        probabilities, ids = answer["probabilities"][row], answer["class_ids"][row]
        if not is_valid:
            assert not probabilities.any()
            assert not answer["scores"][row].any()
            assert ids.tolist() == [-1] * k
            assert answer["labels"][row].tolist() == [b""] * k
            continue
        assert probabilities.sum() == pytest.approx(1, abs=1e-5)
        assert ids.tolist() == np.argsort(-probabilities, kind="stable")[:k].tolist()
        np.testing.assert_array_equal(answer["scores"][row], probabilities[ids])
        assert [label.decode() for label in answer["labels"][row]] == [labels[number] for number in ids]


@pytest.mark.parametrize("count", [1, 2, 9])
def test_good_images_have_their_best_classes_in_order(served, count):
    answer = served.run(IMAGES[:count])
    check_consistent(answer, LABELS, [True] * count)
    if count == 9:
        assert len(set(answer["class_ids"][:, 0])) > 1


def test_three_classes_have_three_best(three):
    answer = three.run([*IMAGES[:3], b""])
    check_consistent(answer, tuple(sorted(COLOURS)), [True] * 3 + [False])
    assert [row[0].decode() for row in answer["labels"][:3]] == list(COLOURS)


def test_a_broken_image_leaves_its_neighbours_alone(served):
    mixed = [BROKEN[0], IMAGES[0], BROKEN[1], BROKEN[2], IMAGES[1], BROKEN[3], IMAGES[2], BROKEN[4]]
    answer = served.run(mixed)
    check_consistent(answer, LABELS, [image in IMAGES for image in mixed])
    alone = served.run(IMAGES[:3])
    np.testing.assert_allclose(answer["probabilities"][[1, 4, 6]], alone["probabilities"], atol=1e-6)


def test_a_batch_of_broken_images_is_answered(served):
    check_consistent(served.run(BROKEN), LABELS, [False] * 5)
    assert not served.run(BROKEN, "embeddings")["embeddings"].any()


def test_an_empty_batch_is_answered_with_none(served):
    check_consistent(served.run([]), LABELS, [])
    check_consistent(served.run(np.zeros((0, 12, 12, 3), np.float32), "pixels"), LABELS, [])
    assert served.run([], "embeddings")["embeddings"].shape == (0, 6)


def test_a_large_batch_is_in_order_and_a_batchs_size_is_no_matter(served):
    order = np.random.default_rng(0).integers(0, 9, 200)
    answer = served.run([IMAGES[number] for number in order])
    alone = np.concatenate([served.run([image])["probabilities"] for image in IMAGES])
    np.testing.assert_allclose(answer["probabilities"], alone[order], atol=1e-6)


def shrink(image: bytes) -> np.ndarray:
    """As Pillow squashes it, within a level."""
    return np.array(Image.open(io.BytesIO(image)).resize((12, 12), Image.Resampling.BILINEAR), np.float32)


def test_pixels_are_answered_as_the_image_that_they_are(served, classifier):
    pixels = np.stack([shrink(image) for image in IMAGES])
    answer = served.run(pixels, "pixels")
    check_consistent(answer, LABELS, [True] * 9)
    expected = tf.nn.softmax(classifier.network.predict(pixels, verbose=0)).numpy()
    np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-5)
    np.testing.assert_allclose(served.run(IMAGES)["probabilities"], expected, atol=5e-3)


def test_black_and_white_pixels_are_valid(served):
    extremes = np.stack([np.zeros((12, 12, 3)), np.full((12, 12, 3), 255)]).astype(np.float32)
    check_consistent(served.run(extremes, "pixels"), LABELS, [True, True])


def test_embeddings_are_the_backbones_and_zeros_where_broken(served, classifier):
    found = served.run([IMAGES[0], b"no image", IMAGES[1]], "embeddings")["embeddings"]
    pixels = np.stack([shrink(image) for image in IMAGES[:2]])
    np.testing.assert_allclose(found[[0, 2]], classifier.embedder.predict(pixels, verbose=0), atol=0.01)
    assert not found[1].any()


def test_the_graph_has_variables_and_stock_ops_and_nothing_of_python(folder):
    content = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    graph = content.meta_graphs[0].graph_def
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    found = {node.op for node in nodes}
    functions = {function.signature.name for function in graph.library.function}
    assert "Conv2D" in found
    assert [op for op in found - functions if not hasattr(tf.raw_ops, op)] == []
    assert sum(node.op == "VarHandleOp" for node in nodes) == 2  # of the convolution and of the logits
    forbidden = ("PyFunc", "Assign", "Random", "MutableHash", "Print", "File", "Summary")
    # to restore the variables
    allowed = {"ShardedFilename", "AssignVariableOp"}
    assert [op for op in found - allowed if any(word in op for word in forbidden)] == []
    assert not [node.name for node in nodes if "GPU" in node.device]


def test_the_folder_holds_what_tf_serving_reads_and_the_labels(folder):
    assert names(folder) == ["assets", "assets.extra", "fingerprint.pb", "saved_model.pb", "variables"]
    assert names(folder / "assets.extra") == ["tf_serving_warmup_requests", "tl_keras.json"]
    text = (folder / "assets" / "labels.txt").read_bytes().decode("utf-8")
    assert text == "".join(f"{label}\n" for label in LABELS)
    assert folder.stat().st_mode & 0o777 == 0o755  # TF Serving may run as another user
    for path in folder.rglob("*"):
        assert path.stat().st_mode & 0o444 == 0o444


# whole or not there


def test_an_export_that_disagrees_leaves_nothing_behind_and_says_so(trained, tmp_path):
    samples, expected = load_samples(str(trained[0]))
    lines = []
    text = error_of(
        export,
        tmp_path,
        classifier=load_trained(str(trained[0])),
        samples=samples,
        expected=np.roll(expected, 1, axis=1),
        lines=lines,
    )
    assert text.startswith(
        "the exported model differs from the evaluated classifier: decisions agree in 0.000 (required: 0.99), "
    )
    assert text.endswith("Nothing was exported. Please report this; the run folder is kept.")
    assert len(lines) == 1
    assert lines[0].startswith(f"export: exported model checked on {len(samples)} images in a new process: decisions")
    assert names(tmp_path / "m") == []


def fail_with(error: BaseException):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    ("where", "error", "text"),
    [
        ("compare", UserError("the exported model can't be loaded. Nothing was exported."), "can't be loaded"),
        ("compare", KeyboardInterrupt(), None),
        (
            "write_version",
            OSError(28, "No space left on device"),
            "the disk is full: the model folder {} could not be written.",
        ),
        ("write_version", OSError(None, "a graph of 3 GB"), "the model folder {} can't be written: a graph of 3 GB."),
        ("_take_version", PermissionError(13, "Permission denied"), "the model folder {} can't be written: Permission"),
    ],
)
def test_whatever_stops_an_export_leaves_the_earlier_versions_and_nothing_else(
    quick, tmp_path, monkeypatch, where, error, text
):
    export(tmp_path)
    if where == "compare":
        monkeypatch.setattr(saved_model, "ParityProcess", lambda: Parity(fail_with(error)))
    else:
        monkeypatch.setattr(saved_model, where, fail_with(error))
    if text is None:
        with pytest.raises(KeyboardInterrupt):
            export(tmp_path)
    else:
        assert text.format(tmp_path) in error_of(export, tmp_path)
    assert names(tmp_path / "m") == ["1"]


def test_tensorflows_own_word_for_a_full_disk_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(saved_model, "ParityProcess", Parity)
    error = tf.errors.ResourceExhaustedError(None, None, "No space left on device")
    monkeypatch.setattr(tf.saved_model, "save", fail_with(error))
    assert error_of(export, tmp_path) == (
        f"the model folder {tmp_path} can't be written: No space left on device. Choose another place."
    )


def test_while_it_is_written_it_has_a_name_that_tf_serving_ignores(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(saved_model, "ParityProcess", lambda: Parity(lambda folder: seen.append(folder) or AGREED))
    exported = export(tmp_path)
    assert seen[0].parent == exported.path.parent
    assert not seen[0].name.isdecimal()
    assert not seen[0].exists()
    assert (exported.path / "saved_model.pb").is_file()


def test_what_is_said_has_the_figures(quick, tmp_path):
    lines = []
    exported = export(tmp_path, lines=lines)
    assert lines == [
        "export: exported model checked on 16 images in a new process: decisions agree in 1.000, largest difference "
        "of a probability 1.0e-06"
    ]
    assert exported.as_dict() == {
        "path": f"{tmp_path}/m/1",
        "count": 16,
        "decisions": 1.0,
        "largest_difference": 1e-6,
        "batch_difference": 1e-7,
        "loader": "C++",
    }


# versions


@pytest.mark.parametrize(
    ("there", "version"),
    [
        ([], "1"),
        (["1", "2"], "3"),
        (["9", "10"], "11"),
        (["5"], "6"),
        (["0"], "1"),
        (["007"], "8"),
        (["20240229"], "20240230"),
        (["1", "latest", ".unfinished-x", "-7", "3.5", "4 copy", "1e9", "²", "v8", "٩"], "2"),
        (["99999999999999999999", "4"], "5"),  # larger than TF Serving's int64
        (["9223372036854775807", "4"], "5"),
    ],
    ids=str,
)
def test_the_next_free_number_is_taken(quick, tmp_path, there, version):
    for name in there:
        (tmp_path / "m" / name).mkdir(parents=True)
    assert export(tmp_path).path == tmp_path / "m" / version
    assert names(tmp_path / "m") == sorted([*there, version])


def test_a_file_with_a_number_for_a_name_is_left_alone(quick, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "3").write_text("notes")
    assert export(tmp_path).path.name == "4"
    assert (tmp_path / "m" / "3").read_text() == "notes"


def test_two_exports_at_the_same_moment_get_two_versions(quick, tmp_path, monkeypatch):
    count = 6
    barrier = threading.Barrier(count)
    rename, waited = os.rename, threading.local()

    def rename_together(source, target):
        if not getattr(waited, "once", False):
            waited.once = True
            barrier.wait(timeout=30)  # all have chosen the same number
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_together)
    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda number: export(tmp_path).path.name, range(count)))
    assert sorted(found) == names(tmp_path / "m") == ["1", "2", "3", "4", "5", "6"]
    assert all((tmp_path / "m" / name / "saved_model.pb").is_file() for name in found)


def test_a_model_folder_that_is_a_file_is_named(quick, tmp_path):
    (tmp_path / "file").write_text("")
    assert error_of(export, tmp_path / "file").startswith(f"the model folder {tmp_path}/file can't be written: ")


# the agreement


def agreement(*, decisions: float = 1.0, largest: float = 0.0, batch: float = 0.0) -> Agreement:
    return Agreement(count=100, decisions=decisions, largest_difference=largest, batch_difference=batch)


@pytest.fixture(params=[False, True], ids=["CPU", "GPU"])
def on_gpu(request, monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU:0"] if request.param else [])
    return request.param


ALLOWED = {("float32", False): 1e-3, ("float32", True): 2e-2, ("bfloat16", False): 0.5, ("float16", True): 0.5}


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_difference_that_the_precision_explains_is_allowed(precision, on_gpu):
    limit = ALLOWED.get((precision, on_gpu), 0.5)
    check_agreement(agreement(decisions=0.99, largest=limit * 0.99, batch=0.99e-3), precision)
    for wrong in (agreement(largest=limit * 1.01), agreement(decisions=0.98), agreement(largest=float("nan"))):
        assert "differs from the evaluated classifier" in error_of(check_agreement, wrong, precision)
    for wrong in (agreement(batch=1.01e-3), agreement(batch=float("nan"))):
        assert "depend on the batch size" in error_of(check_agreement, wrong, precision)


@pytest.mark.parametrize(
    ("precision", "allowed", "advice"),
    [
        ("float32", "float32: 1e-03", "Please report this"),
        ("bfloat16", "bfloat16: 5e-01", "Run again with --precision=float32"),
    ],
)
def test_a_disagreement_says_how_much_what_is_allowed_and_what_to_do(precision, allowed, advice, monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    assert error_of(check_agreement, agreement(decisions=0.875, largest=0.75), precision) == (
        "the exported model differs from the evaluated classifier: decisions agree in 0.875 (required: 0.99), largest "
        f"difference 7.5e-01 (allowed in {allowed}). Nothing was exported. {advice}; the run folder is kept."
    )


def test_on_a_gpu_float32_is_not_advised_to_whoever_has_it(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU:0"])
    text = error_of(check_agreement, agreement(decisions=0.5), "float32")
    assert "(allowed in TensorFloat-32: 2e-02)" in text
    assert "Please report this" in text


def test_an_answer_that_depends_on_the_batch_is_told_as_such():
    assert error_of(check_agreement, agreement(batch=0.5), "bfloat16") == (
        "the predictions of the exported model depend on the batch size (by 5.0e-01). Nothing was exported; please "
        "report this with the run folder."
    )


# the request


@pytest.mark.parametrize("size", [1, 2, 3, 200_000])
def test_the_curl_line_sends_the_photograph(tmp_path, size):
    photo = bytes(np.random.default_rng(size).integers(0, 256, size, np.uint8))
    (tmp_path / "photo.jpg").write_bytes(photo)
    serve, line = describe_request(Path("saved_models/my-model/12"))
    assert serve == "try it: tl_keras serve --classifier=saved_models/my-model/12"
    line = line.removeprefix("then send a request: ")
    shell, url = line.split(" | curl -d @- ")
    assert url == "http://localhost:8501/v1/models/my-model:predict"
    body = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, check=True).stdout
    request = json.loads(body)
    assert list(request) == ["instances"]
    ((one,),) = [request["instances"]]
    assert list(one) == ["b64"]
    assert base64.b64decode(one["b64"], validate=True) == photo


def test_the_request_is_one_that_the_model_answers(folder, served, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(IMAGES[0])
    shell = describe_request(folder)[1].removeprefix("then send a request: ").split(" | ")[0]
    body = json.loads(subprocess.check_output(["bash", "-c", shell], cwd=tmp_path))
    answer = served.run([base64.b64decode(one["b64"]) for one in body["instances"]])
    check_consistent(answer, LABELS, [True])


def test_an_exported_folder_may_be_moved_and_renamed(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "红" / "7")
    check_consistent(Served(tmp_path / "红" / "7").run(IMAGES[:1]), LABELS, [True])


def test_a_version_with_other_labels_than_the_one_before_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(saved_model, "ParityProcess", Parity)
    lines = []
    for labels in (("a", "b"), ("a", "b"), ("a", "c")):
        export(tmp_path, classifier=build_classifier(labels), lines=lines)
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: version 2 of m has other labels, and TF Serving serves the newest version;")


def test_images_above_the_limit_of_pixels_are_not_compared_but_said(tmp_path, monkeypatch):
    compared = []

    def compare(folder):
        compared.append(folder)
        return AGREED

    monkeypatch.setattr(saved_model, "ParityProcess", lambda: Parity(compare))
    small, large = (encode_png(side) for side in (4, 30))
    lines = []
    given = {"samples": [small, large, small], "expected": np.ones((3, 2)), "max_pixels": 100}
    export(tmp_path, lines=lines, **given)
    assert "warning: 1 of 3 evaluated images have more than --max_pixels=100 pixels" in lines[0]
    assert len(compared) == 1
    text = error_of(export, tmp_path, **given | {"max_pixels": 3})
    assert text.startswith("the evaluated images have more than --max_pixels=3 pixels")
    assert names(tmp_path / "m") == ["1"]


def encode_png(side: int) -> bytes:
    return bytes(tf.io.encode_png(np.zeros((side, side, 3), np.uint8)).numpy())
