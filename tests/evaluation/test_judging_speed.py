"""A small version of benchmarks/judging.py."""

import importlib.util
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "judging.py"


def test_judging_keeps_the_server_busy_and_the_client_idle():
    spec = importlib.util.spec_from_file_location("judging_benchmark", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = benchmark.measure(judgments=100, latency=0.4, concurrency=10)
    assert found["over_limit"] < 1.25
    assert found["cpu_ms_per_call"] < 6
    assert found["resumed_seconds"] < 2
