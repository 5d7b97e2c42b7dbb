"""The door: exit codes, one line for each mistake, and a screen without TensorFlow's chatter."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from tests.conftest import run_main
from tl_keras import __version__, api, config
from tl_keras import main as main_module
from tl_keras.errors import UserError
from tl_keras.jobs.result import Result

ROOT = Path(__file__).parent.parent


@pytest.fixture
def mode(monkeypatch):
    """Puts a function in the place of the doctor."""

    def place(run) -> None:
        module = types.ModuleType("tl_keras.modes.doctor")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return place


def fail_with(error: BaseException):
    def fail(*args, **kwargs):
        raise error

    return fail


def run_doctor() -> int:
    return run_main("--mode=doctor")


# exit codes


@pytest.mark.parametrize("status", [0, 1, 130])
def test_the_status_is_what_the_mode_came_to(mode, status, capfd):
    seen = []
    mode(lambda settings, screen: seen.append(settings) or Result(exit_status=status))
    assert run_doctor() == status
    assert seen == [config.Config("doctor")]
    assert capfd.readouterr() == ("", "")


def test_a_mistake_is_one_line_on_stderr_and_1(mode, capfd):
    mode(fail_with(UserError("the first line\n  and  a second.\tDo this.")))
    assert run_doctor() == 1
    assert capfd.readouterr() == ("", "tl_keras: error: the first line and a second. Do this.\n")


def test_an_interruption_is_130_and_no_traceback(mode, capfd):
    mode(fail_with(KeyboardInterrupt()))
    assert run_doctor() == 130
    assert capfd.readouterr() == ("", "tl_keras: interrupted; nothing was lost\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_that_tensorflow_turns_into_another_error_ends_the_run_in_one_line(mode, capfd, number):
    def trace(settings, screen):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise RuntimeError("in user code:") from None

    mode(trace)
    assert run_doctor() == 130
    assert capfd.readouterr() == ("", "tl_keras: interrupted; nothing was lost\n")
    mode(fail_with(RuntimeError()))  # the next command line of this process
    with pytest.raises(RuntimeError):
        run_doctor()


def test_a_user_error_after_a_handled_interruption_is_shown(mode, capfd):
    def end(settings, screen):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        raise UserError("the disk is full.")

    mode(end)
    assert run_doctor() == 1
    assert capfd.readouterr() == ("", "tl_keras: error: the disk is full.\n")


def test_a_fault_of_ours_is_not_dressed_up_as_the_users(mode):
    mode(fail_with(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        run_doctor()


def test_the_installed_command_ends_with_the_status(mode, monkeypatch):
    mode(lambda settings, screen: Result(exit_status=130))
    monkeypatch.setattr(sys, "argv", ["tl_keras", "--mode=doctor"])
    with pytest.raises(SystemExit) as ended:
        main_module.entry_point()
    assert ended.value.code == 130


# what needs no mode


def test_the_version_is_the_packages(capfd):
    assert run_main("--version") == 0
    assert capfd.readouterr() == (f"tl_keras {__version__}\n", "")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]], ids=str)
def test_the_overview_lists_the_modes_a_line_each(arguments, capfd):
    assert run_main(*arguments) == 0
    out, error = capfd.readouterr()
    for mode in config.MODES:
        assert len([line for line in out.splitlines() if line.startswith(f"  {mode} ")]) == 1
    assert error == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "--help"],
        ["--mode=predict", "--help"],
        ["--mode", "predict", "-h"],
        ["--help", "--mode=predict"],
        ["help", "predict"],
        ["--help=predict"],
        ["predict", "--epochs=no", "--help"],
    ],
    ids=str,
)
def test_help_shows_the_flags_of_the_mode(arguments, capfd):
    assert run_main(*arguments) == 0
    out, error = capfd.readouterr()
    assert out.startswith("tl_keras predict: classify images")
    assert "--images=PATHS" in out
    assert "--epochs" not in out
    assert error == ""


def test_help_for_a_mode_that_does_not_exist_names_the_nearest(capfd):
    assert run_main("predct", "--help") == 1
    error = capfd.readouterr().err
    assert error.startswith("tl_keras: error: 'predct' is not a mode. Did you mean: predict")
    assert error.endswith("Allowed: finetune, extract, evaluate, predict, export, serve, audit, doctor.\n")


def test_dry_run_prints_the_settings_and_starts_nothing(mode, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mode(fail_with(AssertionError("started")))
    assert run_main("--mode=doctor", "--store_dir=x y", "--dry_run") == 0
    assert run_main("--mode=finetune", "--dataset=digits", "--dry_run") == 0
    out, error = capfd.readouterr()
    assert out.splitlines()[:3] == ["--mode=doctor", "--store_dir=x y", "--mode=finetune"]
    assert error == ""
    assert list(tmp_path.iterdir()) == []


def test_what_dry_run_prints_is_a_flag_file(capfd, tmp_path):
    assert run_main("--mode=finetune", "--classes=a,b", "--noexport", "--dry_run") == 0
    (tmp_path / "x.flags").write_text(capfd.readouterr().out)
    assert run_main(f"--flagfile={tmp_path}/x.flags", "--dry_run") == 0
    assert capfd.readouterr().out == (tmp_path / "x.flags").read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--mode=doctor", "--dry_run=maybe"], "--dry_run=maybe is not true or false. `tl_keras doctor --help=all`"),
        (["finetune", "--epochs=ten"], "--epochs=ten is not a whole number. `tl_keras finetune --help=all` lists all"),
        (["finetune", "--dropout=x"], "--dropout=x is not a number. "),
        (["--mode"], "Missing value for flag --mode. `tl_keras MODE --help=all` lists all flags."),
        (["--mode=doctor", "--", "x"], "'x' is not a flag. Every setting is a flag: --name=value."),
        (["--dry_run"], "--mode is missing. Allowed: finetune, "),
        (["--mode=doctor", "--stor_dir=x"], "--stor_dir is not a flag. Did you mean --store_dir? "),
        (["--mode=finetune", "--no-report"], "--no-report is not a flag. Did you mean --noreport? "),
        (["finetune", "--learning-rate=1"], "--learning-rate is not a flag. Did you mean --learning_rate? "),
        (["--mode=finetune", "--no_export"], "--no_export is not a flag. Did you mean --noexport? "),
        (["--helpshort"], "--helpshort is not a flag. Did you mean --help? "),
        (["finetune", "--helpfull"], "--helpfull is not a flag. Did you mean --help=all? "),
        (["--finetune"], "--finetune is not a flag. Did you mean --mode=finetune? "),
        (["--dataset=digits", "finetune"], "'finetune' is not a flag. The mode is the first word, or --mode=finetune."),
        (["--mode=finetune", "extract"], "'extract' is not a flag. The mode is the first word, or --mode=extract."),
        (["train"], "'train' is not a mode. Did you mean: finetune? Allowed: finetune, "),
        (["finetune", "--lr=1"], "--lr is not a flag. Did you mean --learning_rate? "),
        (["finetune", "--model=VGG16"], "--model is not a flag. Did you mean --backbone? "),
        (["fintune"], "'fintune' is not a mode. Did you mean: finetune? Allowed: finetune, "),
        (["finetune", "--mode=extract"], "the mode is 'finetune' and --mode=extract, perhaps from a flag file."),
        (["completion", "csh"], "completion: 'csh' is not a known shell. Allowed: bash, zsh, fish."),
        (["completion"], "completion: no shell is named. Allowed: bash, zsh, fish."),
    ],
    ids=str,
)
def test_a_command_line_that_is_not_understood_is_told(arguments, text, capfd):
    assert run_main(*arguments) == 1
    out, error = capfd.readouterr()
    assert out == ""
    assert error.startswith(f"tl_keras: error: {text}")
    assert error.count("\n") == 1


def test_a_flag_file_that_is_not_utf8_is_told(capfd, tmp_path):
    (tmp_path / "x.flags").write_bytes(b"--mode=finetune\n--dataset=folder:caf\xe9\n")
    assert run_main(f"--flagfile={tmp_path}/x.flags", "--dry_run") == 1
    error = capfd.readouterr().err
    assert error.startswith("tl_keras: error: the flag file is not UTF-8: ")
    assert error.count("\n") == 1


def test_nothing_is_loaded_for_a_mistake_on_the_command_line():
    code = "import sys, tl_keras.main as m; m.main(['x', '--mode=finetune', '--epochs=0']); "
    code += "print([name for name in ('tensorflow', 'keras', 'numpy', 'sklearn') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == "[]\n"


def test_names_that_are_no_utf8_can_be_printed():
    command = [sys.executable, "-m", "tl_keras.main", "--mode=predict", "--classifier=x", b"--images=caf\xe9.jpg"]
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8:strict"}
    result = subprocess.run([*command, "--dry_run"], capture_output=True, cwd=ROOT, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert b"--images=caf\xe9.jpg\n" in result.stdout


# pipes that close

FLOOD = """
import sys, types
module = types.ModuleType("tl_keras.modes.doctor")
def run(settings, screen):
    for number in range(100_000):
        print("a line of some length", number)
module.run = run
sys.modules[module.__name__] = module
from tl_keras.main import entry_point
sys.argv = ["tl_keras", "--mode=doctor"]
entry_point()
"""


@pytest.mark.parametrize(
    "arguments",
    [["-c", FLOOD], ["-m", "tl_keras.main", "--help"], ["-m", "tl_keras.main", "--mode=finetune", "--dry_run"]],
    ids=["a mode", "help", "dry run"],
)
def test_whoever_reads_no_more_is_no_error(arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    process.stdout.close()
    error = process.stderr.read()
    assert (process.wait(timeout=60), error) == (0, "")


# TensorFlow's chatter

CHATTER = [
    "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
    "I0000 00:00:1769.123 1 port.cc:153] oneDNN custom operations are on.",
    "W0000 00:00:1769.123 1 gpu_device.cc:2342] Cannot dlopen some GPU libraries.",
    "I1231 23:59:59.123 1 cpu_feature_guard.cc:227] This TensorFlow binary is optimized",
    "To enable the following instructions: AVX2 FMA, in other operations, rebuild TensorFlow",
    "E0000 00:00:1769.123 1 cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA error: 303",
    "2026-01-01 00:00:00.1: E external/cuda_driver.cc:152] failed call to cuInit: UNKNOWN ERROR (303)",
    "",
    "   ",
]
MESSAGES = [
    "E0000 00:00:1769.123 1 gpu.cc:1] Out of memory",
    "F0000 00:00:1769.123 1 check.cc:1] Check failed",
    "Traceback (most recent call last):",
    "Illegal instruction",
    "I am a line of yours",
    "WARNING: disk almost full",
    "libcudnn.so.9: cannot open shared object file: 红",
    "  W0000 indented",
]


@pytest.fixture
def loading(monkeypatch):
    """Puts a function in the place of loading the mode, which writes to stderr as C++ does."""

    def place(load) -> None:
        monkeypatch.setattr(api.importlib, "import_module", load)

    yield place
    monkeypatch.undo()


def write_error(*lines: str) -> None:
    os.write(2, "".join(f"{line}\n" for line in lines).encode())


def test_chatter_is_dropped_and_all_else_is_shown_in_order(loading, capfd):
    mixed = [line for pair in zip(CHATTER, MESSAGES, strict=False) for line in pair]

    def load(name):
        write_error(*mixed)
        return types.SimpleNamespace(run=lambda settings, screen: Result())

    loading(load)
    assert run_doctor() == 0
    assert capfd.readouterr() == ("", "".join(f"{line}\n" for line in MESSAGES))


def test_what_the_mode_itself_writes_is_shown_as_it_is(loading, capfd):
    def run(settings, screen):
        write_error(*CHATTER)
        sys.stdout.write("to the screen\n")
        return Result()

    loading(lambda name: types.SimpleNamespace(run=run))
    assert run_doctor() == 0
    assert capfd.readouterr() == ("to the screen\n", "".join(f"{line}\n" for line in CHATTER))


def test_bytes_that_are_no_text_are_shown_all_the_same(loading, capfd):
    def load(name):
        os.write(2, b"odd \xff bytes\nno line end")
        return types.SimpleNamespace(run=lambda settings, screen: Result())

    loading(load)
    assert run_doctor() == 0
    assert capfd.readouterr().err == "odd \ufffd bytes\nno line end\n"


@pytest.mark.parametrize(
    ("error", "status"), [(UserError("x"), 1), (KeyboardInterrupt(), 130), (ImportError("x"), 1), (OSError(), None)]
)
def test_stderr_is_given_back_however_loading_ends(loading, capfd, error, status):
    def load(name):
        write_error("Illegal instruction")
        raise error

    loading(load)
    if status is None:
        with pytest.raises(OSError):  # noqa: PT011 (an error of ours has no text)
            run_doctor()
    else:
        assert run_doctor() == status
    write_error("afterwards")
    lines = capfd.readouterr().err.splitlines()
    assert (lines[0], lines[-1]) == ("Illegal instruction", "afterwards")


def test_no_file_stays_open(loading):
    loading(lambda name: types.SimpleNamespace(run=lambda settings, screen: Result()))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        run_doctor()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_tensorflow_that_cannot_be_imported_is_one_line(loading, capfd):
    loading(fail_with(ImportError("libstdc++.so.6: version `GLIBCXX_3.4.30' not found\n(required by x)")))
    assert run_doctor() == 1
    assert capfd.readouterr() == (
        "",
        "tl_keras: error: TensorFlow can't be imported: libstdc++.so.6: version `GLIBCXX_3.4.30' not found (required "
        "by x). Try: pip install --force-reinstall tensorflow keras.\n",
    )


def test_a_tensorflow_that_is_not_there_is_one_line():
    code = "import sys; sys.modules['tensorflow'] = None; from tl_keras.main import main; "
    code += "sys.exit(main(['x', '--mode=doctor']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("tl_keras: error: TensorFlow can't be imported: ")
    assert result.stderr.count("\n") == 1


def test_devices_are_looked_for_while_tensorflows_words_about_them_are_caught(loading, monkeypatch, capfd):
    def list_logical_devices():
        write_error(CHATTER[5], "E0000 00:00:1.1 1 gpu.cc:1] the driver is too old")

    tensorflow = types.SimpleNamespace(config=types.SimpleNamespace(list_logical_devices=list_logical_devices))
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    loading(lambda name: types.SimpleNamespace(run=lambda settings, screen: Result()))
    assert run_doctor() == 0
    assert capfd.readouterr().err == "E0000 00:00:1.1 1 gpu.cc:1] the driver is too old\n"


@pytest.mark.parametrize(("before", "after"), [(None, "2"), ("0", "0")])
def test_a_log_level_that_the_user_set_is_kept(loading, monkeypatch, before, after):
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    if before:
        monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", before)
    seen = []
    loading(
        lambda name: types.SimpleNamespace(run=lambda settings, screen: seen.append(os.environ["TF_CPP_MIN_LOG_LEVEL"]))
    )
    with pytest.raises(AttributeError):  # append gives no Result
        run_doctor()
    assert seen == [after]


@pytest.mark.parametrize("name", config.MODES)
def test_every_mode_has_its_module(name):
    assert callable(importlib.import_module(f"tl_keras.modes.{name}").run)


def test_a_full_disk_behind_standard_output_is_one_line():
    command = [sys.executable, "-m", "tl_keras.main", "--help"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert result.returncode == 1
    assert result.stderr == "tl_keras: error: the disk is full. What is complete is kept: free space, run again.\n"


_SWALLOWS = """
import signal, sys, time
from tl_keras import main

class Closes:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def swallow_in_destructor():
    closes = Closes()
    del closes

def swallow_in_c():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as error:
        sys.excepthook(SystemError, SystemError("returned a result with an exception set"), error.__traceback__)

def run(argv, *, owns_process):
    swallow_in_{place}()
    time.sleep(90)
    return 0

main._run = run
main.entry_point()
"""


@pytest.mark.parametrize("place", ["destructor", "c"])
def test_an_interrupt_that_is_swallowed_is_not_lost(place):
    """`PyErr_Print` of C++ code calls `sys.excepthook`; one of 72 kills came there."""
    start, code = time.monotonic(), _SWALLOWS.replace("{place}", place)
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 130, process.stderr
    assert process.stderr == "tl_keras: interrupted before anything was done\n"
    assert "Exception ignored" not in process.stderr
    assert time.monotonic() - start < 60
