"""Step 3: the bi-encoder folded into the layers that read a pair (`python -m training.beginning`)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from training.joined import joined_encoder
from training.run import MARKS_FILE
from training.sets import SEED


def main() -> None:
    """Parse the command line and write WORK/joined."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="directory that training.build has filled")
    options = parser.parse_args()
    model, marks = joined_encoder(options.work, SEED)
    model.save_pretrained(options.work / "joined")
    (options.work / MARKS_FILE).write_text(json.dumps(marks), encoding="utf-8")


if __name__ == "__main__":
    main()
