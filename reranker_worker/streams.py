"""The descriptors of the conversation: claimed before anything can print, written by a thread that alone may block."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import stat
import struct
import termios
import threading
import time
from collections import deque
from dataclasses import dataclass

_LAST_WORDS_SECONDS = 1.0
_TIOCOUTQ = 0x5411


@dataclass(frozen=True, slots=True)
class Streams:
    """The descriptors of the conversation, private to us, and the process that started us."""

    requests_fd: int
    answers_fd: int
    host_pid: int


def claim() -> Streams:
    """Take stdin and stdout for the protocol alone, before anything else can print or read. Call it first in the process.

    Closed standard descriptors become /dev/null, or a pipe without a reader (else the next opened file would take their number), inherited
    ones above 2 are closed (hosts leak theirs), fd 1 becomes stderr for every print, library and child, fd 0 reads as empty.
    """
    host_pid = os.getppid()  # now: a host that dies while we import must be missed too
    if not os.isatty(0):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # see `Signals`; here, because a Ctrl-C may come while we import
    # An engine must not inherit that its children's ends are ignored; what would end us waits until `Signals` can drain instead.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            if descriptor == 1:
                _open_deaf()
            else:
                os.open(os.devnull, os.O_RDWR)
    _close_inherited()
    streams = Streams(os.dup(0), os.dup(1), host_pid)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return streams


def _open_deaf() -> None:
    """Make fd 1, which is closed, a pipe that nobody reads: a host without ears is noticed like one that stopped listening."""
    read_fd, write_fd = os.pipe()  # the first takes the lowest free number, which is 1
    os.dup2(write_fd, read_fd)
    os.close(write_fd)


def _close_inherited() -> None:
    directory = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    for name in os.listdir(directory):
        if name.isdigit() and int(name) > 2:
            with contextlib.suppress(OSError):  # the listing's own descriptor is gone by now
                os.close(int(name))


class AnswerWriter:
    """Writes whole lines, in order, from a thread of its own: a host that does not read stops nobody else."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lines: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._seen: tuple[int, int | None] = (0, None)
        self.unsent_bytes = 0
        self.sent_bytes = 0
        self.broken = False
        threading.Thread(target=self._write, name="answers", daemon=True).start()

    def put(self, lines: list[bytes]) -> None:
        """Queue lines."""
        with self._changed:
            self._lines.extend(lines)
            self.unsent_bytes += sum(map(len, lines))
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all is written; False when time is up or the host is gone."""
        with self._changed:
            return self._changed.wait_for(lambda: self.broken or not self.unsent_bytes, timeout_s) and not self.broken

    def made_progress(self) -> bool:
        """True when the host has read something since the last call, even in the middle of a long line."""
        seen = (self.sent_bytes, _unread_bytes(self._fd))
        changed, self._seen = seen != self._seen, seen
        return changed

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._lines))
                line = memoryview(self._lines.popleft())
            try:
                while line:
                    written = self._write_some(line)
                    line = line[written:]
                    with self._changed:
                        self.unsent_bytes -= written
                        self.sent_bytes += written
                        self._changed.notify_all()
            except OSError:
                with self._changed:
                    self.broken = True
                    self._changed.notify_all()
                return

    def _write_some(self, line: memoryview) -> int:
        try:
            return os.write(self._fd, line)
        except BlockingIOError:  # the host made the shared description non-blocking
            poll = select.poll()
            poll.register(self._fd, select.POLLOUT)
            poll.poll()
            return 0


def _unread_bytes(fd: int) -> int | None:
    """Bytes that the reader of a pipe or socket has not taken yet, where the system tells."""
    request = _TIOCOUTQ if stat.S_ISSOCK(os.fstat(fd).st_mode) else termios.FIONREAD
    try:
        return int(struct.unpack("i", fcntl.ioctl(fd, request, b"\0\0\0\0"))[0])
    except OSError:
        return None


def refuse_start(streams: Streams, error: str) -> None:
    """Tell the host in its own language why there will be no `ready`; the known host shows this text to its user."""
    from reranker_worker.logs import last_words
    from reranker_worker.protocol import Code, Refusal, error_answer, serialize

    last_words(error)
    # An argument that is no UTF-8 arrives with lone surrogates, which cannot leave.
    sentence = error.encode("ascii", "backslashreplace").decode()
    writer = AnswerWriter(streams.answers_fd)
    writer.put([serialize(error_answer(Refusal(None, Code.MODEL_LOAD_ERROR, sentence), time.time()))])
    writer.flush(_LAST_WORDS_SECONDS)
