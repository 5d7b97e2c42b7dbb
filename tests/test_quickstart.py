"""What the README's first command runs, and what it promises."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from tests.conftest import run_main

ROOT = Path(__file__).parent.parent


def run_step(root: Path, step: str, *extra: str) -> float:
    places = [f"--run_dir={root / step}", f"--store_dir={root / 'store'}"]
    assert run_main(f"--flagfile={ROOT / 'flags' / step}.flags", *places, *extra) == 0
    return json.loads((root / step / "metrics.json").read_text())["test"]["accuracy"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quickstart")
    assert run_step(root, "quickstart_pretrain") > 0.95
    return root


def test_the_three_steps_reach_what_their_flag_files_say(pretrained):
    weights = f"--weights={pretrained / 'quickstart_pretrain'}"
    assert 0.60 <= run_step(pretrained, "quickstart", weights, f"--export_dir={pretrained / 'models'}") <= 0.75
    assert 0.50 <= run_step(pretrained, "quickstart_scratch") <= 0.70
    assert (pretrained / "models" / "digits-SmallConvNet" / "1" / "saved_model.pb").is_file()


@pytest.mark.slow
def test_the_transfer_is_better_than_scratch(pretrained):
    weights = [f"--weights={pretrained / 'quickstart_pretrain'}", "--noexport"]
    transferred = [run_step(pretrained, "quickstart", *weights, f"--seed={seed}") for seed in range(5)]
    scratch = [run_step(pretrained, "quickstart_scratch", f"--seed={seed}") for seed in range(5)]
    assert statistics.mean(transferred) > statistics.mean(scratch) + 0.03


def test_the_scripts_run_what_the_readme_says():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "./quickstart" in readme
    assert ".venv/bin/pip install --editable '.[test]' && ./check" in readme
    script = (ROOT / "quickstart").read_text(encoding="utf-8")
    assert "quickstart_pretrain quickstart quickstart_scratch" in script
    assert "pip\" install --quiet --editable '.[test]'" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
