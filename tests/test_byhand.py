"""`rerank` and `check` as a person runs them: real processes, the fake backend, and a real terminal where that matters."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from reranker_worker.backends.fake import fake_logit, fake_probability
from reranker_worker.byhand.documents import Document, split
from reranker_worker.byhand.failures import Failure
from reranker_worker.byhand.table import Row, bar, cells, cut, encoded, table, visible

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 30.0
Result = subprocess.CompletedProcess[bytes]


def command(*arguments: str, backend: str = "fake") -> list[str]:
    return [sys.executable, "-m", "reranker_worker", *arguments, *([f"--backend={backend}"] if backend else [])]


def run(*arguments: str, stdin: bytes = b"", backend: str = "fake") -> Result:
    return subprocess.run(command(*arguments, backend=backend), cwd=ROOT, input=stdin, capture_output=True, timeout=DEADLINE_S, check=False)


def on_terminal(*arguments: str, columns: int, stdin: bytes = b"") -> tuple[list[str], str]:
    """What a terminal of so many columns shows on standard output (lines) and on standard error."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environ = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")} | {"PYTHONUTF8": "1"}
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, stdin=subprocess.PIPE, stdout=theirs, stderr=subprocess.PIPE, env=environ
    )
    os.close(theirs)
    _, error = process.communicate(stdin, timeout=DEADLINE_S)
    shown = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # Linux reports the end of a terminal as an error
            break
        if not data:
            break
        shown += data
    os.close(ours)
    return shown.decode().replace("\r\n", "\n").splitlines(), error.decode()


def ranking(result: Result) -> list[dict[str, Any]]:
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def sentence(result: Result) -> str:
    """The one line on standard error; never a traceback."""
    (line,) = result.stderr.decode().splitlines()
    assert line.endswith(".")
    return line


# --- rerank in a pipe --------------------------------------------------------------------------------------------------------


def test_files_are_ranked_by_line_with_their_places_best_first(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"alpha\r\n\n  beta  \n")
    (tmp_path / "b.txt").write_text("gamma")
    rows = ranking(run("rerank", "q", str(tmp_path / "a.txt"), str(tmp_path / "b.txt")))
    places = {"alpha": "a.txt:1", "beta": "a.txt:3", "gamma": "b.txt:1"}
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert [row["score"] for row in rows] == sorted((fake_probability("q", text) for text in places), reverse=True)
    assert {row["text"]: row["source"] for row in rows} == {text: str(tmp_path / place) for text, place in places.items()}


def test_flags_may_stand_between_the_query_and_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\nb\nc\n")
    assert len(ranking(run("rerank", "--json", "q", "--top", "2", str(tmp_path / "a.txt")))) == 2


def test_standard_input_is_read_when_no_file_is_named_and_for_a_dash() -> None:
    assert [row["source"] for row in ranking(run("rerank", "q", stdin=b"one\n"))] == ["stdin:1"]
    assert [row["source"] for row in ranking(run("rerank", "q", "-", stdin=b"one\n"))] == ["stdin:1"]


def test_json_lines_keep_their_ids() -> None:
    rows = ranking(run("rerank", "q", stdin=b'{"text": "a", "id": 7}\n{"text": "b", "id": "x"}\n{"text": "c"}\n'))
    assert {row["text"]: row.get("id") for row in rows} == {"a": 7, "b": "x", "c": None}


def test_more_documents_than_one_request_takes_are_merged_into_one_ranking() -> None:
    texts = [f"document {number}" for number in range(1000)]
    flags = ("--max-documents=7", "--max-waiting-requests=2", "--max-line-bytes=1024")
    rows = ranking(run("rerank", "q", *flags, stdin="\n".join(texts).encode()))
    best = sorted(range(1000), key=lambda index: (-fake_probability("q", texts[index]), index))
    assert [row["index"] for row in rows] == best
    assert all(row["score"] == pytest.approx(fake_probability("q", row["text"])) for row in rows)


def test_raw_gives_the_logits() -> None:
    (row,) = ranking(run("rerank", "--raw", "q", stdin=b"d\n"))
    assert row["score"] == pytest.approx(fake_logit("q", "d"))


def test_nothing_but_the_ranking_is_written_when_all_is_well() -> None:
    assert run("rerank", "q", stdin=b"d\n").stderr == b""


def test_documents_of_which_only_the_beginning_counted_are_mentioned() -> None:
    result = run("rerank", "q", stdin=b"short\n" + b"word " * 2000 + b"\n")
    assert "1 of 2 documents longer than the model's 512 tokens" in sentence(result)


@pytest.mark.parametrize(
    ("arguments", "stdin", "exit_code", "words"),
    [
        ((), b"", 64, "Give the query"),
        (("  ",), b"d\n", 64, "query is empty"),
        (("q", "--top", "0"), b"d\n", 64, "--top must be"),
        (("q", "--nonsense"), b"d\n", 64, "--nonsense"),
        (("q", "--threads", "many"), b"d\n", 64, "--threads must be"),
        (("q", "/nowhere/file"), b"", 66, "/nowhere/file: there is no such file"),
        (("q", "/"), b"", 66, "this is a directory"),
        (("q",), b"", 66, "standard input held no text"),
        (("q",), b"\n \n", 66, "standard input held no text"),
        (("q",), b"good\nbad \xff\n", 65, "stdin:2: byte 5 of this line (0xff) is not UTF-8"),
        (("q",), b"a\0b\n", 65, "stdin:1: a NUL byte"),
        (("q", "--by", "jsonl"), b'{"text": "a"}\n{nonsense}\n', 65, "stdin:2: this line is not valid JSON"),
        (("q",), b'{"text": "a"}\n{"other": 1}\n', 65, "stdin:2: expected an object"),
        (("q", "--max-line-bytes=1024"), b"long " * 400, 65, "stdin:1: this document is 2,002 bytes long"),
        (("q", "--model", "fail=71&x=1"), b"d\n", 71, "told to fail"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_an_exit_code(arguments: tuple[str, ...], stdin: bytes, exit_code: int, words: str) -> None:
    result = run("rerank", *arguments, stdin=stdin)
    assert (result.returncode, result.stdout) == (exit_code, b"")
    assert words in sentence(result)


def test_a_missing_model_is_told_in_the_workers_words_and_with_its_exit_code() -> None:
    result = run("rerank", "q", "--model", "/nowhere/model", stdin=b"d\n", backend="")
    assert result.returncode == 66
    assert "'/nowhere/model' does not exist" in sentence(result)


def test_a_reader_that_has_seen_enough_ends_the_command_quietly() -> None:
    lines = b"".join(b"document %d\n" % number for number in range(5000))
    process = subprocess.Popen(command("rerank", "q"), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout:
        process.stdin.write(lines)
        process.stdin.close()
        process.stdout.readline()
    assert process.wait(DEADLINE_S) == 0
    with process.stderr as stderr:
        assert stderr.read() == b""


# --- rerank on a terminal ----------------------------------------------------------------------------------------------------


def test_a_terminal_gets_a_table_that_fits_its_width() -> None:
    stdin = ("plain\n" + "wide 漢字かな交じり文 " * 20 + "\nescape \x1b[31m bell \x07 end\n").encode()
    lines, _ = on_terminal("rerank", "q", columns=60, stdin=stdin)
    assert lines[0].split() == ["rank", "score", "source", "text"]
    assert len(lines) == 4
    assert all(cells(line) <= 60 for line in lines)
    assert any(line.endswith("…") for line in lines)
    assert not any("\x1b" in line or "\x07" in line for line in lines)
    assert any("␛[31m bell ␇" in line for line in lines)


def test_json_is_given_to_a_terminal_that_asks_for_it() -> None:
    lines, _ = on_terminal("rerank", "q", "--json", columns=60, stdin=b"d\n")
    assert [json.loads(line)["text"] for line in lines] == ["d"]


# --- documents ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "unit", "documents"),
    [
        (b"\xef\xbb\xbfa\nb", "auto", [("a", "f:1"), ("b", "f:2")]),
        (b"a\n\n\nb\nc\n\n", "paragraph", [("a", "f:1"), ("b\nc", "f:4")]),
        (b"\na\n\nb\n", "file", [("a\n\nb", "f")]),
        (b" \n", "file", []),
        (b'{"text": "a"}\n', "line", [('{"text": "a"}', "f:1")]),
        (b'{"other": "a"}\n', "auto", [('{"other": "a"}', "f:1")]),
        (b'\n{"text": "a"}\n', "auto", [("a", "f:2")]),
        ("line\u2028separator\x85\n".encode(), "auto", [("line\u2028separator", "f:1")]),
    ],
)
def test_a_file_is_split_as_asked(data: bytes, unit: str, documents: list[tuple[str, str]]) -> None:
    assert list(split(data, "f", unit)) == [Document(text, source) for text, source in documents]


@pytest.mark.parametrize("identifier", [b"true", b"1.5", b"[]"])
def test_an_id_is_a_string_or_an_integer(identifier: bytes) -> None:
    with pytest.raises(Failure, match='f:1: "id" must be'):
        list(split(b'{"text": "a", "id": %s}' % identifier, "f", "jsonl"))


# --- the table ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 漢", "plain ü 漢"),
        ("a\tb\nc\x00\x1b", "a␉b␊c␀␛"),
        ("\x7f\x9b", "␡\\x9b"),
        ("right\u202eleft\u200bnone", "right\\u202eleft\\u200bnone"),
        ("no\u00a0break", "no break"),
        ("👩\u200d💻", "👩\u200d💻"),
    ],
)
def test_characters_that_would_steer_the_terminal_are_made_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(("text", "width"), [("abc", 3), ("漢字", 4), ("e\u0301", 1), ("\uff46", 2), ("👍", 2), ("", 0)])
def test_wide_characters_take_two_columns_and_marks_none(text: str, width: int) -> None:
    assert cells(text) == width


@pytest.mark.parametrize("width", range(1, 12))
@pytest.mark.parametrize("keep_end", [False, True])
def test_text_is_cut_to_the_width_and_never_beyond(width: int, keep_end: bool) -> None:
    for text in ("abcdefghijkl", "漢字漢字漢字", "a漢b字cée\u0301"):
        assert cells(cut(text, width, keep_end=keep_end)) <= width


def test_the_bar_is_empty_for_nothing_and_full_for_all() -> None:
    assert bar(0.0) == " " * 10
    assert bar(1.0) == "█" * 10
    assert [len(bar(part / 100)) for part in range(-10, 120)] == [10] * 130


def test_a_narrow_terminal_still_gets_lines_that_fit() -> None:
    rows = [Row(1, 0.5, 0.5, "a/very/long/path/to/a/file.txt:1234", "some text that is long"), Row(2, -11.25, 0.0, "b", "")]
    for width in range(1, 100):
        assert all(cells(line) <= width for line in table(rows, width))


def test_a_terminal_without_block_elements_gets_plain_characters() -> None:
    assert encoded("█▌ a… ü\n", "ascii") == b"#= a~ \\xfc\n"


# --- check -------------------------------------------------------------------------------------------------------------------


def test_check_tells_in_words_and_ends_with_a_verdict() -> None:
    result = run("check")
    lines = result.stdout.decode().splitlines()
    assert result.returncode == 0, result.stderr
    assert lines[-1].startswith("This machine can serve")
    for label in ("software", "processors", "memory", "model", "device", "start", "scores", "speed"):
        assert any(line.startswith(label) for line in lines)


def test_check_gives_the_same_as_one_object() -> None:
    result = run("check", "--json")
    body = json.loads(result.stdout)
    assert (result.returncode, body["ok"], body["exit_code"]) == (0, True, 0)
    assert body["machine"]["threads"] >= 1
    assert body["speed"]["pairs_per_second"] > 0


@pytest.mark.parametrize("as_json", [False, True])
def test_check_says_why_not_and_what_to_do(as_json: bool) -> None:
    result = run("check", "--model=/nowhere/model", *(["--json"] if as_json else []), backend="")
    text = result.stdout.decode()
    verdict = json.loads(text)["verdict"] if as_json else text.splitlines()[-1]
    assert result.returncode == 66
    assert verdict.startswith("This machine cannot serve '/nowhere/model': ")
    assert "does not exist" in verdict
    assert " Do: " in verdict


def test_a_wrong_setting_is_a_usage_error_of_check() -> None:
    result = run("check", "--batch-size", "none")
    assert result.returncode == 64
    assert "--batch-size must be" in sentence(result)


@pytest.mark.parametrize("name", ["rerank", "check"])
def test_help_lists_the_settings(name: str) -> None:
    result = run(name, "--help", backend="")
    assert result.returncode == 0
    assert b"RERANKING_MODEL_PATH" in result.stdout
