"""The process as users start and end it: swaps under load, the end, what goes wrong at the start."""

from __future__ import annotations

import gc
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import run_main
from tests.serving.conftest import as_b64, start_server
from tl_keras.errors import UserError
from tl_keras.export.saved_model import write_version
from tl_keras.serving import server as server_module
from tl_keras.serving.models import Models

METRICS, QUEUED = "/monitoring/prometheus/metrics", ":tl_keras:serving:queued_rows{"
FAST = ("--engine=tensorflow", "--precision=float32", "--max_batch_size=4")


@pytest.fixture
def models(trained: tuple[Path, Path], tmp_path: Path) -> Path:
    """Without requests for the warm-up, which take longer than all else; the fixture `server` has them."""
    shutil.copytree(trained[1], tmp_path / "models" / "colours" / "1")
    (tmp_path / "models" / "colours" / "1" / "assets.extra" / "tf_serving_warmup_requests").unlink()
    return tmp_path / "models"


def add_version(models: Path, number: int) -> None:
    """As the exporter does: under another name first."""
    first = models / "colours" / "1"
    shutil.copytree(first, models / "colours" / ".unfinished")
    (models / "colours" / ".unfinished").rename(models / "colours" / str(number))


def test_no_request_fails_while_versions_are_swapped(models, photographs, tmp_path):
    answers, stop = list[tuple[int, str]](), threading.Event()
    with start_server(tmp_path / "log", f"--export_dir={models}", *FAST) as server:

        def ask() -> None:
            while not stop.is_set():
                status, answer = server.ask("/v1/models/colours:predict", {"instances": [as_b64(photographs[0])]})
                answers.append((status, answer["predictions"][0]["labels"][0] if status == 200 else str(answer)))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        add_version(models, 2)
        server.wait_for("unloaded colours/1")
        broken = models / "colours" / "3"
        broken.mkdir()
        (broken / "saved_model.pb").write_bytes(b"no model")
        server.wait_for("colours/3 can't be loaded")
        deadline = time.monotonic() + 30
        while len(answers) <= 20 and time.monotonic() < deadline:
            time.sleep(0.05)
        stop.set()
        for thread in threads:
            thread.join()
        _, status = server.ask("/v1/models/colours")
        shutil.rmtree(models / "colours" / "3")
    assert len(answers) > 20
    assert set(answers) == {(200, "blue")}
    states = {one["version"]: one for one in status["model_version_status"]}
    assert [states[number]["state"] for number in ("3", "2", "1")] == ["END", "AVAILABLE", "END"]
    assert states["3"]["status"]["error_code"] == "UNKNOWN"
    assert states["3"]["status"]["error_message"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_end_waits_for_requests_under_way(number, status, models, photographs, tmp_path):
    answers = list[int]()
    with start_server(tmp_path / "log", f"--export_dir={models}", *FAST) as server:
        body = {"instances": [as_b64(photographs[0])] * 250}
        asking = [
            threading.Thread(target=lambda: answers.append(server.ask("/v1/models/colours:predict", body)[0]))
            for _ in range(4)
        ]
        for thread in asking:
            thread.start()
        deadline = time.monotonic() + 10  # until all four have come, and none has been answered
        while "queued_rows" in (text := server.ask(METRICS)[1]) and time.monotonic() < deadline:
            if sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(QUEUED)) > 500:
                break
        assert not answers
        server.process.send_signal(number)
        assert server.process.wait(60) == status
        for thread in asking:
            thread.join()
    assert answers == [200] * 4
    assert "Traceback" not in server.log.read_text()


def test_a_run_is_served_without_an_export(trained, photographs, tmp_path):
    with start_server(tmp_path / "log", f"--classifier={trained[0]}", "--model_name=mine", *FAST) as server:
        status, answer = server.ask("/v1/models/mine:predict", {"instances": [as_b64(photographs[0])]})
    assert (status, answer["predictions"][0]["labels"][0]) == (200, "blue")
    assert "serving the run" in server.log.read_text()


@pytest.fixture
def load(monkeypatch):
    """Loads models in this process as a server would, and gives them instead of listening."""
    found = []
    monkeypatch.setattr(server_module, "_run", lambda models, *_: found.append(models))
    monkeypatch.setattr(server_module, "_run_loop", lambda _: False)
    previous = signal.getsignal(signal.SIGTERM)

    def run(*flags: str) -> Models:
        assert run_main("--mode=serve", "--port=0", "--grpc_port=0", *flags, *FAST) == 0
        return found[-1]

    yield run
    for models in found:
        models.close()
    gc.unfreeze()
    signal.signal(signal.SIGTERM, previous)


def test_one_version_is_served_and_no_other(models, load):
    add_version(models, 2)
    loaded = load(f"--classifier={models / 'colours' / '1'}")
    assert [version.number for version in loaded.find_all("colours")] == [1]


def test_a_list_of_models_with_labels(models, photographs, tmp_path):
    add_version(models, 2)
    config = tmp_path / "models.config"
    config.write_text(f"""model_config_list {{ config {{
        name: "c" base_path: "{models / "colours"}" model_platform: "tensorflow"
        model_version_policy {{ specific {{ versions: 1 versions: 2 }} }}
        version_labels {{ key: "stable" value: 1 }} version_labels {{ key: "canary" value: 2 }} }} }}""")
    with start_server(tmp_path / "log", f"--models_config={config}", *FAST) as server:
        body = {"instances": [as_b64(photographs[0])]}
        assert server.ask("/v1/models/c/labels/stable:predict", body)[0] == 200
        _, status = server.ask("/v1/models/c/labels/canary")
        _, metadata = server.ask("/v1/models/c/labels/stable/metadata")
    assert [one["version"] for one in status["model_version_status"]] == ["2"]
    assert metadata["model_spec"]["version"] == "1"


def test_a_reload_swaps_the_list(models, tmp_path):
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from tensorflow_serving.apis import model_management_pb2, model_service_pb2_grpc

    SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING  # noqa: N806
    add_version(models, 2)
    with start_server(tmp_path / "log", f"--export_dir={models}", *FAST) as server:
        with grpc.insecure_channel(server.grpc) as channel:
            stub = model_service_pb2_grpc.ModelServiceStub(channel)
            request = model_management_pb2.ReloadConfigRequest()
            one = request.config.model_config_list.config.add(name="renamed", base_path=str(models / "colours"))
            one.model_version_policy.specific.versions.append(1)
            stub.HandleReloadConfigRequest(request, timeout=60)
        assert server.ask("/v1/models/renamed/versions/1")[0] == 200
        assert server.ask("/v1/models/colours:predict", {"instances": ["x"]})[0] == 404
        with grpc.insecure_channel(server.grpc) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert health.Check(health_pb2.HealthCheckRequest(), timeout=60).status == SERVING
            stub = model_service_pb2_grpc.ModelServiceStub(channel)
            del request.config.model_config_list.config[:]
            request.config.SetInParent()
            request.config.model_config_list.SetInParent()
            stub.HandleReloadConfigRequest(request, timeout=60)
            for name in ("", "tensorflow.serving.PredictionService"):
                asked = health_pb2.HealthCheckRequest(service=name)
                assert health.Check(asked, timeout=60).status == NOT_SERVING
        assert server.ask("/healthz") == (503, "no model\n")
        assert server.ask("/livez") == (200, "ok\n")


def test_openvino_answers_as_the_graph_does(models, photographs, tmp_path):
    body = {"instances": [as_b64(one) for one in (*photographs, b"broken")]}
    answers = []
    for engine in ("tensorflow", "openvino"):
        flags = (f"--export_dir={models}", f"--engine={engine}", "--precision=float32")
        with start_server(tmp_path / engine, *flags) as server:
            answers.append(server.ask("/v1/models/colours:predict", body)[1]["predictions"])
            classify = {
                "signature_name": "classify",
                "examples": [{"image_bytes": as_b64(photographs[0])}, {"image_bytes": ""}],
            }
            status, classes = server.ask("/v1/models/colours:classify", classify)
            assert status == 200
            assert [row[0][0] for row in classes["results"]] == ["blue", ""]
            assert f"{engine} float32" in server.log.read_text()
    for ours, theirs in zip(*answers, strict=True):
        assert (ours["labels"], ours["class_ids"], ours["valid"]) == (
            theirs["labels"],
            theirs["class_ids"],
            theirs["valid"],
        )
        assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-4)


@pytest.mark.parametrize(("flag", "other"), [("port", "grpc_port"), ("grpc_port", "port")])
def test_a_port_that_is_taken(flag, other, models, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run_main("--mode=serve", f"--export_dir={models}", f"--{flag}={port}", f"--{other}=0") == 1
    captured = capsys.readouterr()
    assert f"--{flag}={port} of 127.0.0.1 is not available: Address already in use" in captured.err
    assert "serving" not in captured.out  # found out before models are loaded


def test_clients_are_refused_until_models_are_loaded():
    """They hung for as long as that took."""
    address = server_module.Address("127.0.0.1", 0, 0)
    with server_module._bind("127.0.0.1", 0, "port") as bound:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(bound.getsockname(), timeout=10)
        server_module._listen(bound, address)
        socket.create_connection(bound.getsockname(), timeout=10).close()
        taken = bound.getsockname()[1]
        with pytest.raises(UserError, match="Address already in use"), server_module._bind("127.0.0.1", taken, "port"):
            pass


@pytest.mark.parametrize("version", ["", "1"])
def test_a_models_folder_is_served_under_a_name_of_ones_own(models, load, version):
    loaded = load(f"--classifier={models / 'colours' / version}", "--model_name=resnet")
    assert loaded.names == ["resnet"]
    assert not loaded.find_missing()


def test_a_models_folder_is_served_without_a_version(models, load):
    loaded = load(f"--classifier={models / 'colours'}")
    assert [version.number for version in loaded.find_all("colours")] == [1]


def test_nothing_but_broken_models(tmp_path, capsys):
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "saved_model.pb").write_bytes(b"no model")
    assert run_main("--mode=serve", f"--export_dir={tmp_path}", "--port=0") == 1
    assert "no model can be served: m/1: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--export_dir=nowhere"], "--export_dir=nowhere can't be read: No such file or directory"),
        (["--classifier=nowhere"], "nowhere does not exist"),
        (["--models_config=nowhere"], "--models_config=nowhere can't be read"),
        (["--models_config=setup.cfg"], "is not a valid --model_config_file of TF Serving"),
        (["--models_config=a", "--classifier=b"], "Leave --classifier out"),
        (["--port=70000"], "--port=70000 is out of range"),
        (["--max_batch_size=20"], "--max_batch_size=20 is not a batch size of the warm-up"),
        (["--max_queued_images=5"], "--max_queued_images=5 is less than --max_request_images=256"),
        (["--request_timeout_seconds=nan"], "--request_timeout_seconds=nan is out of range"),
        (["--cors=evil.example"], "--cors=evil.example is not the origin of a web page. Allowed: scheme://host[:port]"),
        (["--cors=*,https://a.example/path"], "--cors=https://a.example/path is not the origin"),
        (["--model_name=x"], "--model_name names a single model. Give --classifier too"),
        (["--precision=float16"], "--precision=float16 is not available for serving"),
    ],
)
def test_mistakes_get_one_line(flags, words, capsys):
    assert run_main("--mode=serve", *flags) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_model_of_an_earlier_version_is_served_too(tmp_path, trained, load):
    """Exported before warm-up requests and what is kept beside them."""
    from tl_keras.classifier import load_trained

    write_version(
        load_trained(str(trained[0])), make_folder(tmp_path / "models" / "old" / "1"), name="old", max_pixels=10**6
    )
    shutil.rmtree(tmp_path / "models" / "old" / "1" / "assets.extra")  # versions before 0.2 have none
    assert not load(f"--export_dir={tmp_path / 'models'}").find_missing()


def make_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path
