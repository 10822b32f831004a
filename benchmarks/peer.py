"""The peer of `throughput` in a process of its own: `CrossEncoder.predict` with its defaults. One JSON line in, one out.

It measures itself, so that its pipe costs it nothing; the worker is measured from outside, pipes and JSON included.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

_BATCH_SIZE = 32


def main(model_path: str, threads: int) -> None:
    """Serve calls until the input ends: {"calls": [[query, [document, ...]], ...], "raw": bool} -> {"seconds", "scores"}."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    import torch
    from sentence_transformers import CrossEncoder

    torch.set_num_threads(threads)
    model: Any = CrossEncoder(model_path, device="cpu")
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        body = json.loads(line)
        options: dict[str, Any] = {"activation_fn": torch.nn.Identity()} if body["raw"] else {}
        begin = time.perf_counter()
        scores = [
            model.predict([(query, document) for document in documents], batch_size=_BATCH_SIZE, **options).tolist()
            for query, documents in body["calls"]
        ]
        print(json.dumps({"seconds": time.perf_counter() - begin, "scores": scores}), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
