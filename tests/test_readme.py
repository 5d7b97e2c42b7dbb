"""What the README and the docs say can be done as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import run_main
from tl_keras.config import define_flags

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(r"^```bash\n(.+?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
]
COMMANDS = sorted({
    command.strip()
    for block in BLOCKS
    for command in re.findall(r"^(?:tl_keras|python -m tl_keras\.main) ([^|<#\n]+)", block, re.MULTILINE)
    if "--resume" not in command and not command.startswith("completion")
})


def test_the_readme_has_commands_to_run():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_understood(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert run_main(*shlex.split(command), *([] if "--help" in command else ["--dry_run"])) == 0
    assert capsys.readouterr().out.startswith(("--mode=", "ok", "tl_keras"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_that_is_named_exists(page):
    others = {
        "editable",
        "force",
        "help",
        "dry_run",
        "flagfile",
        "version",
        "name",
        "noname",
    }  # pip's, absl's, and placeholders
    tf_servings = {"allow_version_labels_for_unavailable_models", "mixed_precision", "model_config_file"}
    other_programs = {"gpus", "data", "tag"}  # docker's and curl's
    known = set(define_flags()) | others | tf_servings | other_programs
    named = set(re.findall(r"(?<![\w-])--([a-z_]+)", page.read_text(encoding="utf-8")))
    assert {flag for flag in named if flag not in known and flag.removeprefix("no") not in known} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_changelogs_top_entry_is_the_packages_version():
    from tl_keras import __version__

    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1) == __version__
