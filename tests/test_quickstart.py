"""What the README's first command runs, and what it promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import run_main

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def accuracies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    root = tmp_path_factory.mktemp("quickstart")
    pretrained = root / "quickstart_pretrain"
    results = {}
    for step in ("quickstart_pretrain", "quickstart", "quickstart_scratch"):
        extra = [f"--weights={pretrained}"] if step == "quickstart" else []
        places = [f"--run_dir={root / step}", f"--store_dir={root / 'store'}", f"--export_dir={root / 'models'}"]
        assert run_main(f"--flagfile={ROOT / 'flags' / step}.flags", *extra, *places) == 0
        results[step] = json.loads((root / step / "metrics.json").read_text())["test"]["accuracy"]
    return results


def test_the_first_digits_are_learnt(accuracies):
    assert accuracies["quickstart_pretrain"] > 0.95


def test_the_transfer_is_better_than_scratch(accuracies):
    assert 0.78 <= accuracies["quickstart"] <= 0.95
    assert accuracies["quickstart"] > accuracies["quickstart_scratch"] + 0.03


def test_the_scripts_run_what_the_readme_says():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "./quickstart" in readme
    assert ".venv/bin/pip install --editable '.[test]' && ./check" in readme
    script = (ROOT / "quickstart").read_text(encoding="utf-8")
    assert "quickstart_pretrain quickstart quickstart_scratch" in script
    assert "pip\" install --quiet --editable '.[test]'" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
