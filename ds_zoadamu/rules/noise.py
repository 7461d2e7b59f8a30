"""Noise as a pure function of (seed, step, parameter name, flat index): a file format of two versions, for two kinds of noise.

A journal of steps can be replayed years later only if the same four arguments still give the same bits, so this map never
changes within a version; another map is another version. Version 1,
``NOISE_VERSION``, normal numbers:

    key      two 32-bit words (k0, k1): the 8 bytes, little endian, of BLAKE2b(digest_size=8, person="ds_zoadamu-noise")
             over the seed as 8 bytes little endian followed by the parameter's name in UTF-8; for the direction q > 0 of a
             step with several, followed by a zero byte and q as 4 bytes little endian
    counter  (pair low 32 bits, pair high 32 bits, step, 0),  pair = flat index >> 1
    words    Philox-4x32-10(counter, key) = (x0, x1, x2, x3);  (a, b) = (x0, x1) for an even index, (x2, x3) for an odd one
    u        ((a >> 8) + 1) / 2**24            phi = 2 pi (b >> 8) / 2**24
    xi1, xi2 sqrt(-2 ln u) cos(phi), sqrt(-2 ln u) sin(phi), by the fp32 operations of kernels/reference.py

Version 2, ``SIGN_NOISE_VERSION``, signs:

    key      as above, without a direction
    counter  (block low 32 bits, block high 32 bits, step, 1 + n) for the directions 8 n to 8 n + 7
             block = (flat index >> 8) << 4 | (flat index >> 2) & 15
    byte     number flat index & 3, the lowest first, of the word (flat index >> 6) & 3 of Philox-4x32-10(counter, key)
    z        +1 where bit k of the byte is set, -1 where it is not, in direction 8 n + k

and for rounding 16 bits that an even index i and i + 1 have in common, byte(i) | byte(i + 1) << 8 of the last counter word 256.

The flat index counts the elements of the whole parameter, before any partitioning, so neither rank, world size, partition
boundaries nor the order of calls matter. The name is the first one in ``named_parameters()`` of the plain model.
"""

import hashlib
import struct
from collections.abc import Iterable

import torch

from ..kernels import NOISE_VERSION, SIGN_NOISE_VERSION, noise_, signs_
from ..kernels.checks import check_direction

__all__ = ["NOISE_VERSION", "SIGN_NOISE_VERSION", "noise", "parameter_key", "parameter_keys", "signs"]

_PERSON = b"ds_zoadamu-noise"


def _check_integer(thing: str, value: int, bound: int, bound_text: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{thing} must be an int, not {value!r} of type {type(value).__name__}")
    if not 0 <= value < bound:
        raise ValueError(f"{thing} must be in 0 <= {thing} < {bound_text}, got {value}")


def parameter_key(seed: int, name: str, direction: int = 0) -> tuple[int, int]:
    """The Philox key of one parameter and direction: two 32-bit words out of the run's seed and the parameter's name.

    seed: 0 <= seed < 2**64. direction: of a step with several (n-SPSA), 0 <= direction < 2**32. Raises TypeError for another
    type (bool included), ValueError for another value.
    """
    _check_integer("seed", seed, 1 << 64, "2**64")
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, not {name!r} of type {type(name).__name__}")
    _check_integer("direction", direction, 1 << 32, "2**32")
    message = struct.pack("<Q", seed) + name.encode()
    if direction:  # a name holds no zero byte, so this is no other parameter's message
        message += struct.pack("<BI", 0, direction)
    return struct.unpack("<II", hashlib.blake2b(message, digest_size=8, person=_PERSON).digest())


def parameter_keys(seed: int, names: Iterable[str], num_directions: int = 1) -> dict[str, tuple[tuple[int, int], ...]]:
    """The keys of every name, one a direction. Raises ValueError where two are the same, for they would share their noise."""
    keys: dict[str, tuple[tuple[int, int], ...]] = {}
    owners: dict[tuple[int, int], tuple[str, int]] = {}
    for name in names:
        keys[name] = tuple(parameter_key(seed, name, direction) for direction in range(num_directions))
        for direction, key in enumerate(keys[name]):
            owner = owners.setdefault(key, (name, direction))
            if owner != (name, direction):
                raise ValueError(
                    f"parameters {owner[0]!r} (direction {owner[1]}) and {name!r} (direction {direction}) get the same noise "
                    f"key {key} from seed {seed}; choose another seed"
                )
    return keys


def noise(seed: int, step: int, name: str, start: int, stop: int, *, direction: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(xi1, xi2) of the flat indices start <= i < stop of one parameter at one step: two fp32 CPU tensors.

    step: 0 <= step < 2**32. 0 <= start <= stop < 2**63. direction: of a step with several. Raises TypeError or ValueError for
    anything else.

    >>> xi1, xi2 = noise(seed=0, step=1, name="model.embed_tokens.weight", start=10, stop=12)
    """
    _check_range(step, start, stop)
    key = parameter_key(seed, name, direction)
    xi1, xi2 = (torch.empty(stop - start, dtype=torch.float32, device="cpu") for _ in range(2))
    noise_(xi1, xi2, key=key, step=step, start=start)
    return xi1, xi2


def signs(seed: int, step: int, name: str, start: int, stop: int, *, direction: int = 0) -> torch.Tensor:
    """The signs +1 and -1 of the flat indices start <= i < stop of one parameter at one step: an fp32 CPU tensor.

    direction: 0 <= direction < 1024. Otherwise as ``noise``.
    """
    _check_range(step, start, stop)
    check_direction(direction)
    z = torch.empty(stop - start, dtype=torch.float32, device="cpu")
    signs_(z, key=parameter_key(seed, name), step=step, start=start, direction=direction)
    return z


def _check_range(step: int, start: int, stop: int) -> None:
    _check_integer("step", step, 1 << 32, "2**32")
    _check_integer("start", start, 1 << 63, "2**63")
    _check_integer("stop", stop, 1 << 63, "2**63")
    if stop < start:
        raise ValueError(f"stop must not be below start, got start={start}, stop={stop}")
