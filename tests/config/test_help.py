"""The help of a mode: its flags only, wrapped, with its own defaults; and the files generated from the settings."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import run_main
from tl_keras.backbones.reference import BACKBONES_FILE, backbones_page
from tl_keras.config.completion import completion
from tl_keras.config.help import EXAMPLES, mode_help, overview, show_flag
from tl_keras.config.reference import FLAGS_FILE, KEYWORDS_FILE, flags_page, keywords_module
from tl_keras.config.settings import MODES, find_default, list_fields

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(params=[100, 72])
def width(request, monkeypatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_help_of_a_mode_has_its_flags_only_and_fits_the_terminal(mode, everything, width):
    lines = mode_help(mode, everything=everything).splitlines()
    assert max(map(len, [line for line in lines if EXAMPLES[mode] not in line])) <= width
    shown = {match[1] for line in lines if (match := re.match(r"  --(?:\[no\])?(\w+)", line))}
    own = {field.name for _, field in list_fields(mode)}
    basic = {field.name for _, field in list_fields(mode) if mode in field.metadata["basic"]}
    assert shown - {"flagfile", "dry_run", "quiet", "version"} == (own if everything else basic)
    assert f"  {EXAMPLES[mode]}" in lines[:5]


def test_the_help_of_predict_is_short():
    assert len(mode_help("predict").splitlines()) < 25


@pytest.mark.parametrize("mode", MODES)
def test_the_first_help_shows_a_dozen_flags_at_most(mode):
    assert sum(mode in field.metadata["basic"] for _, field in list_fields(mode)) <= 13


def test_defaults_are_those_of_the_mode():
    for mode in MODES:
        text = " ".join(mode_help(mode, everything=True).split())
        for _, field in list_fields(mode):
            default = find_default(field, mode)
            if default not in {None, "", ()} and not isinstance(default, (bool, tuple)) and default != 64 << 20:
                shown = f"{default:,}" if isinstance(default, int) and default >= 1_000_000 else default
                assert f"(default: {shown})" in text[text.index(show_flag(field)) :]
    assert "(default: VGG16)" in " ".join(mode_help("extract").split())
    assert "(default: ResNet50)" in " ".join(mode_help("finetune").split())
    assert "(default: 64 MiB)" in " ".join(mode_help("serve", everything=True).split())


def test_no_help_text_repeats_its_default():
    for _, field in list_fields():
        assert "default" not in field.metadata["help"].replace("by default only", "")


@pytest.mark.parametrize("mode", MODES)
def test_the_example_is_a_command_that_is_understood(mode, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_main(*EXAMPLES[mode].split()[1:], "--dry_run") == 0
    assert capfd.readouterr().out.startswith(f"--mode={mode}\n")


def test_the_overview_is_short_and_names_the_way_on():
    lines = overview().splitlines()
    assert len(lines) < 20
    assert max(map(len, lines)) <= 100
    assert "`tl_keras MODE --help`" in overview()


def test_the_installed_module_is_the_command():
    command = [sys.executable, "-m", "tl_keras"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == (overview() + "\n", "")


def test_generated_files_are_up_to_date():
    advice = "run python -m tl_keras.config.reference"
    assert KEYWORDS_FILE.read_text(encoding="utf-8") == keywords_module(), advice
    assert FLAGS_FILE.read_text(encoding="utf-8") == flags_page(), advice


def test_the_page_of_backbones_is_that_of_the_zoo():
    advice = "run python -m tl_keras.backbones.reference"
    assert BACKBONES_FILE.read_text(encoding="utf-8") == backbones_page(), advice


def test_help_that_does_not_exist_is_named_as_such(capsys):
    assert run_main("finetune", "--help=foo") == 1
    assert capsys.readouterr().err == "tl_keras: error: --help=foo is not known. Allowed: --help, --help=all.\n"
    assert run_main("finetune", "--help=finetune") == 0
    for help_flag in ("--help", "-h"):
        assert run_main("completion", help_flag) == 0
        assert "tl_keras completion bash|zsh|fish: print" in capsys.readouterr().out


# completion


def complete(line: str) -> list[str]:
    """What bash offers at the end of a line."""
    script = (
        completion("bash")
        + f"""
COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=({line})
compopt() {{ :; }}
_tl_keras; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    )
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert found.stderr == ""
    return found.stdout.split()


def test_bash_completes_modes_flags_and_choices():
    assert complete("tl_keras fi") == ["finetune"]
    assert complete("tl_keras finetune --bat") == ["--batch_size="]
    assert complete("tl_keras predict --bat") == []
    assert complete("tl_keras --mode=finetune --opt") == ["--optimizer="]
    assert complete("tl_keras finetune --optimizer=ada") == ["adam", "adamw"]
    assert complete("tl_keras finetune --norep") == ["--noreport"]
    assert complete("tl_keras completion ") == ["bash", "zsh", "fish"]
    assert complete("tl_keras finetune --epochs=") == []
    assert f"{ROOT}/tests" in complete(f"tl_keras finetune --run_dir={ROOT}/te")
    assert f"{ROOT}/tests" in complete(f"tl_keras finetune --flagfile={ROOT}/te")
    assert set(complete("tl_keras export --")) >= {"--classifier=", "--deploy=", "--help", "--quiet"}


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish on this machine")
def test_fish_completes_modes_flags_and_choices():
    def ask(line: str) -> list[str]:
        script = f"{completion('fish')}\ncomplete -C {line!r}"
        found = subprocess.run(["fish", "--no-config", "-c", script], capture_output=True, text=True, check=True)
        assert found.stderr == ""
        return [offer.partition("\t")[0] for offer in found.stdout.splitlines()]

    assert ask("tl_keras fi") == ["finetune"]
    assert ask("tl_keras finetune --bat") == ["--batch_size"]
    assert ask("tl_keras predict --bat") == []
    assert ask("tl_keras --mode=finetune --opt") == ["--optimizer"]
    assert ask("tl_keras finetune --optimizer=ada") == ["--optimizer=adam", "--optimizer=adamw"]
    assert ask("tl_keras finetune --norep") == ["--noreport"]
    assert sorted(ask("tl_keras completion ")) == ["bash", "fish", "zsh"]
    assert ask(f"tl_keras finetune --epochs={ROOT}/te") == []
    assert ask(f"tl_keras finetune --run_dir={ROOT}/te") == [f"--run_dir={ROOT}/tests/"]
    assert ask("tl_keras finetune --he") == ["--help"]
    assert ask("tl_keras finetune --flagf") == ["--flagfile"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh on this machine")
def test_zsh_completes_modes_flags_and_choices(tmp_path):
    def ask(line: str, offer: str) -> None:
        type_into_zsh(tmp_path, f"source {script}", f"{line}\t\t", offer)

    script = tmp_path / "tl_keras.zsh"
    script.write_text(completion("zsh"), encoding="utf-8")
    ask("tl_keras fi", "tl_keras finetune ")
    ask("tl_keras finetune --batch_s", "--batch_size=")
    ask("tl_keras --mode=finetune --optimizer=ada", "adamw")
    ask("tl_keras finetune --norepo", "--noreport ")
    ask("tl_keras completion z", "tl_keras completion zsh ")
    ask(f"tl_keras finetune --run_dir={ROOT}/tes", "/tests/")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh on this machine")
def test_zsh_loads_the_script_from_its_folder_of_completions(tmp_path):
    (tmp_path / "_tl_keras").write_text(completion("zsh"), encoding="utf-8")
    start = f"fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -D -u"
    type_into_zsh(tmp_path, start, "tl_keras fi\t", "tl_keras finetune ")


def type_into_zsh(home: Path, start: str, keys: str, offer: str) -> None:
    """Runs a command in a new zsh, types some keys, and waits until it shows the offer."""
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe("zsh", ["zsh", "-f", "-i"], {**os.environ, "TERM": "dumb", "ZDOTDIR": str(home)})
    try:
        os.write(terminal, f"{start} && echo rea''dy\n".encode())
        wait_for(terminal, "ready")
        os.write(terminal, keys.encode())
        wait_for(terminal, offer)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(terminal)


def wait_for(terminal: int, text: str) -> None:
    """Reads a terminal until it shows a text."""
    shown, end = "", time.monotonic() + 120
    while text not in shown:
        assert time.monotonic() < end, shown
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 65536).decode(errors="replace")


def test_bash_offers_each_mode_its_flags_and_no_others():
    for mode in MODES:
        offered = set(complete(f"tl_keras {mode} --"))
        for _, field in list_fields():
            flag = f"--no{field.name}" if field.default is True else f"--{field.name}"
            flag += "" if isinstance(field.default, bool) else "="
            assert (flag in offered) == (mode in field.metadata["modes"]), (mode, flag)


@pytest.mark.parametrize(
    ("shell", "pattern"), [("zsh", r"'--(?:no)?{}(?:=)?\["), ("fish", r" -l (?:no)?{}(?: -|\n)")], ids=["zsh", "fish"]
)
def test_zsh_and_fish_know_each_flag(shell, pattern, capfd):
    assert run_main("completion", shell) == 0
    script = capfd.readouterr().out
    for mode in MODES:
        assert mode in script
    for _, field in list_fields():
        assert re.search(pattern.format(field.name), script), field.name
