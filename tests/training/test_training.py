"""The recipe's parts on tiny data: what is exact is tested, how well the model gets is not."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from training import target
from training.bm25 import BM25, words
from training.check_leakage import Evaluation, offenders, table
from training.groups import LABEL, labelled, unlabelled
from training.joined import HEAD_WIDTH, MARK, Marks, gate, renew
from training.matching import add_layers
from training.run import Run, average
from training.student import Read, Tokens, read_alone, with_plain_attention
from training.texts import sentences, vary
from training.train import LEARNING_RATE, SCALE, WARM_UP_STEPS, Goal, Seen, losses, plan, rate, with_target
from training.tuning import losses as apart
from training.vocabulary import prune

if TYPE_CHECKING:
    from pathlib import Path

PASSAGE = "The red fox lives in the forest near the old mill and hunts mice at night. It sleeps by day."


def write_evaluation(folder: Path) -> None:
    (folder / "tiny").mkdir()
    row = {"qid": 1, "query": "Where does the fox live?", "documents": [{"text": PASSAGE}]}
    with gzip.open(folder / "tiny" / "tiny.jsonl.gz", "wt", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def write_tokens(work: Path, texts: list[list[int]]) -> Tokens:
    np.savez(work / "tokens.npz", tokens=np.array(sum(texts, []), np.uint16), ends=np.cumsum([0, *map(len, texts)]))  # noqa: RUF017 # tiny
    vocabulary = {"[CLS]": 1, "[SEP]": 2, "[DOC]": 60, **{str(number): number for number in range(3, 60)}}
    (work / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}), encoding="utf-8")
    return Tokens(work)


def test_a_query_in_other_clothes_and_a_passage_in_part_are_found(tmp_path: Path) -> None:
    write_evaluation(tmp_path)
    evaluation = Evaluation(tmp_path)
    part = "People say: the red fox lives in the forest near the old mill and hunts mice."
    assert offenders(["where does the FOX live", part, "Foxes are red.", PASSAGE.split(".")[1]], evaluation) == ["where does the FOX live", part]
    assert "| tiny | 1 | 1 | 1 | 1 |" in table(evaluation)


def test_words_lose_case_function_words_and_the_plural() -> None:
    assert words("What are the Foxes of glass?") == ["foxe", "glass"]


def test_bm25_prefers_the_passage_with_the_query_s_words_and_stays_below_one() -> None:
    bm25 = BM25([PASSAGE, "A mill grinds corn.", "Nothing of that kind."])
    scores = bm25.score(["red fox in a forest", "unheard words"])
    assert scores.shape == (2, 3)
    assert scores[0].argmax() == 0
    assert 0 < scores[0, 0] < 1
    assert scores[1].max() == 0
    assert bm25.score(["fox"], ["a fox", "no such animal"])[0].argmax() == 0


def test_sentences_are_split_and_fragments_dropped() -> None:
    assert sentences(f"Yes. {PASSAGE}") == [PASSAGE.split(". ")[0] + ".", "It sleeps by day."]


def test_a_varied_query_keeps_its_content_words() -> None:
    varied = {vary("Where does the red fox live?", random.Random(seed)) for seed in range(60)}
    assert varied == {"Where does the red fox live?", "where does the red fox live", "red fox live"}


def test_pruning_keeps_characters_and_frequent_pieces_and_renumbers_special_tokens(tmp_path: Path) -> None:
    pieces = ["[PAD]", "[unused0]", "a", "##a", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces += [f"[unused{number}]" for number in range(1, 1990)] + ["often", "never"]
    added = [{"id": pieces.index(piece), "content": piece} for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]
    special = {piece: {"id": piece, "ids": [pieces.index(piece)]} for piece in ("[CLS]", "[SEP]")}
    content: dict[str, Any] = {"model": {"vocab": {piece: place for place, piece in enumerate(pieces)}}, "added_tokens": added}
    source = tmp_path / "tokenizer.json"
    source.write_text(json.dumps(content | {"post_processor": {"special_tokens": special}}), encoding="utf-8")
    pruned, rows = prune(source, Counter({"often": 9}), size=8)
    kept = ["[PAD]", "a", "##a", "[UNK]", "[CLS]", "[SEP]", "[DOC]", "often"]
    assert pruned["model"]["vocab"] == {piece: place for place, piece in enumerate(kept)}
    assert rows == [pieces.index(piece.replace("DOC", "MASK")) for piece in kept]
    assert pruned["added_tokens"][-1]["content"] == "[DOC]"
    assert [token["id"] for token in pruned["added_tokens"]] == [0, 3, 4, 5, 6]
    assert pruned["post_processor"]["special_tokens"]["[SEP]"]["ids"] == [5]


def test_an_answer_is_nearly_certain_and_a_negative_as_probable_as_the_teacher_finds_it_beside_the_answer() -> None:
    group = labelled("passages", "q", ["answer", "close", "far", "better"], np.array([10.0 + LABEL, 13.0, 0.0, 20.0]))
    assert group.probabilities == pytest.approx([0.95, math.exp(-1), math.exp(-14), 0.6])
    assert max(unlabelled("q", ["a", "b"], np.array([1.0, 3.0])).probabilities) == pytest.approx(0.7)


def test_the_gate_is_open_within_a_text_and_shut_between_two_however_small_their_marks_are() -> None:
    marks = Marks(plus=0, minus=1, one=2)
    query = torch.tensor([[MARK, -MARK, MARK, 0, 0], [MARK, -MARK, MARK, 0, 0]]) * torch.tensor([[1.0], [0.3]]) + 0.1
    document = query * 1.0
    document[:, [0, 1]] = query[:, [1, 0]]
    tokens = torch.cat([query, document])
    rows, columns = torch.zeros(2, 5), torch.zeros(2, 5)
    gate(rows, columns, marks, 24.0)
    found = (tokens @ rows.T) @ (tokens @ columns.T).T / HEAD_WIDTH**0.5
    across = torch.tensor([[0, 0, 1, 1]] * 2 + [[1, 1, 0, 0]] * 2) == 1
    assert found[~across].abs().max() < 1e-5
    assert found[across].tolist() == pytest.approx([-24.0, -7.2, -7.2, -2.16] * 2, abs=1e-4)


def test_the_matching_layers_see_which_document_holds_the_query_s_tokens_however_long_it_is() -> None:
    config = BertConfig(hidden_size=384, num_attention_heads=12, num_hidden_layers=1, intermediate_size=64, vocab_size=5)
    model = BertForSequenceClassification(config).eval()
    random_numbers, marks = torch.Generator().manual_seed(1), Marks(plus=0, minus=1, one=2)

    def text(states: torch.Tensor, sign: float) -> torch.Tensor:
        marked = torch.nn.functional.layer_norm(states, [384])
        marked[:, :3] = torch.tensor([sign * MARK, -sign * MARK, MARK])
        return marked

    def tokens(count: int) -> torch.Tensor:
        return torch.randn(count, 384, generator=random_numbers)

    def coordinate(query: torch.Tensor, document: torch.Tensor) -> float:
        states = torch.cat([text(query, 1.0), text(document, -1.0)])[None]
        with torch.no_grad():
            for layer in model.bert.encoder.layer[1:]:
                states = layer(states)
        return float(states[0, 0, marks.one])

    add_layers(model, torch.cat([text(tokens(300), 1.0), text(tokens(300), -1.0)]), marks)
    query = tokens(8)
    holding, half = torch.cat([tokens(40), query + 0.3 * tokens(8)]), torch.cat([tokens(44), query[:4]])
    ordered = [coordinate(query, document) for document in (holding, half, tokens(48))]
    assert ordered == sorted(ordered)
    assert ordered[2] - ordered[0] > 10 * abs(coordinate(query, tokens(150)) - ordered[2])


def test_the_exact_target_is_maxsim_and_the_cosine_of_averages_whatever_stands_behind_the_end() -> None:
    states = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(3))
    place, begins, ends = torch.arange(6), torch.tensor([[2], [3]]), torch.tensor([[6], [5]])
    part = Read([0, 1], states, None, place < begins, (place >= begins) & (place < ends))
    found = target.found(part, ignored=[4])
    assert found.shape == (2, 3)
    for row, (begin, end) in enumerate(((2, 6), (3, 5))):
        units = torch.nn.functional.normalize(states[row, :, :4], dim=-1)
        query, document = units[:begin], units[begin:end]
        maxsim = (query @ document.T).amax(1).mean()
        averages = torch.nn.functional.cosine_similarity(query.mean(0), document.mean(0), dim=0)
        assert float(found[row].sum() / begin) == pytest.approx(float(maxsim + target.AVERAGES * averages), abs=1e-5)
        assert not found[row, begin:].any()


def test_texts_apart_are_scored_as_the_pairs_they_make_and_each_group_learns_from_its_own() -> None:
    states = torch.nn.functional.normalize(torch.randn(9, 6, generator=torch.Generator().manual_seed(5)), dim=-1)
    query, documents = states[:2], [states[2:6], states[6:7], states[7:8], states[8:]]
    for document, score in zip(documents, target.scores(query, documents).tolist(), strict=True):
        place = torch.arange(2 + len(document))[None]
        pair = Read([0], torch.cat([query, document])[None], None, place < 2, place >= 2)
        assert score == pytest.approx(float(target.found(pair, ignored=[]).sum() / 2), abs=1e-6)
    exact = (SCALE * target.scores(query, documents)).tolist()
    groups = [{"kind": "sentences", "texts": [0, 1], "logits": exact[:2]}, {"kind": "passages", "texts": [2, 3], "logits": exact[2:]}]
    listwise, contrast = apart(groups, [query, query], documents)
    assert float(listwise) == pytest.approx(0, abs=1e-5)
    assert float(contrast) == pytest.approx(-float(torch.log_softmax(SCALE * target.scores(query, documents), 0)[2]), abs=1e-5)


def test_a_goal_mixes_late_interaction_the_teacher_and_what_is_known_to_be_the_answer() -> None:
    wanted = torch.tensor([[0.8, 0.6, 0.0], [0.4, 0.2, 0.0], [0.5, 0.0, 0.0], [0.9, 0.0, 0.0]])  # the last two of a query of one token
    seen = Seen(torch.zeros(4), wanted, torch.zeros(4, 3))
    groups = [{"kind": "passages", "texts": [0, 1], "logits": [10.0, 2.0]}, {"kind": "sentences", "texts": [2, 3], "logits": [5.0, 5.0]}]
    passages, sentences = (group["logits"] for group in with_target(groups, seen, Goal(averages=0.5, teacher=0.25, label=2.0)))
    assert passages == pytest.approx([0.25 * 10 + 0.75 * SCALE * 0.7 + 2.0, 0.25 * 2 + 0.75 * SCALE * 0.3])
    assert sentences == pytest.approx([0.25 * 5 + 0.75 * SCALE * 0.5, 0.25 * 5 + 0.75 * SCALE * 0.9])
    assert groups[0]["logits"] == [10.0, 2.0]


def test_a_later_run_begins_with_the_mean_of_the_weights_that_it_is_given(tmp_path: Path) -> None:
    for number, value in enumerate((1.0, 3.0)):
        torch.save({"weight": torch.full((2,), value)}, tmp_path / f"{number}.pt")
    assert average([tmp_path / "0.pt", tmp_path / "1.pt"])["weight"].tolist() == [2.0, 2.0]


def test_a_text_read_beside_longer_ones_is_read_as_the_model_reads_it_alone() -> None:
    with_plain_attention()
    config = BertConfig(hidden_size=12, num_attention_heads=2, num_hidden_layers=2, intermediate_size=8, vocab_size=20, attn_implementation="plain")
    model = BertModel(config).eval()
    texts = [[3, 4, 5], [6, 7, 8, 9, 10, 11], [12]]
    with torch.no_grad():
        for text, found in zip(texts, read_alone(model, texts), strict=True):
            torch.testing.assert_close(found, model(input_ids=torch.tensor([text])).last_hidden_state[0], atol=1e-5, rtol=1e-4)


def test_a_run_that_is_started_again_ends_where_one_in_one_go_ends(tmp_path: Path) -> None:
    def steps(run: Run, count: int) -> Run:
        for _ in range(count):
            data = torch.full((1, 3), 1.0 + run.step, dtype=torch.bfloat16)
            run.update(run.model(data).square().sum(), learning_rate=0.1)
        return run

    def build() -> torch.nn.Linear:
        torch.manual_seed(7)
        return torch.nn.Linear(3, 2)

    whole = steps(Run(build, tmp_path / "whole"), 5)
    steps(Run(build, tmp_path / "parts"), 2).save(last=True)
    resumed = steps(Run(build, tmp_path / "parts"), 3)
    assert resumed.step == whole.step == 5
    assert resumed.master.weight.equal(whole.master.weight)
    assert not whole.master.weight.equal(build().weight)


def test_renewed_marks_have_their_size_again_and_nothing_else_changes() -> None:
    layer = SimpleNamespace(intermediate=SimpleNamespace(dense=torch.nn.Linear(5, 16)), output=SimpleNamespace(dense=torch.nn.Linear(16, 5)))
    for linear in (layer.intermediate.dense, layer.output.dense):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    marks = Marks(plus=0, minus=1, one=2)
    renew(layer, list(marks), marks, MARK, range(16))
    states = torch.tensor([[0.6, -0.5, 0.4, 3.0, -1.0], [-0.9, 1.1, 0.7, 0.2, 5.0]])
    with torch.no_grad():
        after = states + layer.output.dense(torch.nn.functional.gelu(layer.intermediate.dense(states)))
    assert after[:, :3].flatten().tolist() == pytest.approx([MARK, -MARK, MARK, -MARK, MARK, MARK], abs=1e-3)
    assert after[:, 3:].equal(states[:, 3:])


def test_a_pair_is_cut_at_its_end_or_to_the_window_that_shares_most_with_the_query(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path, [[50, 51], [*range(3, 43), 50, 51, *range(3, 13)]])
    ids, second = tokens.pair(0, 1, 15)
    assert (ids, second) == ([1, 50, 51, 2, 60, *range(3, 12), 2], 4)
    ids, second = tokens.pair(0, 1, 15, window=True)
    assert len(ids) == 15
    assert {50, 51} <= set(ids[second:])
    assert tokens.pair(0, 1, 448, window=True)[0] == tokens.pair(0, 1, 448)[0]


def test_every_group_is_trained_on_once_an_epoch(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path, [[5]] * 10)
    groups = [{"texts": [number % 10], "length": 96} for number in range(300)]
    steps = plan(groups, tokens, 1)
    assert sorted(index for step in steps for index in step) == list(range(300))
    assert steps == plan(groups, tokens, 1) != plan(groups, tokens, 2)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    assert rate(0, 500, 1000) == pytest.approx(LEARNING_RATE / WARM_UP_STEPS)
    assert rate(WARM_UP_STEPS, 500, 1000) == rate(500, 500, 1000) == LEARNING_RATE
    assert rate(750, 500, 1000) == pytest.approx(LEARNING_RATE / 2)
    assert rate(999, 500, 1000) == pytest.approx(LEARNING_RATE / 50)
    assert rate(999, 1000, 1000) == LEARNING_RATE


def test_a_student_that_agrees_with_the_teacher_has_no_listwise_loss_wherever_its_logits_lie() -> None:
    group = {"texts": [0, 1, 2], "logits": [4.0, 1.0, 0.0], "probabilities": [0.95, 0.1, 0.1]}
    listwise, pointwise = losses([group, group], torch.tensor([4.0, 1.0, 0.0, 14.0, 11.0, 10.0]))
    assert listwise.item() == pytest.approx(0.0, abs=1e-5)
    assert pointwise.item() > 0.5
