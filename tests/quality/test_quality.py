"""The quality benchmark reads sets, asks the worker, and judges orders; its figures for the fake backend mean nothing."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import metrics, show
from benchmarks.quality.orders import first_stage
from benchmarks.quality.sets import Question, SetsError, read_sets

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 50.0

ROWS = [
    {"qid": 1, "query": "capital of France", "documents": [{"text": "Lyon is large.", "rank": 1}, {"text": "Paris.", "label": 2, "rank": 2}]},
    {"qid": 2, "query": "color of grass", "documents": [{"text": "Green.", "label": 1, "rank": 1}, {"text": "Green.", "label": 0, "rank": 2}]},
    {"qid": 3, "query": "nobody knows", "documents": [{"text": "Nothing relevant.", "label": 0, "rank": 1}]},
]


def write_set(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from benchmarks.quality import main; sys.exit(main(sys.argv[1:]))", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def question(*labels: int) -> Question:
    return Question("q", "query", tuple(f"text {index}" for index in range(len(labels))), labels)


def test_a_set_is_read_in_the_order_of_the_file_and_a_document_without_a_label_is_not_relevant(tmp_path: Path) -> None:
    write_set(tmp_path, "tiny", ROWS)
    first = read_sets(tmp_path, [], None)["tiny"][0]
    assert first == Question("1", "capital of France", ("Lyon is large.", "Paris."), (0, 2), ranked=True)


def test_candidates_that_the_makers_of_a_set_listed_are_in_no_first_stage_order(tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    listed = {"rank": 1, "origin": "official"}
    documents = [{"text": "Lyon is large.", **listed}, {"text": "Paris is the capital.", "label": 1, **listed}]
    write_set(tmp_path, "listed", [{"qid": 1, "query": "capital of France", "documents": documents}])
    (question,) = read_sets(tmp_path, [], None)["listed"]
    assert not question.ranked
    assert metrics.order(first_stage([question])[0]) == [1, 0]


def test_a_limit_takes_the_same_sample_every_time(tmp_path: Path) -> None:
    write_set(tmp_path, "tiny", ROWS)
    assert read_sets(tmp_path, ["tiny"], 2) == read_sets(tmp_path, ["tiny"], 2)
    assert len(read_sets(tmp_path, ["tiny"], 2)["tiny"]) == 2


def test_a_set_that_is_absent_and_a_line_that_is_no_query_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(SetsError, match="no set"):
        read_sets(tmp_path, ["absent"], None)
    write_set(tmp_path, "broken", [ROWS[0], {"qid": 2, "query": "no documents", "documents": []}])
    with pytest.raises(SetsError, match="line 2"):
        read_sets(tmp_path, [], None)


def test_equal_scores_keep_the_order_of_the_file() -> None:
    assert metrics.order([0.5, 0.9, 0.5, 0.9]) == [1, 3, 0, 2]


def test_precision_and_recall_count_pairs_of_all_questions_and_say_when_there_is_nothing_to_count() -> None:
    found = metrics.threshold([question(1, 0), question(2, 0)], [[0.9, 0.5], [0.1, 0.2]], 0.5)
    assert (found.precision, found.recall) == (0.5, 0.5)
    nothing = metrics.threshold([question(0)], [[0.1]], 0.5)
    assert (nothing.precision, nothing.recall) == (None, None)


def test_measures_are_means_over_the_questions_that_have_a_relevant_candidate() -> None:
    pytest.importorskip("ir_measures")
    found = metrics.measure([question(0, 1), question(1, 0), question(0, 0)], [[0.1, 0.2], [0.1, 0.2], [0.1, 0.2]])
    assert found is not None
    assert found["MRR@10"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["MAP"] == pytest.approx((1 + 1 / 2) / 2)
    assert metrics.measure([question(0)], [[1.0]]) is None


def test_a_table_shows_what_was_not_computed_as_a_dash() -> None:
    scores = dict.fromkeys(metrics.NAMES, 0.25)
    line = show.Line("tiny", 2, 4, 10.0, {show.FIRST_STAGE: scores, show.MODEL: scores}, metrics.Threshold(0.5, None, 1.0))
    assert "0.250 / - / **0.250**" in show.table([line])
    assert "-, 1.000" in show.table([line])


def test_the_command_asks_the_worker_and_writes_its_figures(tmp_path: Path) -> None:
    pytest.importorskip("ir_measures")
    write_set(tmp_path, "tiny", ROWS)
    file = tmp_path / "figures.json"
    result = run("--data", str(tmp_path), "--no-bi-encoder", "--set", "backend=fake", "--json", str(file))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no progress bar where nobody looks
    (line,) = json.loads(file.read_text(encoding="utf-8"))["sets"]
    assert (line["name"], line["questions"], line["pairs"]) == ("tiny", 2, 5)
    assert line["measures"]["BM25"]["MRR@10"] == pytest.approx(0.75)
    assert "| tiny | 2 |" in result.stdout


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scores = dict.fromkeys(metrics.NAMES, 0.25)
    line = show.Line("tiny", 2, 4, 10.0, {show.FIRST_STAGE: scores, show.MODEL: scores}, metrics.Threshold(0.5, 0.5, 1.0))
    show.picture([line], "bundled", tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_data_that_are_absent_are_a_usage_error(tmp_path: Path) -> None:
    result = run("--data", str(tmp_path))
    assert result.returncode == 64
    assert result.stderr.startswith("benchmarks quality: ")
