"""The server process: both APIs on one event loop, a thread that watches the disk, and a graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf
import uvicorn
from tensorflow_serving.apis import prediction_log_pb2

from tl_keras.classifier import read_labels
from tl_keras.errors import UserError
from tl_keras.run import INTERRUPTED
from tl_keras.serving import calls
from tl_keras.serving import grpc as grpc_api
from tl_keras.serving.batching import Batcher
from tl_keras.serving.engines import ServingEngine, build_serving_engine
from tl_keras.serving.errors import RequestError
from tl_keras.serving.graphs import as_strings
from tl_keras.serving.metrics import Metrics
from tl_keras.serving.models import AVAILABLE, ModelEntry, Models, Version
from tl_keras.serving.protocol import BoundedProtocol
from tl_keras.serving.rest import build_app
from tl_keras.serving.stderr import drop_decoder_lines
from tl_keras.serving.workers import Workers, trim_memory

_POLL_SECONDS = 1.0  # like TF Serving's --file_system_poll_wait_seconds
_SPARE_SECONDS = 5.0  # in addition to the request timeout, at shutdown
_BACKLOG = 2048
_NO_LIMITS = calls.Limits(request_bytes=1 << 40, images=1 << 20, seconds=0.0, bytes_in_flight=0)
_CORES_A_BATCH = 4  # number of cores that a batch keeps busy; on two cores two concurrent batches were slower than one
_KEEP_ALIVE_SECONDS = 65  # longer than the usual minute of load balancers


@dataclasses.dataclass(frozen=True)
class Address:
    """Addresses of the server.

    Attributes:
        host: host name or IP address.
        port: port of the REST API (0 picks a free one).
        grpc_port: port of the gRPC API (0 picks a free one).
        cors: origins of other web pages that may use the REST API; `*` for any.
    """

    host: str
    port: int
    grpc_port: int
    cors: tuple[str, ...] = ()


def check_ports(address: Address) -> None:
    """Checks that both ports are free.

    Raises:
        UserError: a port is in use, or needs privileges.
    """
    with _bind(address.host, address.port, "port"), _bind(address.host, address.grpc_port, "grpc_port"):
        pass


def serve(
    entries: Sequence[ModelEntry],
    *,
    roots: Sequence[Path],
    address: Address,
    engine: str,
    precision: str,
    batch_sizes: Sequence[int],
    max_queued: int,
    limits: calls.Limits,
    read_warmup: Callable[[Path], list[prediction_log_pb2.PredictionLog]],
    samples: Sequence[bytes],
    show: Callable[[str], None],
) -> bool:
    """Serves models until SIGINT or SIGTERM.

    Args:
        entries: models to serve.
        roots: folders that models must be in.
        address: addresses to listen on.
        engine: see `build_serving_engine`.
        precision: see `build_serving_engine`.
        batch_sizes: batch sizes for batching.
        max_queued: queue limit per model, in images.
        limits: limits of a request.
        read_warmup: reads the warm-up requests of a version folder.
        samples: images to compare engines on.
        show: shows a line.

    Returns:
        Whether the user interrupted the server (SIGINT); False after SIGTERM.

    Raises:
        UserError: a port is in use, or no model can be loaded.
    """
    chosen: dict[str, ServingEngine] = {}

    def load(name: str, number: int, path: Path) -> calls.Served:
        del number
        labels = tuple(read_labels(path))  # before anything is loaded: another program's model has none
        # later versions use the engine of the first, because a benchmark would compete with running requests
        asked_for = ServingEngine(engine, precision)
        build = functools.partial(build_serving_engine, path, samples=samples, show=show)
        try:
            graph, chosen[name] = build(wanted=chosen.get(name, asked_for))
        except RuntimeError:
            if chosen.get(name, asked_for) == asked_for:
                raise
            graph, chosen[name] = build(wanted=asked_for)
        try:
            _warm_up(graph, read_warmup(path))
        except BaseException:
            graph.close()
            raise
        trim_memory()  # of the engines that were tried
        workers = max(1, (os.cpu_count() or 1) // _CORES_A_BATCH)
        batcher = Batcher(graph.run, sizes=batch_sizes, max_queued=max_queued, workers=workers)
        return calls.Served(graph, batcher, labels, str(chosen[name]))

    def close(served: calls.Served) -> None:
        served.batcher.close()
        served.graph.close()

    drain_seconds = limits.seconds + _SPARE_SECONDS
    models = Models(load=load, close=close, roots=roots, drain_seconds=drain_seconds, show=show)
    try:
        models.configure(entries, check_labels=False)
    except RequestError as error:
        raise UserError(f"these models can't be served: {error.message}. Check names and paths.") from error
    # The socket listens when the models are loaded. Until then connections are refused and do not hang.
    with _bind(address.host, address.port, "port") as bound:
        with _bind(address.host, address.grpc_port, "grpc_port"):
            pass  # checks that the port is free: gRPC binds it itself when the models are loaded
        # Objects of imported modules are excluded from garbage collection, which would otherwise delay all requests by
        # half a second now and then.
        gc.freeze()
        models.poll()
        _check_loaded(models, entries)
        gc.collect()
        trim_memory()
        with drop_decoder_lines():
            return _run_loop(_run(models, bound, address, limits, show))


def _run_loop(work: Coroutine[Any, Any, bool]) -> bool:
    """Uses uvloop if it is installed (not on Windows), for ten percent more requests."""
    if importlib.util.find_spec("uvloop"):
        import uvloop

        return bool(uvloop.run(work))
    return asyncio.run(work)


async def _run(
    models: Models, bound: socket.socket, address: Address, limits: calls.Limits, show: Callable[[str], None]
) -> bool:
    workers = Workers()
    metrics, budget = Metrics(functools.partial(_count_queued, models), is_served=models.has), calls.Budget(limits)
    drain_seconds = limits.seconds + _SPARE_SECONDS
    rest = _Server(
        uvicorn.Config(
            build_app(models, metrics, limits, budget, workers=workers, host=address.host, cors=address.cors),
            http=BoundedProtocol,
            ws="none",
            log_level="critical",
            access_log=False,
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=round(drain_seconds),
            server_header=False,
        )
    )
    grpc_server, health = grpc_api.build_server(models, metrics, limits, budget, workers=workers)
    grpc_port = _bind_grpc(grpc_server, address)
    await health.note()
    await grpc_server.start()
    _listen(bound, address)
    ending: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, _end, ending, number == signal.SIGINT)
    watching = asyncio.create_task(_watch(models, workers, health, show))
    answering = asyncio.create_task(rest.serve(sockets=[bound]))
    while not rest.started and not answering.done():
        await asyncio.sleep(0.01)
    port = bound.getsockname()[1]
    host = f"[{address.host}]" if ":" in address.host else address.host
    for line in _describe(models, f"http://{host}:{port}", f"{host}:{grpc_port}"):
        show(line)
    either: set[asyncio.Future[Any]] = {ending, answering}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    interrupted = ending.done() and ending.result()
    show("shutting down: running requests will be answered")
    watching.cancel()
    rest.should_exit = True
    # gRPC must have stopped when the event loop ends, also if the REST server has failed
    await asyncio.gather(grpc_server.stop(drain_seconds), answering, return_exceptions=True)
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    await workers.load_models(models.close)
    workers.close()
    answering.result()
    return interrupted


class _Server(uvicorn.Server):
    """A uvicorn server without signal handlers, because gRPC must be shut down with it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _watch(models: Models, workers: Workers, health: grpc_api.Health, show: Callable[[str], None]) -> None:
    """Checks the disk periodically in a thread, because loading takes seconds."""
    while True:
        await asyncio.sleep(_POLL_SECONDS)
        try:
            await workers.load_models(models.poll)
        except Exception as error:  # loaded models are still served
            show(f"warning: the folders of the models can't be read: {type(error).__name__}: {error}")
        await health.note()


def _end(ending: asyncio.Future[bool], interrupted: bool) -> None:
    """Starts the shutdown; the second signal ends the process at once."""
    if ending.done():
        os._exit(INTERRUPTED)
    ending.set_result(interrupted)


def _warm_up(graph: Any, requests: Sequence[prediction_log_pb2.PredictionLog]) -> None:
    """Runs the warm-up requests of a model, like TF Serving before it serves a version.

    An engine that prepares nothing per batch size and signature runs only the first ones.
    """
    for log in requests[: graph.warm_up_requests]:
        if log.WhichOneof("log_type") == "predict_log":
            request = log.predict_log.request
            inputs = {name: tf.make_ndarray(request.inputs[name]) for name in request.inputs}
        else:
            request = log.classify_log.request
            inputs = {"inputs": as_strings(calls.read_input(request.input, limits=_NO_LIMITS))}
        graph.run(request.model_spec.signature_name, inputs)


def _check_loaded(models: Models, entries: Sequence[ModelEntry]) -> None:
    """Checks that every model can be served.

    Raises:
        UserError: no model can be served.
    """
    versions = [version for name in models.names for version in _list(models, name)]
    if not any(version.state == AVAILABLE for version in versions):
        reasons = [f"{one.model}/{one.number}: {one.error}" for one in versions]
        empty = [f"{entry.name}: {entry.base_path} contains no version" for entry in entries]
        raise UserError(f"no model can be served: {'; '.join(reasons or empty)}. Check the path, or export it again.")


def _list(models: Models, name: str) -> list[Version]:
    try:
        return models.find_all(name)
    except RequestError:
        return []


def _count_queued(models: Models) -> dict[str, int]:
    loaded = {name: [version.served for version in _list(models, name)] for name in models.names}
    return {name: sum(served.batcher.queued for served in found if served) for name, found in loaded.items()}


@contextlib.contextmanager
def _bind(host: str, port: int, flag: str) -> Iterator[socket.socket]:
    """Binds a socket, to find out before models are loaded whether the port is in use.

    Raises:
        UserError: the port is in use, or needs privileges.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, port))
        except OSError as error:
            raise _explain_taken(flag, port, host, error) from error
        yield bound


def _listen(bound: socket.socket, address: Address) -> None:
    """Starts to listen on a bound socket.

    Raises:
        UserError: another process has taken the port in the meantime.
    """
    try:
        bound.listen(_BACKLOG)
    except OSError as error:
        raise _explain_taken("port", address.port, address.host, error) from error


def _explain_taken(flag: str, port: int, host: str, error: OSError) -> UserError:
    return UserError(f"--{flag}={port} of {host} is not available: {error.strerror}. Give another --{flag}, or --host.")


def _bind_grpc(server: Any, address: Address) -> int:
    host = f"[{address.host}]" if ":" in address.host else address.host
    try:
        return int(server.add_insecure_port(f"{host}:{address.grpc_port}"))
    except RuntimeError as error:
        raise UserError(
            f"--grpc_port={address.grpc_port} of {address.host} is not available: it is in use, or needs privileges. "
            "Give another."
        ) from error


def _describe(models: Models, rest: str, grpc_address: str) -> Iterator[str]:
    yield f"REST {rest}/v1/models/NAME · gRPC {grpc_address} · page {rest}/"
    for name in models.names:
        yield f"try it: curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' {rest}/v1/models/{name}:predict"
