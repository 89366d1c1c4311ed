"""Rows of keys and values, compiled for the CPU: their bits, their rotation, their low-bit codes.

Numba knows neither bfloat16 nor float16, so that a row [D] of the model's dtype comes as its bits: uint16 or uint32,
with a `kind` that says what they mean. Everything here rounds as the functions of slot.py do, to the bit.
"""

import fcntl
import functools
import hashlib
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from numba import config, njit

from .pairs import LARGEST, LARGEST_CODED
from .slot import MAX_POSITION, POSITION_BITS

BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.int64}  # by bytes
BFLOAT16, FLOAT16, FLOAT32 = range(3)
KINDS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}
LOG2_E = np.float32(math.log2(math.e))
TAYLOR = tuple(np.float32(math.log(2) ** i / math.factorial(i)) for i in range(7))  # of 2^x about 0


def _cache_folder() -> str:
    """One for every version of these files: Numba itself asks only whether the function's own file has changed."""
    folder = Path(__file__).parent
    files = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    version = hashlib.blake2b(files, digest_size=6).hexdigest()
    for place in (config.CACHE_DIR or folder / "__pycache__", os.path.expanduser("~/.cache/deltamem")):
        try:
            path = Path(place) / version
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
            return str(path)
        except OSError:
            continue
    return os.devnull  # nowhere: every process compiles anew


CACHE_FOLDER = _cache_folder()


def compiled(function, **options):
    """Numba's compiler, whose work stays on disk for the next process, if there is a folder that it may write to."""
    elsewhere, config.CACHE_DIR = config.CACHE_DIR, CACHE_FOLDER
    try:
        cached = njit(cache=True, nogil=True, error_model="numpy", **options)(function)
        if cached._cache.cache_path.startswith(CACHE_FOLDER):
            return cached  # where that can't be, Numba has folders of its own, for any version
    except RuntimeError:
        pass
    finally:
        config.CACHE_DIR = elsewhere
    return njit(nogil=True, error_model="numpy", **options)(function)


@contextmanager
def compiling() -> Iterator[None]:
    """One process at a time: two that compile for different dtypes may give one file in Numba's cache to both."""
    if CACHE_FOLDER == os.devnull:
        yield
        return
    with open(Path(CACHE_FOLDER) / "lock", "a") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# Where the order of a sum may be the compiler's, which only the extents of a call decide.
summed = functools.partial(compiled, fastmath={"reassoc", "contract"})
# Of what has one caller: LLVM optimises all that a function calls once more with it.
inlined = functools.partial(compiled, inline="always")


def as_bits(x: torch.Tensor) -> np.ndarray:
    """The same memory, floats as their bits."""
    whole = BITS[x.itemsize]
    return (x if x.dtype == whole else x.view(whole)).numpy()


@compiled
def to_bits(x):
    """The bits of an fp32, int64."""
    return np.int64(np.float32(x).view(np.uint32))


@compiled
def from_bits(whole):
    """The fp32 of these bits."""
    return np.uint32(whole).view(np.float32)


@compiled
def half_bits(x):
    """fp32 to the bits of fp16, rounded to nearest even."""
    whole = to_bits(x)
    sign, size = (whole >> 16) & 0x8000, whole & 0x7FFFFFFF
    if size >= 0x47800000:  # too large, or no number
        return sign | (0x7E00 if size > 0x7F800000 else 0x7C00)
    if size < 0x38800000:  # subnormal: the sum has its last bit where theirs is
        return sign | (to_bits(from_bits(size) + np.float32(0.5)) - 0x3F000000)
    return sign | ((size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13)


@compiled
def from_half_bits(half):
    """The bits of fp16 to fp32."""
    half = np.int64(half)
    sign, exponent, fraction = (half & 0x8000) << 16, (half >> 10) & 31, half & 0x3FF
    if exponent == 0:
        return from_bits(sign | to_bits(np.float32(fraction) * np.float32(2.0**-24)))
    return from_bits(sign | ((255 if exponent == 31 else exponent + 112) << 23) | (fraction << 13))


@compiled
def ordered(bits):
    """The bits of an fp32, int32, to whole numbers in the same order, and back: these are compared many at a time."""
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@compiled
def highest(x):
    """The maximum of a row fp32."""
    bits, top = x.view(np.int32), np.int32(-0x80000000)
    for i in range(len(bits)):
        top = max(top, ordered(bits[i]))
    return np.int32(ordered(top)).view(np.float32)


@compiled
def exponentiate(x, top):
    """A row fp32 to e^(x - top), to the last bit but one: 2^n by its bits, the rest by TAYLOR."""
    for i in range(len(x)):
        power = max((x[i] - top) * LOG2_E, np.float32(-127))
        whole = np.floor(power + np.float32(0.5))
        rest, found = power - whole, TAYLOR[6]
        found = found * rest + TAYLOR[5]
        found = found * rest + TAYLOR[4]
        found = found * rest + TAYLOR[3]
        found = found * rest + TAYLOR[2]
        found = found * rest + TAYLOR[1]
        found = found * rest + TAYLOR[0]
        x[i] = found * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled
def load(row, kind, out):
    """A row of the model's dtype as fp32."""
    if kind == BFLOAT16:
        for d in range(len(row)):
            out[d] = from_bits(np.uint32(row[d]) << 16)
    elif kind == FLOAT16:
        for d in range(len(row)):
            out[d] = from_half_bits(row[d])
    else:
        for d in range(len(row)):
            out[d] = from_bits(row[d])


@compiled
def save(x, kind, row):
    """Round fp32 to a row of the model's dtype."""
    if kind == BFLOAT16:
        for d in range(len(row)):
            whole = to_bits(x[d])
            row[d] = (whole + 0x7FFF + ((whole >> 16) & 1)) >> 16
    elif kind == FLOAT16:
        for d in range(len(row)):
            row[d] = half_bits(x[d])
    else:
        for d in range(len(row)):
            row[d] = to_bits(x[d])


# Blocks of rows go by their indices: a row cut out of one costs as much as the work on it.


@compiled
def turn(x, position, cos, sin, interleaved, back, out):
    """Rotate rows fp32 [N, D] to their positions [N], or back, by the angles [P, R / 2]; see slot.rotate."""
    half = cos.shape[1]
    sign = np.float32(-1.0) if back else np.float32(1.0)
    for j in range(len(x)):
        p = position[j]
        if interleaved:
            for i in range(half):
                a, b, c, s = x[j, 2 * i], x[j, 2 * i + 1], cos[p, i], sign * sin[p, i]
                out[j, 2 * i] = a * c - b * s
                out[j, 2 * i + 1] = b * c + a * s
        else:
            for i in range(half):
                a, b, c, s = x[j, i], x[j, half + i], cos[p, i], sign * sin[p, i]
                out[j, i] = a * c - b * s
                out[j, half + i] = b * c + a * s
        for i in range(2 * half, x.shape[1]):
            out[j, i] = x[j, i]


@compiled
def encode(x, width, kind, codes, affine, read):
    """Code rows fp32 [N, D] in `width` bits per value, see slot.encode; `read` becomes what decoding makes of them.

    codes: bytes [N, B].
    """
    if width == 16:
        save(x.reshape(-1), kind, read.reshape(-1))
        whole = codes.view(read.dtype)
        for j in range(len(x)):
            for d in range(x.shape[1]):
                whole[j, d] = read[j, d]
        return
    most, shape = np.float32((1 << width) - 1), (len(x), affine.shape[1], x.shape[1] // affine.shape[1])
    code, value = np.empty(x.shape, np.float32), np.empty(x.shape, np.float32)
    _fit(x.reshape(shape), most, affine)
    _quantise(x.reshape(shape), affine, most, code.reshape(shape))
    _pack(code, width, codes)
    _dequantise(code.reshape(shape), affine, value.reshape(shape))
    save(value.reshape(-1), kind, read.reshape(-1))


@compiled
def _fit(x, most, affine):
    """The (scale, zero) of every group of values [N, groups, D / groups]."""
    bits = x.view(np.int32)
    for j in range(x.shape[0]):
        for g in range(x.shape[1]):
            low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
            for d in range(x.shape[2]):
                order = ordered(bits[j, g, d])
                low, high = min(low, order), max(high, order)
            affine[j, g, 1] = half_bits(_within_half(np.int32(ordered(low)).view(np.float32)))
            zero = from_half_bits(affine[j, g, 1])
            affine[j, g, 0] = half_bits((_within_half(np.int32(ordered(high)).view(np.float32)) - zero) / most)


@inlined
def _within_half(x):
    return min(max(x, np.float32(-LARGEST_CODED)), np.float32(LARGEST_CODED))


@compiled
def _quantise(x, affine, most, code):
    for j in range(x.shape[0]):
        for g in range(x.shape[1]):
            scale, zero = from_half_bits(affine[j, g, 0]), from_half_bits(affine[j, g, 1])
            step = scale if scale > 0 else np.float32(np.inf)  # every code of a group without spread is 0
            for d in range(x.shape[2]):
                level = (x[j, g, d] - zero) / step + np.float32(0.5)
                code[j, g, d] = np.floor(min(max(level, np.float32(0)), most))


@compiled
def _pack(code, width, codes):
    half = code.shape[1] // 2
    for j in range(len(code)):
        if width == 8:
            for d in range(code.shape[1]):
                codes[j, d] = np.uint8(np.int32(code[j, d]))
        else:
            for d in range(half):
                codes[j, d] = np.uint8(np.int32(code[j, d]) | np.int32(code[j, half + d]) << 4)


@compiled
def _dequantise(code, affine, value):
    for j in range(code.shape[0]):
        for g in range(code.shape[1]):
            scale, zero = from_half_bits(affine[j, g, 0]), from_half_bits(affine[j, g, 1])
            for d in range(code.shape[2]):
                scaled = code[j, g, d] * scale
                value[j, g, d] = scaled + zero


@compiled
def encode_pairs(x, place, step, wide, kind, codes, gains, read):
    """See pairs.encode, of keys fp32 [N, D] with their head's code [P]; `read` becomes what decoding makes of them."""
    shape, most, reach = (len(x), 2, len(place)), np.empty_like(step), np.empty_like(step)
    code, value = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for i in range(len(place)):
        most[i] = np.float32(255 if place[i] < wide else 15)
        reach[i] = step[i] * most[i] if step[i] > 0 else np.float32(np.inf)
    _fit_pairs(x.reshape(shape), reach, gains)
    _quantise_pairs(x.reshape(shape), gains, step, most, code, value)
    _pack_pairs(code, place, wide, codes)
    save(value.reshape(-1), kind, read.reshape(-1))


@compiled
def _fit_pairs(x, reach, gains):
    """The gain of every row of pairs [N, 2, P]."""
    share = np.empty_like(reach)
    for j in range(len(x)):
        for i in range(len(reach)):
            share[i] = max(abs(x[j, 0, i]), abs(x[j, 1, i])) / reach[i]
        gains[j, 0, 0] = half_bits(min(highest(share), np.float32(LARGEST)))


@compiled
def _quantise_pairs(x, gains, step, most, code, value):
    """Their codes, and what they are read as."""
    level, divisor = np.empty_like(step), np.empty_like(step)
    for j in range(len(x)):
        gain = from_half_bits(gains[j, 0, 0])
        for i in range(len(step)):
            level[i] = gain * step[i]
            divisor[i] = level[i] if level[i] > 0 else np.float32(np.inf)
        for half in range(2):
            for i in range(len(step)):
                middle = (x[j, half, i] / divisor[i] + most[i]) * np.float32(0.5)
                code[j, half, i] = min(max(np.floor(middle + np.float32(0.5)), np.float32(0)), most[i])
                value[j, half, i] = (code[j, half, i] * np.float32(2) - most[i]) * level[i]


@compiled
def _pack_pairs(code, place, wide, codes):
    count = len(place)
    low, high = np.empty(count, np.uint8), np.empty(count, np.uint8)
    for j in range(len(code)):
        for i in range(count):
            low[place[i]] = np.uint8(np.int32(code[j, 0, i]))
            high[place[i]] = np.uint8(np.int32(code[j, 1, i]))
        for i in range(wide):
            codes[j, i], codes[j, wide + i] = low[i], high[i]
        for i in range(codes.shape[1] - 2 * wide):
            codes[j, 2 * wide + i] = np.uint8(np.int32(low[wide + i]) | np.int32(high[wide + i]) << 4)


@compiled
def pack_rank(score, position):
    """See slot.pack_rank, of one score."""
    whole = np.int64(np.int32(to_bits(score + np.float32(0) if score == score else np.float32(-np.inf))))
    ordered = (whole ^ ((whole >> 31) & 0x7FFFFFFF)) + (1 << 31)
    return (ordered << POSITION_BITS) | (MAX_POSITION - position)
