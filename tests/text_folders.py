"""A small language, its sentences with labels, and Hugging Face folders that read it."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

GOOD = ("lovely", "bright", "warm", "clever", "honest", "café-fresh", "splendid", "funny")
BAD = ("dull", "cold", "lazy", "broken", "noisy", "bitter", "clumsy", "grim")
THINGS = ("film", "story", "actor", "scene", "plot", "song", "ending", "dialogue")
FILLERS = ("really", "quite", "somehow", "again", "always", "tonight")


def sentences(count: int, *, seed: int) -> list[tuple[str, str]]:
    """(text, "good" or "bad"), distinct, of 4 to 14 words; a text has words of its label alone."""
    draw = random.Random(seed)
    made: dict[str, str] = {}
    while len(made) < count:
        label = draw.choice(("good", "bad"))
        words = GOOD if label == "good" else BAD
        parts = [
            f"the {draw.choice(THINGS)} is {draw.choice(FILLERS)} {draw.choice(words)}"
            for _ in range(draw.randint(1, 3))
        ]
        made[" and ".join(parts)] = label
    return list(made.items())


def write_csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerows([("text", "label"), *rows])
    return path


def write_tokenizer(folder: Path, *, longest: int = 64) -> None:
    """A WordPiece tokenizer of the small language, and of letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = {w for text, _ in sentences(300, seed=0) for w in text.replace("-", " - ").split()}
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?-'é"
    pieces = [*sorted(words), *letters, *(f"##{one}" for one in letters)]
    vocabulary = {
        word: index
        for index, word in enumerate(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *pieces]))
    }
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"pad_token": "[PAD]", "model_max_length": longest}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def write_folder(folder: Path, *, seed: int = 0, head: bool = False, **options: Any) -> Path:
    """A BERT with weights from `seed` and the tokenizer; `head`: it classifies good and bad."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    settings = {
        "vocab_size": size, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
    } | options  # fmt: skip
    config = BertConfig(**settings)
    if head:
        config.num_labels = 2
        config.id2label, config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = (BertForSequenceClassification if head else BertModel)(config)
    network.save_pretrained(folder)
    return folder
