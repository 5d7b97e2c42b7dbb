"""Prometheus metrics of the server, with the names of TF Serving."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric

PATH = "/monitoring/prometheus/metrics"
CONTENT_TYPE = "text/plain"
_COUNT, _LATENCY, _QUEUE = (
    ":tensorflow:serving:request_count",
    ":tensorflow:serving:request_latency",
    ":tl_keras:serving:queued_rows",
)
_UNKNOWN = "unknown"
_BUCKETS = tuple(10 * 1.8**power for power in range(33))  # microseconds, as TF Serving's (servables/tensorflow/util.cc)


class Metrics:
    """Counts requests and their latency; thread-safe."""

    def __init__(self, count_queued: Callable[[], dict[str, int]], *, is_served: Callable[[str], bool]) -> None:
        """Args: count_queued: model → rows in the queue; is_served: whether a model with this name is served."""
        self._count_queued, self._is_served = count_queued, is_served
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], int] = {}
        self._latencies: dict[tuple[str, str, str], list[int]] = {}
        self._sums: dict[tuple[str, str, str], float] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def count(self, model: str, *, api: str, entrypoint: str, status: str, seconds: float) -> None:
        """Counts a request.

        Args:
            model: name of the model.
            api: `Predict`, `Classify`, ….
            entrypoint: `REST` or `GRPC`.
            status: gRPC code; `OK` if it was answered.
            seconds: latency.
        """
        if not self._is_served(model):  # names invented by clients must not fill the memory
            model = _UNKNOWN
        key = (model, api, entrypoint)
        with self._lock:
            self._counts[model, status] = self._counts.get((model, status), 0) + 1
            buckets = self._latencies.setdefault(key, [0] * (len(_BUCKETS) + 1))
            buckets[bisect.bisect_left(_BUCKETS, seconds * 1e6)] += 1
            self._sums[key] = self._sums.get(key, 0.0) + seconds * 1e6

    def page(self) -> bytes:
        """Renders all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The interface of a collector in prometheus_client."""
        with self._lock:
            counts = Metric(_COUNT, "requests", "untyped")
            for (model, status), number in self._counts.items():
                counts.add_sample(_COUNT, {"model_name": model, "status": status}, number)
            latencies = Metric(_LATENCY, "microseconds from a request's arrival to its answer", "histogram")
            for (model, api, entrypoint), buckets in self._latencies.items():
                labels, total = {"model_name": model, "API": api, "entrypoint": entrypoint}, 0
                for bound, number in zip([*map(str, _BUCKETS), "+Inf"], buckets, strict=True):
                    total += number
                    latencies.add_sample(_LATENCY + "_bucket", {**labels, "le": bound}, total)
                latencies.add_sample(_LATENCY + "_sum", labels, self._sums[model, api, entrypoint])
                latencies.add_sample(_LATENCY + "_count", labels, total)
        queued = Metric(_QUEUE, "rows that wait", "gauge")
        for model, number in self._count_queued().items():
            queued.add_sample(_QUEUE, {"model_name": model}, number)
        yield from (counts, latencies, queued)
