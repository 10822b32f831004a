"""The torch backend gives what the library's `predict` gives, alone and in any company, and refuses what cannot score."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parity import PARITY, farthest, logits_of, some_pairs
from tiny_models import ARCHITECTURES

from reranker_worker.backends import BackendError, OutOfMemoryError, Pair
from reranker_worker.backends.torch import TorchBackend, versions
from reranker_worker.config import Config
from reranker_worker.models import ResolvedModel

ModelMaker = Callable[..., Path]


def opened(path: Path, **settings: Any) -> TorchBackend:
    return TorchBackend(Config(model=str(path), **settings), ResolvedModel(str(path), path, None, "directory"), 1)


def refused(path: Path, **settings: Any) -> BackendError:
    with pytest.raises(BackendError) as caught:
        opened(path, **settings)
    assert str(caught.value).isascii()
    assert "\n" not in str(caught.value)
    return caught.value


def library(path: Path) -> Any:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(path), device="cpu", local_files_only=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_those_of_predict_alone_and_in_any_company(architecture: str, tiny: ModelMaker) -> None:
    import torch

    path = tiny(architecture)
    pairs = some_pairs(1, 40)
    expected = library(path).predict(pairs, activation_fn=torch.nn.Identity()).tolist()
    backend = opened(path)
    assert farthest(logits_of(backend, pairs), expected) < PARITY
    assert farthest([logits_of(backend, [pair])[0] for pair in pairs], expected) < PARITY
    order = list(range(len(pairs)))
    random.Random(2).shuffle(order)
    shuffled = [logit for start in range(0, 40, 7) for logit in logits_of(backend, [pairs[i] for i in order[start : start + 7]])]
    assert farthest(shuffled, [expected[i] for i in order]) < PARITY
    assert max(expected) - min(expected) > 100 * PARITY, "the model tells the pairs apart"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_long_document_is_cut_as_predict_cuts_it(architecture: str, tiny: ModelMaker) -> None:
    import torch

    path = tiny(architecture, max_length=64)
    pairs = [("where is the boat", "the boat is on the lake and " * count) for count in (1, 12, 500, 20_000)]
    reference = library(path)
    reference.max_seq_length = 64  # the library gives RoBERTa two positions more than its table has
    expected = reference.predict(pairs, activation_fn=torch.nn.Identity()).tolist()
    backend = opened(path)
    assert backend.info.max_length == 64
    tokens = backend.tokenize([Pair(query, document, 64) for query, document in pairs])
    assert [one.truncated for one in tokens] == [False, True, True, True]
    assert farthest(backend.score(tokens), expected) < PARITY


def test_what_predict_does_to_the_tokenizer_does_not_matter(tiny: ModelMaker) -> None:
    backend = opened(tiny("bert"))
    pair = Pair("where is the boat", "the boat is on the lake and " * 20_000, 512)
    before = backend.tokenize([pair])
    backend._model.predict([("boat", "lake")])
    assert backend.tokenize([pair]) == before


def test_a_prompt_that_the_model_declares_is_used_as_predict_uses_it(tiny: ModelMaker, tmp_path: Path) -> None:
    import torch

    path = tmp_path / "prompted"
    library(tiny("bert")).save_pretrained(str(path))
    settings = path / "config_sentence_transformers.json"
    content = json.loads(settings.read_text()) | {"prompts": {"rerank": "find the answer: "}, "default_prompt_name": "rerank"}
    settings.write_text(json.dumps(content))
    pairs = some_pairs(4, 8)
    expected = library(path).predict(pairs, activation_fn=torch.nn.Identity()).tolist()
    assert farthest(logits_of(opened(path), pairs), expected) < PARITY
    assert farthest(logits_of(opened(tiny("bert")), pairs), expected) > 100 * PARITY


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, "sigmoid"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "identity"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh"}, "tanh"),
    ],
)
def test_activate_gives_what_predict_gives_by_default(config: dict[str, Any], name: str, tiny: ModelMaker) -> None:
    path = tiny("bert", config=config)
    pairs = some_pairs(5, 10)
    backend = opened(path, scores="model")
    assert backend.info.activation == name
    assert farthest(backend.activate(logits_of(backend, pairs)), library(path).predict(pairs).tolist()) < PARITY


def test_of_several_labels_the_logit_is_the_log_odds_of_the_relevant_one(tiny: ModelMaker) -> None:
    path = tiny("bert", num_labels=3, labels=("contradiction", "entailment", "neutral"))
    pairs = some_pairs(6, 12)
    probabilities = library(path).predict(pairs, apply_softmax=True)
    for settings, index in (({}, 1), ({"relevance_label": "neutral"}, 2), ({"relevance_label": "0"}, 0)):
        backend = opened(path, **settings)
        assert backend.info.num_labels == 3
        assert backend.info.relevance_label == ("contradiction", "entailment", "neutral")[index]
        assert farthest(backend.activate(logits_of(backend, pairs)), probabilities[:, index].tolist()) < 1e-5


def test_several_labels_without_a_declared_one_are_refused(tiny: ModelMaker) -> None:
    error = refused(tiny("bert", num_labels=2))
    assert error.exit_code == 78
    assert "RERANKING_RELEVANCE_LABEL" in str(error)
    assert "LABEL_1" in str(error)


def test_the_models_own_scale_needs_one_label(tiny: ModelMaker) -> None:
    error = refused(tiny("bert", num_labels=2), scores="model", relevance_label="1")
    assert error.exit_code == 78
    assert "RERANKING_SCORES" in str(error)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "deberta-v2", "modernbert"])
def test_a_backbone_without_a_trained_head_is_no_cross_encoder(architecture: str, tiny: ModelMaker) -> None:
    error = refused(tiny(architecture, head=False))
    assert error.exit_code == 78
    assert "not a cross-encoder" in str(error)


def test_a_bi_encoder_of_the_library_is_no_cross_encoder(tiny: ModelMaker, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(str(tiny("bert", head=False)), device="cpu").save_pretrained(str(tmp_path / "embedder"))
    error = refused(tmp_path / "embedder")
    assert error.exit_code == 78
    assert "not a cross-encoder" in str(error)


def test_weights_with_a_hole_are_corrupt(tiny: ModelMaker, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "hole"
    shutil.copytree(tiny("bert"), path)
    weights = load_file(path / "model.safetensors")
    del weights["bert.encoder.layer.1.attention.self.query.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    error = refused(path)
    assert error.exit_code == 65
    assert "attention.self.query.weight" in str(error)


@pytest.mark.parametrize(
    ("name", "text"),
    [("config.json", '{"model_type": "no-such-architecture"}'), ("tokenizer.json", '{"model": 1}'), ("model.safetensors", "x" * 100)],
)
def test_a_model_that_cannot_be_loaded_is_one_sentence(name: str, text: str, tiny: ModelMaker, tmp_path: Path) -> None:
    path = tmp_path / "broken"
    shutil.copytree(tiny("bert"), path)
    (path / name).write_text(text)
    assert refused(path).exit_code == 65


@pytest.mark.parametrize(("device", "exit_code"), [("cuda:99", 71), ("xpu:7", 71), ("tpu", 78), ("cpu:x", 78), ("", 78)])
def test_a_device_that_is_not_there_is_refused(device: str, exit_code: int, tiny: ModelMaker) -> None:
    error = refused(tiny("bert"), device=device)
    assert error.exit_code == exit_code
    assert device in str(error)


def test_the_info_tells_what_is_loaded(tiny: ModelMaker) -> None:
    import torch

    backend = opened(tiny("roberta", max_length=128), device="cpu")
    info = backend.info
    assert (info.backend, info.device, info.dtype, info.max_length, info.num_labels) == ("torch", "cpu", "float32", 128, 1)
    assert (info.relevance_label, info.instruction) == ("", False)
    assert torch.get_num_threads() == 1
    assert opened(tiny("roberta", max_length=128), max_length=32, max_pass_tokens=99).info.max_length == 32
    assert opened(tiny("bert"), max_pass_tokens=99).info.max_pass_tokens == 99


@pytest.mark.parametrize(("architecture", "own"), [("bert", 512), ("roberta", 512), ("xlm-roberta", 512), ("deberta-v2", 512)])
def test_without_a_limit_in_the_tokenizer_the_positions_decide(architecture: str, own: int, tiny: ModelMaker, tmp_path: Path) -> None:
    path = tmp_path / "limitless"
    shutil.copytree(tiny(architecture), path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    del settings["model_max_length"]
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    backend = opened(path)
    assert backend.info.max_length == own
    assert len(logits_of(backend, [("boat", "the lake is old " * 1000)])) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_precision_gives_nearly_the_same_floats(dtype: str, tiny: ModelMaker) -> None:
    pairs = some_pairs(7, 10)
    backend = opened(tiny("bert"), dtype=dtype)
    assert backend.info.dtype == dtype
    assert farthest(logits_of(backend, pairs), logits_of(opened(tiny("bert")), pairs)) < 0.5


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("MPS backend out of memory"),
    ],
    ids=["python", "cpu", "cuda", "mps"],
)
def test_a_pass_that_is_too_large_is_told_apart(error: Exception, tiny: ModelMaker) -> None:
    backend = opened(tiny("bert"))
    tokens = backend.tokenize([Pair("boat", "lake", 64)])
    expected = backend.score(tokens)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    hook = backend._model.register_forward_pre_hook(fail)
    with pytest.raises(OutOfMemoryError):
        backend.score(tokens)
    hook.remove()
    assert backend.score(tokens) == expected


def test_a_real_allocation_that_fails_is_out_of_memory(tiny: ModelMaker) -> None:
    import torch

    backend = opened(tiny("bert"))

    def allocate(*args: Any, **kwargs: Any) -> Any:
        return torch.empty(1 << 60, dtype=torch.uint8)

    backend._model.register_forward_pre_hook(allocate)
    with pytest.raises(OutOfMemoryError):
        backend.score(backend.tokenize([Pair("boat", "lake", 64)]))


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert triggered"), ValueError("out of memory")])
def test_other_failures_of_a_pass_are_not_hidden(error: Exception, tiny: ModelMaker) -> None:
    backend = opened(tiny("bert"))

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    backend._model.register_forward_pre_hook(fail)
    with pytest.raises(type(error)):
        backend.score(backend.tokenize([Pair("boat", "lake", 64)]))


def test_a_model_without_a_padding_token_scores_pairs_of_different_lengths(tiny: ModelMaker) -> None:
    backend = opened(tiny("bert"))
    pairs = some_pairs(8, 6)
    expected = logits_of(backend, pairs)
    backend._pad_id = None
    assert farthest(logits_of(backend, pairs), expected) < PARITY


def test_a_thread_that_scores_has_the_threads_that_were_asked_for(tiny: ModelMaker) -> None:
    import threading

    import torch

    backend = opened(tiny("bert"))
    tokens = backend.tokenize([Pair("boat", "lake", 64)])
    seen: list[int] = []
    backend._model.register_forward_pre_hook(lambda *args: seen.append(torch.get_num_threads()))
    thread = threading.Thread(target=backend.score, args=(tokens,))
    thread.start()
    thread.join(30)
    assert seen == [1]


def test_an_empty_batch_has_no_scores(tiny: ModelMaker) -> None:
    backend = opened(tiny("bert"))
    assert backend.tokenize([]) == []
    assert backend.score([]) == []
    assert backend.activate([]) == []


def test_versions_name_the_libraries() -> None:
    found = versions()
    assert set(found) == {"torch", "transformers", "sentence_transformers", "tokenizers"}
    assert all(version[0].isdigit() for version in found.values())


QUIET = """
import json, socket, sys
from pathlib import Path
calls = []
def refuse(*args):
    calls.append(repr(args)); raise OSError("no network in this test")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from reranker_worker.backends import Pair
from reranker_worker.backends.torch import TorchBackend
from reranker_worker.config import Config
from reranker_worker.models import resolve
model = resolve(Config(model=sys.argv[1]), lambda *report: None)
backend = TorchBackend(Config(model=sys.argv[1]), model, 1)
backend.score(backend.tokenize([Pair("a", "b " * 5000, 64), Pair("a", "b", 64)]))
assert not calls, calls
"""


def test_opening_and_scoring_print_nothing_and_connect_to_nothing(tiny: ModelMaker, tmp_path: Path) -> None:
    command = [sys.executable, "-c", QUIET, str(tiny("bert"))]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=55, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
