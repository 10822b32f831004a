"""The OpenVINO backend gives what the library's `predict` gives, alone and in any company, and reports to nobody."""

from __future__ import annotations

import importlib.util
import queue
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parity import FAMILIES, PARITY, farthest, logits_of, predicted, some_pairs

# Looked for and not imported: a plain import of openvino reports itself to its maker (see backends/openvino.py).
if importlib.util.find_spec("openvino") is None or importlib.util.find_spec("onnx") is None:
    pytest.skip("openvino, an optional backend, or onnx, which writes its graph, is not installed", allow_module_level=True)

from reranker_worker.backends import BackendError, OutOfMemoryError, Pair
from reranker_worker.backends import openvino as backends_openvino
from reranker_worker.backends.declared import read_declared
from reranker_worker.backends.encoder import read_encoder
from reranker_worker.backends.onnx_graph import save_graph
from reranker_worker.backends.openvino import OpenVinoBackend, versions
from reranker_worker.backends.packing import pack
from reranker_worker.config import Config

ModelMaker = Callable[..., Path]
Opener = Callable[..., OpenVinoBackend]
# 89 with the bound on a 2-core Xeon with AMX, 529 without.
GROWTH_MB = 200


@pytest.fixture
def opened(tmp_path: Path) -> Opener:
    """`opened(path, threads=1, dtype="float32", **settings)`: the backend over that model's graph."""

    def open_one(path: Path, threads: int = 1, dtype: str = "float32", **settings: Any) -> OpenVinoBackend:
        declared = read_declared(path)
        encoder = read_encoder(path, declared.config, typed=declared.typed)
        save_graph(encoder, tmp_path)
        config = Config(model=str(path), **settings)
        return OpenVinoBackend(config, declared, tmp_path, positions=len(encoder.position), dtype=dtype, threads=threads)

    return open_one


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_predict_alone_and_in_any_company(family: str, tiny: ModelMaker, opened: Opener) -> None:
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
def test_a_long_document_is_cut_as_predict_cuts_it(family: str, tiny: ModelMaker, opened: Opener) -> None:
    import torch
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


def test_of_several_labels_the_logit_is_the_log_odds_of_the_relevant_one(tiny: ModelMaker, opened: Opener) -> None:
    path = tiny("bert", num_labels=3, labels=("contradiction", "entailment", "neutral"))
    pairs = some_pairs(6, 12)
    probabilities = predicted(path, pairs, apply_softmax=True)
    backend = opened(path, relevance_label="neutral")
    assert (backend.info.num_labels, backend.info.relevance_label) == (3, "neutral")
    assert farthest(backend.activate(logits_of(backend, pairs)), probabilities[:, 2]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_gives_nearly_the_same_floats_in_the_same_order(family: str, tiny: ModelMaker, opened: Opener) -> None:
    if "BF16" not in backends_openvino._library().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16 arithmetic")
    pairs = some_pairs(7, 30)
    exact = logits_of(opened(tiny(family)), pairs)
    backend = opened(tiny(family), dtype="bfloat16")
    assert backend.info.dtype == "bfloat16"
    reduced = logits_of(backend, pairs)
    tolerance = (max(exact) - min(exact)) * 0.05
    assert 0 < farthest(reduced, exact) < tolerance
    far_apart = [(a, b) for a in range(30) for b in range(30) if exact[a] - exact[b] > 2 * tolerance]
    assert len(far_apart) > 200
    assert all(reduced[a] > reduced[b] for a, b in far_apart)


def test_a_precision_that_the_cpu_would_have_to_imitate_is_refused(tiny: ModelMaker, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    class OldMachine:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    class Library:
        Core = OldMachine

    monkeypatch.setattr(backends_openvino, "_library", lambda: Library)
    with pytest.raises(BackendError, match="5 to 6 times slower") as caught:
        opened(tiny("bert"), dtype="bfloat16")
    assert caught.value.exit_code == 71


def test_what_the_backend_does_not_have_is_refused(tiny: ModelMaker, opened: Opener) -> None:
    with pytest.raises(BackendError, match="float16") as caught:
        opened(tiny("bert"), dtype="float16")
    assert caught.value.exit_code == 78


def test_a_graph_that_cannot_be_opened_is_one_sentence(tiny: ModelMaker, tmp_path: Path) -> None:
    declared = read_declared(tiny("bert"))
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match="OpenVINO cannot open the float32 graph") as caught:
        OpenVinoBackend(Config(), declared, tmp_path, positions=512, dtype="float32", threads=1)
    assert caught.value.exit_code == 71
    assert str(caught.value).isascii()
    assert "\n" not in str(caught.value)


def test_the_info_tells_what_is_loaded(tiny: ModelMaker, opened: Opener) -> None:
    info = opened(tiny("roberta", max_length=128), threads=2).info
    assert (info.backend, info.device, info.dtype, info.max_length, info.num_labels) == ("openvino", "cpu", "float32", 128, 1)
    assert (info.instruction, info.packed, info.max_pass_tokens, info.parallel_passes) == (False, True, 512, 2)
    assert opened(tiny("bert"), threads=9, max_pass_tokens=99).info.max_pass_tokens == 99
    assert opened(tiny("bert"), threads=9).info.parallel_passes == 4


def test_passes_side_by_side_give_the_same(tiny: ModelMaker, opened: Opener) -> None:
    backend = opened(tiny("bert"), threads=4)
    batches = [backend.tokenize([Pair(*pair, 512) for pair in some_pairs(seed, 12)]) for seed in range(8)]
    expected = [backend.score(batch) for batch in batches]
    results: list[list[float]] = [[]] * 8

    def score(number: int) -> None:
        for _ in range(5):
            results[number] = backend.score(batches[number])

    threads = [threading.Thread(target=score, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(farthest(got, wanted) < 1e-6 for got, wanted in zip(results, expected, strict=True))


def test_a_pass_leaves_the_scores_of_the_one_before_alone(tiny: ModelMaker, opened: Opener) -> None:
    backend = opened(tiny("bert"))
    batches = [pack([one.inputs for one in backend.tokenize([Pair(*pair, 512) for pair in some_pairs(seed, 12)])]) for seed in range(2)]
    first = backend._run(batches[0])
    before = first.copy()
    backend._run(batches[1])
    assert (first == before).all()


class Failing:
    """A request that ends with an error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def infer(self, *args: Any, **options: Any) -> Any:
        raise self._error


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("Exception: std::bad_alloc"), RuntimeError("Cannot allocate memory")])
def test_a_pass_that_is_too_large_is_told_apart(error: Exception, tiny: ModelMaker, opened: Opener) -> None:
    backend = opened(tiny("bert"))
    backend._requests = queue.SimpleQueue()
    backend._requests.put(Failing(error))
    for _ in range(2):  # its request is there for the next pass
        with pytest.raises(OutOfMemoryError):
            logits_of(backend, [("boat", "lake")])


def test_other_failures_of_a_pass_are_not_hidden(tiny: ModelMaker, opened: Opener) -> None:
    backend = opened(tiny("bert"))
    backend._requests = queue.SimpleQueue()
    backend._requests.put(Failing(RuntimeError("shape mismatch")))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shape mismatch"):
            logits_of(backend, [("boat", "lake")])


SHAPES = """
import sys
from pathlib import Path
from reranker_worker.backends import Tokens
from reranker_worker.backends.declared import read_declared
from reranker_worker.backends.openvino import OpenVinoBackend
from reranker_worker.backends.texts import PairIds
from reranker_worker.config import Config
backend = OpenVinoBackend(Config(), read_declared(Path(sys.argv[1])), Path(sys.argv[2]), positions=512, dtype="float32", threads=1)
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
def test_passes_of_ever_other_lengths_do_not_fill_the_memory(tiny: ModelMaker, opened: Opener, tmp_path: Path) -> None:
    path = tiny("bert", hidden_size=256, max_length=512)
    opened(path)
    command = [sys.executable, "-c", SHAPES, str(path), str(tmp_path)]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=55, check=True)
    assert float(done.stdout) < GROWTH_MB, done.stdout


def test_an_empty_batch_has_no_scores(tiny: ModelMaker, opened: Opener) -> None:
    backend = opened(tiny("bert"))
    assert (backend.tokenize([]), backend.score([]), backend.activate([])) == ([], [], [])


def test_versions_name_the_libraries() -> None:
    assert set(versions()) == {"openvino", "tokenizers", "numpy"}
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
from reranker_worker.backends.declared import read_declared
from reranker_worker.backends.openvino import OpenVinoBackend
from reranker_worker.config import Config
path = Path(sys.argv[1])
backend = OpenVinoBackend(Config(), read_declared(path), Path(sys.argv[2]), positions=512, dtype="float32", threads=2)
backend.score(backend.tokenize([Pair("a", "b " * 5000, 64), Pair("a", "b", 64)]))
heavy = {"torch", "transformers", "onnx", "onnxruntime", "openvino_telemetry", "openvino.tools.ovc"} & sys.modules.keys()
assert not calls and not heavy, (calls, heavy)
"""


def test_opening_and_scoring_import_openvino_alone_print_nothing_and_connect_to_nothing(tiny: ModelMaker, opened: Opener, tmp_path: Path) -> None:
    opened(tiny("bert"))
    command = [sys.executable, "-c", QUIET, str(tiny("bert")), str(tmp_path)]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=55, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "home").exists(), "nothing is written for a telemetry that nobody asked for"
