"""What each intrinsic is asked, and how far apart its emulated and its native words may be.

Of csrc/emulation/intrinsics.cu, which says what the words of each are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator

# Zeros, ones, the ends of subnormal and of normal floats, numbers that are only just infinity or
# only just not 0 in float16, infinities, NaN.
SPECIAL = np.uint32(
    [
        *(0x00000000, 0x80000000, 0x3F800000, 0xBF800000, 0x00000001, 0x807FFFFF, 0x00800000),
        *(0xFF7FFFFF, 0x477FEFFF, 0x477FF000, 0x33000000, 0xB3000001, 0x7F800000, 0xFF800000),
        *(0x7FC00000, 0xFFC12345),
    ]
)
INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}
COUNT = 1 << 16


class Check(NamedTuple):
    """How an intrinsic is asked and judged.

    Attributes:
        inputs: draws the words of each run.
        apart: (emulated, native, words in, emulates other words) -> the distance of each word.
        bound: the greatest one that is right.
    """

    inputs: Callable[[Generator], list[np.ndarray]]
    apart: Callable[..., np.ndarray]
    bound: float = 0.0


def words(draw: Generator, count: int) -> np.ndarray:
    """Any words, among them the special ones."""
    found = draw.integers(0, 1 << 32, count, dtype=np.uint32)
    places = draw.permutation(count)[: len(SPECIAL)]
    found[places] = SPECIAL[: len(places)]
    return found


def below(draw: Generator, end: int, count: int) -> np.ndarray:
    return draw.integers(0, end, count, dtype=np.uint32)


def floats(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).view(np.uint32)


def any_words(count: int, *ends: tuple[int, int]) -> Callable[[Generator], list[np.ndarray]]:
    """Any words, and behind them for each (end, count) that many below an end."""
    return lambda draw: [np.concatenate([words(draw, count), *(below(draw, *e) for e in ends)])]


def shuffled(draw: Generator) -> list[np.ndarray]:
    """Sources and distances below 32, what is documented, in segments of every width."""
    lanes = [np.concatenate([words(draw, 32), below(draw, 32, 32)]) for _ in range(6)]
    return [np.append(each, np.uint32(1 << power)) for power, each in enumerate(lanes)]


def votes(draw: Generator) -> list[np.ndarray]:
    some = words(draw, 32) * below(draw, 2, 32)
    return [some, words(draw, 32) | 1, np.zeros(32, np.uint32), np.eye(32, dtype=np.uint32)[17]]


def fragments(draw: Generator, kind: str) -> list[np.ndarray]:
    """Elements at random, so that no place matters: whole numbers, any, some not finite.

    Nothing else overflows, so that no order of adding decides what is infinite.
    """
    spread = draw.standard_normal((3, 512)) * 2.0 ** draw.integers(-6, 7, (3, 512))
    spread[2, draw.permutation(512)[:8]] = [np.inf, -np.inf, np.nan, 0, *[2.0**-20] * 4]
    found = []
    for values in (draw.integers(-8, 8, 512), *spread):
        halves = values[:384].astype(np.float16).view(np.uint16)
        if kind == "bfloat16":
            halves = (floats(values[:384]) >> 16).astype(np.uint16)
        found.append(np.concatenate([halves.view(np.uint32), floats(values[384:])]))
    return found


def about(draw: Generator, kind: str) -> list[np.ndarray]:
    """Every number of 16 bits, the middle to the next one, what is beside that; any words."""
    every = np.arange(COUNT, dtype=np.uint16)
    number, above = (
        torch.from_numpy(bits.view(np.int16)).view(getattr(torch, kind)).double().numpy()
        for bits in (every, every + np.uint16(1))
    )
    with np.errstate(over="ignore", invalid="ignore"):
        middle = ((number + above) / 2).astype(np.float32)
        beside = [np.nextafter(middle, np.float32(end)) for end in (np.inf, -np.inf)]
        return [*map(floats, (number, middle, *beside)), words(draw, COUNT)]


def pairs(draw: Generator, kind: str) -> list[np.ndarray]:
    low = about(draw, kind)
    return [np.stack(two, 1).ravel() for two in zip(low, reversed(low), strict=True)]


def exponents(draw: Generator) -> list[np.ndarray]:
    """Not -126 itself: an approximation's last bit decides whether its power is subnormal."""
    line = np.linspace(-160, 140, COUNT)
    return [floats(np.where(line == -126, 0, line)), words(draw, COUNT)]


def comparable(draw: Generator) -> list[np.ndarray]:
    """Not what C or CUDA leaves open of fmin: signalling NaN, NaN and NaN, zeros of two signs."""
    a, b = words(draw, 256), words(draw, 256)
    for each in (a, b):
        each[is_nan(each)] |= 0x00400000
    b[is_nan(a) & is_nan(b) | (a << 1 == 0) & (b << 1 == 0)] = 0x3F800000
    return [np.concatenate([a, b]), np.concatenate([b, a])]


def sums(draw: Generator) -> list[np.ndarray]:
    """Whole numbers: the order of adding does not matter."""
    return [floats(draw.integers(-1000, 1000, 256))]


def is_nan(bits: np.ndarray, kind: str = "float32") -> np.ndarray:
    return (bits & ((1 << 8 * bits.itemsize - 1) - 1)) > INFINITY[kind]


def exact(emulated: np.ndarray, native: np.ndarray, *_: object) -> np.ndarray:
    """As whole numbers."""
    return abs(emulated.astype(float) - native)


def but_for_nan(kind: str, emulated: np.ndarray, native: np.ndarray, *_: object) -> np.ndarray:
    """As whole numbers, which count the floats of a kind; one NaN is as good as another."""
    one, other = (w.view(np.uint32 if kind == "float32" else np.uint16) for w in (emulated, native))
    off = np.where(is_nan(one, kind) & is_nan(other, kind), 0, abs(one.astype(float) - other))
    return off.reshape(len(emulated), -1).max(1)


def of_itself(emulated: np.ndarray, native: np.ndarray, *_: object) -> np.ndarray:
    """As floats, over the emulated one."""
    return over(emulated, emulated, native)


def of_its_terms(
    emulated: np.ndarray, native: np.ndarray, given: np.ndarray, again: Callable
) -> np.ndarray:
    """As floats, over the sum of all terms without signs."""
    signs = np.repeat(np.uint32([0x80008000, 0x80000000]), [192, 128])
    return over(again(given & ~signs), emulated, native)


def over(*words: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        size, one, other = (each.view(np.float32).astype(float) for each in words)
        off = abs(other - one) / abs(size)
    off[(one == other) | (np.isnan(one) & np.isnan(other))] = 0
    return np.where(np.isnan(off), np.inf, off)


# PTX, mma: "at least single precision", in any order, rounded anyhow. So each of 17 terms is added
# within 2^-23 of the sum of all without signs, and when emulated within half of that.
OF_ITS_TERMS = 2.0**-18
# PTX, ex2.approx.ftz: 2^-22. The emulation has it from the C library, within 2^-23.
OF_ITSELF = 2.0**-22 + 2.0**-23
CHECKS = {
    **dict.fromkeys(
        ("shuffle", "shuffle_up", "shuffle_down", "shuffle_xor"), Check(shuffled, exact)
    ),
    **dict.fromkeys(
        [f"load_matrix_x{count}{how}" for count in (2, 4) for how in ("", "_transposed")],
        Check(any_words(128, (32, 32)), exact),
    ),
    "shuffle_in_halves": Check(any_words(32), exact),
    "votes": Check(votes, exact),
    "synchronise": Check(any_words(256), exact),
    "copy_async": Check(any_words(128, (3, 32)), exact),
    "copy_async_groups": Check(any_words(384), exact),
    "exp2_approx": Check(exponents, of_itself, OF_ITSELF),
    "atomic_add_int": Check(any_words(256), exact),
    "atomic_add_unsigned": Check(any_words(256), exact),
    "atomic_add_float": Check(sums, exact),
    "compare_and_count": Check(comparable, exact),
    "multiply_and_add": Check(
        lambda draw: [words(draw, 768), floats(draw.standard_normal(768))],
        partial(but_for_nan, "float32"),
    ),
    "indices": Check(any_words(0), exact),
    "large_shared_memory": Check(any_words(64), exact),
}
for kind in ("float16", "bfloat16"):
    CHECKS |= {
        f"mma_{kind}": Check(partial(fragments, kind=kind), of_its_terms, OF_ITS_TERMS),
        f"round_to_{kind}": Check(partial(about, kind=kind), partial(but_for_nan, kind)),
        f"pack_{kind}": Check(partial(pairs, kind=kind), partial(but_for_nan, kind)),
        f"to_float_of_{kind}": Check(lambda _: [np.arange(COUNT, dtype=np.uint32)], exact),
    }
