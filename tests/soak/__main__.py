"""`python -m tests.soak --seconds 60 [--seed S]`: prints a table; 1 when something grew, 2 when an answer was wrong."""

from __future__ import annotations

import argparse
import sys

from tests.chaos.expected import ViolationError
from tests.soak.soak import soak, table


def main() -> int:
    """Soak and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    try:
        outcome = soak(options.seconds, options.seed)
    except ViolationError as violation:
        print(f"WRONG {violation}")
        return 2
    print(table(outcome))
    codes = ", ".join(f"{code} {count}" for code, count in sorted(outcome.codes.items()))
    print(f"{sum(outcome.codes.values())} answers ({codes}), {outcome.kills} engines killed")
    for fault in outcome.faults:
        print(f"GREW {fault}")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
