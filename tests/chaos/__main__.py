"""`python -m tests.chaos --runs N --seed S [--jobs J]`: random runs; `--seeds A,B,C`: exactly these, in order, in one host."""

from __future__ import annotations

import argparse
import sys
import time

from tests.chaos.chaos import play, play_parallel


def main() -> int:
    """Play, print the figures, return 1 when a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", default="")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--failures", type=int, default=5, help="stop after so many (in one process)")
    options = parser.parse_args()
    begin = time.monotonic()
    if options.jobs > 1 and not options.seeds:
        report = play_parallel(options.seed, options.runs, options.jobs)
    else:
        seeds = [int(seed) for seed in options.seeds.split(",") if seed] or list(range(options.seed, options.seed + options.runs))
        report = play(seeds, most_failures=options.failures, progress=sys.stderr.isatty())
    seconds = time.monotonic() - begin
    print(f"{report.runs} runs, {report.answers} answers, {report.processes} processes, {len(report.failures)} failures, {seconds:.1f} s")
    print(", ".join(f"{name} {count}" for name, count in sorted(report.faults.items())))
    for failure in report.failures:
        print(f"FAILED {failure}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
