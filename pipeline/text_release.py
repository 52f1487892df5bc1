"""What a text model is released with, beside the model: all that a device needs to use it.

tokenizer.json, vocab.txt   the tokenizer; the latter where it has one
labels.json                 class names in the order of the logits
golden.jsonl                64 texts with their tokens and the released model's logits: a port
                            of the tokenizer, or of the runtime, is held against them
"""

from __future__ import annotations

import json
from pathlib import Path

from ..exporters.sessions import open_session, run_batches
from .data.golden import read_golden_texts
from .data.texts import TOKENIZER, VOCABULARY

LABELS, GOLDEN = "labels.json", "golden.jsonl"


def text_files(
    data: Path, model: Path, *, class_names: tuple[str, ...], threads: int
) -> dict[str, Path | str]:
    """File name → what is in it.

    Args:
        data: folder of the data stage. model: the file that is released.
    """
    rows, inputs = read_golden_texts(data)
    session = open_session(model, threads=threads)
    answers = [run_batches(session, tokens, 1)[0].tolist() for tokens in inputs]
    lines = [
        json.dumps({**row, "logits": logits}, ensure_ascii=False)
        for row, logits in zip(rows, answers, strict=True)
    ]
    vocabulary = data / VOCABULARY
    return {
        TOKENIZER: data / TOKENIZER,
        **({VOCABULARY: vocabulary} if vocabulary.exists() else {}),
        LABELS: json.dumps(list(class_names), ensure_ascii=False, indent=1) + "\n",
        GOLDEN: "".join(f"{line}\n" for line in lines),
    }
