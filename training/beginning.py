"""Step 3: the student at its beginning, which ranks as the teacher does before any training (`python -m training.beginning`)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from training.comparison import add_comparison, fit_judgement
from training.joined import joined_encoder
from training.lexical import add_matching
from training.run import MARKS_FILE
from training.sets import SEED


def main() -> None:
    """Parse the command line and write WORK/start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="directory that training.build has filled")
    options = parser.parse_args()
    model, seen, marks = joined_encoder(options.work, SEED)
    add_matching(model, seen, marks, options.work)
    add_comparison(model, seen, marks)
    fit_judgement(model, options.work)
    model.save_pretrained(options.work / "start")
    (options.work / MARKS_FILE).write_text(json.dumps(marks), encoding="utf-8")


if __name__ == "__main__":
    main()
