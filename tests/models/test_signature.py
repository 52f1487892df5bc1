"""Signatures survive JSON."""

from __future__ import annotations

import json

from edgestill.models.signature import Signature, TensorSpec


def test_signature_read_from_its_own_json_is_equal() -> None:
    signature = Signature(
        inputs=(TensorSpec("input", ("N", 3, 32, 32), "float32"),),
        outputs=(TensorSpec("logits", ("N", 2), "float32"),),
        class_names=("cat", "dög"),
    )

    assert Signature.from_json(json.loads(json.dumps(signature.to_json()))) == signature
