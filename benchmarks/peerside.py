"""What users would pick instead, each in a process and an environment of its own: one JSON line in, one out.

A peer measures itself, so that its pipe costs it nothing; the worker is measured from outside, pipes and JSON included.
Run by `contestants.py`; imports nothing of this project but the fake backend's hash.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Call = tuple[str, list[str]]
Score = Callable[[list[Call], bool], list[list[float]]]

_BATCH_SIZE = 32  # predict's default
_MAX_TOKENS = 512


def _one_by_one(score: Callable[[str, list[str], bool], list[float]]) -> Score:
    """A peer that knows nothing of concurrent requests takes them one after the other."""
    return lambda calls, raw: [score(query, documents, raw) for query, documents in calls]


def _predict(path: str, threads: int, **options: Any) -> Score:
    import torch
    from sentence_transformers import CrossEncoder

    torch.set_num_threads(threads)
    model: Any = CrossEncoder(path, device="cpu", **options)
    identity = {"activation_fn": torch.nn.Identity()}

    def score(query: str, documents: list[str], raw: bool) -> list[float]:
        scores: list[float] = model.predict(
            [(query, document) for document in documents], batch_size=_BATCH_SIZE, **(identity if raw else {})
        ).tolist()
        return scores

    return _one_by_one(score)


def predict(model: str, exported: str, threads: int) -> Score:
    """`CrossEncoder.predict` with its defaults."""
    return _predict(model, threads)


def predict_bf16(model: str, exported: str, threads: int) -> Score:
    """The same in bfloat16."""
    import torch

    return _predict(model, threads, model_kwargs={"torch_dtype": torch.bfloat16})


def predict_onnx(model: str, exported: str, threads: int, file: str = "model.onnx") -> Score:
    """Its onnx backend."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    kwargs = {"file_name": file, "provider": "CPUExecutionProvider", "session_options": options}
    return _predict(exported, threads, backend="onnx", model_kwargs=kwargs)


def predict_openvino(model: str, exported: str, threads: int, **hints: str) -> Score:
    """Its openvino backend, in the precision that OpenVINO chooses for this CPU."""
    return _predict(model, threads, backend="openvino", model_kwargs={"ov_config": {"INFERENCE_NUM_THREADS": threads, **hints}})


def flashrank(model: str, exported: str, threads: int, file: str = "model.onnx") -> Score:
    """FlashRank knows models by name; ours is laid out as one of them. It sorts, and gives probabilities alone."""
    import onnxruntime
    from flashrank import Config, Ranker, RerankRequest

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads  # it has no setting for them
    onnxruntime.InferenceSession = functools.partial(onnxruntime.InferenceSession, sess_options=options)
    name = "ms-marco-MiniLM-L-12-v2"
    with tempfile.TemporaryDirectory() as cache:
        place = Path(cache) / name
        place.mkdir()
        for item in Path(exported).glob("*.json"):
            (place / item.name).symlink_to(item)
        (place / Config.model_file_map[name]).symlink_to(Path(exported) / file)
        ranker = Ranker(model_name=name, cache_dir=cache, max_length=_MAX_TOKENS, log_level="ERROR")

    def score(query: str, documents: list[str], raw: bool) -> list[float]:
        passages = [{"id": number, "text": document} for number, document in enumerate(documents)]
        ranked = ranker.rerank(RerankRequest(query=query, passages=passages))
        return [float(item["score"]) for item in sorted(ranked, key=lambda item: item["id"])]

    return _one_by_one(score)


def fastembed(model: str, exported: str, threads: int, file: str = "model.onnx") -> Score:
    """fastembed's `TextCrossEncoder`; it gives logits alone."""
    from fastembed.common.model_description import ModelSource
    from fastembed.rerank.cross_encoder import TextCrossEncoder

    TextCrossEncoder.add_custom_model(model="local/model", sources=ModelSource(hf="local/model"), model_file=file)
    encoder = TextCrossEncoder("local/model", threads=threads, cuda=False, specific_model_path=exported)
    return _one_by_one(lambda query, documents, raw: [float(score) for score in encoder.rerank(query, documents)])


def infinity(model: str, exported: str, threads: int) -> Score:
    """infinity's engine, in this process; the one peer that batches concurrent requests."""
    import torch
    from infinity_emb import AsyncEmbeddingEngine, EngineArgs

    torch.set_num_threads(threads)
    loop = asyncio.new_event_loop()
    engine = AsyncEmbeddingEngine.from_args(EngineArgs(model_name_or_path=model, engine="torch", device="cpu", model_warmup=False))
    loop.run_until_complete(engine.astart())

    async def one(query: str, documents: list[str], raw: bool) -> list[float]:
        ranked, _ = await engine.rerank(query=query, docs=documents, raw_scores=raw)
        return [float(item.relevance_score) for item in sorted(ranked, key=lambda item: item.index)]

    async def everyone(calls: list[Call], raw: bool) -> list[list[float]]:
        return await asyncio.gather(*(one(query, documents, raw) for query, documents in calls))

    return lambda calls, raw: loop.run_until_complete(everyone(calls, raw))


def fake(model: str, exported: str, threads: int) -> Score:
    """The fake backend's hash, off by FAKE_PEER_SHIFT: for the tests of this benchmark."""
    from reranker_worker.backends.fake import fake_logit

    shift = float(os.environ.get("FAKE_PEER_SHIFT", "0"))
    return _one_by_one(lambda query, documents, raw: [fake_logit(query, document) + shift for document in documents])


_INT8 = {"file": "model_int8.onnx"}
KINDS: dict[str, Callable[[str, str, int], Score]] = {
    "predict": predict,
    "predict-bf16": predict_bf16,
    "predict-onnx": predict_onnx,
    "predict-onnx-int8": functools.partial(predict_onnx, **_INT8),
    "predict-openvino": predict_openvino,
    "predict-openvino-fp32": functools.partial(predict_openvino, INFERENCE_PRECISION_HINT="f32"),
    "flashrank": flashrank,
    "flashrank-int8": functools.partial(flashrank, **_INT8),
    "fastembed": fastembed,
    "fastembed-int8": functools.partial(fastembed, **_INT8),
    "infinity": infinity,
    "fake": fake,
}


def main(kind: str, model: str, exported: str, threads: int) -> None:
    """Serve until the input ends: {"calls": [[query, [document, ...]], ...], "raw": bool} -> {"seconds", "scores"}."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    score = KINDS[kind](model, exported, threads)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        body = json.loads(line)
        begin = time.perf_counter()
        scores = score(body["calls"], body["raw"])
        print(json.dumps({"seconds": time.perf_counter() - begin, "scores": scores}), file=answers, flush=True)


if __name__ == "__main__":
    failed = 1
    try:
        main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
        failed = 0
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(failed)  # some keep threads that never end
