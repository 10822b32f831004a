"""Step 8: average checkpoints, calibrate, round and write the bundle (`python -m training.export`)."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is local; fail fast rather than look for a hub

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.cross_encoder import CrossEncoder
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from training.calibrate import fit, fold, held_out_logits
from training.run import average
from training.student import build_student, is_stored_as_float8
from training.train import STEPS_TOGETHER

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_LENGTH = 256  # the bi-encoder's own: it was never trained to read what stands further back
MOST_BYTES = 30_000_000
# The first is clearly relevant, the second clearly not, the third on the topic without answering.
KNOWN_PAIRS = [
    (
        "how do I reset my password",
        "To reset your password, open the sign-in page, choose Forgot password and follow the link we send you.",
    ),
    (
        "how do I reset my password",
        "The blue whale is the largest animal known to have existed and feeds almost only on krill.",
    ),
    (
        "what is the capital of France",
        "Lyon is the third-largest city of France and lies where the Rhone and the Saone meet.",
    ),
]
_TOKENIZER_PROBES = [
    "naïve café",
    "kirkuk-alberta £5 and €3",
    "\u03b1-synuclein",
    "“quoted” — end…",
    "".join(map(chr, range(33, 127))),
    "日本",
    "\u0000 \u200b",
]
# The library's own class for BERT would write pairs in its own way; this one takes tokenizer.json as it is.
_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    "model_max_length": MAX_LENGTH,
    "padding_side": "right",
    "truncation_side": "right",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
}
_PAIR = (("[CLS]", 0), ("A", 0), ("[SEP]", 0), ("[DOC]", 1), ("B", 1), ("[SEP]", 1))

Row = dict[str, Any]


def edit_json(path: Path, change: Callable[[Row], None]) -> None:
    """Apply `change` to a JSON file in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(source: Path, directory: Path) -> None:
    """The pruned tokenizer, which begins the document with a token of its own."""
    shutil.copy(source, directory / "tokenizer.json")

    def pairs(content: Row) -> None:
        document = content["model"]["vocab"]["[DOC]"]
        content["post_processor"]["special_tokens"]["[DOC]"] = {"id": "[DOC]", "ids": [document], "tokens": ["[DOC]"]}
        content["post_processor"]["pair"] = [
            {"Sequence" if name in "AB" else "SpecialToken": {"id": name, "type_id": type_id}} for name, type_id in _PAIR
        ]

    edit_json(directory / "tokenizer.json", pairs)
    (directory / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER_CONFIG, indent=2) + "\n", encoding="utf-8")


def clean_config(content: Row) -> None:
    """Declare float32 (the file holds less) and the activation where older sentence-transformers look for it."""
    content["dtype"] = "float32"
    content["sentence_transformers"] = {"activation_fn": "torch.nn.modules.activation.Sigmoid"}


def write_bundle(model: Any, tokenizer: Path, out: Path) -> None:
    """Weights in float8 (those that were rounded to it in training) or float16, configuration and tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as raw_name, tempfile.TemporaryDirectory() as saved_name:
        raw, saved = Path(raw_name), Path(saved_name)
        model.save_pretrained(raw)
        write_tokenizer(tokenizer, raw)
        loaded: CrossEncoder = CrossEncoder(str(raw), num_labels=1, max_length=MAX_LENGTH, activation_fn=torch.nn.Sigmoid(), device="cpu")
        loaded.save_pretrained(str(saved), create_model_card=False)
        edit_json(saved / "config.json", clean_config)
        write_tokenizer(tokenizer, saved)
        weights = {name: tensor.to(_stored(name)).contiguous() for name, tensor in load_file(saved / "model.safetensors").items()}
        save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
        for source in sorted(saved.iterdir()):
            target = out / source.name
            target.write_bytes(source.read_bytes())
            target.chmod(0o644)


def _stored(name: str) -> torch.dtype:
    return torch.float8_e4m3fn if is_stored_as_float8(name) else torch.float16


def check_bundle(out: Path) -> CrossEncoder:
    """Load the bundle as a user would, and compare its two ways to tokenize."""
    size = (out / "model.safetensors").stat().st_size
    if size > MOST_BYTES:
        raise SystemExit(f"the weights take {size} bytes")
    model: CrossEncoder = CrossEncoder(str(out), device="cpu")
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise SystemExit("the bundle does not load into float32")
    if model.max_seq_length != MAX_LENGTH or not isinstance(model.activation_fn, torch.nn.Sigmoid):
        raise SystemExit("the bundle declares another length or activation")
    alone, loaded = Tokenizer.from_file(str(out / "tokenizer.json")), AutoTokenizer.from_pretrained(str(out))
    for first, second in [*KNOWN_PAIRS, *((probe, f"{probe} and {probe.upper()}") for probe in _TOKENIZER_PROBES)]:
        own, other = alone.encode(first, second), loaded(first, second)
        if own.ids != other["input_ids"] or own.type_ids != other["token_type_ids"]:
            raise SystemExit(f"the tokenizers differ on {first!r}")
    return model


def write_known_pairs(model: CrossEncoder, out: Path) -> None:
    """Record the logits that other runtimes must reproduce."""
    logits = [float(logit) for logit in model.predict(KNOWN_PAIRS, activation_fn=torch.nn.Identity())]
    if not logits[0] > 0.0 > logits[1]:
        raise SystemExit(f"the known pairs are scored the wrong way round: {logits}")
    known = [{"query": q, "document": d, "logit": round(logit, 6)} for (q, d), logit in zip(KNOWN_PAIRS, logits, strict=True)]
    (out / "known_pairs.json").write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print("known pairs:", logits)


def write_manifest(out: Path) -> None:
    """Write MANIFEST.sha256 over every other file of the bundle, in the format of sha256sum."""
    names = sorted(path.name for path in out.iterdir() if path.name != "MANIFEST.sha256")
    lines = [f"{hashlib.sha256((out / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (out / "MANIFEST.sha256").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Export, or write the manifest anew after the card was edited."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="directory that training.build has filled")
    parser.add_argument("--weights", type=Path, nargs="+", help="weights-N.pt; of several the mean is taken")
    parser.add_argument("--trained-steps", type=int, help="steps of training.train, of all its runs: groups after them calibrate")
    parser.add_argument("--out", type=Path, required=True, help="directory of the bundle; its model card stays")
    parser.add_argument("--manifest-only", action="store_true", help="after an edit of the model card")
    options = parser.parse_args()
    if not options.manifest_only:
        model = build_student(options.work)
        model.load_state_dict(average(options.weights))
        scale, shift = fit(*held_out_logits(model.eval(), options.work, options.trained_steps * STEPS_TOGETHER))
        print(f"calibration: logit x {scale:.3f} {shift:+.3f}")
        fold(model, scale, shift)
        write_bundle(model, options.work / "tokenizer.json", options.out)
        write_known_pairs(check_bundle(options.out), options.out)
    write_manifest(options.out)


if __name__ == "__main__":
    main()
