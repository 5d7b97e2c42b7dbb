"""The documented structure is the real one, and every flag, file, signature and error of the reference exists."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from tl_keras.config.settings import list_fields

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tl_keras"
ARCHITECTURE = (ROOT / "docs" / "about" / "architecture.md").read_text(encoding="utf-8")
DOCS = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
LINES_AT_MOST = 60  # of code in a function, without its docstring


def list_functions() -> list[tuple[str, int]]:
    found = []
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = source.splitlines()[body[0].lineno - 1 : body[-1].end_lineno] if body else []
                found.append((f"{path.relative_to(ROOT)}:{node.name}", len([line for line in lines if line.strip()])))
    return found


def test_the_documented_order_of_imports_is_the_one_that_is_checked():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = [[name.strip() for name in layer.split("|")] for layer in contracts[0]["layers"]]
    chain = re.search(r"^`(main → .+)`$", ARCHITECTURE, re.MULTILINE)[1]
    assert [re.findall(r"\w+", part) for part in chain.split("→")] == [
        layer for layer in layers if layer != ["__main__"]
    ]


def test_every_package_is_in_the_table():
    documented = set(re.findall(r"`(\w+)(?:/|\.py)`", "\n".join(re.findall(r"^\|.*?\|", ARCHITECTURE, re.MULTILINE))))
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert documented == packages | {"main", "api"}


def test_no_function_is_long():
    assert [one for one in list_functions() if one[1] > LINES_AT_MOST] == []
    assert [count for name, count in list_functions() if name == "tl_keras/modes/finetune.py:run"][0] < 40


def test_no_source_file_cites_what_is_not_in_the_repository():
    others = {
        "MODEL_CARD.md",
        "applications.md",
        "RELEASE.md",
        "api_rest.md",
    }  # of a run; of Keras and TensorFlow Serving
    known = {path.name for path in ROOT.rglob("*.md")} | others
    for path in PACKAGE.rglob("*.py"):
        cited = set(re.findall(r"\b(\w+\.md)\b(?!\.j2)", path.read_text(encoding="utf-8")))
        assert cited <= known, path


@pytest.mark.parametrize("name", [field.name for _, field in list_fields()])
def test_every_flag_is_in_the_documentation(name):
    assert re.search(rf"--(?:\[no\]|no)?{name}\b", DOCS)


def test_every_error_of_the_reference_is_a_message_of_the_program():
    source = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message is written over several lines
    page = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(messages) >= 12
    for message in messages:
        parts = [part.strip() for part in re.split(r"…|--NAME", message) if part.strip()]
        assert parts, message
        assert [part for part in parts if part not in source] == [], message


def test_every_file_of_a_run_is_in_the_reference(trained):
    page = (ROOT / "docs" / "reference" / "files.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`([\w.]+)/?`", page))
    assert {path.name for path in trained[0].iterdir()} - documented == set()


def test_every_signature_is_in_the_reference(trained):
    import tensorflow as tf

    page = (ROOT / "docs" / "reference" / "signatures.md").read_text(encoding="utf-8")
    for name, signature in tf.saved_model.load(str(trained[1])).signatures.items():
        assert f"| `{name}` |" in page
        for output in signature.structured_outputs:
            assert f"`{output}`" in page
