"""Signatures over a manifest: by the right key and over these bytes, or exit 6."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

GATE = Callable[..., int]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pairs of keys on P-256 and one on Ed25519."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    folder = tmp_path_factory.mktemp("keys")
    made = {
        "ours": ec.generate_private_key(ec.SECP256R1()),
        "theirs": ec.generate_private_key(ec.SECP256R1()),
        "other-curve": ed25519.Ed25519PrivateKey.generate(),
    }
    for name, key in made.items():
        (folder / f"{name}.pem").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        (folder / f"{name}.pub").write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
    return folder


@pytest.fixture
def signature(run_folder: Path, keys: Path, tmp_path: Path) -> Path:
    """As the README signs: `model_signing sign key out/manifest.json`."""
    from model_signing import signing

    path = tmp_path / "out.sig"
    signer = signing.Config().use_elliptic_key_signer(private_key=keys / "ours.pem")
    signer.sign(run_folder / "manifest.json", path)
    return path


def test_a_run_that_its_maker_signed_passes_and_says_by_whom(
    run_folder: Path, signature: Path, keys: Path, gate: GATE, tmp_path: Path
) -> None:
    summary = tmp_path / "m.md"
    signed = ("--signature", signature, "--public-key", keys / "ours.pub")

    assert gate(run_folder, *signed, "--markdown", summary) == 0
    assert "checked by a signature of ours.pub" in summary.read_text()


def test_another_key_is_refused(run_folder: Path, signature: Path, keys: Path, gate: GATE) -> None:
    signed = ("--signature", signature, "--public-key", keys / "theirs.pub")

    assert gate(run_folder, *signed) == 6


def test_a_manifest_made_anew_is_refused(
    run_folder: Path, signature: Path, keys: Path, gate: GATE, releases: ModuleType
) -> None:
    (run_folder / "report.md").write_text("?")
    releases.renew_manifest(run_folder)
    signed = ("--signature", signature, "--public-key", keys / "ours.pub")

    assert gate(run_folder) == 0, "unseen without the signature"
    assert gate(run_folder, *signed) == 6


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"dsseEnvelope": {}}'])
def test_a_signature_that_is_none_is_refused(
    content: bytes, run_folder: Path, signature: Path, keys: Path, gate: GATE
) -> None:
    signature.write_bytes(content)

    assert gate(run_folder, "--signature", signature, "--public-key", keys / "ours.pub") == 6


@pytest.mark.parametrize("at", [0.2, 0.5, 0.8, 0.97])
def test_a_signature_with_another_byte_is_refused(
    at: float, run_folder: Path, signature: Path, keys: Path, gate: GATE
) -> None:
    content = bytearray(signature.read_bytes())
    place = int(at * len(content))
    content[place] = ord("A") if content[place] != ord("A") else ord("B")
    signature.write_bytes(content)

    assert gate(run_folder, "--signature", signature, "--public-key", keys / "ours.pub") == 6


@pytest.mark.parametrize("name", ["other-curve.pub", "ours.pem", "no-such.pub"])
def test_a_key_that_cannot_check_is_a_user_error(
    name: str, run_folder: Path, signature: Path, keys: Path, gate: GATE
) -> None:
    assert gate(run_folder, "--signature", signature, "--public-key", keys / name) == 2


def test_a_missing_extra_is_named(
    run_folder: Path, signature: Path, keys: Path, gate: GATE,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "model_signing", None)

    assert gate(run_folder, "--signature", signature, "--public-key", keys / "ours.pub") == 2
    assert "pip install 'edgestill[sign]'" in capsys.readouterr().err
