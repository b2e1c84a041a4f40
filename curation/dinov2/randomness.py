"""Random numbers as pure functions of (seed, purpose, position): the same whoever asks, whenever, in any order."""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1


class Purpose(IntEnum):
    """What a random number is for; different purposes never share one."""

    ORDER = 1
    CROP = 2
    COLOUR = 3
    MASK_SHARE = 4
    MASK_BLOCKS = 5
    DROP_PATH = 6
    MIXTURE = 16
    CHUNKS = 17
    WINDOW = 18


def generator(seed: int, purpose: Purpose, position: int, part: int = 0) -> np.random.Generator:
    """Return a fresh generator for one part (such as one crop) of the sample at a global position."""
    # The two upper counter words hold the position: 2**128 numbers lie between neighbouring generators.
    return np.random.Generator(np.random.Philox(key=[seed & _MASK, int(purpose)], counter=[0, 0, position, part]))


def scores(seed: int, purpose: Purpose, part: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Return one well mixed 64-bit number for each position, shape of ``positions``.

    Ranking them draws a random subset of exact size whose members do not depend on how positions are split over
    processes.

    Source:
        Steele et al. 2014, "Fast splittable pseudorandom number generators" (the finaliser of SplitMix64).
    """
    mixed = np.asarray(positions).astype(np.uint64)
    for word in (part, int(purpose), seed):
        mixed = _mix(mixed + np.uint64((word * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & _MASK))
    return mixed


def permuted(position: int, size: int, key: int) -> int:
    """Return the image at ``position`` of a pseudorandom permutation of ``range(size)``.

    A balanced Feistel network with cycle walking: constant memory for any ``size``, at most about four evaluations
    on average.

    Source:
        Black and Rogaway 2002, "Ciphers with arbitrary finite domains".
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    value = position
    while True:
        left, right = value >> half_bits, value & mask
        for round_index in range(6):
            left, right = right, left ^ (_mix_int(right ^ key ^ (round_index << 56)) & mask)
        value = (left << half_bits) | right
        if value < size:
            return value


def sample_index(position: int, size: int, seed: int) -> int:
    """Return which of ``size`` images stands at a global position: every epoch is a new permutation."""
    epoch, within = divmod(position, size)
    return permuted(within, size, key(seed, Purpose.ORDER, epoch))


def key(seed: int, purpose: Purpose, *parts: int) -> int:
    """Return a 64-bit key of a permutation."""
    mixed = _mix_int(seed + int(purpose))
    for part in parts:
        mixed = _mix_int(mixed + part)
    return mixed


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _mix_int(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
