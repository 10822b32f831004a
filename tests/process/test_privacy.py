"""What must not leave: request text in logs, files, arguments or errors; secrets of the environment; broken log records."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from host import Host, request
from states import while_importing

MARKER = "zq7marker"
HOSTILE = '\x1b[31mred\x1b[0m \r\n {"level":"ERROR"} \u2028\u2029\u0085 \x00\x07\x7f \U0001f600 \u202e'


def check_log(errors: bytes) -> list[dict]:
    """Every stderr line is one JSON object of at most 4 KiB without a control character."""
    *lines, rest = errors.split(b"\n")
    assert rest == b""
    records = []
    for line in lines:
        assert len(line) + 1 <= 4096
        assert all(32 <= byte < 128 for byte in line), line
        record = json.loads(line)
        assert set(record) == {"time", "level", "source", "message"}
        records.append(record)
    return records


def stop(host: Host) -> list[dict]:
    host.close_stdin()
    host.wait_exit()
    return check_log(bytes(host.errors))


# --- log injection -------------------------------------------------------------------------------------------------------------


def test_hostile_ids_and_types_never_break_a_log_record(spawn):
    host = spawn("--log-level", "DEBUG")
    host.wait_ready()
    host.send(
        request(["a"], id=HOSTILE),
        {"type": HOSTILE, "id": HOSTILE},
        {"type": "cancel", "target": HOSTILE, "id": HOSTILE},
        {"type": "configure", "log_level": HOSTILE},
        request(["fake:raise " + HOSTILE], HOSTILE, id="r"),
        request(["fake:kill 9 " + HOSTILE], HOSTILE, id="k"),
        HOSTILE.encode() + b"\n",
    )
    assert len(host.read_lines(8)) == 8  # the hostile text holds a line end
    assert stop(host)


@pytest.mark.parametrize("name", ["red\x9b31m\u2028\x7f", "x" * 60_000, "\U0001f600" * 9000, '"}\\"{'], ids=["escapes", "long", "wide", "quotes"])
def test_a_hostile_model_name_never_breaks_a_log_record(spawn, name):
    host = spawn("--model", name)
    assert host.wait_ready()["model"] == name
    records = stop(host)
    assert any(record["message"].startswith("ready: ") for record in records)


def test_hostile_bytes_of_native_code_never_break_a_log_record(spawn, tmp_path):
    noise = r"bytes(range(256)) * 40 + b'\n' + b'z' * 50_000 + b'\r\n' + b'\xf0\x9f' * 3000"
    host = spawn(env=while_importing(tmp_path, f"if sys.argv[0] == '-c': os.write(2, {noise})"))
    host.wait_ready()
    assert sum(record["source"] == "engine" for record in stop(host)) > 10


# --- request text --------------------------------------------------------------------------------------------------------------


def faulty_lines() -> list[bytes]:
    """One line for each way in which a request can fail, each with its own marker."""
    deadly = ["fake:kill 9", "fake:exit 3"]
    mild = ["fake:raise", "fake:nan", "fake:oom", "fake:oom1", "fake:print", "fake:sleep 1"]
    lines = [json.dumps(request(["x", f"{fault} {MARKER}-f{n}"], f"{MARKER}-q{n}")) for n, fault in enumerate(mild + deadly)]
    lines += [json.dumps(request([f"fake:hang {MARKER}-h"], timeout_ms=300))]
    lines += [
        json.dumps(body)
        for body in (
            {"query": 5, "documents": [f"{MARKER}-a"]},
            {"query": f"{MARKER}-b", "documents": {f"{MARKER}-c": 1}},
            {"query": f"{MARKER}-d", "documents": [f"{MARKER}-e", 7]},
            {"type": f"{MARKER}-t"},
            {"type": "score", "pairs": [[f"{MARKER}-g"]]},
            {"type": "configure", "log_level": f"{MARKER}-l"},
            {"id": f"{MARKER}-" + "i" * 200, "query": "q", "documents": []},
            {"query": f"{MARKER}-j", "documents": ["a"], "top_k": f"{MARKER}-k"},
            {"query": f"{MARKER}-m " * 2000, "documents": ["a"]},
            {"query": "q", "documents": [f"{MARKER}-n"] * 1001},
        )
    ]
    lines += [f'{{"query":"{MARKER}-o","documents":["{MARKER}-p"]', f"{MARKER}-r", f'{{"query":"\\ud800 {MARKER}-s","documents":[]}}']
    broken = f'{{"query":"{MARKER}-u'.encode() + b'\xff","documents":[]}\n'
    return [line.encode() + b"\n" for line in lines] + [broken]


def test_no_text_of_two_thousand_requests_and_all_faults_leaves_except_in_answers(spawn, tmp_path):
    places = {name: tmp_path / name for name in ("cwd", "tmp", "home")}
    for place in places.values():
        place.mkdir()
    env = {"TMPDIR": str(places["tmp"]), "HOME": str(places["home"]), "RERANKING_ENGINES": "2", "RERANKING_LOG_LEVEL": "DEBUG"}
    host = spawn(env=env, cwd=places["cwd"], setup="resource.setrlimit(resource.RLIMIT_CORE, (1 << 30, 1 << 30))")
    host.wait_ready()
    texts = [f"{MARKER}-{n}" for n in range(2000)]
    for start in range(0, 2000, 500):
        host.queue(*(request([text, "other"], f"{MARKER} query {n}") for n, text in enumerate(texts[start : start + 500])))
        assert all("scores" in answer for answer in host.read_lines(500))
    for line in faulty_lines():
        host.send(line)
        answer = host.read_line(15)
        assert MARKER not in answer.get("error", ""), answer
    for kind in ("stats", "health", "info", "metrics", "live", "ready"):
        assert MARKER not in json.dumps(host.ask({"type": kind}))
    for pid in (host.pid, *host.engine_pids()):
        assert MARKER.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert core_limits(pid) == ("0", "0"), "a core dump would hold documents"
    records = stop(host)
    assert len(records) > 5
    assert MARKER not in json.dumps(records)
    for root, _, names in os.walk(tmp_path):
        for name in names:
            assert MARKER.encode() not in Path(root, name).read_bytes()


def test_serving_with_onnx_runtime_leaves_nothing_in_the_home_directory(spawn, tmp_path):
    """Its wheels write an identifier of the device there, for their maker's telemetry, unless they are told not to."""
    host = spawn("--backend", "onnx", backend=None, env={"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")})
    host.wait_ready()
    assert "scores" in host.ask(request(["a document"], "a query"))
    stop(host)
    assert list(tmp_path.iterdir()) == []


def core_limits(pid: int) -> tuple[str, ...]:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return tuple(next(line for line in lines if line.startswith("Max core file size")).split()[4:6])


# --- secrets -------------------------------------------------------------------------------------------------------------------

SECRETS = (
    "HF_TOKEN HUGGING_FACE_HUB_TOKEN HUGGINGFACE_HUB_TOKEN HUGGINGFACE_API_KEY HF_API_TOKEN AWS_SECRET_ACCESS_KEY OPENAI_API_KEY "
    "DATABASE_PASSWORD PGPASSWORD SSH_AUTH_SOCK RERANKING_SOMETHING LD_AUDIT_KEY"
).split()


def test_secrets_of_the_environment_reach_neither_the_engine_nor_the_log_nor_an_answer(spawn):
    host = spawn("--log-level", "DEBUG", env={name: f"{MARKER}-{name}" for name in SECRETS} | {"LC_ALL": "C.UTF-8"})
    host.wait_ready()
    host.send(request(["fake:exit 1"]), request(["fake:print"]), {"type": "info"}, {"type": "health"}, {"type": "stats"}, {"type": "metrics"})
    host.read_lines(6)
    try:
        seen = Path(f"/proc/{host.wait_engines()[0]}/environ").read_bytes()
    except PermissionError:
        pytest.skip("only root can read the environment of an undumpable process")
    names = {entry.partition(b"=")[0].decode() for entry in seen.split(b"\0") if entry}
    assert not names & set(SECRETS)
    assert {"PATH", "LC_ALL", "TOKENIZERS_PARALLELISM"} <= names
    assert MARKER.encode() not in seen
    assert MARKER.encode() not in host.raw
    assert MARKER not in json.dumps(stop(host))
