"""The fresh process that loads an exported model as TF Serving does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import COLOURS, make_image, write_image
from tl_keras.classifier import load
from tl_keras.errors import UserError
from tl_keras.export import parity
from tl_keras.export.cpp_loader import find_libraries, load_library
from tl_keras.export.parity import Agreement, ParityProcess


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[bytes]:
    """Nineteen images: more than two batches, more than are run alone."""
    root = tmp_path_factory.mktemp("samples")
    colours = list(COLOURS.values())
    return [
        write_image(root / f"{number}.png", make_image(number, colours[number % 3])).read_bytes()
        for number in range(19)
    ]


@pytest.fixture(scope="module")
def expected(trained, samples) -> np.ndarray:
    return np.stack([row["probabilities"] for row in load(str(trained[1])).predict(samples)])


@pytest.fixture
def process(monkeypatch):
    """Puts a few lines of Python in the place of the process."""
    popen = subprocess.Popen

    def place(code: str) -> None:
        monkeypatch.setattr(
            parity.subprocess, "Popen", lambda command, **options: popen([sys.executable, "-c", code], **options)
        )

    return place


ANSWER = {"valid": True, "loader": "TensorFlow's C++ loader"}


def compare(probabilities: np.ndarray, folder: Path = Path("m")) -> Agreement:
    with ParityProcess() as fresh:
        return fresh.compare(folder, [b"x"] * len(probabilities), probabilities)


def test_a_fresh_process_without_keras_gives_the_probabilities_that_were_evaluated(trained, samples, expected):
    with ParityProcess() as fresh:
        agreement = fresh.compare(trained[1], samples, expected)
    assert (agreement.count, agreement.decisions) == (19, 1.0)
    assert agreement.largest_difference < 1e-5
    assert agreement.batch_difference < 1e-5
    assert fresh._process.returncode is not None


def test_a_model_that_still_hangs_on_kerass_variables_does_not_pass(tmp_path):
    class Holder(tf.Module):
        """The trap: this loads with `tf.saved_model.load`, and fails in TF Serving."""

        def __init__(self):
            super().__init__()
            self.network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
        def serve(self, image_bytes):
            values = tf.ones((tf.shape(image_bytes)[0], 2))
            return {"probabilities": self.network(values), "valid": tf.strings.length(image_bytes) > 0}

    holder = Holder()
    tf.saved_model.save(holder, str(tmp_path / "1"), signatures={"serving_default": holder.serve})
    assert tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"] is not None
    with ParityProcess() as fresh:
        text = error_of(fresh.compare, tmp_path / "1", [b"x"], np.ones((1, 2), np.float32))
    assert text.startswith("the exported model can't be loaded like in TF Serving: ")
    assert "variable" in text.lower()
    assert text.endswith(". Nothing was exported.")


def test_whoever_imports_keras_in_the_process_fails(process):
    process(
        "from tl_keras.export import parity\n"
        "parity._load_runtime = lambda: None\n"
        "parity._answer = lambda question, library: __import__('keras')\n"
        "parity._main()"
    )
    assert "import of keras halted; None in sys.modules" in error_of(compare, np.ones((1, 2)))


def ask(folder: Path, images: list[bytes]) -> dict[str, object]:
    encoded = [parity.base64.b64encode(image).decode() for image in images]
    return {"folder": str(folder), "tensors": parity._name_tensors(folder), "images": encoded}


def open_library():
    return load_library(find_libraries())


@pytest.mark.parametrize(("loader", "load_runtime"), [("TF1 session", lambda: None), ("C++", open_library)])
def test_the_answer_is_that_of_both_batch_sizes(trained, samples, expected, loader, load_runtime):
    answer = json.loads(json.dumps(parity._answer(ask(trained[1], samples), load_runtime())))
    assert (answer["valid"], answer["loader"]) == (True, loader)
    np.testing.assert_allclose(answer["batched"], expected, atol=1e-5)
    np.testing.assert_allclose(answer["alone"], expected[:8], atol=1e-5)


@pytest.mark.parametrize("load_runtime", [lambda: None, open_library])
def test_an_image_that_is_invalid_in_the_model_is_told(trained, samples, load_runtime):
    assert parity._answer(ask(trained[1], [b"x", *samples]), load_runtime())["valid"] is False


def test_tensorflows_c_plus_plus_loader_says_what_is_missing(tmp_path):
    with pytest.raises(RuntimeError, match="Could not find SavedModel"):
        parity._answer(ask(tmp_path, [b"x"]), open_library())


def test_the_fresh_process_imports_no_python_of_tensorflow_where_its_wheel_has_the_c_plus_plus_loader(process):
    process(
        "import sys; from tl_keras.export import parity\n"
        "parity._answer = lambda question, library: sys.exit(str((bool(library), 'tensorflow' in sys.modules)))\n"
        "parity._main()"
    )
    assert "(True, False)" in error_of(compare, np.ones((1, 2)))


def test_without_that_library_the_model_is_loaded_through_a_session(monkeypatch):
    monkeypatch.setattr(parity, "find_libraries", list)
    assert parity._load_runtime() is None


def test_an_image_that_the_model_finds_invalid_is_an_error(process):
    process("print('{\"valid\": false}')")
    assert error_of(compare, np.ones((1, 2))) == (
        "the exported model rejects images that were evaluated. Nothing was exported."
    )


def test_the_agreement_is_measured_over_all_images(process):
    wanted = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.55, 0.45]], np.float32)
    batched = [[0.9, 0.1], [0.25, 0.75], [0.6, 0.4], [0.45, 0.55]]
    alone = [[0.9, 0.1], [0.23, 0.77]]
    process(f"print({json.dumps(json.dumps({**ANSWER, 'batched': batched, 'alone': alone}))})")
    found = compare(wanted)
    assert (found.count, found.decisions) == (4, 0.75)
    assert found.largest_difference == pytest.approx(0.1, abs=1e-6)
    assert found.batch_difference == pytest.approx(0.02, abs=1e-6)
    assert found.loader == "TensorFlow's C++ loader"


def test_what_is_asked_is_one_line_with_the_folder_and_the_images(process, tmp_path):
    path = tmp_path / "question.json"
    process(f"import sys; open({str(path)!r}, 'w').write(sys.stdin.readline()); print('{{\"valid\": false}}')")
    with pytest.raises(UserError):
        compare(np.ones((2, 2)), tmp_path / "红 1")
    asked = json.loads(path.read_text())
    assert asked.keys() == {"folder", "images", "tensors"}
    assert (asked["folder"], asked["images"]) == (str(tmp_path / "红 1"), ["eA==", "eA=="])


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ValueError('no such op: MyOp')", "ValueError: no such op: MyOp"),
        ("import sys; sys.exit('x' * 1000 + '.')", "x" * 300),
        ("import os; os.kill(os.getpid(), 9)", "the process was killed by signal 9, probably for lack of memory"),
        ("import os; os.kill(os.getpid(), 11)", "the process was killed by signal 11"),
        ("import sys; sys.exit(3)", "the process exited with status 3"),
        ("print('no JSON')", "the process exited with status 0"),
        ("import sys; print('a line', file=sys.stderr); os", "NameError: name 'os' is not defined"),
    ],
    ids=["an exception", "a long line", "killed", "crashed", "silent", "no JSON", "the last line"],
)
def test_a_process_that_gives_no_answer_is_told_by_what_ended_it(process, code, reason):
    process(code)
    assert error_of(compare, np.ones((1, 2))) == (
        f"the exported model can't be loaded like in TF Serving: {reason}. Nothing was exported."
    )


def test_a_process_that_never_answers_is_given_up_and_ended(process, monkeypatch):
    monkeypatch.setattr(parity, "_SECONDS", 0.2)
    process("import time; time.sleep(1000)")
    with ParityProcess() as fresh:
        text = error_of(fresh.compare, Path("m"), [b"x"], np.ones((1, 2)))
        assert fresh._process.poll() is None
    assert text.endswith("like in TF Serving: no answer within 0.2 s. Nothing was exported.")
    assert fresh._process.returncode == -9


def test_the_process_ends_with_whoever_started_it(process):
    process("import time; time.sleep(1000)")
    with pytest.raises(KeyboardInterrupt), ParityProcess() as fresh:
        raise KeyboardInterrupt
    assert fresh._process.returncode == -9
    assert fresh._process.stdin.closed
    assert fresh._stderr.closed


def test_the_process_sees_no_gpu_and_imports_what_this_one_imports(process, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.syspath_prepend("/a place of mine")
    process("import os, sys; sys.exit(os.environ['CUDA_VISIBLE_DEVICES'] + ' ' + str('/a place of mine' in sys.path))")
    assert "like in TF Serving: -1 True. Nothing" in error_of(compare, np.ones((1, 2)))
