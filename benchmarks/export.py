"""A model directory as the ONNX files that ONNX rerankers are given: what optimum's exporter writes, in float32 and in int8.

Runs in the environment `onnx`. The int8 file is quantised dynamically and per channel, by optimum's preset for AVX512-VNNI.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

_SPECIAL_TOKENS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def main(model: Path, out: Path) -> None:
    """Write model.onnx, model_int8.onnx, the configuration and the tokenizer."""
    from optimum.onnxruntime import ORTModelForSequenceClassification, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    ORTModelForSequenceClassification.from_pretrained(model, export=True, local_files_only=True).save_pretrained(out)
    preset = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    ORTQuantizer.from_pretrained(out, file_name="model.onnx").quantize(save_dir=out, quantization_config=preset, file_suffix="int8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, out / name)
    settings = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {name: settings[name] for name in _SPECIAL_TOKENS if name in settings}
    (out / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")  # FlashRank reads it


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
