"""Random numbers without a state: each is a hash of (seed, view, stream, sample id).

So a draw depends on nothing but its own name: not on the batch, the order, the rank or how often
something was drawn before. The hash is the finalizer of SplitMix64 (Steele, Lea & Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014, fig. 16; its mixing constants are D.
Stafford's variant 13, its increment is 2^64 / golden ratio made odd), applied once to the id and
once more to each stream. torch has no unsigned 64-bit arithmetic; int64 wraps around alike, and
the sign bits that its right shift brings in are masked away.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INCREMENT = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def uniform(ids: Tensor, streams: int, *, seed: int, view: int, purpose: int) -> Tensor:
    """Independent uniform numbers of each sample.

    Args:
        ids: int64 (N,), any device.
        streams: how many numbers a sample needs.
        purpose: separates users of the same (seed, view, id).

    Returns:
        float64 (streams, N) in [0, 1), multiples of 2^-53.
    """
    key = _mix_int(_mix_int(_mix_int(seed) ^ view) ^ purpose)
    offsets = [_signed((stream + 1) * _INCREMENT + key) for stream in range(streams)]
    stream_keys = torch.tensor(offsets, dtype=torch.int64, device=ids.device)
    hashed = _mix(ids + _signed(key))
    bits = _mix(hashed[None, :] + stream_keys[:, None])
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


def _mix(words: Tensor) -> Tensor:
    words = (words ^ _shift_right(words, 30)) * _signed(_MIX_1)
    words = (words ^ _shift_right(words, 27)) * _signed(_MIX_2)
    return words ^ _shift_right(words, 31)


def _shift_right(words: Tensor, count: int) -> Tensor:
    return (words >> count) & ((1 << (64 - count)) - 1)


def _mix_int(word: int) -> int:
    """The next output of SplitMix64 from the state `word`, in Python's integers."""
    word = (word + _INCREMENT) & _WORD
    word = ((word ^ (word >> 30)) * _MIX_1) & _WORD
    word = ((word ^ (word >> 27)) * _MIX_2) & _WORD
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    """The int64 with the same low 64 bits."""
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word
