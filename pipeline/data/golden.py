"""Texts that show whether another port of a tokenizer computes the same tokens.

Real training texts beside ones that ports get wrong: accents composed and decomposed, emoji with
joiners, scripts without spaces, control characters, numbers and links, nothing at all, and texts
long enough to be cut.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..workspace import write_atomically
from .tokenizer import TextTokenizer

GOLDEN_TEXTS = "golden.json"
COUNT = 64
HARD = (
    "",
    " ",
    "a",
    "Hello, World!",
    "HELLO wOrLd",
    "don't can't it's o'clock",
    "naïve café déjà vu, señor Müller",
    "nai\u0308ve cafe\u0301 de\u0301ja\u0300 vu",
    "Zażółć gęślą jaźń",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "Съешь ещё этих мягких французских булок",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "你好，世界",
    "東京タワーは高い。",
    "안녕하세요 세계",
    "𠀋𡈽 rare ideographs",
    "😀 😃 grin",
    "👩\u200d👩\u200d👧\u200d👦 family and 🏳\ufe0f\u200d🌈 flag",
    "👍🏽 skin tone",
    "tab\tand\nnew line\r\nand more",
    "zero\u200bwidth and soft\u00adhyphen and no\u00a0break",
    "control \u0001 \u0007 characters \ufffd",
    "“curly” ‘quotes’ — dashes – … ellipsis",
    "fullwidth ＡＢＣ１２３",
    "ﬁne ligatures ﬂow",
    "3.14159 1,000,000 $12.50 50% #1 @user",
    "https://example.org/a?b=c&d=e_f mail@example.org",
    "C++ C# a/b a_b <b>bold</b> [CLS] [SEP] [MASK] <s> </s>",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "x" * 300,
    "word " * 700,
    "长" * 600,
)


def write_golden_texts(
    folder: Path, tokenizer: TextTokenizer, texts: Sequence[tuple[str, ...]], *, max_length: int
) -> None:
    """The hard texts, and training texts up to COUNT, with their tokens.

    Args:
        texts: (text,) or (text, pair) of train, in an order of which any part is fair.
    """
    paired = "token_type_ids" in tokenizer.rows
    hard = [(text, "and a second text") if paired else (text,) for text in HARD]
    chosen = [*hard, *texts][:COUNT]
    rows: list[dict[str, Any]] = []
    for text in chosen:
        tokens = tokenizer.encode([text], max_length=max_length).contents[0]
        named = zip(tokenizer.rows, tokens.tolist(), strict=True)
        rows.append({"text": text[0], **({"pair": text[1]} if paired else {}), **dict(named)})
    write_atomically(folder / GOLDEN_TEXTS, json.dumps(rows, ensure_ascii=False).encode())


def read_golden_texts(folder: Path) -> tuple[list[dict[str, Any]], list[np.ndarray[Any, Any]]]:
    """The rows, and for each its input, int64 (1, K, S)."""
    rows = json.loads((folder / GOLDEN_TEXTS).read_text(encoding="utf-8"))
    names = [name for name in rows[0] if name not in ("text", "pair")]
    return rows, [np.array([[row[name] for name in names]], np.int64) for row in rows]
