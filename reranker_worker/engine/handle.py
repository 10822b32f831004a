"""The front's handle on one engine process: spawn, write frames, read frames, take its log, kill, reap. No policy.

The engine is exec'd, never forked from a running program; it inherits exactly its four descriptors and an allow-listed environment.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reranker_worker.engine.frames import FrameReader, pack

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reranker_worker.config import Config

_ROOT = str(Path(__file__).resolve().parents[2])
_START = "import sys; sys.path[:] = [sys.argv[1], *filter(None, sys.path)]; from reranker_worker.engine.child import main; main(sys.argv[2:])"
_PIPE_BYTES = 1 << 20
_READ_BYTES = 1 << 20
_MAX_LOG_LINE_BYTES = 3000
_F_SETPIPE_SZ = 1031
_ALLOWED_NAMES = frozenset(
    (
        "PATH HOME USER LOGNAME LANG LANGUAGE TZ TMPDIR TEMP TMP VIRTUAL_ENV LD_LIBRARY_PATH LD_PRELOAD DYLD_LIBRARY_PATH XDG_CACHE_HOME "
        "HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY http_proxy https_proxy no_proxy all_proxy "
        "SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE"
    ).split()
)
_ALLOWED_PREFIXES = tuple(
    (
        "LC_ PYTHON HF_ HUGGINGFACE_ TRANSFORMERS_ TORCH PYTORCH_ CUDA_ NVIDIA_ HIP_ ROCR_ ZE_ ONEAPI_ OMP_ GOMP_ KMP_ MKL_ DNNL_ "
        "ONEDNN_ MALLOC_ COVERAGE_"
    ).split()
)
_SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")


def engine_environment(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """What the engine sees of the environment. The hub's secrets only when a download may be needed."""
    allowed = {name: value for name, value in environ.items() if name in _ALLOWED_NAMES or name.startswith(_ALLOWED_PREFIXES)}
    if config.model == "bundled" or config.local_files_only or config.backend == "fake" or os.path.isdir(config.model):
        allowed = {name: value for name, value in allowed.items() if not any(word in name for word in _SECRET_WORDS)}
    # Spinning threads cost half as much time again and more when the database beside us uses the same cores; idle they gain a seventh
    # where a pass has several threads, and nothing where it has one.
    allowed.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return allowed | {"TOKENIZERS_PARALLELISM": "false", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}


class EngineProcess:
    """One engine process at a time, started again by `start`. All descriptors are private and close-on-exec."""

    def __init__(self, config: Config, environ: Mapping[str, str]) -> None:
        self._config = config
        self._environ = engine_environment(config, environ)
        self._process: subprocess.Popen[bytes] | None = None
        self._is_early = False
        self._frames = FrameReader()
        self._unsent: deque[memoryview] = deque()
        self._log_rest = b""
        self.requests_fd = self.results_fd = self.log_fd = -1

    @property
    def pid(self) -> int | None:
        """The process id, while it runs."""
        return self._process.pid if self._process else None

    @property
    def wants_write(self) -> bool:
        """True while a frame waits for room in the pipe."""
        return bool(self._unsent)

    def start_early(self) -> None:
        """`start`, which the next call of `start` then finds done. If the machine cannot, that one tries again and raises."""
        with contextlib.suppress(OSError):
            self.start()
            self._is_early = True

    def start(self) -> None:
        """Spawn the process and send it its settings. Raises OSError when the machine cannot."""
        if self._is_early:
            self._is_early = False
            return
        self._close()
        ends: list[int] = []
        # They wait while the engine imports: one for the whole group would end it before it can ignore them (`child._isolate`).
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            for _ in range(3):
                ends += os.pipe()
            requests_r, requests_w, results_r, results_w, log_r, log_w = ends
            self._process = subprocess.Popen(  # noqa: S603  # our own interpreter, a constant program
                [sys.executable, "-c", _START, _ROOT, str(results_w), str(os.getpid())],
                stdin=requests_r,
                stdout=log_w,
                stderr=log_w,
                pass_fds=(results_w,),
                env=self._environ,
            )
        except OSError:
            for descriptor in ends:
                os.close(descriptor)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for descriptor in (requests_r, results_w, log_w):
            os.close(descriptor)
        self.requests_fd, self.results_fd, self.log_fd = requests_w, results_r, log_r
        for descriptor in (self.requests_fd, self.results_fd, self.log_fd):
            os.set_blocking(descriptor, False)
        for descriptor in (self.requests_fd, self.results_fd):
            with contextlib.suppress(OSError):  # a larger pipe saves wake-ups; not everywhere, and not needed
                fcntl.fcntl(descriptor, _F_SETPIPE_SZ, _PIPE_BYTES)
        self.send({"op": "load", "config": asdict(self._config)})

    def send(self, body: dict[str, Any]) -> None:
        """Queue a frame and write what fits now."""
        self._unsent.append(memoryview(pack(body)))
        self.flush()

    def flush(self) -> None:
        """Write what the pipe takes; a dead engine's frames are dropped (its death is reported by `results_fd`)."""
        try:
            while self._unsent:
                written = os.write(self.requests_fd, self._unsent[0])
                self._unsent[0] = self._unsent[0][written:]
                if not self._unsent[0]:
                    self._unsent.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()

    def read(self) -> list[dict[str, Any]] | None:
        """The frames that have arrived; None when the engine has closed its side. Raises FrameError for garbage."""
        try:
            data = os.read(self.results_fd, _READ_BYTES)
        except BlockingIOError:
            return []
        return self._frames.feed(data) if data else None

    def read_log(self) -> list[str]:
        """Whole lines that the engine, its libraries or their native code wrote to its streams."""
        try:
            data = os.read(self.log_fd, _READ_BYTES)
        except OSError:
            return []
        if not data:  # the end: poll must not report it for ever
            os.close(self.log_fd)
            self.log_fd = -1
        *lines, rest = (self._log_rest + data).split(b"\n")
        if len(rest) > _MAX_LOG_LINE_BYTES or not data:
            lines, rest = [*lines, rest], b""
        self._log_rest = rest
        return [line[:_MAX_LOG_LINE_BYTES].decode("utf-8", "replace") for line in lines if line.strip()]

    def kill(self) -> None:
        """SIGKILL; also ends a stopped process."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)

    def wait(self, timeout_s: float) -> None:
        """Give a killed process so long to end, so that it leaves no zombie."""
        if self._process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)

    def reap(self, timeout_s: float = 0.2) -> int:
        """Wait for the process after its pipe closed (killing it if it lingers); its return code, negative for a signal."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.wait()
        self._close()
        return code

    def _close(self) -> None:
        for descriptor in (self.requests_fd, self.results_fd, self.log_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self.requests_fd = self.results_fd = self.log_fd = -1
        self._process = None
        self._frames = FrameReader()
        self._unsent.clear()
        self._log_rest = b""
