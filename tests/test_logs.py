"""The log never blocks, loses lines rather than time, and writes one short JSON object a line."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import tty
from typing import TYPE_CHECKING

import pytest

from reranker_worker.logs import Log

if TYPE_CHECKING:
    from collections.abc import Iterator


class Reader:
    """The other end of the log."""

    def __init__(self, read_fd: int, write_fd: int, level: str = "INFO") -> None:
        self.fd = read_fd
        self.write_fd = write_fd
        self.log = Log(write_fd, level)

    def lines(self, count: int = 1) -> list[bytes]:
        """The next `count` lines; there must be no more."""
        data = b""
        while data.count(b"\n") < count:
            data += os.read(self.fd, 1 << 16)
        self.log.flush(10.0)
        os.set_blocking(self.fd, False)
        with contextlib.suppress(BlockingIOError):
            data += os.read(self.fd, 1 << 16)
        os.set_blocking(self.fd, True)
        assert data.endswith(b"\n")
        lines = data[:-1].split(b"\n")
        assert len(lines) == count
        return lines

    def records(self, count: int = 1) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.lines(count)]


@pytest.fixture
def reader() -> Iterator[Reader]:
    made = Reader(*os.pipe())
    yield made
    os.close(made.fd)


def test_a_record_is_one_json_object_with_its_source(reader: Reader) -> None:
    reader.log.write("WARNING", "worker", "text")
    (record,) = reader.records()
    assert isinstance(record.pop("time"), float)
    assert record == {"level": "WARNING", "source": "worker", "message": "text"}


def test_records_stay_in_order(reader: Reader) -> None:
    for number in range(100):
        reader.log.write("INFO", "worker", str(number))
    assert [record["message"] for record in reader.records(100)] == [str(number) for number in range(100)]


def test_only_records_of_the_level_and_above_are_written(reader: Reader) -> None:
    for level, expected in {"DEBUG": 4, "INFO": 3, "WARNING": 2, "ERROR": 1}.items():
        reader.log.level = level
        for other in ("DEBUG", "INFO", "WARNING", "ERROR"):
            reader.log.write(other, "worker", "x")
        reader.lines(expected)


HOSTILE = [
    "\n", "\r\n", "\x1b[31m", "\0", "\u2028", "\x85", "😀", "\ud800", '"}\n{"level":"ERROR"', "\\", "\x7f",
    "x" * 100_000, "\x01" * 5000, "😀" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_makes_a_second_line_a_control_character_or_a_line_over_4_kib(reader: Reader, text: str) -> None:
    reader.log.write("INFO", "worker", f"before {text} after")
    (line,) = reader.lines()
    assert len(line) + 1 <= 4096
    assert line.isascii()
    assert all(byte >= 32 for byte in line)
    assert json.loads(line)["message"].startswith("before")


def test_a_pipe_that_nobody_reads_never_blocks_and_the_lost_lines_are_counted(reader: Reader) -> None:
    for _ in range(5000):
        reader.log.write("INFO", "worker", "x" * 1000)
    assert reader.log.lost_lines > 4000
    reader.log.flush(0.01)  # returns although nobody reads
    lost = reader.log.lost_lines
    reader.lines(5000 - lost)
    assert reader.log.lost_lines == lost


def test_the_log_goes_on_when_somebody_reads_again(reader: Reader) -> None:
    for _ in range(1000):
        reader.log.write("INFO", "worker", "x" * 1000)
    reader.lines(1000 - reader.log.lost_lines)
    reader.log.write("INFO", "worker", "again")
    assert [record["message"] for record in reader.records()] == ["again"]


def test_a_reader_that_left_costs_lines_and_nothing_else() -> None:
    read_fd, write_fd = os.pipe()
    log = Log(write_fd, "INFO")
    os.close(read_fd)
    for _ in range(10):
        log.write("INFO", "worker", "x")
    log.flush(10.0)
    assert log.lost_lines == 10


def test_a_terminal_gets_plain_text_without_control_characters() -> None:
    host, terminal = pty.openpty()
    tty.setraw(terminal)
    reader = Reader(host, terminal)
    reader.log.write("INFO", "worker", "red \x1b[31m\n\u2028 é")
    assert reader.lines() == [b"info: worker: red \\x1b[31m\\x0a\\x2028 \\xe9"]
    os.close(host)
