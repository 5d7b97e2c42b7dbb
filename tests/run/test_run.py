"""The run folder, and what the user sees: never half a file, never a stray one."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import math
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tl_keras import run
from tl_keras.errors import LostRunError, UserError
from tl_keras.jobs.result import Result
from tl_keras.run import (
    History,
    Interrupts,
    RunFolder,
    Screen,
    Stopwatch,
    check_run_dir,
    csv_bytes,
    disk_errors,
    end_run,
    map_ahead,
    name_run,
    read_json,
    write_atomically,
)
from tl_keras.run import folder as folder_module


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def fail_with(number: int):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


def create(path: Path, *, overwrite: bool = False, **config) -> RunFolder:
    return RunFolder.create(str(path), overwrite=overwrite, config=config, flags="--mode=finetune\n")


# files


def test_a_file_is_written_whole_in_a_folder_that_is_made(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomically(path, b"\0first")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    seen = []
    replace = os.replace

    def look_and_replace(source, target):
        seen.append((path.read_bytes(), Path(source).read_bytes(), Path(source).parent))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look_and_replace)
    write_atomically(path, b"new")
    assert seen == [(b"old", b"new", tmp_path)]
    assert path.read_bytes() == b"new"


def test_a_disk_that_is_full_half_way_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    path.write_bytes(b"old")

    monkeypatch.setattr(os, "fsync", fail_with(errno.ENOSPC))  # where a file system allocates late
    assert error_of(write_atomically, path, b"much longer") == (
        f"the disk is full: {path} could not be written. Free some space and run again."
    )
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=repr)
def test_whatever_stops_the_renaming_leaves_no_temporary_file(tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((UserError, KeyboardInterrupt)):
        write_atomically(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_is_needed_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "metrics.json"
    text = error_of(write_atomically, path, b"")
    assert text.startswith(f"{path} can't be written: ")
    assert text.endswith(". Choose another place.")


def test_a_pipe_that_closed_is_no_mistake_and_other_errors_are_no_disks():
    for error in (BrokenPipeError(), ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)), disk_errors("the file"):
            raise error


def test_an_error_without_a_reason_is_told_by_its_text():
    for error, reason in ((OSError(None, "it is too large"), "it is too large"), (OSError("odd"), "odd")):
        with pytest.raises(UserError) as told, disk_errors("the model"):
            raise error
        assert str(told.value) == f"the model can't be written: {reason}. Choose another place."


# CSV and JSON

AWKWARD = ["plain", "a,b", 'say "no"', "two\nlines", "cr\rhere", " spaces ", "红 色", "caf\udce9", "'", ";", "", "\\"]


def test_csv_keeps_every_character_of_every_cell():
    content = csv_bytes(("id", "n"), [(cell, number) for number, cell in enumerate(AWKWARD)])
    text = io.StringIO(content.decode("utf-8", "surrogateescape"), newline="")
    rows = list(csv.reader(text, strict=True))
    assert rows[0] == ["id", "n"]
    assert rows[1:] == [[cell, str(number)] for number, cell in enumerate(AWKWARD)]


def test_csv_lines_end_as_on_unix_and_only_what_must_be_is_quoted():
    assert csv_bytes(("id", "x"), [("a b", 0.5), ("c,d", None)]) == b'id,x\na b,0.5\n"c,d",\n'
    assert csv_bytes(("id",), []) == b"id\n"


def test_json_is_read_as_it_was_written_in_the_order_given(tmp_path):
    content = {"z": [1, 2.5, None], "a": {"名": "红 色", "caf\udce9": True}}
    RunFolder(tmp_path).write_json("x.json", content)
    text = (tmp_path / "x.json").read_bytes().decode("utf-8", "surrogateescape")
    assert json.loads(text) == content
    assert list(json.loads(text)) == ["z", "a"]
    assert "红 色" in text
    assert text.endswith("}\n")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_never_holds_what_is_no_json(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunFolder(tmp_path).write_json("x.json", {"nll": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1} x', b"\xff\xfe\x00", b'{"a": }'])
def test_damaged_json_is_named(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    text = error_of(read_json, path)
    assert text.startswith(f"{path} is damaged: ")
    assert text.endswith("Create it again, or restore a copy.")


def test_json_that_is_not_there_is_named(tmp_path):
    assert error_of(read_json, tmp_path / "x.json") == (
        f"{tmp_path}/x.json can't be read: No such file or directory. Check the path."
    )
    assert "Is a directory" in error_of(read_json, tmp_path)


# the run folder


def test_a_run_folder_says_at_once_what_runs_it_again(tmp_path):
    folder = create(tmp_path / "runs" / "红 1", seed=3)
    assert folder.path == tmp_path / "runs" / "红 1"
    assert read_json(folder.path / "config.json") == {"seed": 3}
    assert (folder.path / "run.flags").read_text() == "--mode=finetune\n"


def test_an_empty_folder_is_taken_and_that_of_a_complete_run_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    folder = create(tmp_path / "empty")
    folder.write_json("metrics.json", {})
    end_run(folder.path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert error_of(create, tmp_path / "empty", seed=9) == (
        f"the run folder {tmp_path}/empty already exists. Give another --run_dir, or --overwrite to replace an earlier "
        "run."
    )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def settings(**run) -> dict[str, object]:
    return {"mode": "finetune", "run": {"seed": 0, "resume": False, "overwrite": False, "run_dir": "a", **run}}


def test_a_run_that_has_not_ended_goes_on_under_the_same_settings(tmp_path):
    first = create(tmp_path / "run", **settings())
    (tmp_path / "run" / ".history.csv.1.tmp").write_text("half")
    second = create(tmp_path / "run", **settings(resume=True, overwrite=False, run_dir="./a"))
    assert (first.resumed, second.resumed, second.run_id) == (False, True, first.run_id)
    assert not list(tmp_path.rglob("*.tmp"))
    (tmp_path / "run" / "history.csv").write_text("stage,epoch")
    assert error_of(create, tmp_path / "run", **settings(seed=3)) == (
        f"the run folder {tmp_path}/run already exists. It contains an unfinished run with other settings (--seed: 0 "
        "there, 3 here). Repeat its command to continue it, replace it with --overwrite, or give another --run_dir."
    )


def test_a_run_that_computed_nothing_gives_way_to_other_settings(tmp_path):
    """The advice of its error was followed: another --max_broken_fraction, the same --run_dir."""
    earlier = create(tmp_path / "run", **settings())
    earlier.write_broken([("a.jpg", "empty file")])
    now = create(tmp_path / "run", **settings(seed=3))
    assert (now.resumed, now.run_id == earlier.run_id) == (False, False)
    assert read_json(now.path / "config.json")["run"]["seed"] == 3
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["config.json", "run.flags", "unfinished.json"]


def test_only_the_files_of_a_start_are_deleted_and_only_behind_its_marker(tmp_path):
    earlier = create(tmp_path / "runs" / "real", **settings())
    (tmp_path / "link").symlink_to(earlier.path)
    assert create(tmp_path / "link", **settings(seed=3)).resumed is False
    assert (tmp_path / "link").is_symlink()
    (earlier.path / "unfinished.json").unlink()  # someone kept the settings of a run alone
    assert "already exists" in error_of(create, earlier.path, **settings(seed=4))
    assert read_json(earlier.path / "config.json")["run"]["seed"] == 3


def test_a_run_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "run").write_text("x")
    assert error_of(create, tmp_path / "run") == (
        f"the run folder {tmp_path}/run can't be written: it is a file. Give the path of a folder."
    )


def test_a_run_that_is_alive_is_left_to_the_check_of_its_process(tmp_path, monkeypatch):
    create(tmp_path / "run", **settings())
    monkeypatch.setattr(folder_module, "is_running_here", lambda process: True)
    check_run_dir(str(tmp_path / "run"), overwrite=False, config=settings(seed=3))  # says nothing of other settings


def test_an_interrupt_behind_an_error_of_the_system_is_left_to_the_outer_block():
    def fail(error):
        with Interrupts.restored():
            Interrupts.arrived = True
            raise error

    def fail_in_an_outer_block(inner, then):
        with Interrupts.restored():
            with contextlib.suppress(OSError, KeyboardInterrupt):
                fail(inner)
            with Interrupts.restored():
                pass
            raise then

    with pytest.raises(KeyboardInterrupt):
        fail_in_an_outer_block(OSError("read"), RuntimeError("while tracing"))
    assert not Interrupts.arrived
    with pytest.raises(RuntimeError, match="of its own"):  # the interrupt itself was handled
        fail_in_an_outer_block(RuntimeError("while tracing"), RuntimeError("of its own"))


def test_a_run_that_was_killed_while_its_folder_was_made_goes_on(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "unfinished.json").write_text("")
    folder = create(tmp_path / "run", seed=4)
    assert read_json(folder.path / "config.json") == {"seed": 4}
    assert (folder.path / "run.flags").is_file()


def test_a_run_that_is_still_going_on_is_left_alone(tmp_path):
    folder = create(tmp_path / "run", seed=1)
    marker = read_json(folder.path / "unfinished.json")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        marker["process"] |= {"id": other.pid, "started": run.owner.start_time(other.pid)}
        folder.write_json("unfinished.json", marker)
        for overwrite in (False, True):
            assert error_of(create, folder.path, overwrite=overwrite, seed=1) == (
                f"the run in {folder.path} is still running in process {other.pid}. Wait until it ends, or give "
                "another --run_dir."
            )
        other.communicate()
    assert create(folder.path, seed=1).resumed
    folder.write_json("unfinished.json", marker | {"process": {**marker["process"], "id": os.getppid()}})
    assert create(folder.path, seed=1).resumed  # a later process with the number of an earlier one


@pytest.fixture
def elsewhere(tmp_path):
    """An unfinished run that a process on another machine has started."""
    folder = create(tmp_path / "run", seed=1)
    marker = read_json(folder.path / "unfinished.json")
    run.stop_heartbeats()
    assert read_json(folder.path / "unfinished.json") == {**marker, "process": None}  # who comes next need not wait
    marker["process"] |= {"host": "elsewhere", "machine": "another"}
    folder.write_json("unfinished.json", marker)
    return folder.path


def test_a_run_that_another_machine_works_on_is_left_alone(elsewhere):
    ended = threading.Event()

    def touch_like_the_other():
        while not ended.wait(0.05):
            os.utime(elsewhere / "unfinished.json")

    other = threading.Thread(target=touch_like_the_other)
    other.start()
    try:
        assert error_of(create, elsewhere, seed=1) == (
            f"the run in {elsewhere} is still running in a process on elsewhere. Wait until it ends, or give another "
            "--run_dir."
        )
    finally:
        ended.set()
        other.join(60)


def test_a_run_that_another_machine_left_goes_on(elsewhere, monkeypatch):
    marker, said = elsewhere / "unfinished.json", []
    monkeypatch.setattr(run.process, "_TIMEOUT_SECONDS", 1)
    assert run.process.find_process(marker, read_json(marker)["process"], said.append) == ""
    assert said == ["checking for up to 1 s whether the run is still running on elsewhere"]
    monkeypatch.setattr(run.process, "_TIMEOUT_SECONDS", 60)
    os.utime(marker, (0, 0))  # no need to wait
    assert create(elsewhere, seed=1).resumed


def test_a_process_that_was_suspended_while_another_continued_its_run_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(run.process, "_HEARTBEAT_SECONDS", 0.01)
    folder = create(tmp_path / "run", seed=1)
    marker = folder.path / "unfinished.json"
    thread = [one for one in threading.enumerate() if one.name == "heartbeat"][-1]
    content = read_json(marker)
    folder.write_json("metrics.json", {})
    other = {"process": content["process"] | {"id": 7, "host": "elsewhere", "machine": "another"}}
    folder.write_json("unfinished.json", content | other)
    text = (
        f"process 7 on elsewhere has continued the run in {folder.path}, so this process stops. If that one does not "
        "complete it, run the same command again."
    )
    for write in (
        lambda: folder.write_json("metrics.json", {"accuracy": 1}),
        lambda: folder.write_csv("history.csv", ["a"], [[1]]),
        lambda: run.write_atomically(folder.path / "probabilities.npy", b""),
        lambda: run.replace_folder(tmp_path / "new", folder.path / "classifier"),
        lambda: run.end_run(folder.path),
    ):
        with pytest.raises(LostRunError) as error:
            write()
        assert str(error.value) == text
    thread.join(60)
    assert not thread.is_alive()
    run.stop_heartbeats()
    assert read_json(folder.path / "metrics.json") == {}
    assert read_json(marker) == content | other


def test_of_two_processes_that_continue_a_run_at_the_same_moment_one_stops(tmp_path, monkeypatch):
    folder = create(tmp_path / "run", seed=1)
    run.stop_heartbeats()
    mark = run.RunFolder._mark_unfinished

    def mark_as_both(self, replaces):
        mark(self, replaces)
        content = read_json(folder.path / "unfinished.json")
        content["process"] |= {"id": 7, "host": "elsewhere", "machine": "another"}
        self.write_json("unfinished.json", content)

    monkeypatch.setattr(run.RunFolder, "_mark_unfinished", mark_as_both)
    with pytest.raises(LostRunError, match="process 7 on elsewhere has continued the run"):
        create(folder.path, seed=1)
    run.stop_heartbeats()


@pytest.mark.parametrize("left", ["complete", "interrupted"])
def test_a_run_that_another_process_has_ended_meanwhile_is_not_written_to(tmp_path, left):
    folder = create(tmp_path / "run", seed=1)
    marker = folder.path / "unfinished.json"
    if left == "complete":
        marker.unlink()
    else:
        marker.write_text(json.dumps(read_json(marker) | {"process": None}))
    with pytest.raises(LostRunError, match="another process has continued the run"):
        folder.write_json("metrics.json", {})
    run.check_owner(tmp_path / "other")  # not in the run
    run.stop_heartbeats()


def test_a_machine_may_change_its_name_during_a_run(tmp_path, monkeypatch):
    folder = create(tmp_path / "run", seed=1)
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    folder.write_json("metrics.json", {})
    run.end_run(folder.path)


def test_a_heartbeat_ends_with_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run.process, "_HEARTBEAT_SECONDS", 0.01)
    marker = create(tmp_path / "run", seed=1).path / "unfinished.json"
    thread = [one for one in threading.enumerate() if one.name == "heartbeat"][-1]
    os.utime(marker, (0, 0))
    while marker.stat().st_mtime == 0:
        thread.join(0.01)
        assert thread.is_alive()
    run.stop_heartbeats()
    thread.join(60)
    assert not thread.is_alive()


def test_what_is_no_file_is_written_to_and_never_replaced(tmp_path):
    pipe, seen = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: seen.append(pipe.read_bytes()))
    reader.start()
    run.write_atomically(pipe, b"content")
    reader.join(60)
    assert (seen, stat.S_ISFIFO(pipe.stat().st_mode)) == ([b"content"], True)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "target").write_bytes(b"before")
    run.write_atomically(tmp_path / "link", b"after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"after"
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "link", "target"}


def test_an_earlier_run_is_kept_until_the_one_that_replaces_it_has_ended(tmp_path):
    folder = create(tmp_path / "run", seed=1)
    folder.write_text("classifier/old.txt", "old")
    folder.write_json("metrics.json", {})
    end_run(folder.path)
    for seed in (2, 3):  # the first of these fails, and is replaced in turn
        create(tmp_path / "run", overwrite=True, seed=seed)
        assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "run.flags", "unfinished.json"}
        assert (tmp_path / "run.replaced" / "classifier" / "old.txt").read_text() == "old"
    assert read_json(tmp_path / "run" / "config.json") == {"seed": 3}
    assert create(tmp_path / "run", seed=3).resumed
    end_run(tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "run.flags"}


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def note_sync(descriptor):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_replace(source, target):
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_atomically(tmp_path / "a.json", b"{}")
    assert calls == [f".a.json.{os.getpid()}.tmp", "replace", tmp_path.name]


def test_overwrite_never_replaces_what_is_no_run(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    assert error_of(create, tmp_path / "home", overwrite=True) == (
        f"the folder {tmp_path}/home already exists, and no run has written it. Give a new folder as --run_dir."
    )
    assert (tmp_path / "home" / "thesis.txt").read_text() == "precious"


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert error_of(create, tmp_path / "file").startswith(f"the run folder {tmp_path}/file can't be written: ")
    monkeypatch.setattr(Path, "mkdir", fail_with(errno.EROFS))
    assert error_of(create, tmp_path / "x") == (
        f"the run folder {tmp_path}/x can't be written: Read-only file system. Choose another place."
    )


def test_history_is_on_disk_after_each_row(tmp_path):
    history = History(RunFolder(tmp_path), ("stage", "epoch"))
    for number in (1, 2, 3):
        history.keep(("head", number))
        lines = (tmp_path / "history.csv").read_text().splitlines()
        assert lines == ["stage,epoch", *(f"head,{earlier}" for earlier in range(1, number + 1))]
    assert [path.name for path in tmp_path.iterdir()] == ["history.csv"]


def test_a_run_is_named_by_what_it_does_and_never_as_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20240229-235959")
    names = []
    for _ in range(3):
        names.append(name_run("finetune", "my_照片", "ResNet50"))
        os.makedirs(names[-1])
    stem = "runs/finetune-my_照片-ResNet50-20240229-235959"
    assert names == [stem, f"{stem}-2", f"{stem}-3"]


def test_the_time_is_part_of_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    year = time.strftime("%Y")
    assert name_run("evaluate", "digits", "1").startswith(f"runs/evaluate-digits-1-{year}")


def test_a_mode_comes_to_nothing_bad_unless_it_says_so():
    assert (Result().exit_status, Result().metrics, Result().run_dir) == (0, {}, None)
    assert run.INTERRUPTED == 130


# the screen


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def shown(text: str) -> list[str]:
    """What a terminal's lines hold after the carriage returns."""
    lines = []
    for line in text.split("\n"):
        row: list[str] = []
        for part in line.split("\r"):
            row[: len(part)] = part
        lines.append("".join(row).rstrip())
    return lines


def test_on_a_terminal_progress_is_rewritten_in_place_and_wiped_by_a_line(clock):
    stream = Terminal()
    screen = Screen(stream)
    screen.progress("trunk: 10/20 images, a long text")
    clock[0] += 1
    screen.progress("trunk: 20/20")
    assert shown(stream.getvalue()) == ["trunk: 20/20"]
    screen.line("done")
    screen.line("more")
    assert shown(stream.getvalue()) == ["done", "more", ""]


def test_on_a_terminal_progress_costs_at_most_ten_writes_a_second(clock):
    stream = Terminal()
    screen = Screen(stream)
    for number in range(1000):
        screen.progress(f"{number:03d}")
        clock[0] += 0.001
    assert 9 <= stream.getvalue().count("\r") / 2 <= 11


def test_in_a_pipe_progress_is_a_line_every_ten_seconds_and_holds_no_carriage_return(clock):
    stream = io.StringIO()
    screen = Screen(stream)
    for second in range(36):
        screen.progress(f"second {second}")
        clock[0] += 1
    screen.line("done")
    assert stream.getvalue() == "second 11\nsecond 22\nsecond 33\ndone\n"


def test_what_is_soon_done_shows_no_progress_in_a_pipe(clock):
    stream = io.StringIO()
    screen = Screen(stream)
    for _ in range(9):
        screen.progress("working")
        clock[0] += 1
    assert stream.getvalue() == ""


def test_the_screen_is_standard_output_unless_told_otherwise(capsys):
    Screen().line("红 色 · 1")
    assert capsys.readouterr().out == "红 色 · 1\n"


def test_every_line_is_out_before_the_next_step_begins():
    class Stream(io.StringIO):
        flushed = 0

        def flush(self) -> None:
            self.flushed += 1

    stream = Stream()
    Screen(stream).line("a")
    assert stream.flushed == 1


# the stopwatch


def test_a_stopwatch_adds_up_stages_even_those_that_fail(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch()
    for seconds in (1.25, 2.0):
        with watch.stage("trunk"):
            now[0] += seconds

    def fail():
        with watch.stage("head"):
            now[0] += 0.5004
            raise UserError("x")

    assert error_of(fail) == "x"
    now[0] += 100
    assert watch.seconds == {"trunk": 3.25, "head": 0.5}


def test_a_folder_with_another_programs_config_is_never_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="already exists"):
        RunFolder.create(str(tmp_path / "model"), overwrite=True, config={}, flags="")
    assert (tmp_path / "model" / "config.json").read_text() == "{}"


@pytest.mark.parametrize("threads", [1, 4, None])
def test_work_is_done_ahead_and_comes_in_order(threads):
    taken = []

    def items():
        for number in range(40):
            taken.append(number)
            yield f"key {number}", number

    found = map_ahead(lambda value: value * value, items(), threads=threads, ahead=5)
    assert next(found) == ("key 0", 0)
    assert len(taken) == 5  # and no more: what is ahead is bounded
    assert list(found) == [(f"key {number}", number * number) for number in range(1, 40)]


def test_what_fails_ahead_is_told_where_it_stands():
    found = map_ahead(lambda value: 1 // value, [("a", 1), ("b", 0)], threads=2, ahead=4)
    assert next(found) == ("a", 1)
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_a_consumer_that_stops_early_does_not_wait_for_what_has_not_begun():
    begun, may_end = [], threading.Event()

    def work(value: int) -> int:
        begun.append(value)
        if value:
            may_end.wait(60)
        return value

    found = map_ahead(work, ((number, number) for number in range(100)), threads=1, ahead=50)
    assert next(found) == (0, 0)
    threading.Timer(0.5, may_end.set).start()  # the second one ends while the generator is being closed
    found.close()
    assert len(begun) <= 2
