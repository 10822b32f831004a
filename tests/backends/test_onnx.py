"""The ONNX Runtime path gives what the library's `predict` gives, without torch, and leaves alone what it is not certain of."""

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
from parity import FAMILIES, PARITY, farthest, logits_of, predicted, some_pairs
from tiny_models import WORDS

from reranker_worker.backends import Backend, BackendError, OutOfMemoryError, Pair, open_backend
from reranker_worker.backends.onnx import OnnxBackend, versions
from reranker_worker.config import Config
from reranker_worker.models import ResolvedModel

ModelMaker = Callable[..., Path]


def opened(path: Path, notes: list[str] | None = None, **settings: Any) -> Backend:
    settings = {"backend": "onnx", "device": "cpu", **settings}
    model = ResolvedModel(str(path), path, None, "directory")
    return open_backend(Config(model=str(path), **settings), model, 2, (notes if notes is not None else []).append)


def refused(path: Path, **settings: Any) -> BackendError:
    with pytest.raises(BackendError) as caught:
        opened(path, **settings)
    assert str(caught.value).isascii()
    assert "\n" not in str(caught.value)
    return caught.value


def by_the_library(path: Path) -> Backend:
    from reranker_worker.backends.torch import TorchBackend

    return TorchBackend(Config(device="cpu"), ResolvedModel(str(path), path, None, "directory"), 1)


def changed(path: Path, target: Path, name: str, **changes: Any) -> Path:
    shutil.copytree(path, target)
    content = json.loads((target / name).read_text()) if (target / name).exists() else {}
    (target / name).write_text(json.dumps({**content, **changes}))
    return target


@pytest.mark.parametrize("architecture", FAMILIES)
def test_logits_equal_those_of_predict_alone_and_in_any_company(architecture: str, tiny: ModelMaker) -> None:
    path = tiny(architecture)
    pairs = some_pairs(1, 40)
    expected = predicted(path, pairs)
    backend = opened(path)
    assert isinstance(backend, OnnxBackend)
    assert farthest(logits_of(backend, pairs), expected) < PARITY
    assert farthest([logits_of(backend, [pair])[0] for pair in pairs], expected) < PARITY
    order = list(range(len(pairs)))
    random.Random(2).shuffle(order)
    shuffled = [logit for start in range(0, 40, 7) for logit in logits_of(backend, [pairs[i] for i in order[start : start + 7]])]
    assert farthest(shuffled, [expected[i] for i in order]) < PARITY
    assert max(expected) - min(expected) > 100 * PARITY, "the model tells the pairs apart"


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_long_document_is_cut_where_predict_cuts_it(architecture: str, tiny: ModelMaker) -> None:
    path = tiny(architecture, max_length=48)
    pairs = [("where is the boat", " ".join(WORDS * 3)), ("boat", "the boat is on the lake")]
    backend = opened(path)
    assert backend.info.max_length == 48
    assert farthest(logits_of(backend, pairs), predicted(path, pairs)) < PARITY


@pytest.mark.parametrize("config", [{"hidden_act": "relu"}, {"hidden_act": "gelu_new"}, {"layer_norm_eps": 1e-2}])
def test_what_the_configuration_says_of_the_arithmetic_is_done(config: dict[str, Any], tiny: ModelMaker) -> None:
    path = tiny("bert", config=config)
    pairs = some_pairs(3, 20)
    expected = predicted(path, pairs)
    assert farthest(logits_of(opened(path), pairs), expected) < PARITY
    assert farthest(logits_of(opened(tiny("bert")), pairs), expected) > PARITY, "it makes a difference"


def test_a_narrow_embedding_is_projected(tiny: ModelMaker, tmp_path: Path) -> None:
    import torch
    import transformers

    path = shutil.copytree(tiny("electra"), tmp_path / "narrow")
    config = transformers.ElectraConfig.from_pretrained(path, embedding_size=16)
    torch.manual_seed(5)
    transformers.ElectraForSequenceClassification(config).save_pretrained(path)
    pairs = some_pairs(4, 20)
    assert farthest(logits_of(opened(path), pairs), predicted(path, pairs)) < PARITY


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_stored_in_half_precision_are_read_as_the_library_reads_them(dtype: str, tiny: ModelMaker, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path = shutil.copytree(tiny("bert"), tmp_path / "half")
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    pairs = some_pairs(5, 20)
    general = by_the_library(path)
    assert farthest(logits_of(opened(path), pairs), logits_of(general, pairs)) < PARITY
    assert farthest(logits_of(opened(path), pairs), predicted(tiny("bert"), pairs)) > 1e-6, "rounding is seen"


def test_an_untyped_model_is_given_no_token_types(tiny: ModelMaker, tmp_path: Path) -> None:
    path = changed(tiny("bert"), tmp_path / "untyped", "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    pairs = some_pairs(7, 12)
    assert farthest(logits_of(opened(path), pairs), predicted(path, pairs)) < PARITY
    assert farthest(logits_of(opened(path), pairs), logits_of(opened(tiny("bert")), pairs)) > PARITY


def test_of_several_labels_the_logit_is_the_log_odds_of_the_relevant_one(tiny: ModelMaker) -> None:
    path = tiny("bert", num_labels=3, labels=("irrelevant", "partly", "relevant"))
    backend = opened(path)
    general = by_the_library(path)
    pairs = some_pairs(6, 12)
    assert (backend.info.num_labels, backend.info.relevance_label) == (3, "relevant")
    assert farthest(logits_of(backend, pairs), logits_of(general, pairs)) < PARITY
    logits = logits_of(backend, pairs)
    assert farthest(backend.activate(logits), general.activate(logits)) < 1e-6


@pytest.mark.parametrize("name", ["activation.Sigmoid", "linear.Identity"])
def test_activate_gives_what_predict_gives_by_default(name: str, tiny: ModelMaker) -> None:
    path = tiny("bert", config={"sentence_transformers": {"activation_fn": f"torch.nn.modules.{name}"}})
    backend, general = opened(path), by_the_library(path)
    assert backend.info.activation == general.info.activation == name.rpartition(".")[2].lower()
    values = [-90.0, -1.5, 0.0, 0.25, 90.0]
    assert farthest(backend.activate(values), general.activate(values)) < 1e-6


def saved_by_the_library(path: Path, target: Path, **changes: Any) -> Path:
    from sentence_transformers import CrossEncoder

    CrossEncoder(str(path), device="cpu", local_files_only=True).save_pretrained(str(target))
    settings = target / "config_sentence_transformers.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | changes))
    return target


def test_a_prompt_that_the_model_declares_goes_before_every_query(tiny: ModelMaker, tmp_path: Path) -> None:
    path = saved_by_the_library(tiny("bert"), tmp_path / "prompted", prompts={"query": "find the "}, default_prompt_name="query")
    prompted, spelled = logits_of(opened(path), [("boat", "a boat")]), logits_of(opened(tiny("bert")), [("find the boat", "a boat")])
    assert farthest(prompted, spelled) < 1e-6
    assert farthest(prompted, predicted(path, [("boat", "a boat")])) < PARITY


def test_the_librarys_settings_count_only_where_the_library_reads_them(tiny: ModelMaker, tmp_path: Path) -> None:
    path = changed(tiny("bert"), tmp_path / "loose", "config_sentence_transformers.json", prompts={"query": "find "}, default_prompt_name="query")
    assert farthest(logits_of(opened(path), [("boat", "a boat")]), predicted(path, [("boat", "a boat")])) < PARITY


def test_a_bi_encoder_of_the_library_is_left_to_the_library(tiny: ModelMaker, tmp_path: Path) -> None:
    path = saved_by_the_library(tiny("bert"), tmp_path / "other", model_type="SentenceTransformer")
    assert "cross-encoder" in str(refused(path))


def test_word_embeddings_stored_in_float8_are_read_as_the_library_reads_them(tiny: ModelMaker, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path = shutil.copytree(tiny("bert"), tmp_path / "eighth")
    tensors = load_file(path / "model.safetensors")
    (name,) = [name for name in tensors if name.endswith("word_embeddings.weight")]
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    pairs = some_pairs(5, 20)
    assert farthest(logits_of(opened(path), pairs), predicted(path, pairs)) < PARITY
    assert farthest(logits_of(opened(path), pairs), predicted(tiny("bert"), pairs)) > 1e-4, "rounding is seen"


# A document with a first token of its own, which the class for BERT would leave out.
OWN_FIRST = [("[CLS]", 0), ("A", 0), ("[SEP]", 0), ("[CLS]", 1), ("B", 1), ("[SEP]", 1)]


def post_processor(path: Path) -> dict[str, Any]:
    pair = [{"Sequence" if name in "AB" else "SpecialToken": {"id": name, "type_id": number}} for name, number in OWN_FIRST]
    return {**json.loads((path / "tokenizer.json").read_text())["post_processor"], "type": "TemplateProcessing", "pair": pair}


def test_a_tokenizer_that_writes_pairs_in_its_own_way_is_followed(tiny: ModelMaker, tmp_path: Path) -> None:
    names = ["input_ids", "token_type_ids", "attention_mask"]
    path = changed(tiny("bert"), tmp_path / "own", "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", model_input_names=names)
    path = changed(path, tmp_path / "pairs", "tokenizer.json", post_processor=post_processor(path))
    pairs = some_pairs(6, 20)
    assert farthest(logits_of(opened(path), pairs), predicted(path, pairs)) < PARITY
    assert farthest(logits_of(opened(path), pairs), predicted(tiny("bert"), pairs)) > 1e-4


def test_a_class_that_would_write_pairs_in_another_way_than_its_file_is_left_to_the_library(tiny: ModelMaker, tmp_path: Path) -> None:
    names = ["input_ids", "token_type_ids", "attention_mask"]
    path = changed(tiny("bert"), tmp_path / "class", "tokenizer_config.json", tokenizer_class="BertTokenizer", model_input_names=names)
    path = changed(path, tmp_path / "odd", "tokenizer.json", post_processor=post_processor(path))
    assert "pairs in another way" in str(refused(path))
    assert opened(path, backend="auto").info.backend == "torch"


UNCERTAIN: list[tuple[str, dict[str, Any], str]] = [
    ("config.json", {"architectures": ["BertForTokenClassification"]}, "class"),
    ("config.json", {"position_embedding_type": "relative_key"}, "attention"),
    ("config.json", {"hidden_act": "silu"}, "silu"),
    ("config.json", {"num_hidden_layers": 1}, "tensor"),
    ("config.json", {"num_hidden_layers": 3}, "missing"),
    ("config.json", {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}}, "Tanh"),
    ("tokenizer_config.json", {"truncation_side": "left"}, "left"),
    ("tokenizer_config.json", {"do_lower_case": False}, "do_lower_case"),
    ("tokenizer_config.json", {"tokenizer_class": "OtherTokenizer", "model_input_names": None}, "OtherTokenizer"),
]


@pytest.mark.parametrize(("name", "changes", "word"), UNCERTAIN, ids=[word for _, _, word in UNCERTAIN])
def test_a_model_that_may_be_something_else_is_refused_and_says_why(
    name: str, changes: dict[str, Any], word: str, tiny: ModelMaker, tmp_path: Path
) -> None:
    path = changed(tiny("bert"), tmp_path / "odd", name, **changes)
    error = refused(path)
    assert error.exit_code == 78
    assert word in str(error)
    assert "RERANKING_BACKEND" in str(error)


@pytest.mark.parametrize("architecture", ["modernbert", "deberta-v2"])
def test_auto_leaves_another_architecture_to_torch_and_says_so(architecture: str, tiny: ModelMaker) -> None:
    notes: list[str] = []
    backend = opened(tiny(architecture), notes, backend="auto")
    assert backend.info.backend == "torch"
    assert any(architecture in note for note in notes)


def test_a_backbone_without_a_trained_head_is_no_cross_encoder_on_any_backend(tiny: ModelMaker) -> None:
    error = refused(tiny("bert", head=False), backend="auto")
    assert "not a cross-encoder" in str(error)


@pytest.mark.parametrize(("dtype", "word"), [("bfloat16", "float32, int8"), ("int8", "prewarm")])
def test_a_precision_that_is_not_there_is_refused_with_the_way_out(dtype: str, word: str, tiny: ModelMaker) -> None:
    assert word in str(refused(tiny("bert"), dtype=dtype))


def test_onnx_is_for_the_cpu(tiny: ModelMaker) -> None:
    assert "RERANKING_DEVICE" in str(refused(tiny("bert"), device="cuda"))


def test_a_pass_that_is_too_large_is_told_apart(tiny: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = opened(tiny("bert"))
    tokens = backend.tokenize([Pair("boat", "the boat", 512)])

    class Full:
        def run(self, outputs: list[str], inputs: dict[str, Any]) -> None:
            raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bfc_arena.cc Failed to allocate memory for requested buffer of size 1")

    monkeypatch.setattr(backend, "_session", Full())
    with pytest.raises(OutOfMemoryError):
        backend.score(tokens)


def test_other_failures_of_a_pass_are_not_hidden(tiny: ModelMaker) -> None:
    backend: Any = opened(tiny("bert"))
    (tokens,) = backend.tokenize([Pair("boat", "the boat", 512)])
    tokens.inputs.ids[0] = 10_000_000  # no such token
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        backend.score([tokens])


def test_an_empty_batch_has_no_scores(tiny: ModelMaker) -> None:
    assert opened(tiny("bert")).score([]) == []


def test_the_info_tells_what_is_loaded(tiny: ModelMaker) -> None:
    info = opened(tiny("bert")).info
    assert (info.backend, info.device, info.dtype, info.max_length) == ("onnx", "cpu", "float32", 512)
    assert info.packed
    assert info.parallel_passes == 2
    assert opened(tiny("bert"), max_length=100).info.max_length == 100
    assert set(versions()) == {"onnxruntime", "tokenizers", "numpy"}


def test_without_a_place_for_the_graph_onnx_fails_with_a_sentence_and_auto_goes_on(
    tiny: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reranker_worker.backends.onnx_graph._stored", full)
    error = refused(tiny("bert"))
    assert error.exit_code == 71
    assert "TMPDIR" in str(error)
    assert opened(tiny("bert"), backend="auto").info.backend == "torch"


IMPORTS_NOTHING_HEAVY = """
import sys
from pathlib import Path
from reranker_worker.backends import Pair, open_backend
from reranker_worker.config import Config
from reranker_worker.models import ResolvedModel
path = Path(sys.argv[1])
backend = open_backend(Config(device="cpu"), ResolvedModel("m", path, None, "directory"), 1)
assert len(backend.score(backend.tokenize([Pair("where", "here", 512)]))) == 1
heavy = {"torch", "transformers", "sentence_transformers", "huggingface_hub", "scipy", "sklearn"} & set(sys.modules)
assert backend.info.backend in ("onnx", "openvino"), backend.info
assert not heavy, heavy
"""


def test_it_prints_nothing_and_imports_no_torch(tiny: ModelMaker) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS_NOTHING_HEAVY, str(tiny("bert"))],
        capture_output=True,
        cwd=Path(__file__).parents[2],
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
