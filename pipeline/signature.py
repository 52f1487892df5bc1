"""Who vouches for a manifest: an OpenSSF model signature over manifest.json, checked offline.

The signature is made with the `model_signing` command and a private key on an elliptic curve, and
checked with the public key; no service is asked. It says who signed a manifest, not which manifest
was wanted: an older release of the same signer passes too, which only the manifest's sha256 tells.

OpenSSF Model Signing, https://github.com/sigstore/model-transparency
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .errors import IntegrityError, UsageError
from .manifest import Manifest

EXTRA = "edgestill[sign]"


@dataclass(frozen=True)
class Signed:
    """A signature file and the public key (PEM, P-256, P-384 or P-521) that it must be of."""

    signature: Path
    public_key: Path


def check_signature(manifest: Manifest, signed: Signed) -> None:
    """Holds if the bytes that were read as manifest.json are those that were signed.

    Raises:
        UsageError: the extra is not installed, a file is missing, or the key cannot be used.
        IntegrityError: signed by another key, over something else, or no signature at all.
    """
    for path in (signed.signature, signed.public_key):
        if not path.is_file():
            raise UsageError(f"{path}: no such file; give the signature and the public key")
    try:
        from cryptography.exceptions import InvalidSignature
        from model_signing import verifying
    except ImportError as error:
        raise UsageError(
            f"--signature needs {error.name}; install the extra: pip install '{EXTRA}'"
        ) from None
    try:
        config = verifying.Config()  # type: ignore[no-untyped-call]
        checker = config.use_elliptic_key_verifier(public_key=signed.public_key)
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{signed.public_key}: not a public key on P-256, P-384 or P-521 in PEM: {error}"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        # of the bytes already read, not of what the folder holds by now
        copy = Path(folder) / manifest.path.name
        copy.write_bytes(manifest.content)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # it prints warnings; stdout is ours
                checker.verify(copy, signed.signature)
        except (InvalidSignature, ValueError, KeyError, IndexError, TypeError) as error:
            reason = str(error).strip() or "another key signed it, or it was changed"
            raise IntegrityError(
                f"{signed.signature}: does not vouch for {manifest.path} with "
                f"{signed.public_key}: {reason}; what must be signed is manifest.json itself"
            ) from None
