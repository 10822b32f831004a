"""Settings: one frozen dataclass whose fields make the flags and the `RERANKING_*` variables. The only reader of the environment.

A flag wins over its variable, a variable over the default. An unknown flag, an unparsable or out-of-range value is a
`ConfigError`: a sentence that names the setting and the way out (exit code 64).
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MIB = 1024 * 1024
_PREFIX = "RERANKING_"
_DESCRIPTION = "Rerank documents: one JSON request a line on stdin, one JSON answer a line on stdout. A flag wins over its variable."
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off", ""}


class ConfigError(Exception):
    """A setting is wrong; the text names it and says what is allowed."""


def _setting(
    default: Any,
    text: str,
    *,
    unit: str = "",
    low: int | None = None,
    high: int | None = None,
    choices: Sequence[str] = (),
    env: str = "",
    pattern: str = "",
) -> Any:
    """A field with what `--help`, the README table and validation need."""
    meta = {"text": text, "unit": unit, "low": low, "high": high, "choices": tuple(choices), "env": env, "pattern": pattern}
    return field(default=default, metadata=meta)


@dataclass(frozen=True, slots=True)
class Config:
    """Every setting of the worker. Units stand in the names; 0 means "decide yourself" where the text says so."""

    model: str = _setting("bundled", "model: `bundled`, a local directory, or a hub id such as org/name", env="RERANKING_MODEL_PATH")
    model_revision: str = _setting("", "commit, tag or branch of a hub model (empty: the cache's main)")
    local_files_only: bool = _setting(False, "never touch the network: a hub model must already be in the cache")
    trust_remote_code: bool = _setting(False, "allow a model that brings its own Python code (runs as this user)")
    allow_pickle: bool = _setting(False, "allow pickled weights (.bin, .pt), which can run code when loaded")
    relevance_label: str = _setting("", "for a model with several labels: the name or index of the label that means relevant")
    scores: str = _setting(
        "probability",
        "scale of `scores`: probability in [0, 1], the raw logit, or exactly what the model's own predict gives",
        choices=("probability", "logit", "model"),
    )
    artefacts: str = _setting("~/.cache/reranker-worker", "directory of prewarmed artefacts, which are found by the model's name")
    backend: str = _setting(
        "auto",
        "what computes the scores: onnx is the fast CPU default, torch takes any model and device (fake: a hash of the text, for tests of hosts)",
        choices=("auto", "torch", "onnx", "openvino", "fake"),
    )
    device: str = _setting("auto", "auto, cpu, cuda, cuda:N, mps, xpu or xpu:N", pattern=r"auto|cpu|mps|(cuda|xpu)(:\d{1,3})?")
    dtype: str = _setting(
        "auto",
        "precision (auto: float32, unless the model was prewarmed with another; int8 needs a prewarmed model)",
        choices=("auto", "float32", "bfloat16", "float16", "int8"),
    )
    threads: int = _setting(0, "CPU threads of one engine (0: usable CPUs by affinity and cgroup quota, shared by the engines)", low=0, high=1024)
    engines: int = _setting(1, "engine processes, each with its own copy of the model", low=1, high=64)
    batch_size: int = _setting(32, "most pairs in one forward pass", unit="pairs", low=1, high=4096)
    max_pass_tokens: int = _setting(0, "most padded tokens in one forward pass (0: by device)", unit="tokens", low=0, high=1 << 22)
    max_batch_pairs: int = _setting(256, "most pairs in one send to an engine", unit="pairs", low=1, high=65536)
    batch_target_ms: int = _setting(
        50,
        "aimed time of one batch: the grain of cancelling, deadlines and fairness (one request takes up to four, with one thread two)",
        unit="ms",
        low=1,
        high=60_000,
    )
    max_length: int = _setting(0, "most tokens of one pair (0: the model's limit)", unit="tokens", low=0, high=1 << 20)
    max_line_bytes: int = _setting(4 * MIB, "longest request line", unit="bytes", low=1024, high=64 * MIB)
    max_documents: int = _setting(1000, "most documents in one request", unit="documents", low=1, high=100_000)
    max_waiting_pairs: int = _setting(20_000, "most pairs admitted and not yet answered", unit="pairs", low=1, high=10_000_000)
    max_waiting_bytes: int = _setting(32 * MIB, "most text admitted and not yet answered", unit="bytes", low=1024, high=4096 * MIB)
    max_waiting_requests: int = _setting(1024, "most requests admitted and not yet answered", unit="requests", low=1, high=1_000_000)
    max_unsent_bytes: int = _setting(8 * MIB, "most answer bytes held for a host that does not read", unit="bytes", low=64 * 1024, high=1024 * MIB)
    write_timeout_ms: int = _setting(30_000, "exit 74 when the host has read nothing for so long", unit="ms", low=100, high=3_600_000)
    request_timeout_ms: int = _setting(
        30_000, "answer DEADLINE_EXCEEDED after so long (keep it below the host's own limit)", unit="ms", low=1, high=3_600_000
    )
    start_timeout_ms: int = _setting(60_000, "give up a start that has made no progress for so long", unit="ms", low=100, high=3_600_000)
    engine_stall_ms: int = _setting(30_000, "kill an engine that has finished no pass for so long", unit="ms", low=100, high=3_600_000)
    drain_timeout_ms: int = _setting(5_000, "time to finish accepted requests when stopping", unit="ms", low=0, high=3_600_000)
    log_level: str = _setting("INFO", "least severe log line written to stderr", choices=("DEBUG", "INFO", "WARNING", "ERROR"))


def env_name(name: str) -> str:
    """The environment variable of a field."""
    return str(_field(name).metadata["env"] or _PREFIX + name.upper())


def flag_name(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


def misnamed(environ: Iterable[str]) -> list[str]:
    """A sentence for each variable that looks like a setting's and is none. Others that begin like ours are the host's own business."""
    known = {env_name(item.name).removeprefix(_PREFIX) for item in fields(Config)}
    unknown = sorted({name.removeprefix(_PREFIX) for name in environ if name.startswith(_PREFIX)} - known)
    if not unknown:
        return []
    import difflib

    near = [(name, difflib.get_close_matches(name, known, n=1)) for name in unknown]
    return [f"{_PREFIX}{name} is no setting and is ignored; did you mean {_PREFIX}{match[0]}?" for name, match in near if match]


def load_config(argv: Sequence[str], environ: Mapping[str, str], *, prog: str = "reranking_server.py") -> Config:
    """Settings from flags and environment; raises ConfigError, and SystemExit(0) for --help."""
    parser = _Parser(prog=prog, allow_abbrev=False, description=_DESCRIPTION, formatter_class=_HelpFormatter)
    add_flags(parser)
    return from_flags(parser.parse_args(list(argv)), environ)


def add_flags(parser: argparse.ArgumentParser, names: Iterable[str] | None = None) -> None:
    """Add the settings' flags (all, or the named ones) to a parser; the values stay strings until `from_flags`."""
    for item in fields(Config):
        if names is not None and item.name not in names:
            continue
        is_switch = isinstance(item.default, bool)
        parser.add_argument(
            flag_name(item.name),
            dest=item.name,
            metavar=_metavar(item.name),
            default=None,
            help=f"{item.metadata['text']} (default {_shown(item.default)}; {env_name(item.name)})",
            **({"nargs": "?", "const": "true"} if is_switch else {}),  # type: ignore[arg-type]  # argparse overloads
        )


def from_flags(namespace: argparse.Namespace, environ: Mapping[str, str]) -> Config:
    """Settings from parsed flags over the environment over the defaults; raises ConfigError."""
    changes: dict[str, Any] = {}
    for item in fields(Config):
        raw = getattr(namespace, item.name, None)
        source = flag_name(item.name)
        if raw is None:
            raw, source = environ.get(env_name(item.name)), env_name(item.name)
        if raw is not None and not (raw == "" and source.startswith(_PREFIX)):
            changes[item.name] = parse_value(item.name, raw, source)
    return replace(Config(), **changes)


def parse_value(name: str, raw: str, source: str) -> Any:
    """One value from its text; raises ConfigError naming `source` and what is allowed."""
    item = _field(name)
    default, meta = item.default, item.metadata
    if isinstance(default, bool):
        if raw.strip().lower() not in _TRUE | _FALSE:
            raise ConfigError(f"{source} must be true or false, not {raw!r}.")
        return raw.strip().lower() in _TRUE
    if isinstance(default, int):
        return _integer(raw, source, meta)
    if meta["choices"]:
        match = [choice for choice in meta["choices"] if choice.lower() == raw.strip().lower()]
        if not match:
            raise ConfigError(f"{source} must be one of {', '.join(meta['choices'])}, not {raw!r}.")
        return match[0]
    if meta["pattern"] and not re.fullmatch(meta["pattern"], raw.strip().lower()):
        raise ConfigError(f"{source} must be {meta['text']}, not {raw[:64]!r}.")
    if raw == "" == default:
        return raw
    if not raw or any(ord(c) < 32 or 0xD800 <= ord(c) <= 0xDFFF for c in raw):
        raise ConfigError(f"{source} must be a non-empty UTF-8 text without control characters.")
    return raw


def _integer(raw: str, source: str, meta: Mapping[str, Any]) -> int:
    unit = f" {meta['unit']}" if meta["unit"] else ""
    allowed = f"a whole number from {meta['low']} to {meta['high']}{unit}"
    try:
        value = int(raw)
    except ValueError:
        raise ConfigError(f"{source} must be {allowed}, not {raw[:64]!r}.") from None
    if not meta["low"] <= value <= meta["high"]:
        raise ConfigError(f"{source} must be {allowed}, not {value}.")
    return value


def settings_table() -> list[tuple[str, str, str, str]]:
    """(flag, variable, default, text) of every setting, for the README and `--help`."""
    return [(flag_name(f.name), env_name(f.name), _shown(f.default), f.metadata["text"]) for f in fields(Config)]


def _field(name: str) -> Any:
    return next(item for item in fields(Config) if item.name == name)


def _metavar(name: str) -> str:
    meta = _field(name).metadata
    return "{" + ",".join(meta["choices"]) + "}" if meta["choices"] else (meta["unit"] or "VALUE").upper()


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return str(default) if default != "" else "empty"


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)


class _Parser(argparse.ArgumentParser):
    """argparse, except that a usage error is a ConfigError (exit 64), not exit 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[0].upper()}{message[1:]}. Run {self.prog} --help for the list of flags.")
