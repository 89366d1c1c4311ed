"""Rows of keys and values, compiled for the CPU: their bits, their rotation, their low-bit codes.

Numba knows neither bfloat16 nor float16, so that a row [D] of the model's dtype comes as its bits: uint16 or uint32,
with a `kind` that says what they mean. Everything here rounds as the functions of slot.py do, to the bit.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from numba import config, njit

from .pairs import LARGEST
from .slot import MAX_POSITION, POSITION_BITS

BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.int64}  # by bytes
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def _cache_folder() -> str:
    """One for every version of these files: Numba itself asks only whether the function's own file has changed."""
    folder = Path(__file__).parent
    version = hashlib.blake2b(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))), digest_size=6)
    return str(Path(config.CACHE_DIR or folder / "__pycache__") / version.hexdigest())


CACHE_FOLDER = _cache_folder()


def compiled(function, **options):
    """Numba's compiler, whose work stays on disk for the next process, if there is a folder that it may write to."""
    elsewhere, config.CACHE_DIR = config.CACHE_DIR, CACHE_FOLDER
    try:
        return njit(cache=True, nogil=True, error_model="numpy", **options)(function)
    except RuntimeError:
        return njit(nogil=True, error_model="numpy", **options)(function)
    finally:
        config.CACHE_DIR = elsewhere


def as_bits(x: torch.Tensor) -> np.ndarray:
    """The same memory, floats as their bits."""
    whole = BITS[x.itemsize]
    return (x if x.dtype == whole else x.view(whole)).numpy()


@compiled
def to_bits(x):
    return np.int64(np.float32(x).view(np.uint32))


@compiled
def from_bits(whole):
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
    half = np.int64(half)
    sign, exponent, fraction = (half & 0x8000) << 16, (half >> 10) & 31, half & 0x3FF
    if exponent == 0:
        return from_bits(sign | to_bits(np.float32(fraction) * np.float32(2.0**-24)))
    return from_bits(sign | ((255 if exponent == 31 else exponent + 112) << 23) | (fraction << 13))


@compiled
def load(row, kind, out):
    """A row of the model's dtype as fp32."""
    if kind == 0:
        for d in range(len(row)):
            out[d] = from_bits(np.uint32(row[d]) << 16)
    elif kind == 1:
        for d in range(len(row)):
            out[d] = from_half_bits(row[d])
    else:
        for d in range(len(row)):
            out[d] = from_bits(row[d])


@compiled
def save(x, kind, row):
    """Round fp32 to a row of the model's dtype."""
    if kind == 0:
        for d in range(len(row)):
            whole = to_bits(x[d])
            row[d] = (whole + 0x7FFF + ((whole >> 16) & 1)) >> 16
    elif kind == 1:
        for d in range(len(row)):
            row[d] = half_bits(x[d])
    else:
        for d in range(len(row)):
            row[d] = to_bits(x[d])


@compiled
def turn(x, cos, sin, interleaved, back, out):
    """Rotate a row fp32 by the angles [R / 2] of a position, or back; see slot.rotate."""
    half = len(cos)
    step, second = (2, 1) if interleaved else (1, half)
    sign = np.float32(-1.0) if back else np.float32(1.0)
    for i in range(half):
        a, b, s = x[i * step], x[i * step + second], sign * sin[i]
        out[i * step] = a * cos[i] - b * s
        out[i * step + second] = b * cos[i] + a * s
    for i in range(2 * half, len(x)):
        out[i] = x[i]


@compiled
def encode(x, width, kind, codes, affine, row):
    """Code a row fp32 in `width` bits per value, see slot.encode; `row` becomes what decoding makes of it."""
    size = len(x)
    if width == 16:
        save(x, kind, row)
        codes[:] = row
        return
    groups, most = len(affine), np.float32((1 << width) - 1)
    length = size // groups
    read = np.empty(size, np.float32)
    for g in range(groups):
        low, high = x[g * length], x[g * length]
        for d in range(g * length, (g + 1) * length):
            low, high = min(low, x[d]), max(high, x[d])
        affine[g, 1] = half_bits(low)
        zero = from_half_bits(affine[g, 1])
        affine[g, 0] = half_bits((high - zero) / most)
        scale = from_half_bits(affine[g, 0])
        step = scale if scale > 0 else np.float32(np.inf)  # every code of a group without spread is 0
        for d in range(g * length, (g + 1) * length):
            code = np.floor(min(max((x[d] - zero) / step + np.float32(0.5), np.float32(0)), most))
            read[d] = code
    if width == 8:
        for d in range(size):
            codes[d] = np.uint8(read[d])
    else:
        for d in range(size // 2):
            codes[d] = np.uint8(read[d]) | np.uint8(np.uint8(read[d + size // 2]) << np.uint8(4))
    for g in range(groups):
        scale, zero = from_half_bits(affine[g, 0]), from_half_bits(affine[g, 1])
        for d in range(g * length, (g + 1) * length):
            scaled = read[d] * scale
            read[d] = scaled + zero
    save(read, kind, row)


@compiled
def encode_pairs(x, place, step, wide, kind, codes, gains, row):
    """See pairs.encode, of a key fp32 [D] with its head's code [P]; `row` becomes what decoding makes of it."""
    count, gain = len(place), np.float32(0)
    for i in range(count):
        if step[i] > 0:
            reach = step[i] * np.float32(255 if place[i] < wide else 15)
            gain = max(gain, max(abs(x[i]), abs(x[i + count])) / reach)
    gains[0, 0] = half_bits(min(gain, np.float32(LARGEST)))
    gain = from_half_bits(gains[0, 0])
    read = np.zeros(2 * count, np.float32)
    for i in range(count):
        if step[i] > 0:
            most, level = np.float32(255 if place[i] < wide else 15), gain * step[i]
            divisor = level if level > 0 else np.float32(np.inf)
            low = _level(x[i] / divisor, most)
            high = _level(x[i + count] / divisor, most)
            read[i], read[i + count] = (low * np.float32(2) - most) * level, (high * np.float32(2) - most) * level
            if place[i] < wide:
                codes[place[i]], codes[wide + place[i]] = np.uint8(low), np.uint8(high)
            else:
                codes[wide + place[i]] = np.uint8(low) | np.uint8(np.uint8(high) << np.uint8(4))
    save(read, kind, row)


@compiled
def _level(levels, most):
    """The code of a value so many steps from zero, of codes up to `most`."""
    middle = levels + most
    return min(max(np.floor(middle * np.float32(0.5) + np.float32(0.5)), np.float32(0)), most)


@compiled
def pack_rank(score, position):
    """See slot.pack_rank, of one score."""
    whole = np.int64(np.int32(to_bits(score + np.float32(0) if score == score else np.float32(-np.inf))))
    ordered = (whole ^ ((whole >> 31) & 0x7FFFFFFF)) + (1 << 31)
    return (ordered << POSITION_BITS) | (MAX_POSITION - position)
