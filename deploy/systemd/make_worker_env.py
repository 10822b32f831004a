#!/usr/bin/env python3
"""Writes worker.env from the worker's own list of settings: `python deploy/systemd/make_worker_env.py > deploy/systemd/worker.env`."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from reranker_worker.config import settings_table  # the checkout's, wherever this is started

HEAD = """\
# Settings of the reranker worker on this node: /etc/reranker-worker/worker.env, read by the host's unit and by reranker-prewarm.service.
# Made by deploy/systemd/make_worker_env.py. A line that starts with # states the default. After a change: systemctl restart the host.
# No secrets here (0644): HF_TOKEN belongs into /etc/reranker-worker/prewarm.env (0600), which only the prewarming reads.

# Where hub models are kept. (HF_HUB_OFFLINE=1 and RERANKING_LOCAL_FILES_ONLY=1 come from the host's drop-in; set here they would also forbid
# the prewarming its download.)
HF_HOME=/var/cache/reranker-worker/huggingface
# A mirror of the hub, for prewarming.
#HF_ENDPOINT=https://huggingface.co
"""
# What a node sets otherwise than the default, and why.
ON_A_NODE = {
    "RERANKING_ARTEFACTS": ("/var/cache/reranker-worker/artefacts", "Shared by the user who prewarms and the one who serves."),
    "RERANKING_REQUEST_TIMEOUT_MS": ("4500", "Below JadeVectorDB's own 5 s, so that an error arrives before it stops waiting."),
}


def worker_env() -> str:
    """The whole file."""
    return HEAD + "".join(_entry(variable, default, text) for _, variable, default, text in settings_table())


def _entry(variable: str, default: str, text: str) -> str:
    default = "" if default == "empty" else default
    note = f"{text}."
    if variable in ON_A_NODE:
        value, reason = ON_A_NODE[variable]
        return f"\n{_comment(f'{note} Default: {default}. {reason}')}\n{variable}={value}\n"
    return f"\n{_comment(note)}\n#{variable}={default}\n"


def _comment(text: str) -> str:
    return "\n".join("# " + line for line in textwrap.wrap(text, 140))


if __name__ == "__main__":
    sys.stdout.write(worker_env())
