"""Versions come, go and break while others are in use; on disk as TF Serving finds them."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from tl_keras.errors import UserError
from tl_keras.serving.errors import RequestError
from tl_keras.serving.models import AVAILABLE, END, ModelEntry, Models, Version, find_models


class Disk:
    """Model folders, and what was loaded from and closed of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.closed, self.shown = root, list[str](), list[str]()
        self.needs = list[str]()
        self.models = Models(
            load=self.load, close=self.closed.append, roots=[root], drain_seconds=10, show=self.shown.append
        )

    def write(self, name: str, content: str = "good") -> Path:
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "saved_model.pb").write_text(content)
        return path

    def load(self, name: str, number: int, path: Path) -> str:
        content = (path / "saved_model.pb").read_text()
        if content != "good":
            raise ValueError(f"{content}\nsecond line")
        for needed in self.needs:
            (path / needed).read_text()
        return f"{name}/{number}"

    def serve(self, *entries: ModelEntry) -> None:
        self.models.configure(entries or [ModelEntry("m", self.root / "m")])
        self.models.poll()

    def find(self, name: str, **choice: object) -> Version:
        with self.models.use(name, **choice) as (version, served):
            assert served == f"{name}/{version.number}"
            return version

    def states(self, name: str = "m") -> dict[int, str]:
        return {one.number: one.state for one in self.models.find_all(name)}


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def test_the_latest_version_is_served(disk):
    for number in (1, 2, 10):
        disk.write(f"m/{number}")
    disk.serve()
    assert disk.find("m").number == 10
    assert disk.states() == {10: AVAILABLE}


def test_folders_that_are_no_versions_are_left_alone(disk):
    disk.write("m/3")
    for name in ("m/.unfinished-x", "m/latest", "m/٣", "m/-1"):
        disk.write(name)
    (disk.root / "m" / "9").mkdir()  # no model in it yet
    disk.serve()
    assert disk.states() == {3: AVAILABLE}


def test_a_new_version_takes_over_and_the_old_one_goes(disk):
    disk.write("m/1")
    disk.serve()
    disk.write("m/2")
    disk.models.poll()
    assert disk.find("m").number == 2
    assert disk.states() == {2: AVAILABLE, 1: END}
    assert disk.closed == ["m/1"]


def test_a_broken_version_is_reported_and_the_old_one_goes_on(disk):
    disk.write("m/1")
    disk.serve()
    disk.write("m/2", "broken")
    disk.models.poll()
    assert disk.find("m").number == 1
    broken, good = disk.models.find_all("m")
    assert (broken.state, broken.error, good.state) == (END, "broken", AVAILABLE)
    assert "m/2 can't be loaded: broken" in disk.shown
    shown = len(disk.shown)
    disk.models.poll()
    assert len(disk.shown) == shown  # it is not tried again
    time.sleep(0.02)
    disk.write("m/2")
    disk.models.poll()  # until it is written anew
    assert disk.find("m").number == 2


def test_a_removed_version_is_unloaded(disk):
    for number in (1, 2):
        disk.write(f"m/{number}")
    disk.serve()
    shutil.rmtree(disk.root / "m" / "2")
    disk.models.poll()
    assert disk.states() == {2: END, 1: AVAILABLE}
    shutil.rmtree(disk.root / "m")
    disk.models.poll()
    with pytest.raises(RequestError, match=r"Servable not found for request: Latest\(m\)"):
        disk.find("m")


def test_rolling_back_loads_the_old_version_again(disk):
    disk.write("m/1")
    disk.serve()
    disk.write("m/2")
    disk.models.poll()
    shutil.rmtree(disk.root / "m" / "2")
    disk.models.poll()
    assert disk.states() == {2: END, 1: AVAILABLE}
    assert disk.find("m").number == 1


def test_the_same_number_in_another_folder_replaces_the_first(disk):
    disk.write("m/1")
    disk.write("n/1")
    disk.serve()
    disk.serve(ModelEntry("m", disk.root / "n"))
    assert disk.find("m").path == disk.root / "n" / "1"
    assert disk.closed == ["m/1"]


def test_a_version_goes_on_until_its_like_from_another_folder_is_there(disk):
    """A reload to another base_path with the same number: requests found no version for as long as loading took."""
    disk.write("m/1")
    disk.write("n/1")
    disk.serve()
    seen = list[Path]()
    load = disk.models._load

    def load_slowly(name: str, number: int, path: Path) -> str:
        seen.append(disk.find("m").path)  # while the other one is loaded
        assert disk.models.find_missing() == ""
        return load(name, number, path)

    disk.models._load = load_slowly
    disk.serve(ModelEntry("m", disk.root / "n"))
    assert seen == [disk.root / "m" / "1"]
    assert disk.find("m").path == disk.root / "n" / "1"
    assert disk.closed == ["m/1"]


def test_a_version_goes_on_where_its_like_from_another_folder_is_broken(disk):
    disk.write("m/1")
    disk.write("n/1", "broken")
    disk.serve()
    entry = ModelEntry("m", disk.root / "n")
    disk.serve(entry)
    with pytest.raises(RequestError, match=r"Latest\(m\): broken"):
        disk.models.check_loaded([entry])
    shown = len(disk.shown)
    disk.models.poll()
    assert len(disk.shown) == shown  # it is not tried again and again
    assert disk.find("m").path == disk.root / "m" / "1"
    disk.write("n/1")
    disk.models.poll()
    disk.models.check_loaded([entry])
    assert (disk.find("m").path, disk.closed) == (disk.root / "n" / "1", ["m/1"])


def test_a_version_that_is_copied_in_place_is_loaded_once_it_is_whole(disk):
    """`cp -r`, rsync and object stores write saved_model.pb first, the rest seconds later."""
    disk.needs = ["assets/labels.txt", "assets.extra/decoding.json"]
    path = disk.write("m/1")
    disk.serve()
    for name in disk.needs:
        assert disk.states() == {1: END}
        file = path / name
        file.parent.mkdir()
        file.write_text("x")
        disk.models.poll()
    assert disk.find("m").number == 1


def test_a_version_that_grows_while_it_is_loaded_is_loaded_again(disk):
    """What came too late for the first load may change its answers."""
    path = disk.write("m/1")
    disk.serve()
    (path / "late").write_text("x")
    disk.models.poll()
    assert (disk.states(), disk.closed) == ({1: AVAILABLE}, ["m/1"])
    disk.models.poll()
    assert disk.closed == ["m/1"]


def test_a_version_that_failed_is_tried_again_a_few_times(disk, monkeypatch):
    """What failed may have been the machine: TF Serving tries five times more, a minute apart."""
    now = [1000.0]
    monkeypatch.setattr("tl_keras.serving.models.time.monotonic", lambda: now[0])
    tries = list[int]()
    disk.models._load = lambda name, number, path: tries.append(number) or 1 / 0
    disk.write("m/1")
    disk.serve()
    for _ in range(20):
        disk.models.poll()
        now[0] += 30
    assert len(tries) == 6


def test_reasons_hide_the_machines_folders(disk):
    path = disk.write("m/1")
    disk.models._load = fail_with(f"{path} has no labels; see /etc/passwd, 'C:\\x\\y' or https://a.example/b and a/b")
    disk.serve()
    (version,) = disk.models.find_all("m")
    assert version.error == "m/1 has no labels; see passwd, 'y' or https://a.example/b and a/b"
    assert str(path) in disk.shown[-1]


def fail_with(message: str):
    def load(name: str, number: int, path: Path) -> None:
        raise ValueError(message)

    return load


def test_whether_requests_will_be_answered(disk):
    assert disk.models.find_missing() == "no model"
    disk.write("m/1", "broken")
    disk.serve()
    assert disk.models.find_missing() == "no version of m"
    disk.write("m/2")
    disk.models.poll()
    assert disk.models.find_missing() == ""
    disk.models.configure([])
    assert disk.models.find_missing() == "no model"


def test_a_version_that_is_a_link_out_of_the_folder_is_not_served(disk, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "saved_model.pb").write_text("good")
    disk.write("m/1")
    (disk.root / "m" / "2").symlink_to(elsewhere)
    disk.serve()
    assert disk.states() == {2: END}  # and 1 is not the latest
    assert "outside of what may be served" in disk.models.find_all("m")[0].error


def test_a_disk_that_does_not_answer_changes_nothing(disk, monkeypatch):
    disk.write("m/1")
    disk.serve()

    def fail(path: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", fail)
    disk.models.poll()
    assert disk.states() == {1: AVAILABLE}
    assert disk.shown[-1] == "warning: the folder of m can't be read: Permission denied"


def test_requests_under_way_finish_on_the_old_version(disk):
    disk.write("m/1")
    disk.serve()
    disk.write("m/2")
    entered, leave = threading.Event(), threading.Event()

    def request() -> None:
        with disk.models.use("m") as (_, served):
            entered.set()
            leave.wait(10)
            assert served == "m/1"
            assert disk.closed == []

    asking = threading.Thread(target=request)
    polling = threading.Thread(target=disk.models.poll)
    asking.start()
    entered.wait(10)
    polling.start()
    deadline = time.monotonic() + 10
    while disk.find("m").number != 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert disk.find("m").number == 2  # new requests go to the new one already
    assert disk.closed == []
    leave.set()
    asking.join()
    polling.join()
    assert disk.closed == ["m/1"]


def test_policies_and_labels(disk):
    for number in (1, 2, 3):
        disk.write(f"m/{number}")
    disk.serve(ModelEntry("m", disk.root / "m", latest=2), ModelEntry("all", disk.root / "m", latest=0))
    assert disk.states() == {3: AVAILABLE, 2: AVAILABLE}
    assert set(disk.states("all")) == {1, 2, 3}
    disk.serve(ModelEntry("m", disk.root / "m", versions=(2, 3), labels={"stable": 2, "canary": 3}))
    assert disk.find("m", label="stable").number == 2
    assert disk.find("m", label="canary").number == 3
    assert disk.states("all") == {1: END, 2: END, 3: END}
    with pytest.raises(RequestError, match="Unrecognized servable version label: x"):
        disk.find("m", label="x")


def test_a_label_may_not_point_at_what_is_not_there(disk):
    disk.write("m/1")
    disk.serve()
    with pytest.raises(RequestError, match="not currently available for inference"):
        disk.models.configure([ModelEntry("m", disk.root / "m", labels={"canary": 2})])
    assert disk.find("m").number == 1


def test_a_list_that_is_refused_changes_nothing(disk, tmp_path_factory):
    disk.write("m/1")
    disk.serve()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for entries in (
        [ModelEntry("n", elsewhere)],
        [ModelEntry("n", disk.root / ".." / elsewhere.name)],
        [ModelEntry("n", disk.root), ModelEntry("n", disk.root)],
    ):
        with pytest.raises(RequestError):
            disk.models.configure(entries)
    assert disk.models.names == ["m"]


def test_a_link_out_of_the_folder_is_refused(disk, tmp_path_factory):
    (disk.root / "link").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(RequestError, match="outside of what may be served"):
        disk.models.configure([ModelEntry("n", disk.root / "link")])


def test_closing_lets_go_of_everything(disk):
    disk.write("m/1")
    disk.write("n/4")
    disk.serve(ModelEntry("m", disk.root / "m"), ModelEntry("n", disk.root / "n"))
    disk.models.close()
    assert sorted(disk.closed) == ["m/1", "n/4"]


def test_a_folder_without_models(tmp_path):
    with pytest.raises(UserError, match="contains no exported model"):
        find_models(tmp_path)
    with pytest.raises(UserError, match="can't be read: No such file"):
        find_models(tmp_path / "nowhere")
