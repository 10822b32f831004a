"""`python -m tests.fuzz --lines N --seed S`: compare N mutated lines; prints what they were, and every difference."""

from __future__ import annotations

import argparse
import sys
import time

from tests.fuzz.fuzz import fuzz


def main() -> int:
    """1 when the two parsers differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    begin = time.monotonic()
    tally = fuzz(options.lines, options.seed)
    print(f"{tally.lines} lines in {time.monotonic() - begin:.1f} s, seed {options.seed}: {len(tally.differences)} differences")
    print(", ".join(f"{name} {count}" for name, count in sorted(tally.verdicts.items())))
    for text in tally.differences:
        print(f"DIFFERENT {text}")
    return 1 if tally.differences else 0


if __name__ == "__main__":
    sys.exit(main())
