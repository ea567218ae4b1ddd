"""Random numbers as a pure function of (seed, what for, which sample).

Every draw of a run is keyed by the position of its sample in the run, never by how many draws came before. Hence a
resumed run, another number of loader workers and another number of ranks see the same numbers, and there is no
generator state to save.

The generator is counter-based: splitmix64 (Steele, Lea & Flood 2014) applied to key + counter, in int64 tensor
arithmetic (which wraps), so a whole batch is drawn on its device in a few elementwise operations. `hash64` and
`mix` do the same for Python integers.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def _signed(x: int) -> int:
    """The int64 with the bits of the unsigned `x`."""
    x &= _MASK
    return x - (1 << 64) if x >= 1 << 63 else x


def mix(x: int) -> int:
    """splitmix64's finaliser: a bijection of 64-bit integers."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK
    return x ^ (x >> 31)


def hash64(*parts: int | str) -> int:
    """A stable 64-bit key from integers and strings; the same on every machine and Python version."""
    digest = hashlib.blake2b("\x1f".join(f"{type(p).__name__}:{p}" for p in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniform_scalar(*parts: int | str) -> float:
    """One number in [0, 1) for this key."""
    return (hash64(*parts) >> 11) * 2.0**-53


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's >> on int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_tensor(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX2)
    return x ^ _shift_right(x, 31)


# What kernels that draw by themselves need, as int64.
GOLDEN, MIX1, MIX2 = map(_signed, (_GOLDEN, _MIX1, _MIX2))


def salt_of(salt: int) -> int:
    """What `derive` adds to a key before it mixes."""
    return _signed((salt + 1) * _MIX1)


def derive(keys: Tensor, salt: int) -> Tensor:
    """Other keys from (B,) int64 keys, for another use of the same samples; a tensor operation, for compiled code."""
    return _mix_tensor(keys + salt_of(salt))


def random_bits(keys: Tensor, numel: int) -> Tensor:
    """(B, numel) int64, all 64 bits random, from (B,) int64 keys."""
    return random_bits_at(keys[:, None], torch.arange(numel, device=keys.device, dtype=torch.int64))


def random_bits_at(keys: Tensor, index: Tensor) -> Tensor:
    """Single draws of `random_bits`: number `index` (int64, from 0) of each key; the two broadcast."""
    is_compiled = torch.compiler.is_compiling() and index.device.type == "cpu"
    return _mix_tensor(keys + (_hidden_steps if is_compiled else _steps)(index))


def _steps(index: Tensor) -> Tensor:
    """(index + 1) * GOLDEN; from the complement, which keeps a range from being folded into the product."""
    return ~index * -GOLDEN


# Inductor would write the product of a range into C++ as one of signed loop counters, whose overflow is undefined there: the
# compiler may drop the loop's bound and write behind the tensor, or draw other numbers in the rest behind whole vectors.
_hidden_steps = torch.library.custom_op("tessera::steps", _steps, mutates_args=(), device_types="cpu")
_hidden_steps.register_fake(torch.empty_like)


def permutation(length: int, *key: int | str) -> np.ndarray:
    """A permutation of range(length), int64, as a function of the key alone (1.3 M entries take 0.2 s)."""
    with np.errstate(over="ignore"):
        x = (np.arange(1, length + 1, dtype=np.uint64) * np.uint64(_GOLDEN)) + np.uint64(hash64("permutation", *key))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX1)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX2)
        x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable")


class Draws:
    """The random draws of one batch.

    Args:
        seed: of the run.
        positions: (B,) int64, the position of each sample in the run; draws land on its device.
        step: keys the draws that a whole step shares.
    """

    def __init__(self, seed: int, positions: Tensor, step: int = 0):
        self.seed, self.positions, self.step = seed, positions, step

    def keys(self, name: str) -> Tensor:
        """(B,) int64: a key per sample, from which `random_bits` makes any number of draws."""
        return _mix_tensor(self.positions * _signed(_GOLDEN) + _signed(hash64(self.seed, name)))

    def _bits(self, name: str, numel: int) -> Tensor:
        """(B, numel) int64, all 64 bits random."""
        return random_bits(self.keys(name), numel)

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """(B, *shape) fp32 in [0, 1), 24 random bits each."""
        bits = _shift_right(self._bits(name, math.prod(shape)), 40)
        return (bits.float() * 2.0**-24).view(-1, *shape)

    def normal(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """(B, *shape) fp32 standard normal (Box & Muller 1958: two from one 64-bit draw)."""
        numel = math.prod(shape)
        bits = self._bits(name, (numel + 1) // 2)
        radius = torch.sqrt(-2.0 * torch.log((_shift_right(bits, 32).float() + 0.5) * 2.0**-32))
        angle = (bits & 0xFFFFFFFF).float() * (2.0 * math.pi * 2.0**-32)
        pair = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
        return pair.flatten(1)[:, :numel].reshape(-1, *shape)

    def categorical(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """(B, *shape) fp64 inside (0, 1): what generator.sampling.choose turns into one token each."""
        return self.uniform(name, shape).double() + 2.0**-25

    def shared_uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> float:
        """One Python float in [low, high) for the whole step, the same on every rank."""
        return low + (high - low) * uniform_scalar(self.seed, name, self.step)

    def fork(self, name: str) -> Draws:
        """Draws for a nested use: the same names give other numbers than here."""
        return Draws(hash64(self.seed, "fork", name), self.positions, self.step)
