"""The chaos host: runs random scenarios against worker processes and holds every answer to the promises of the wire."""

from __future__ import annotations

import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.chaos.driver import WorkerProcess
from tests.chaos.expected import Expected, Ledger, ViolationError, parse_answer
from tests.chaos.scenario import Generator, Scenario, Step

RUN_SECONDS = 25.0
EXIT_SECONDS = 8.0  # drain_timeout_ms and some
TREE_SECONDS = 1.5
MOST_RUNS_PER_PROCESS = 40
MOST_DEATHS = 1  # five within a minute mean a storm, and one run may cause three
DRAINED, DRAINED_INCOMPLETELY, IO_ERROR, SECOND_SIGNAL = 0, 75, 74, 143


@dataclass
class Report:
    """What a number of runs showed."""

    runs: int = 0
    answers: int = 0
    processes: int = 0
    engine_deaths: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Take another report's figures in."""
        self.runs += other.runs
        self.answers += other.answers
        self.processes += other.processes
        self.engine_deaths += other.engine_deaths
        self.faults += other.faults
        self.failures += other.failures


class Run:
    """One scenario against one process."""

    def __init__(self, scenario: Scenario, worker: WorkerProcess) -> None:
        self.scenario = scenario
        self.worker = worker
        self.ledger = Ledger()
        self.deaths = 0
        self.deadline = time.monotonic() + RUN_SECONDS

    def go(self) -> None:
        """Play the steps and check everything; raises ViolationError."""
        worker = self.worker
        worker.on_line = self.ledger.answered
        if not worker.pump(RUN_SECONDS, lambda: worker.ready):
            raise ViolationError("no `ready`")
        for step in self.scenario.steps[: -1 if self.scenario.end != "none" else None]:
            self._step(step)
        worker.paused, worker.read_bytes = False, 65536
        if self.scenario.end != "none":
            self._end(self.scenario.end, self.scenario.steps[-1])
            return
        self._settle()
        self._check_rest()

    def _check_rest(self) -> None:
        """Nothing may be left inside a worker that has answered everything; any line but the two asked for is one too many."""
        seen: list[dict[str, object]] = []
        tag = f"end{self.scenario.seed}"

        def note(line: bytes) -> None:
            seen.append(parse_answer(line))
            self.ledger.answered(line)

        self.worker.on_line = note
        for kind in ("health", "stats"):
            self.ledger.sent(Expected(kind, f"{tag}.{kind}"))
            self._write(b'{"type":"%s","id":"%s.%s"}\n' % (kind.encode(), tag.encode(), kind.encode()))
        if not self.worker.pump(RUN_SECONDS, lambda: len(seen) == 2):
            raise ViolationError("the worker does not answer control requests")
        health, stats = seen
        if any(stats[name] for name in ("waiting_requests", "waiting_pairs", "waiting_bytes")):
            raise ViolationError(f"everything is answered, but the worker counts as waiting: {stats}")
        if health["waiting_requests"]:
            raise ViolationError("health counts requests that are answered")
        self.deaths = int(str(stats["engine_deaths"]))
        self.worker.on_line = None

    def _step(self, step: Step) -> None:
        worker, number = self.worker, step.number
        if step.name == "send":
            self._send(step)
        elif step.name == "pause_reading":
            worker.paused = True
        elif step.name == "slow_reading":
            worker.paused, worker.read_bytes = False, number
        elif step.name == "settle":
            worker.paused = False
            self._settle()
        elif step.name == "front_stop_cont":
            worker.signal(signal.SIGSTOP)
            worker.pump(number / 5000)
            worker.signal(signal.SIGCONT)
        else:
            self._engine_fault(step)
        worker.pump(step.gap_seconds)

    def _engine_fault(self, step: Step) -> None:
        name, number = step.name, step.number
        engines = self.worker.engines()
        self._send(step)
        self.worker.pump(number / 2000)
        if not engines:  # dead and not yet started again
            return
        engine = engines[number % len(engines)]
        if name == "engine_stop_cont":
            self.worker.signal(signal.SIGSTOP, engine)
            self.worker.pump(number / 100)
            self.worker.signal(signal.SIGCONT, engine)
        else:
            self.worker.signal({"engine_kill": signal.SIGKILL, "engine_segv": signal.SIGSEGV, "engine_stop": signal.SIGSTOP}[name], engine)

    def _send(self, step: Step) -> None:
        for line in step.lines:
            if line.expected is not None:
                self.ledger.sent(line.expected)
        data = b"".join(line.data for line in step.lines)
        for start, stop in zip([0, *step.cuts], [*step.cuts, len(data)], strict=True):
            self._write(data[start:stop])
            if step.cuts:
                self.worker.pump(0.0002)

    def _write(self, data: bytes) -> None:
        self.worker.write(data, self.deadline)

    def _settle(self) -> None:
        if not self.worker.pump(max(0.1, self.deadline - time.monotonic()), lambda: not self.ledger.open):
            raise ViolationError(f"lost, no answer within {RUN_SECONDS:g} s: {self.ledger.open[:10]}")

    def _end(self, end: str, step: Step) -> None:
        worker, ledger = self.worker, self.ledger
        allowed = {DRAINED}
        if self.scenario.may_be_incomplete:
            allowed.add(DRAINED_INCOMPLETELY)
            for item in self.scenario.steps:
                for expected in (part for line in item.lines if line.expected for part in line.expected.every()):
                    expected.codes.add("SHUTTING_DOWN")
        self._send(step)
        if end.startswith("eof"):
            worker.close_stdin()
        elif end == "sigterm":
            worker.signal(signal.SIGTERM)
        elif end == "sighup":
            worker.signal(signal.SIGHUP)
        elif end == "sigterm_twice":
            allowed |= {SECOND_SIGNAL, DRAINED_INCOMPLETELY}
            worker.signal(signal.SIGTERM)
            worker.pump(0.002)
            worker.signal(signal.SIGTERM)
        elif end == "host_stops_reading":
            allowed = {IO_ERROR}
            worker.close_stdout()
        elif end == "front_killed":
            allowed = {-signal.SIGKILL}
            worker.signal(signal.SIGKILL)
        if end in ("sigterm_twice", "host_stops_reading", "front_killed"):
            ledger.excuse_all()
        self._check_exit(allowed)

    def _check_exit(self, allowed: set[int]) -> None:
        worker = self.worker
        killed = -signal.SIGKILL in allowed
        try:
            worker.pump(EXIT_SECONDS, lambda: worker.finished)
        except ViolationError:
            if not killed:  # only a killed front may leave half a line
                raise
        code = worker.exit_code(0.5)
        if code is None:
            raise ViolationError(f"still running {EXIT_SECONDS:g} s after it was asked to leave")
        if code not in allowed:
            raise ViolationError(f"exit code {code} where only {sorted(allowed)} are right")
        if self.ledger.open:
            raise ViolationError(f"left without an answer to {self.ledger.open[:10]}")
        if code == DRAINED_INCOMPLETELY and not self.ledger.shutting_down:
            raise ViolationError("exit code 75 although nothing was left")
        left = worker.left_over(TREE_SECONDS)
        if left:
            raise ViolationError(f"processes {left} are left {TREE_SECONDS:g} s after the exit")


class Chaos:
    """Plays runs; keeps one process per profile as long as the faults allow."""

    def __init__(self) -> None:
        self.report = Report()
        self._workers: dict[str, WorkerProcess] = {}
        self._served: dict[str, list[int]] = {}
        self._spares: dict[str, WorkerProcess] = {}  # starting while other runs play

    def play(self, seed: int) -> bool:
        """One run; False (and a line in the report) when a promise was broken."""
        scenario = Generator(seed).scenario()
        worker = self._worker(scenario.profile)
        self._served[scenario.profile].append(seed)
        run = Run(scenario, worker)
        failure = ""
        try:
            run.go()
        except ViolationError as violation:
            failure = str(violation)
        self.report.runs += 1
        self.report.answers += run.ledger.answers
        self.report.faults.update(scenario.faults)
        if failure:
            self.report.failures.append(self._described(scenario, failure))
        if failure or scenario.end != "none" or run.deaths > MOST_DEATHS or worker.served >= MOST_RUNS_PER_PROCESS:
            self.report.engine_deaths += run.deaths
            self._retire(scenario.profile)
            self._spares[scenario.profile] = WorkerProcess(scenario.profile)
        return not failure

    def _described(self, scenario: Scenario, failure: str) -> str:
        earlier = self._served[scenario.profile]
        again = "python -m tests.chaos --runs 1 --seed"
        text = f"seed {scenario.seed} ({scenario.profile}; {', '.join(sorted(scenario.faults))}): {failure}\n  replay: {again} {scenario.seed}"
        if len(earlier) > 1:
            text += f"\n  with what the same process served before: python -m tests.chaos --seeds {','.join(map(str, earlier))}"
        return text

    def _worker(self, profile: str) -> WorkerProcess:
        if profile not in self._workers:
            self._workers[profile] = self._spares.pop(profile, None) or WorkerProcess(profile)
            self._served[profile] = []
            self.report.processes += 1
        worker = self._workers[profile]
        worker.served += 1
        return worker

    def _retire(self, profile: str) -> None:
        self._workers.pop(profile).destroy()

    def close(self) -> None:
        """End the processes that are left."""
        for profile in list(self._workers):
            self._retire(profile)
        for spare in self._spares.values():
            spare.destroy()
        self._spares.clear()


def play(seeds: list[int], *, most_failures: int = 5, progress: bool = False) -> Report:
    """Play these seeds in order, in this process."""
    chaos = Chaos()
    try:
        for seed in seeds:
            chaos.play(seed)
            if progress:
                sys.stderr.write(f"\r{chaos.report.runs}/{len(seeds)} runs, {len(chaos.report.failures)} failures ")
            if len(chaos.report.failures) >= most_failures:
                break
    finally:
        chaos.close()
        if progress:
            sys.stderr.write("\n")
    return chaos.report


def play_parallel(first_seed: int, runs: int, jobs: int) -> Report:
    """Spread runs over processes; each takes every jobs-th seed."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    shares = [list(range(first_seed + job, first_seed + runs, jobs)) for job in range(jobs)]
    report = Report()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for part in pool.map(play, shares):
            report.add(part)
    return report
