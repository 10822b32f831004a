"""What is trained on: the sets, how much of each, and their rows."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

SEED = 20


@dataclass(frozen=True, slots=True)
class Share:
    """How much of a set is used at most. `negatives_too`: its given negatives join the pool of passages, not the positives alone."""

    passages: int
    queries: int
    sentence_queries: int = 0
    cloze_queries: int = 0
    negatives_too: bool = False


# climate_fever is left out because it states no licence. The caps keep templated sets and long texts from taking over.
SETS = {
    "squad": Share(3950, 6000, 1300, 500),
    "nq": Share(99_999, 9700, 2200, 800, negatives_too=True),
    "boolq": Share(2957, 2500, 500, 300),
    "medquad": Share(4500, 4000, 600, 600),
    "fairytaleqa": Share(1800, 2500, 300),
    "qamr": Share(4000, 3400, negatives_too=True),
    "selqa": Share(3000, 613, negatives_too=True),
    "pubmedqa": Share(2000, 1000, 300, 700),
    "covidqa": Share(1872, 1285, 300, 500, negatives_too=True),
    "covid_faq": Share(332, 290),
    "dolly": Share(3000, 3000, 300),
    "strategyqa": Share(2289, 2289),
    "dstc9_faq": Share(2000, 1500),
    "factbook": Share(2500, 1500),
    "openstax": Share(2700, 2500, 300, 500),
    "acl_title": Share(3500, 3500, 0, 1200),
    "aws_ec2": Share(1700, 1500, 0, 200),
    "aws_iam": Share(1000, 1000),
    "aws_rds": Share(2000, 1800, 100),
    "powershell": Share(2500, 2500, 100, 200, negatives_too=True),
    "vagov": Share(859, 800, negatives_too=True),
    "wiki_entity": Share(2500, 2000),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a set."""

    query: str
    positive: str
    negatives: tuple[str, ...]


def read_rows(data: Path, name: str, banned: Collection[str] = ()) -> list[Row]:
    """The rows of a set, without those whose query or positive is banned; banned negatives are taken out."""
    rows = []
    with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            content = json.loads(line)
            negatives = tuple(text for text in content["negatives"] if text not in banned)
            rows.append(Row(content["query"], content["positive"], negatives))
    return [row for row in rows if row.query not in banned and row.positive not in banned]
