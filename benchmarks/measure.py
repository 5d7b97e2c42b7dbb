"""Shared parts of all benchmarks: command line with data folder and number of runs, timing, and result files."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MOBILENET_WEIGHTS = "backbones/mobilenet_v2_0.35_224_imagenet_no_top.weights.h5"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="hymenoptera, flowers, backbones"
    )
    parser.add_argument("--work", type=Path, default=Path("/tmp/tl_keras_benchmarks"), help="runs, stores, copies")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="", help="parts to run, comma-separated")
    parser.add_argument("--torch", default="", help="extract: a Python that has torch and torchvision")
    parser.add_argument("--networks", default="ResNet50,VGG16,MobileNetV2,EfficientNetB0,ConvNeXtTiny", help="extract")
    parser.add_argument("--engine", default="auto", help="extract's memory")
    parser.add_argument("--other", default="", help="another checkout of this repository, to compare with")
    arguments = parser.parse_args()
    arguments.data = arguments.data.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    return arguments


def describe_machine() -> dict[str, Any]:
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    flags = Path("/proc/cpuinfo").read_text()
    packages = ("tensorflow", "keras", "scikit-learn", "numpy", "openvino")
    return {
        "cpu": f"{len(cpu)} x {cpu[0]}",
        "avx512_bf16": "avx512_bf16" in flags,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "date": time.strftime("%Y-%m-%d"),
    }


def spread(values: Sequence[float]) -> str:
    """Formats values as min ← median → max."""
    return f"{min(values):.4g} ← {statistics.median(values):.4g} → {max(values):.4g}"


def clock(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run_process(arguments: Sequence[str], *, root: Path = ROOT, **environment: str) -> tuple[float, str]:
    """Runs a process in a checkout; returns its duration in seconds, including its start, and its output."""
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", **environment},
        check=False,
    )
    if result.returncode:
        raise SystemExit(result.stdout[-2000:] + result.stderr[-2000:])
    return time.perf_counter() - start, result.stdout


def measure_peak(command: Sequence[str]) -> float:
    """Measures the peak memory of a whole process in MB."""
    code = "import resource,subprocess,sys;subprocess.run(sys.argv[1:],check=True,stdout=subprocess.DEVNULL);"
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    result = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return int(result.stdout.splitlines()[-1]) / 1024


def write_results(name: str, results: dict[str, Any]) -> None:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept |= {**results, "machine": describe_machine()}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(kept, indent=2, ensure_ascii=False))
