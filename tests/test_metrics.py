"""Counters, percentiles, and a Prometheus text that a strict reader accepts."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from reranker_worker.metrics import Counters, exposition

SAMPLE = re.compile(r'^([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\[\\"n])*",?)*)\})? (-?[0-9.e+-]+)$')
LABEL = re.compile(r'([a-z_]+)="((?:[^"\\\n]|\\[\\"n])*)"')


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Parse the exposition; every line must be a HELP, a TYPE or a sample of the family named last."""
    assert text.endswith("\n")
    family, types, found = "", {}, {}
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            family = line.split(" ")[2]
        elif line.startswith("# TYPE "):
            _, _, family, kind = line.split(" ")
            assert family not in types, f"{family} twice"
            types[family] = kind
            assert (kind == "counter") == family.endswith("_total")
        else:
            match = SAMPLE.match(line)
            assert match, line
            assert match[1] == family
            key = (match[1], tuple(LABEL.findall(match[2] or "")))
            assert key not in found
            found[key] = float(match[3])
    return found


def test_all_counters_and_gauges_are_told_with_their_values() -> None:
    counters = Counters(received=9, scored=2, pairs=3, tokens=4, shared=5, truncated=6, batches=7, engine_deaths=8)
    counters.answered(1.5)
    counters.errors["OVERLOADED"] += 2
    counters.errors["INVALID_JSON"] += 1
    told = samples(exposition(counters, {"ready": 1.0, "waiting_pairs": 12.0}, {"version": "1"}))
    assert {name.removeprefix("reranking_"): value for (name, labels), value in told.items() if not labels} == {
        "received_total": 9,
        "scored_requests_total": 3,
        "pairs_total": 3,
        "tokens_total": 4,
        "shared_pairs_total": 5,
        "truncated_documents_total": 6,
        "batches_total": 7,
        "engine_deaths_total": 8,
        "latency_ms_total": 1.5,
        "ready": 1,
        "waiting_pairs": 12,
    }
    assert told["reranking_errors_total", (("code", "OVERLOADED"),)] == 2
    assert told["reranking_errors_total", (("code", "INVALID_JSON"),)] == 1
    assert told["reranking_info", (("version", "1"),)] == 1


def test_the_text_of_a_fresh_worker_is_valid() -> None:
    assert samples(exposition(Counters(), {}, {}))["reranking_received_total", ()] == 0


def test_labels_are_escaped() -> None:
    told = samples(exposition(Counters(), {}, {"model": 'a"b\\c\nd', "revision": None}))
    assert ("reranking_info", (("model", 'a\\"b\\\\c\\nd'), ("revision", "None"))) in told


def test_percentiles_of_nothing_are_zero() -> None:
    assert set(Counters().latency().values()) == {0.0}


def test_percentiles_and_average_are_those_of_the_latencies() -> None:
    counters = Counters()
    for milliseconds in range(100, 0, -1):
        counters.answered(float(milliseconds))
    latency = counters.latency()
    assert latency["total_latency_ms"] == 5050
    assert latency["avg_latency_ms"] == 50.5
    assert latency["p50_latency_ms"] == pytest.approx(50, abs=1)
    assert latency["p95_latency_ms"] == pytest.approx(95, abs=1)
    assert latency["p99_latency_ms"] == pytest.approx(99, abs=1)
    order = [latency[f"p{part}_latency_ms"] for part in (50, 95, 99)]
    assert all(low <= high for low, high in pairwise(order))


def test_only_recent_latencies_count_for_percentiles_but_all_for_the_sum() -> None:
    counters = Counters()
    for _ in range(5000):
        counters.answered(1000.0)
    for _ in range(1024):
        counters.answered(1.0)
    assert counters.latency()["p99_latency_ms"] == 1.0
    assert counters.latency()["total_latency_ms"] == 5_001_024.0
    assert counters.scored == 6024
