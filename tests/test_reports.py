"""What the worker says of itself, from one snapshot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hall import INFO

from reranker_worker import reports
from reranker_worker.config import Config
from reranker_worker.metrics import Counters
from reranker_worker.protocol import Control

ENGINE = reports.EngineStatus("ready", "", 0, None, 1)
READY = reports.ready(Config(), INFO, 1500, 42)
STATUS = reports.Status(
    config=Config(),
    counters=Counters(scored=3),
    ready_body=READY,
    model_source="directory",
    model_path="/models/tiny",
    engine_versions={"runtime": "1"},
    draining=False,
    last_batch_good=True,
    log_level="DEBUG",
    uptime_ms=5.0,
    waiting_requests=1,
    waiting_pairs=2,
    waiting_bytes=3,
    oldest_in_flight_ms=4.0,
    engines=[ENGINE],
    tokens_per_ms=1.23456,
    lost_log_lines=6,
)
KINDS = {"heartbeat": "heartbeat", "live": "live", "ready": "readiness", "health": "health", "stats": "stats", "metrics": "metrics", "info": "info"}


def told(kind: str, status: reports.Status = STATUS) -> dict[str, Any]:
    return reports.control(Control(None, kind), status)


@pytest.mark.parametrize("kind", [*KINDS, "shutdown"])
def test_every_report_names_its_type_and_echoes_the_id(kind: str) -> None:
    assert reports.control(Control("x", kind), STATUS)["id"] == "x"
    assert reports.control(Control(0, kind), STATUS)["id"] == 0
    assert "id" not in told(kind)
    assert told(kind)["type"] == KINDS.get(kind, "shutdown")


def test_a_poll_for_readiness_cannot_be_taken_for_the_hello_line() -> None:
    assert told("ready") == {"type": "readiness", "ready": True}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"draining": True}, "draining"),
        ({"engines": [replace(ENGINE, state="loading")], "ready_body": None}, "loading"),
        ({"engines": [replace(ENGINE, state="waiting")]}, "restarting the engine"),
        ({"engines": []}, "restarting the engine"),
        ({"last_batch_good": False}, "the last batch failed"),
    ],
)
def test_why_it_is_not_ready_is_said_everywhere(change: dict[str, Any], reason: str) -> None:
    status = replace(STATUS, **change)
    assert told("ready", status) == {"type": "readiness", "ready": False, "reason": reason}
    assert told("health", status)["status"] == reason
    assert told("live", status)["live"] is True
    assert "reranking_ready 0.0" in told("metrics", status)["body"]


def test_stats_hold_the_known_hosts_fields_and_the_queue() -> None:
    stats = told("stats")
    for name in ("requests_processed", "total_latency_ms", "avg_latency_ms", "p50_latency_ms", "p95_latency_ms", "p99_latency_ms"):
        assert isinstance(stats[name], int | float)
    assert (stats["waiting_requests"], stats["waiting_pairs"], stats["waiting_bytes"], stats["log_lines_lost"]) == (1, 2, 3, 6)
    assert stats["engine_tokens_per_ms"] == 1.235


def test_the_heartbeat_is_the_known_hosts() -> None:
    assert told("heartbeat") == {"type": "heartbeat", "status": "alive", "requests_processed": 3}


def test_info_is_ready_with_settings_and_path_and_no_type_of_its_own() -> None:
    info = told("info")
    assert {name: info[name] for name in READY if name != "type"} == {name: value for name, value in READY.items() if name != "type"}
    assert info["model_path"] == "/models/tiny"
    assert info["settings"]["log_level"] == "DEBUG"
    assert info["versions"] == {"runtime": "1"}
    assert told("info", replace(STATUS, ready_body=None))["protocol"] == 1
    assert READY["type"] == "ready"


def test_health_tells_of_every_engine() -> None:
    assert told("health")["engines"] == [{"state": "ready", "stage": "", "in_flight_batches": 0, "progress_ms": None, "starts": 1}]
    assert told("health")["oldest_in_flight_ms"] == 4.0


@pytest.mark.parametrize(("scores", "kind"), [("probability", "probability"), ("logit", "logit"), ("model", "model:sigmoid")])
def test_the_scale_in_force_is_named(scores: str, kind: str) -> None:
    assert reports.ready(Config(scores=scores), INFO, 1, 1)["score_kind"] == kind


def test_ready_lists_every_limit_and_instruction_only_where_the_model_takes_one() -> None:
    limits = READY["limits"]
    assert limits["max_length"] == 512
    for name in ("max_line_bytes", "max_documents", "max_waiting_pairs", "max_waiting_bytes", "max_waiting_requests", "request_timeout_ms"):
        assert limits[name] == getattr(Config(), name)
    assert "instruction" not in READY["capabilities"]
    assert "instruction" in reports.ready(Config(), INFO | {"instruction": True}, 1, 1)["capabilities"]
    assert "instruction" not in reports.ready(Config(), INFO, 1, 1)["capabilities"]
