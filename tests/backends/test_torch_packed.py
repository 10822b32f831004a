"""The lean torch path gives what the library's `predict` gives, alone and in any company, and leaves to others what it cannot."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import FAMILIES, PARITY, farthest, logits_of, predicted, some_pairs

from reranker_worker.backends import BackendError, OutOfMemoryError, Pair
from reranker_worker.backends import torch_packed_network as network
from reranker_worker.backends.declared import UnsupportedModelError, read_declared
from reranker_worker.backends.encoder import read_encoder
from reranker_worker.backends.torch_packed import PackedTorchBackend, open_packed, resolve_dtype, versions
from reranker_worker.config import Config
from reranker_worker.models import ResolvedModel

ModelMaker = Callable[..., Path]
# 52 with the bound on a 2-core Xeon with AMX, 619 without.
GROWTH_MB = 150
CPU = torch.device("cpu")


def opened(path: Path, threads: int = 1, **settings: Any) -> PackedTorchBackend:
    config = Config(model=str(path), **{"device": "cpu", **settings})
    return open_packed(config, ResolvedModel(str(path), path, None, "directory"), threads)


def variant(path: Path, source: Path, **changes: Any) -> Path:
    """A model like that in `source` with another configuration and new random weights, none of them 0 or 1, in `path`."""
    import transformers

    shutil.copytree(source, path)
    config = transformers.AutoConfig.from_pretrained(source)
    config.update(changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(path)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_predict_alone_and_in_any_company(family: str, tiny: ModelMaker) -> None:
    path = tiny(family)
    pairs = some_pairs(1, 40)
    expected = predicted(path, pairs).tolist()
    backend = opened(path)
    assert farthest(logits_of(backend, pairs), expected) < PARITY
    assert farthest([logits_of(backend, [pair])[0] for pair in pairs], expected) < PARITY
    order = list(range(len(pairs)))
    random.Random(2).shuffle(order)
    shuffled = [logit for start in range(0, 40, 7) for logit in logits_of(backend, [pairs[i] for i in order[start : start + 7]])]
    assert farthest(shuffled, [expected[i] for i in order]) < PARITY
    assert max(expected) - min(expected) > 100 * PARITY, "the model tells the pairs apart"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_document_is_cut_as_predict_cuts_it(family: str, tiny: ModelMaker) -> None:
    from sentence_transformers import CrossEncoder

    path = tiny(family, max_length=64)
    pairs = [("where is the boat", "the boat is on the lake and " * count) for count in (1, 12, 500, 20_000)]
    reference = CrossEncoder(str(path), device="cpu", local_files_only=True)
    reference.max_seq_length = 64  # the library gives RoBERTa two positions more than its table has
    backend = opened(path)
    assert backend.info.max_length == 64
    tokens = backend.tokenize([Pair(query, document, 64) for query, document in pairs])
    assert [one.truncated for one in tokens] == [False, True, True, True]
    assert farthest(backend.score(tokens), reference.predict(pairs, activation_fn=torch.nn.Identity())) < PARITY


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in FAMILIES),
        ("electra", {"embedding_size": 16}),
        ("bert", {"num_hidden_layers": 1}),
        ("bert", {"num_hidden_layers": 4, "num_attention_heads": 4, "layer_norm_eps": 1e-3}),
        ("bert", {"hidden_act": "relu"}),
        ("roberta", {"hidden_act": "gelu_new"}),
    ],
)
def test_other_shapes_of_a_family_equal_predict_too(family: str, changes: dict[str, Any], tiny: ModelMaker, tmp_path: Path) -> None:
    path = variant(tmp_path / "variant", tiny(family), **changes)
    pairs = some_pairs(3, 20)
    expected = predicted(path, pairs).tolist()
    assert farthest(logits_of(opened(path), pairs), expected) < PARITY
    assert max(expected) - min(expected) > 100 * PARITY


def test_a_prompt_that_the_model_declares_is_used_as_predict_uses_it(tiny: ModelMaker, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    path = tmp_path / "prompted"
    CrossEncoder(str(tiny("bert")), device="cpu", local_files_only=True).save_pretrained(str(path))
    settings = path / "config_sentence_transformers.json"
    content = json.loads(settings.read_text()) | {"prompts": {"rerank": "find the answer: "}, "default_prompt_name": "rerank"}
    settings.write_text(json.dumps(content))
    pairs = some_pairs(4, 8)
    expected = predicted(path, pairs).tolist()
    assert farthest(logits_of(opened(path), pairs), expected) < PARITY
    assert farthest(logits_of(opened(tiny("bert")), pairs), expected) > 100 * PARITY


@pytest.mark.parametrize(
    ("config", "name"),
    [({}, "sigmoid"), ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "identity")],
)
def test_activate_gives_what_predict_gives_by_default(config: dict[str, Any], name: str, tiny: ModelMaker) -> None:
    path = tiny("bert", config=config)
    pairs = some_pairs(5, 10)
    backend = opened(path, scores="model")
    assert backend.info.activation == name
    assert farthest(backend.activate(logits_of(backend, pairs)), predicted(path, pairs, activation_fn=None)) < PARITY


@pytest.mark.parametrize("family", FAMILIES)
def test_of_several_labels_the_logit_is_the_log_odds_of_the_relevant_one(family: str, tiny: ModelMaker) -> None:
    path = tiny(family, num_labels=3, labels=("contradiction", "entailment", "neutral"))
    pairs = some_pairs(6, 12)
    probabilities = predicted(path, pairs, apply_softmax=True)
    for settings, index in (({}, 1), ({"relevance_label": "neutral"}, 2), ({"relevance_label": "0"}, 0)):
        backend = opened(path, **settings)
        assert (backend.info.num_labels, backend.info.relevance_label) == (3, ("contradiction", "entailment", "neutral")[index])
        assert farthest(backend.activate(logits_of(backend, pairs)), probabilities[:, index]) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reduced_precision_gives_nearly_the_same_floats_in_the_same_order(
    dtype: str, family: str, tiny: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A CPU without such arithmetic imitates it: slow, but the same floats.
    monkeypatch.setattr("reranker_worker.backends.torch_packed._is_native", lambda dtype: True)
    pairs = some_pairs(7, 30)
    exact = logits_of(opened(tiny(family)), pairs)
    backend = opened(tiny(family), dtype=dtype)
    assert backend.info.dtype == dtype
    reduced = logits_of(backend, pairs)
    tolerance = (max(exact) - min(exact)) * (0.05 if dtype == "bfloat16" else 0.01)
    assert 0 < farthest(reduced, exact) < tolerance
    far_apart = [(a, b) for a in range(30) for b in range(30) if exact[a] - exact[b] > 2 * tolerance]
    assert len(far_apart) > 200
    assert all(reduced[a] > reduced[b] for a, b in far_apart)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_precision_that_the_cpu_would_have_to_imitate_is_refused(dtype: str, tiny: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    with pytest.raises(BackendError, match="5 to 6 times slower") as caught:
        opened(tiny("bert"), dtype=dtype)
    assert caught.value.exit_code == 71
    assert resolve_dtype(dtype, torch.device("cuda:0")) == getattr(torch, dtype)
    assert resolve_dtype("auto", torch.device("cuda:0")) == torch.float32


def test_int8_is_not_for_this_backend() -> None:
    with pytest.raises(BackendError, match="int8") as caught:
        resolve_dtype("int8", CPU)
    assert caught.value.exit_code == 78


@pytest.mark.parametrize("architecture", ["modernbert", "deberta-v2"])
def test_another_architecture_is_left_to_the_general_path(architecture: str, tiny: ModelMaker) -> None:
    with pytest.raises(UnsupportedModelError, match=architecture):
        opened(tiny(architecture))


def test_a_backbone_without_a_head_is_left_to_the_general_path(tiny: ModelMaker) -> None:
    with pytest.raises(UnsupportedModelError):
        opened(tiny("bert", head=False))


@pytest.mark.parametrize(
    ("settings", "exit_code", "word"),
    [
        ({"device": "cuda:99"}, 71, "cuda:99"),
        ({"device": "tpu"}, 78, "tpu"),
        ({"scores": "model", "relevance_label": "1"}, 78, "RERANKING_SCORES"),
        ({}, 78, "RERANKING_RELEVANCE_LABEL"),
    ],
)
def test_settings_that_do_not_suit_are_refused(settings: dict[str, Any], exit_code: int, word: str, tiny: ModelMaker) -> None:
    with pytest.raises(BackendError, match=word) as caught:
        opened(tiny("bert", num_labels=2), **settings)
    assert caught.value.exit_code == exit_code


def test_the_info_tells_what_is_loaded(tiny: ModelMaker) -> None:
    info = opened(tiny("roberta", max_length=128)).info
    assert (info.backend, info.device, info.dtype, info.max_length, info.num_labels) == ("torch", "cpu", "float32", 128, 1)
    assert (info.relevance_label, info.instruction, info.packed, info.max_pass_tokens, info.parallel_passes) == ("", False, True, 512, 1)
    assert opened(tiny("bert"), max_length=32, max_pass_tokens=99, threads=9).info.max_length == 32
    assert opened(tiny("bert"), max_pass_tokens=99, threads=9).info.max_pass_tokens == 99
    assert opened(tiny("bert"), threads=9).info.parallel_passes == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_limit_in_the_tokenizer_the_positions_decide(family: str, tiny: ModelMaker, tmp_path: Path) -> None:
    path = tmp_path / "limitless"
    shutil.copytree(tiny(family, max_length=64), path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    del settings["model_max_length"]
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    backend = opened(path)
    assert backend.info.max_length == 64
    assert len(logits_of(backend, [("boat", "the lake is old " * 1000)])) == 1


def test_passes_side_by_side_give_the_same_and_have_their_share_of_the_threads(tiny: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = opened(tiny("bert"), threads=4)
    pairs = some_pairs(8, 12)
    expected = logits_of(backend, pairs)
    seen: list[int] = []
    inner = backend._network

    def watched(packed: Any) -> Any:
        seen.append(torch.get_num_threads())
        return inner(packed)

    monkeypatch.setattr(backend, "_network", watched)
    tokens = backend.tokenize([Pair(query, document, 512) for query, document in pairs])
    results: list[list[float]] = []
    threads = [threading.Thread(target=lambda: results.append(backend.score(tokens))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [expected] * 4
    assert seen == [1] * 4


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError("CUDA out of memory. Tried"), None],
    ids=["python", "cpu", "cuda", "real"],
)
def test_a_pass_that_is_too_large_is_told_apart(error: Exception | None, tiny: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = opened(tiny("bert"))
    expected = logits_of(backend, [("boat", "lake")])

    def fail(packed: Any) -> Any:
        if error is None:
            return torch.empty(1 << 60, dtype=torch.uint8)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(backend, "_network", fail)
        with pytest.raises(OutOfMemoryError):
            logits_of(backend, [("boat", "lake")])
    assert logits_of(backend, [("boat", "lake")]) == expected


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert triggered"), ValueError("out of memory")])
def test_other_failures_of_a_pass_are_not_hidden(error: Exception, tiny: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = opened(tiny("bert"))

    def fail(packed: Any) -> Any:
        raise error

    monkeypatch.setattr(backend, "_network", fail)
    with pytest.raises(type(error)):
        logits_of(backend, [("boat", "lake")])


def test_an_empty_batch_has_no_scores(tiny: ModelMaker) -> None:
    backend = opened(tiny("bert"))
    assert (backend.tokenize([]), backend.score([]), backend.activate([])) == ([], [], [])


def test_no_second_copy_of_the_weights_is_kept(tiny: ModelMaker) -> None:
    path = tiny("bert")
    declared = read_declared(path)
    encoder = read_encoder(path, declared.config, typed=declared.typed)
    backend = PackedTorchBackend(Config(model=str(path)), declared, encoder, device=CPU, dtype=torch.float32, threads=1)
    assert encoder.layers == []
    assert backend._network._word.data_ptr() == encoder.word.ctypes.data, "word embeddings stay in the mapped file"


@pytest.mark.parametrize("missing", ["_reorder_linear_weight", "_linear_pointwise", "wrong"])
def test_without_the_prepacking_operators_the_scores_are_the_same(
    missing: str, tiny: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = variant(tmp_path / "variant", tiny("bert"))
    pairs = some_pairs(9, 10)
    expected = logits_of(opened(path), pairs)

    def fail(*args: Any) -> Any:
        if missing == "wrong":
            return torch.zeros((len(args[0]), len(args[2])))
        raise RuntimeError("this build has no such operator")

    calls: list[None] = []
    linear = network.functional.linear
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise" if missing == "wrong" else missing, fail)
    backend = opened(path)
    monkeypatch.setattr(network.functional, "linear", lambda *args: (calls.append(None), linear(*args))[1])
    assert farthest(logits_of(backend, pairs), expected) < PARITY
    assert len(calls) == 4 + 5 + 2, "the weights are used as they are"


SHAPES = """
import random, sys
from pathlib import Path
from reranker_worker.backends import Tokens
from reranker_worker.backends.texts import PairIds
from reranker_worker.backends.torch_packed import open_packed
from reranker_worker.config import Config
from reranker_worker.models import ResolvedModel
backend = open_packed(Config(device="cpu"), ResolvedModel(sys.argv[1], Path(sys.argv[1]), None, "directory"), 1)
def megabytes():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
def score(lengths):
    for length in lengths:
        backend.score([Tokens(PairIds([5] * length, [0] * length), length)])
score(range(1, 101))
before = megabytes()
score(range(101, 501))
print(megabytes() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_passes_of_ever_other_lengths_do_not_fill_the_memory(tiny: ModelMaker) -> None:
    path = str(tiny("bert", hidden_size=256, max_length=512))
    done = subprocess.run([sys.executable, "-c", SHAPES, path], cwd=Path(__file__).parents[2], capture_output=True, timeout=55, check=True)
    assert float(done.stdout) < GROWTH_MB


def test_versions_name_the_libraries() -> None:
    assert set(versions()) == {"torch", "tokenizers", "numpy"}
    assert all(version[0].isdigit() for version in versions().values())


QUIET = """
import socket, sys
calls = []
def refuse(*args):
    calls.append(repr(args)); raise OSError("no network in this test")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from pathlib import Path
from reranker_worker.backends import Pair
from reranker_worker.backends.torch_packed import open_packed
from reranker_worker.config import Config
from reranker_worker.models import ResolvedModel
path = Path(sys.argv[1])
backend = open_packed(Config(model=sys.argv[1]), ResolvedModel(sys.argv[1], path, None, "directory"), 1)
backend.score(backend.tokenize([Pair("a", "b " * 5000, 64), Pair("a", "b", 64)]))
heavy = {"transformers", "sentence_transformers", "huggingface_hub", "onnx", "onnxruntime", "openvino"} & sys.modules.keys()
assert not calls and not heavy, (calls, heavy)
"""


def test_opening_and_scoring_import_no_model_library_print_nothing_and_connect_to_nothing(tiny: ModelMaker, tmp_path: Path) -> None:
    command = [sys.executable, "-c", QUIET, str(tiny("bert"))]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=55, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
