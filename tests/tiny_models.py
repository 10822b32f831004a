"""Tiny but complete cross-encoders, written to a directory on the spot: real formats, random weights, no network, under 1 MB."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from tokenizers import Tokenizer

ARCHITECTURES = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "modernbert", "deberta-v2")

_WORDS = """
a about after again all also an and any apple are as at bake bank be because been bird boat book bread but by can capital car
cat city climb cloud coffee cold come cook could country day did do dog down drink each eat engine even every eye far farm
fast father find fire first fish flour flower fly food for forest found from fruit garden get give glass go gold good grass
great green ground grow had hand has have he heat help her here high hill him his home horse hot house how hour i ice if in
into iron is island it its jump just keep know lake land large last learn leaf left less letter life light like line little
live long look made make man many map may me milk money moon more most mother mountain much music must my name near need new
night no north not now number of off oil old on one only open or orange other our out oven over page paper park part people
pepper place plant play point poor price queen question quick rain read red rice right river road rock room round run salt
same sand say school sea see seed set she ship short should show silver sing sister sky sleep slow small snow so soil some
song soon sound south star start station stone story street strong sugar summer sun sure swim table take tall tea tell than
that the their them then there these they thing think this time to town train tree turn two under up us use very village
voice walk wall want war warm was wash water way we week well were west what wheat wheel when where which white who why will
wind window winter wish with woman wood word work world would write year yellow yes yet you young your
"""
WORDS = _WORDS.split()


@dataclass(frozen=True, slots=True)
class TinyOptions:
    """What a tiny model looks like. `labels` names the outputs in id2label; `config` is merged into config.json as it stands;
    `head=False` saves the backbone alone (a bi-encoder, not a cross-encoder)."""

    num_labels: int = 1
    labels: Sequence[str] | None = None
    max_length: int = 512
    hidden_size: int = 32
    layers: int = 2
    head: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)


def make_tiny_cross_encoder(directory: Path, *, architecture: str = "bert", num_labels: int = 1, seed: int = 0, **options: Any) -> Path:
    """Write a complete model directory (config, safetensors weights, fast tokenizer) and return it.

    `architecture` is one of ARCHITECTURES; further keywords are the fields of TinyOptions. The same arguments give the same scores.
    """
    import torch

    chosen = TinyOptions(num_labels=num_labels, **options)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(architecture)
    save_tokenizer(directory, tokenizer, architecture, chosen.max_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _build_model(architecture, tokenizer.get_vocab_size(), chosen).save_pretrained(directory)
    if chosen.config:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **chosen.config}, indent=2))
    return directory


def _build_model(architecture: str, vocabulary: int, options: TinyOptions) -> Any:
    import transformers

    t: Any = transformers

    hidden, heads = options.hidden_size, 2
    common: dict[str, Any] = {"vocab_size": vocabulary, "num_labels": options.num_labels, "initializer_range": 0.3, "pad_token_id": 0}
    if options.labels is not None:
        common["id2label"] = dict(enumerate(options.labels))
        common["label2id"] = {name: index for index, name in enumerate(options.labels)}
    wide: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": heads,
        "intermediate_size": hidden * 2,
        "max_position_embeddings": options.max_length,
    }
    if architecture == "bert":
        config: Any = t.BertConfig(**common, **wide)
    elif architecture == "electra":
        config = t.ElectraConfig(**common, **wide, embedding_size=hidden)
    elif architecture in ("roberta", "xlm-roberta"):
        # Positions start after the padding index (1), so the table holds two more rows than a pair may have tokens.
        wide["max_position_embeddings"] += 2
        common |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}
        config = (t.RobertaConfig if architecture == "roberta" else t.XLMRobertaConfig)(**common, **wide)
    elif architecture == "distilbert":
        names = {"dim": hidden, "n_layers": options.layers, "n_heads": heads, "hidden_dim": hidden * 2}
        config = t.DistilBertConfig(**common, **names, max_position_embeddings=options.max_length)
    elif architecture == "modernbert":
        ids = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
        config = t.ModernBertConfig(**common, **wide, **ids, local_attention=16)
    elif architecture == "deberta-v2":
        relative = {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
        config = t.DebertaV2Config(**common, **wide, **relative, pooler_hidden_size=hidden)
    else:
        raise ValueError(f"no tiny architecture is called {architecture!r}; there are {', '.join(ARCHITECTURES)}")
    loader = t.AutoModelForSequenceClassification if options.head else t.AutoModel
    return _unsettled(loader.from_config(config))


def _unsettled(model: Any) -> Any:
    """The model with biases that are not 0 and normalizations that are not 1, as after training: else nobody sees that one is left out."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn_like(parameter) * 0.1
    return model


def sentences() -> Iterator[str]:
    """Training text for the tokenizers: every word in a few neighbourhoods, the same on every machine."""
    for step in (1, 3, 7, 11):
        for start in range(0, len(WORDS), 9):
            yield " ".join(WORDS[(start + step * offset) % len(WORDS)] for offset in range(9))


def make_tokenizer(architecture: str) -> Tokenizer:
    """The kind of fast tokenizer that real models of this architecture have, over a vocabulary of 300 to 700 tokens."""
    if architecture in ("roberta", "modernbert"):
        return _byte_level_bpe(architecture)
    if architecture in ("xlm-roberta", "deberta-v2"):
        return _unigram(architecture)
    return _wordpiece()


def _wordpiece() -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    marks = "!\"#$%&'()*+,-./:;<=>?@[]_{|}~"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *marks, *("##" + letter for letter in letters)]
    pieces += ["##ing", "##ed", "##er", "##s" * 2, "é", "ü", "中", "国", "文", *(word for word in WORDS if len(word) > 1)]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


def _byte_level_bpe(architecture: str) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    roberta = architecture == "roberta"
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if roberta else ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sentences(), trainer)
    if roberta:
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
    else:
        template = {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B [SEP]"}
        tokenizer.post_processor = processors.TemplateProcessing(**template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return tokenizer


def _unigram(architecture: str) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    xlm = architecture == "xlm-roberta"
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if xlm else ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # By hand, because training a Unigram model gives another vocabulary in each process. Longer pieces are likelier than their letters.
    letters = "▁abcdefghijklmnopqrstuvwxyz0123456789.,-中国文"
    pieces = [*letters, *("▁" + word for word in WORDS), "ing", "er", "ed", "th", "ou", "in", "on", "st"]
    vocabulary = [(name, 0.0) for name in special] + [(piece, -6.0 - i / 100) for i, piece in enumerate(dict.fromkeys(pieces))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, special.index("<unk>" if xlm else "[UNK]"), byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    if xlm:
        template = {"single": "<s> $A </s>", "pair": "<s> $A </s> </s> $B </s>"}
        tokenizer.post_processor = processors.TemplateProcessing(**template, special_tokens=[("<s>", 0), ("</s>", 2)])
    else:
        template = {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B:1 [SEP]:1"}
        tokenizer.post_processor = processors.TemplateProcessing(**template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return tokenizer


def save_tokenizer(directory: Path, tokenizer: Tokenizer, architecture: str, max_length: int) -> None:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json, as real repositories have them."""
    if architecture in ("roberta", "xlm-roberta"):
        names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
        names |= {"unk_token": "<unk>", "mask_token": "<mask>"}
    else:
        names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    typed = architecture in ("bert", "electra", "deberta-v2")
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if typed else ["input_ids", "attention_mask"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length, "model_input_names": inputs, **names}
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (directory / "special_tokens_map.json").write_text(json.dumps(names, indent=2))
