"""What real disks, cameras and machines bring along, through the whole of a run."""

from __future__ import annotations

import csv
import json
import os
import pwd
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import SMALL_NETWORK, make_image, run_main, write_colour_folder, write_image
from tests.processes import Process

ROOT = Path(__file__).parent.parent


def finetune(root: Path, dataset: str, *flags: str) -> dict:
    places = [f"--run_dir={root / 'run'}", f"--store_dir={root / 'store'}", f"--export_dir={root / 'models'}"]
    assert run_main("--mode=finetune", f"--dataset={dataset}", *SMALL_NETWORK, "--epochs=1", *places, *flags) == 0
    return json.loads((root / "run" / "metrics.json").read_text())


def test_spaces_and_chinese_in_every_path(tmp_path):
    root = tmp_path / "my photos 照片"
    write_colour_folder(root / "data, 2024", each=12)
    (root / "data, 2024" / "red").rename(root / "data, 2024" / "红 色")
    metrics = finetune(root, f"folder:{root / 'data, 2024'}")
    assert metrics["timing"]["trunk_images"] == 36
    assert (root / "run" / "labels.txt").read_text(encoding="utf-8").splitlines() == ["blue", "green", "红 色"]
    model = Path(metrics["export"]["path"])
    assert model.parent.name == "data__2024-SmallConvNet"  # an address can't hold more
    output = root / "out 出.csv"
    image = root / "data, 2024" / "红 色" / "000.jpg"
    (root / "new").mkdir()
    image.rename(root / "new" / "一 张.jpg")
    assert run_main("--mode=predict", f"--classifier={model}", f"--images={root / 'new'}", f"--output={output}") == 0
    assert "一 张.jpg" in output.read_text(encoding="utf-8")


@pytest.mark.parametrize("classes", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_classes_of_one_pixel(tmp_path, classes):
    (tmp_path / "data").mkdir()
    rows = []
    for number in range(classes + 20):
        pixel = np.array([[[number % 256, number // 256, 100]]], np.uint8)
        Image.fromarray(pixel).save(tmp_path / "data" / f"{number}.png")
        rows.append((f"data/{number}.png", f"class {number % classes:05d}", "train" if number < classes else "val"))
    with (tmp_path / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    metrics = finetune(tmp_path, f"csv:{tmp_path / 'm.csv'}", "--batch_size=256")
    assert metrics["val"]["n"] == 20
    assert metrics["export"]["decisions"] >= 0.99
    assert np.load(tmp_path / "run" / "probabilities.npy").shape == (20, classes)
    assert (tmp_path / "run" / "report.html").stat().st_size < 10e6


def test_a_manifest_made_on_windows(tmp_path):
    write_colour_folder(tmp_path / "data", each=12)
    lines = ["path,label"]
    lines += [f"data\\{path.parent.name}\\{path.name},{path.parent.name}é" for path in tmp_path.glob("data/*/*.jpg")]
    (tmp_path / "m.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    finetune(tmp_path, f"csv:{tmp_path / 'm.csv'}", "--noexport")
    assert (tmp_path / "run" / "labels.txt").read_text(encoding="utf-8").split() == ["blueé", "greené", "redé"]


def test_links_that_lead_in_a_circle(tmp_path):
    write_colour_folder(tmp_path / "data", each=12)
    (tmp_path / "data" / "red" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "red" / "nowhere.jpg").symlink_to(tmp_path / "gone.jpg")
    metrics = finetune(tmp_path, f"folder:{tmp_path / 'data'}", "--max_broken_fraction=0.1", "--noexport")
    assert metrics["timing"]["trunk_images"] == 36


def nobody(uid: int) -> None:
    raise KeyError(uid)


def test_a_machine_without_a_home(colour_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)  # a container's user that no file of users knows
    arguments = [f"--dataset=folder:{colour_folder}", *SMALL_NETWORK, "--epochs=1", "--noexport"]
    assert run_main("--mode=finetune", *arguments, f"--run_dir={tmp_path / 'run'}") == 0
    assert list((tmp_path / ".tl_keras_store").glob("*.sqlite"))


def test_a_broken_photograph_among_many_is_left_out_and_listed(tmp_path, capsys):
    write_colour_folder(tmp_path / "data", each=50)
    path = tmp_path / "data" / "red" / "007.jpg"
    path.write_bytes(path.read_bytes()[:400])
    finetune(tmp_path, f"folder:{tmp_path / 'data'}", "--noexport")
    assert "broken: 1 image left out" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "run" / "broken.csv").open()))
    assert [row["id"] for row in rows] == ["red/007.jpg"]
    assert rows[0]["reason"].startswith("can't be decoded: ")
    assert "red/007.jpg" not in (tmp_path / "run" / "splits.csv").read_text()


def test_a_run_folder_that_exists_is_never_written_over(colour_folder, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    arguments = [f"--dataset=folder:{colour_folder}", *SMALL_NETWORK, f"--run_dir={tmp_path / 'run'}"]
    assert run_main("--mode=finetune", *arguments) == 1
    assert "already exists" in capsys.readouterr().err
    assert (tmp_path / "run" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("stage", ["trunk", "training"])
def test_ctrl_c_keeps_what_is_done(stage, colour_folder, tmp_path):
    places = [f"--run_dir={tmp_path / 'run'}", f"--store_dir={tmp_path / 'store'}", f"--export_dir={tmp_path / 'm'}"]
    process = Process(
        "--mode=finetune", f"--dataset=folder:{colour_folder}", *SMALL_NETWORK, "--epochs=100000", *places
    )
    wanted = tmp_path / "run" / ("config.json" if stage == "trunk" else "history.csv")
    deadline = time.monotonic() + 120
    while not wanted.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130, out + error
    assert "Traceback" not in error
    if stage == "training":
        assert json.loads((tmp_path / "run" / "metrics.json").read_text())["interrupted"] is True
        assert (tmp_path / "run" / "classifier" / "network.keras").is_file()
        assert "accuracy" in out.splitlines()[-1]
        assert not (tmp_path / "m").exists()
        assert "Training was interrupted." in (tmp_path / "run" / "report.html").read_text()


def test_a_name_that_is_no_utf8(tmp_path):
    write_colour_folder(tmp_path / "data", each=12)
    name = os.fsencode(tmp_path / "data" / "red") + b"/caf\xe9.jpg"
    with open(name, "wb") as file:
        file.write(write_image(tmp_path / "x.jpg", make_image(5, (210, 50, 40))).read_bytes())
    metrics = finetune(tmp_path, f"folder:{tmp_path / 'data'}")
    assert metrics["timing"]["trunk_images"] == 37
