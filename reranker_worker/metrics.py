"""Counters of the worker, and their Prometheus text. Pure."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_RECENT = 1024


@dataclass(slots=True)
class Counters:
    """What happened since the start. Latencies of the last 1,024 scored requests are kept for percentiles."""

    received: int = 0
    scored: int = 0
    pairs: int = 0
    tokens: int = 0
    shared: int = 0
    truncated: int = 0
    batches: int = 0
    engine_deaths: int = 0
    latency_ms: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    _recent_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def answered(self, latency_ms: float) -> None:
        """A request was scored."""
        self.scored += 1
        self.latency_ms += latency_ms
        self._recent_ms.append(latency_ms)

    def latency(self) -> dict[str, float]:
        """The known host's latency fields, in milliseconds."""
        ordered = sorted(self._recent_ms)
        fields = {f"p{part}_latency_ms": round(_quantile(ordered, part / 100), 3) for part in (50, 95, 99)}
        average = self.latency_ms / self.scored if self.scored else 0.0
        return {"total_latency_ms": round(self.latency_ms, 3), "avg_latency_ms": round(average, 3), **fields}


def _quantile(ordered: list[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


def exposition(counters: Counters, gauges: Mapping[str, float], labels: Mapping[str, Any]) -> str:
    """Prometheus text: counters, gauges, and one `reranking_info` line with the labels."""
    lines: list[str] = []
    totals = {
        "received_total": ("Request lines received.", counters.received),
        "scored_requests_total": ("Requests answered with scores.", counters.scored),
        "pairs_total": ("Pairs scored by an engine.", counters.pairs),
        "tokens_total": ("Tokens scored, without padding.", counters.tokens),
        "shared_pairs_total": ("Pairs that took the score of an identical pair in flight.", counters.shared),
        "truncated_documents_total": ("Documents that were cut.", counters.truncated),
        "batches_total": ("Batches answered by an engine.", counters.batches),
        "engine_deaths_total": ("Engine processes that ended.", counters.engine_deaths),
        "latency_ms_total": ("Sum of the latencies of scored requests, in milliseconds.", round(counters.latency_ms, 3)),
    }
    for name, (text, value) in totals.items():
        lines += [f"# HELP reranking_{name} {text}", f"# TYPE reranking_{name} counter", f"reranking_{name} {value}"]
    lines += ["# HELP reranking_errors_total Error answers by code.", "# TYPE reranking_errors_total counter"]
    lines += [f'reranking_errors_total{{code="{code}"}} {count}' for code, count in sorted(counters.errors.items())]
    for name, value in gauges.items():
        lines += [f"# TYPE reranking_{name} gauge", f"reranking_{name} {value}"]
    pairs = ",".join(f'{name}="{_escape(str(value))}"' for name, value in labels.items())
    lines += ["# TYPE reranking_info gauge", f"reranking_info{{{pairs}}} 1"]
    return "\n".join(lines) + "\n"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
