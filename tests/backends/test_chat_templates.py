"""Rerankers that are language models with a chat template (Qwen3 and its kind): the template stays whole, only the document is cut."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from tiny_models import make_tokenizer, save_tokenizer

from reranker_worker.backends import Pair
from reranker_worker.backends.torch import TorchBackend
from reranker_worker.config import Config
from reranker_worker.models import ResolvedModel

if TYPE_CHECKING:
    from pathlib import Path

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}<instruct>{{ message.content }}{% endif %}"
    "{% if message.role == 'query' %}<query>{{ message.content }}{% endif %}"
    "{% if message.role == 'document' %}<document>{{ message.content }}{% endif %}"
    "{% endfor %}<answer>"
)
MARKS = ("<instruct>", "<query>", "<document>", "<answer>")


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with a chat template and the library's LogitScore module, saved by the library itself."""
    import torch
    import transformers
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules.logit_score import LogitScore

    t: Any = transformers
    source = tmp_path_factory.mktemp("qwen3")
    tokenizer = make_tokenizer("roberta")
    tokenizer.post_processor = None  # the template writes the special tokens
    tokenizer.add_special_tokens(list(MARKS))
    save_tokenizer(source, tokenizer, "roberta", 256)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}
    config = t.Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(), head_dim=16, max_position_embeddings=256, initializer_range=0.3, pad_token_id=1, **sizes
    )
    t.AutoModelForCausalLM.from_config(config).save_pretrained(source)
    network = Transformer(str(source), transformer_task="text-generation")
    model = CrossEncoder(modules=[network, LogitScore(true_token_id=200, false_token_id=201)], device="cpu")
    target = tmp_path_factory.mktemp("saved")
    model.save_pretrained(str(target))
    return target


@pytest.fixture(scope="module")
def backend(reranker: Path) -> TorchBackend:
    return TorchBackend(Config(model=str(reranker)), ResolvedModel("tiny", reranker, None, "directory"), 1)


@pytest.fixture(scope="module")
def library(reranker: Path) -> Any:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(reranker), device="cpu", local_files_only=True)


def predicted(library: Any, pairs: list[tuple[str, str]], **options: Any) -> list[float]:
    import torch

    return list(library.predict(pairs, activation_fn=torch.nn.Identity(), **options).tolist())


PAIRS = [("where is the boat", "the boat is on the lake"), ("boat", "a"), ("", ""), ("boat", ""), ("old river", "the sea is cold " * 12)]


def test_the_model_takes_instructions(backend: TorchBackend) -> None:
    assert backend.info.instruction
    assert backend.info.num_labels == 1
    assert backend.info.max_length == 256


def test_logits_equal_those_of_predict(backend: TorchBackend, library: Any) -> None:
    got = backend.score(backend.tokenize([Pair(query, document, 256) for query, document in PAIRS]))
    assert got == pytest.approx(predicted(library, PAIRS), abs=1e-4)
    assert max(got) - min(got) > 0.01


def test_an_instruction_is_the_librarys_prompt(backend: TorchBackend, library: Any) -> None:
    pairs = [Pair(query, document, 256, "find the old boat") for query, document in PAIRS]
    got = backend.score(backend.tokenize(pairs))
    assert got == pytest.approx(predicted(library, PAIRS, prompt="find the old boat"), abs=1e-4)
    assert got != pytest.approx(predicted(library, PAIRS), abs=1e-3)


@pytest.mark.parametrize("count", [80, 1_000, 200_000])
def test_a_long_document_is_cut_and_the_template_stays_whole(count: int, backend: TorchBackend, library: Any) -> None:
    pair = ("where is the boat", "the sea is cold and " * count)
    (tokens,) = backend.tokenize([Pair(*pair, 256)])
    assert tokens.truncated
    assert 250 <= tokens.length <= 256
    text = backend._model.tokenizer.decode(tokens.inputs.ids)
    assert text.startswith("<query>where is the boat<document>the sea is cold and the sea")
    assert text.endswith("<answer>")
    if count <= 1_000:
        assert backend.score([tokens]) == pytest.approx(predicted(library, [pair]), abs=1e-4)


def test_a_query_that_leaves_no_room_does_not_fit(backend: TorchBackend) -> None:
    full, endless = "boat " * 400, "boat " * 2_000_000
    got = backend.tokenize([Pair(full, "lake", 64), Pair(endless, "lake", 64), Pair(full, "", 64), Pair("boat", "lake", 64)])
    assert [tokens.fits for tokens in got] == [False, False, False, True]


def test_the_template_is_the_one_that_was_saved(reranker: Path) -> None:
    kinds = [module["type"] for module in json.loads((reranker / "modules.json").read_text())]
    assert any(kind.endswith("LogitScore") for kind in kinds)
