"""Long texts are cut before they are tokenized, and nobody can tell from the ids."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import pytest
from tiny_models import WORDS, make_tokenizer

from reranker_worker.backends import Pair, Tokens
from reranker_worker.backends.texts import PairIds, PairTokenizer, supports_pairs

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS = {"WordPiece": "bert", "byte-level BPE": "roberta", "Unigram": "xlm-roberta"}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return make_tokenizer(KINDS[request.param])


def uncut(tokenizer: Any, pair: Pair) -> Tokens:
    """What the tokenizer's own `only_second` gives for the whole text."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    query = len(tokenizer.encode(pair.query, add_special_tokens=False).ids)
    whole = tokenizer.encode(pair.query, pair.document)
    if len(whole.ids) <= pair.max_length:
        return Tokens(PairIds(whole.ids, whole.type_ids), len(whole.ids))
    if query + tokenizer.num_special_tokens_to_add(True) >= pair.max_length:
        return Tokens(None, 0, fits=False)
    tokenizer.enable_truncation(pair.max_length, strategy="only_second")
    cut = tokenizer.encode(pair.query, pair.document)
    tokenizer.no_truncation()
    return Tokens(PairIds(cut.ids, cut.type_ids), len(cut.ids), truncated=True)


def ordinary(chance: random.Random, size: int) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(size // 4))


def text_kinds(chance: random.Random, size: int) -> Iterator[str]:
    """Texts of about `size` characters, each hard in its own way."""
    yield ordinary(chance, size)
    yield "a " * (size // 2)
    yield " " * size
    yield "x" * size
    yield "中国文" * (size // 3)
    yield "é\u0301" * (size // 2)
    yield "".join(chance.choice("ab \n\t.,-1é中🎉\u200b\u0301") for _ in range(size))
    yield " " * size + ordinary(chance, size)
    yield "=" * size + " " + ordinary(chance, size)
    yield ordinary(chance, size // 2) + "9" * size
    yield "".join(chance.choice(WORDS) + chance.choice(["", " ", "  ", "\n", "-"]) for _ in range(size // 4))
    yield "🎉" * size
    yield ("[SEP] </s> " + ordinary(chance, 40)) * (size // 60)


@pytest.mark.parametrize("seed", range(7))
def test_ids_of_cut_texts_equal_those_of_whole_texts(seed: int, tokenizer: Any) -> None:
    chance = random.Random(seed)
    pairs = []
    for max_length in (16, 128):
        texts = text_kinds(chance, chance.choice([500, 4_000, 9_000]))
        pairs += [Pair(ordinary(chance, 8), text, max_length) for text in texts]
    got = PairTokenizer(tokenizer).tokenize(pairs)
    assert [tokens.length for tokens in got] == [len(tokens.inputs.ids) for tokens in got]
    assert got == [uncut(tokenizer, pair) for pair in pairs]


def test_every_cut_of_one_text_gives_the_same_ids(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefix may end anywhere in a word, a number, a run of blanks or marks."""
    chance = random.Random(1)
    text = "".join(chance.choice([*WORDS, "  ", " ", "---", "1234567", "中国", "\n\n", "."]) for _ in range(4_000))
    pair = Pair("where is the boat", text, 64)
    expected = uncut(tokenizer, pair)
    for size in range(2_000, 2_120):
        monkeypatch.setattr("reranker_worker.backends.texts._first_prefix", lambda max_length, size=size: size)
        assert PairTokenizer(tokenizer).tokenize([pair]) == [expected]


def test_a_word_that_goes_on_behind_the_prefix_is_not_trusted() -> None:
    """Its last letter is unknown, so the whole word is one unknown token; its beginning alone would be two thousand known ones."""
    tokenizer = make_tokenizer("bert")
    tokenizer.model.max_input_chars_per_word = 10_000
    pair = Pair("where", "boat " + "ab" * 1_400 + "ш lake", 64)
    expected = uncut(tokenizer, pair)
    assert expected.length < 10
    assert PairTokenizer(tokenizer).tokenize([pair]) == [expected]


@pytest.mark.parametrize("size", range(300, 306))
def test_words_near_the_cut_are_not_trusted(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tokenizers group the digits of a number from its end, so that every word of it depends on where it ends."""
    from tokenizers import Regex, pre_tokenizers

    tokenizer = make_tokenizer("bert")
    grouped = pre_tokenizers.Split(Regex(r"\d{1,3}(?=(?:\d{3})*(?!\d))"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), grouped])
    pair = Pair("where", "1234567890" * 70 + " lake", 64)
    monkeypatch.setattr("reranker_worker.backends.texts._first_prefix", lambda max_length: size)
    assert PairTokenizer(tokenizer).tokenize([pair]) == [uncut(tokenizer, pair)]


@pytest.mark.parametrize("blanks", [0, 1, 5_000])
def test_a_document_that_just_fills_the_pair_is_not_called_truncated(blanks: int) -> None:
    tokenizer = make_tokenizer("bert")
    query, room = "where", 64 - 1 - 3
    for extra in (-1, 0, 1):
        document = "boat " * (room + extra) + " " * blanks
        (tokens,) = PairTokenizer(tokenizer).tokenize([Pair(query, document, 64)])
        assert tokens.truncated == (extra > 0)
        assert tokens.length == min(64, 64 + extra)


def test_a_query_that_leaves_no_room_does_not_fit() -> None:
    tokenizer = PairTokenizer(make_tokenizer("bert"))
    long = "boat " * 29
    fits = {
        (long, "lake"): False,  # 29 and 3 special tokens are 32
        (long, ""): True,
        (long + "boat", ""): False,
        ("boat " * 28, "lake"): True,
        ("boat " * 500_000, "lake"): False,
        ("boat " * 500_000, ""): False,
        ("b" * 100_000, "lake"): True,  # one unknown word
        ("b" * 500_000, "lake"): False,  # too long to tell
    }
    got = tokenizer.tokenize([Pair(query, document, 32) for query, document in fits])
    assert [tokens.fits for tokens in got] == list(fits.values())
    assert [tokens.length <= 32 for tokens in got] == [True] * len(fits)


def test_pairs_of_different_limits_and_queries_come_back_in_order(tokenizer: Any) -> None:
    pairs = [Pair(f"{WORDS[i % 7]} {i}", "the boat is on the lake " * (i % 5), 12 + i % 9) for i in range(60)]
    assert PairTokenizer(tokenizer).tokenize(pairs) == [uncut(tokenizer, pair) for pair in pairs]
    assert PairTokenizer(tokenizer).tokenize([]) == []


def test_the_prompt_comes_before_each_query(tokenizer: Any) -> None:
    pair, prompted = Pair("boat", "lake", 64), Pair("query: boat", "lake", 64)
    assert PairTokenizer(tokenizer, "query: ").tokenize([pair]) == [uncut(tokenizer, prompted)]


@pytest.mark.parametrize("text", ["", " ", "\n", "\u200b", "\u0301", "\ufeff", "\x00", "\x07", "\U0010ffff", "\ue000"])
def test_odd_texts_are_tokenized(text: str, tokenizer: Any) -> None:
    pairs = [Pair(text, text, 32), Pair("boat", text, 32), Pair(text, "boat", 32)]
    assert PairTokenizer(tokenizer).tokenize(pairs) == [uncut(tokenizer, pair) for pair in pairs]


def test_ten_megabytes_of_words_cost_about_as_much_as_a_page(tokenizer: Any) -> None:
    words = "where is the boat on the lake " * 350_000
    letters = "a " * 5_000_000
    start = time.process_time()  # not the clock: other work beside it must not count
    PairTokenizer(tokenizer).tokenize([Pair("boat", words, 512), Pair("boat", letters, 512), Pair(words, "boat", 512)])
    # Measured 10 to 20 ms; tokenizing one of them whole takes 5 to 12 seconds.
    assert time.process_time() - start < 2.0


ENDLESS = {
    "blanks": " " * 10_000_000,
    "one word": "a" * 10_000_000,
    "one word of ideographs": "中国文" * 3_333_333,
    "marks": "e" + "\u0301" * 9_999_999,
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_ten_megabytes_without_words_are_bounded_too(kind: str, tokenizer: Any) -> None:
    start = time.process_time()  # not the clock: other work beside it must not count
    (document,) = PairTokenizer(tokenizer).tokenize([Pair("boat", ENDLESS[kind], 512)])
    (query,) = PairTokenizer(tokenizer).tokenize([Pair(ENDLESS[kind], "boat", 512)])
    assert document.fits
    assert document.truncated
    assert not query.fits
    # Measured 20 to 90 ms; tokenizing the whole takes 2 to 6 seconds and up to 2 GB.
    assert time.process_time() - start < 2.0


def test_what_lies_within_the_longest_prefix_is_found_behind_blanks(tokenizer: Any) -> None:
    pairs = [Pair("boat", " " * blanks + "the boat is on the lake", 64) for blanks in (1_000, 20_000, 100_000)]
    assert PairTokenizer(tokenizer).tokenize(pairs) == [uncut(tokenizer, pair) for pair in pairs]


def test_a_tokenizer_that_writes_the_document_first_is_not_supported() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer("bert")
    assert supports_pairs(tokenizer)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $B [SEP] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    assert not supports_pairs(tokenizer)


@pytest.mark.parametrize("limit", [1, 5, 40, 100_000])
def test_a_limit_for_the_document_alone_keeps_its_first_tokens_and_the_whole_query(tokenizer: Any, limit: int) -> None:
    pairs = PairTokenizer(tokenizer)
    query, document = "where is the cat", "the cat sat on the mat " * 20
    (whole,) = pairs.tokenize([Pair(query, document, 512)])
    (empty,) = pairs.tokenize([Pair(query, "", 512)])
    (cut,) = pairs.tokenize([Pair(query, document, 512, max_document_tokens=limit)])
    assert cut.length == len(cut.inputs.ids) == min(whole.length, empty.length + limit)
    assert cut.truncated == (cut.length < whole.length or whole.truncated)
