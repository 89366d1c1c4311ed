"""What the Triton kernels share on the device: addresses, codes, RoPE, ranks and the rows of a batch.

A vector of D columns is handled as two halves of HALF >= D / 2 columns, the rest masked: both nibbles of a
4-bit code, and both members of a NeoX pair, then lie in the same lane. B is the rows of a tile.
"""

import math

import triton
import triton.language as tl

from .pairs import LARGEST, LARGEST_CODED, is_paired, pair_counts
from .slot import MAX_POSITION, POSITION_BITS, group_size

_POSITION_BITS = tl.constexpr(POSITION_BITS)
_MAX_POSITION = tl.constexpr(MAX_POSITION)
_LARGEST = tl.constexpr(LARGEST)
_LARGEST_CODED = tl.constexpr(LARGEST_CODED)
LOG2E = math.log2(math.e)
_LOG2E = tl.constexpr(LOG2E)
_group_size = triton.constexpr_function(group_size)
_is_paired = triton.constexpr_function(is_paired)
_pair_counts = triton.constexpr_function(pair_counts)


@triton.jit
def at(field, slot, stride):
    """Start of a slot's part of a field. slot is int64, stride counts 16 bytes, so the result stays aligned."""
    return field + slot * stride * (128 // field.dtype.element_ty.primitive_bitwidth)


@triton.jit
def row_at(rows, n):
    """Slot (int64), first query row, number of query rows and length of sequence n; rows as launch.ROW_ARGUMENTS."""
    slot_indices, slot_step, cu_seqlens, seq_lens, _ = rows
    begin = tl.load(cu_seqlens + n).to(tl.int32)
    count = tl.load(cu_seqlens + n + 1).to(tl.int32) - begin
    return tl.load(slot_indices + n * slot_step).to(tl.int64), begin, count, tl.load(seq_lens + n).to(tl.int32)


@triton.jit
def part_of(rows, n, slot, position, inside, CELLS: tl.constexpr, PARTED: tl.constexpr):
    """In whose ring tokens of sequence n at positions [B] lie, int64: slot, or [B, 1] where it has several parts."""
    if PARTED:
        slot_indices, slot_step, _, _, _ = rows
        slot = tl.load(slot_indices + n * slot_step + position // CELLS, mask=inside, other=0).to(tl.int64)[:, None]
    return slot


@triton.jit
def all_rows(rows, ROWS: tl.constexpr):
    """Slot, query rows and length of every sequence, [ROWS] each; padding has slot -1."""
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences = rows
    n = tl.arange(0, ROWS)
    inside = n < sequences
    begin = tl.load(cu_seqlens + n, mask=inside, other=0).to(tl.int32)
    count = tl.load(cu_seqlens + n + 1, mask=inside, other=0).to(tl.int32) - begin
    slot = tl.load(slot_indices + n * slot_step, mask=inside, other=-1).to(tl.int32)
    seq_len = tl.load(seq_lens + n, mask=inside, other=0).to(tl.int32)
    return tl.where(count > 0, slot, -1), count, seq_len


@triton.jit
def locate(rows, block, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """Sequence that owns a block of TOKENS query rows, and the block's first row in it; ROWS if none does.

    Blocks are counted over the rows that are no padding, so their number is bounded by the live tokens.
    """
    slot, count, _ = all_rows(rows, ROWS)
    blocks = tl.where(slot >= 0, (count + TOKENS - 1) // TOKENS, 0)
    end = tl.cumsum(blocks)
    n = tl.sum((end <= block).to(tl.int32))
    before = tl.sum(tl.where(tl.arange(0, ROWS) == n, end - blocks, 0))
    return n, (block - before) * TOKENS


@triton.jit
def due_tile(rows, tiles, WINDOW: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr):
    """What this program works on, if every sequence that completes a segment with this call has so many tiles.

    Slot (int64), tokens that have left the ring after this call (0: nothing to do), the sequence's order among those
    that are due (int64), and the tile.
    """
    index = tl.program_id(0) // tiles
    slot, _, seq_len = all_rows(rows, ROWS)
    due = (slot >= 0) & (seq_len % SEGMENT == 0) & (seq_len > WINDOW)
    mine = due & (tl.cumsum(due.to(tl.int32)) == index + 1)
    gone = tl.sum(tl.where(mine, seq_len - WINDOW, 0))
    return tl.sum(tl.where(mine, slot, 0)).to(tl.int64), gone, index.to(tl.int64), tl.program_id(0) % tiles


@triton.jit
def left_ring(seq_len, WINDOW: tl.constexpr, SEGMENT: tl.constexpr):
    """See reference.left_ring; int32."""
    return tl.maximum((seq_len - 1) // SEGMENT * SEGMENT - WINDOW, 0)


@triton.jit
def sizes(slots, head, left):
    """Of one head: first exact and coarse entry, numbers of both, and how many hold something after `left` tokens."""
    exact_first = tl.load(slots.exact_start + head)
    coarse_first = tl.load(slots.coarse_start + head)
    exact = tl.load(slots.exact_start + head + 1) - exact_first
    coarse = tl.load(slots.coarse_start + head + 1) - coarse_first
    held_exact = tl.minimum(left, exact)
    held_coarse = tl.minimum(left - held_exact, coarse)
    return exact_first, coarse_first, exact, coarse, held_exact, held_coarse


@triton.jit
def outgoing(head, gone, c, WINDOW: tl.constexpr, SEGMENT: tl.constexpr):
    """Positions of the outgoing tokens c [B], whether they exist, and their ring cells, counted over all heads."""
    RING: tl.constexpr = WINDOW + SEGMENT
    position = gone - SEGMENT + c
    return position, position >= 0, head * RING + (position + RING) % RING


@triton.jit
def pack_rank(score, position):
    """See slot.pack_rank. score fp32 without NaN, position below 2^31; int64."""
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True).to(tl.int64)
    ordered = tl.where(bits < 0, -bits - 1, bits + 2147483648)
    return (ordered << _POSITION_BITS) | (position.to(tl.int64) ^ _MAX_POSITION)


@triton.jit
def rank_position(rank):
    """See slot.rank_position; int32."""
    return ((rank & _MAX_POSITION) ^ _MAX_POSITION).to(tl.int32)  # all bits of MAX_POSITION are ones


@triton.jit
def sink_logit(sink_logits, head, mask):
    """Of query heads, in base 2; minus infinity where masked."""
    return tl.load(sink_logits + head, mask=mask, other=float("-inf")).to(tl.float32) * _LOG2E


@triton.jit
def no_keys(sink_logits, head, valid, SUNK: tl.constexpr, part):
    """The state of a running softmax before its first key, [TILE] each: the largest logit and the sum of weights.

    A sink counts once: here where the head's keys are not parted, else where its parts are combined.
    """
    top = tl.full(head.shape, float("-inf"), tl.float32)
    total = tl.zeros(head.shape, tl.float32)
    if SUNK:
        if part < 0:
            top = sink_logit(sink_logits, head, valid)
            total = tl.where(valid, 1.0, 0.0)
    return top, total


@triton.jit
def far_limit(seq_len, SEGMENT: tl.constexpr, TRAINED: tl.constexpr):
    """See reference.far_limit; int32."""
    limit = seq_len * 0
    if TRAINED > 0:
        limit = tl.maximum(((seq_len - 1) // SEGMENT + 1) * SEGMENT - TRAINED, 0)
    return limit


@triton.jit
def key_position(rank, limit):
    """See slot.key_position; int32."""
    position = rank_position(rank)
    return tl.where((rank == 0) | (position < limit), 0, position)


@triton.jit
def rank_score(rank):
    """The score that a rank was packed with, fp32."""
    ordered = rank >> _POSITION_BITS
    bits = tl.where(ordered < 2147483648, -ordered - 1, ordered - 2147483648)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def unit(low, high):
    """Rows [B, HALF] x 2 fp32 scaled to norm 1, as torch.nn.functional.normalize does."""
    norm = tl.sqrt_rn(tl.sum(low * low, 1) + tl.sum(high * high, 1))[:, None]
    norm = tl.maximum(norm, 1e-12)
    return low / norm, high / norm


@triton.jit
def centred_unit(low, high, key_sum, gone, D: tl.constexpr, HALF: tl.constexpr):
    """Rows [B, HALF] x 2 fp32 less the mean key of `gone` tokens, scaled to norm 1; columns past D stay zero."""
    i = tl.arange(0, HALF)
    mean_low = tl.load(key_sum + i, mask=i < D // 2, other=0.0) / gone
    mean_high = tl.load(key_sum + D // 2 + i, mask=i < D // 2, other=0.0) / gone
    inside = (i < D // 2)[None, :]
    return unit(tl.where(inside, low - mean_low[None, :], 0.0), tl.where(inside, high - mean_high[None, :], 0.0))


@triton.jit
def halves(field, row, inside, D: tl.constexpr, HALF: tl.constexpr):
    """Rows [B] of a field of D columns: two [B, HALF], zero outside."""
    i = tl.arange(0, HALF)
    address = field + row[:, None] * D + i[None, :]
    mask = inside[:, None] & (i < D // 2)[None, :]
    return tl.load(address, mask=mask, other=0), tl.load(address + D // 2, mask=mask, other=0)


@triton.jit
def store_halves(field, row, inside, low, high, D: tl.constexpr, HALF: tl.constexpr):
    """Inverse of halves."""
    i = tl.arange(0, HALF)
    address = field + row[:, None] * D + i[None, :]
    mask = inside[:, None] & (i < D // 2)[None, :]
    tl.store(address, low.to(field.dtype.element_ty), mask=mask)
    tl.store(address + D // 2, high.to(field.dtype.element_ty), mask=mask)


@triton.jit
def _affine(field, cell, mask):
    """Scale and zero, fp32, of one group of codes each: one load of 4 bytes, the least that can be pipelined."""
    both = tl.load(field.to(tl.pointer_type(tl.int32)) + cell, mask=mask, other=0)
    scale = both.to(tl.int16).to(tl.float16, bitcast=True)
    zero = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit
def _group_affine(field, row, inside, first: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """Scale and zero [B, HALF] fp32 of the columns from `first` on, of 4-bit codes."""
    GROUP: tl.constexpr = _group_size(D, 4)
    B: tl.constexpr = row.shape[0]
    if GROUP == D:
        scale, zero = _affine(field, row, inside)
        scale = tl.broadcast_to(scale[:, None], (B, HALF))
        zero = tl.broadcast_to(zero[:, None], (B, HALF))
    elif (D // 2) % GROUP == 0 and HALF == D // 2:
        # one load per group, spread over its columns in registers
        GROUPS: tl.constexpr = HALF // GROUP
        cell = row[:, None] * (D // GROUP) + first // GROUP + tl.arange(0, GROUPS)[None, :]
        scale, zero = _affine(field, cell, tl.broadcast_to(inside[:, None], (B, GROUPS)))
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (B, GROUPS, GROUP)), (B, HALF))
        zero = tl.reshape(tl.broadcast_to(zero[:, :, None], (B, GROUPS, GROUP)), (B, HALF))
    else:
        i = tl.arange(0, HALF)
        cell = row[:, None] * (D // GROUP) + ((first + i) // GROUP)[None, :]
        scale, zero = _affine(field, cell, inside[:, None] & (i < D // 2)[None, :])
    return scale, zero


@triton.jit
def pairs_of(slots, head, D: tl.constexpr):
    """Places and steps of a head's pairs, see pairs.py: where they begin."""
    return slots.pairs.place + head * (D // 2), slots.pairs.step + head * (D // 2)


@triton.jit
def _pair(pairs, pair, mask, D: tl.constexpr, BITS: tl.constexpr):
    """Of pairs [P] the place, the step, and the highest code."""
    WIDE: tl.constexpr = _pair_counts(D, BITS)[0]
    place = tl.load(pairs[0] + pair, mask=mask, other=D)
    return place, tl.load(pairs[1] + pair, mask=mask, other=0.0), tl.where(place < WIDE, 255, 15)


@triton.jit
def _pair_levels(codes, gains, row, inside, place, step, most, D: tl.constexpr, BITS: tl.constexpr):
    """Both columns [B, P] fp32 of coded pairs."""
    WIDE: tl.constexpr = _pair_counts(D, BITS)[0]
    CODED: tl.constexpr = WIDE + _pair_counts(D, BITS)[1]
    byte = codes + row[:, None] * (WIDE + CODED) + place[None, :]
    wide = (place < WIDE)[None, :]
    first = tl.load(byte, mask=inside[:, None] & wide, other=0).to(tl.int32)
    second = tl.load(byte + WIDE, mask=inside[:, None] & (place < CODED)[None, :], other=0).to(tl.int32)
    level = tl.load(gains + row, mask=inside, other=0.0).to(tl.float32)[:, None] * step[None, :]
    low = (2 * tl.where(wide, first, second & 15) - most[None, :]).to(tl.float32) * level
    high = (2 * tl.where(wide, second, second >> 4) - most[None, :]).to(tl.float32) * level
    coded = (step > 0)[None, :]
    return tl.where(coded, low, 0.0), tl.where(coded, high, 0.0)


@triton.jit
def decode(
    codes, affine, row, inside, pairs,
    D: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Rows [B] of coded vectors as attention reads them, see slot.decode: two [B, HALF] in the model's dtype.

    pairs: of the head, see pairs_of.
    """
    if BITS == 16:
        low, high = halves(codes, row, inside, D, HALF)
    elif _is_paired(BITS):
        i = tl.arange(0, HALF)
        place, step, most = _pair(pairs, i, i < D // 2, D, BITS)
        low, high = _pair_levels(codes, affine, row, inside, place, step, most, D, BITS)
        low = low.to(DTYPE)
        high = high.to(DTYPE)
    elif BITS == 8:
        low, high = halves(codes, row, inside, D, HALF)
        scale, zero = _affine(affine, row, inside)
        low = (low.to(tl.int32).to(tl.float32) * scale[:, None] + zero[:, None]).to(DTYPE)
        high = (high.to(tl.int32).to(tl.float32) * scale[:, None] + zero[:, None]).to(DTYPE)
    else:
        i = tl.arange(0, HALF)
        mask = inside[:, None] & (i < D // 2)[None, :]
        both = tl.load(codes + row[:, None] * (D // 2) + i[None, :], mask=mask, other=0)
        scale, zero = _group_affine(affine, row, inside, 0, D, HALF)
        low = ((both & 15).to(tl.float32) * scale + zero).to(DTYPE)
        scale, zero = _group_affine(affine, row, inside, D // 2, D, HALF)
        high = ((both >> 4).to(tl.float32) * scale + zero).to(DTYPE)
    return low, high


@triton.jit
def _decode_columns(
    codes, affine, row, inside, mask, column, pairs, D: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr
):
    """Any columns [HALF] of coded vectors: [B, HALF] in the model's dtype."""
    if BITS == 16:
        value = tl.load(codes + row[:, None] * D + column[None, :], mask=mask, other=0)
    elif _is_paired(BITS):
        place, step, most = _pair(pairs, column % (D // 2), column < D, D, BITS)
        low, high = _pair_levels(codes, affine, row, inside, place, step, most, D, BITS)
        value = tl.where((column < D // 2)[None, :], low, high).to(DTYPE)
    else:
        if BITS == 8:
            code = tl.load(codes + row[:, None] * D + column[None, :], mask=mask, other=0).to(tl.int32)
            cell = row[:, None] + (column * 0)[None, :]
        else:
            GROUP: tl.constexpr = _group_size(D, 4)
            byte = tl.load(codes + row[:, None] * (D // 2) + (column % (D // 2))[None, :], mask=mask, other=0)
            code = (byte.to(tl.int32) >> (column // (D // 2) * 4)[None, :]) & 15
            cell = row[:, None] * (D // GROUP) + (column // GROUP)[None, :]
        scale, zero = _affine(affine, cell, mask)
        value = (code.to(tl.float32) * scale + zero).to(DTYPE)
    return value


@triton.jit
def mate(column, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The column that RoPE turns together with each column."""
    if INTERLEAVED:
        other = column ^ 1
    else:
        other = tl.where(column < ROTARY // 2, column + ROTARY // 2, column - ROTARY // 2)
    return tl.where(column < ROTARY, other, column)


@triton.jit
def mates(
    codes, affine, row, inside, low, high, pairs,
    D: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The mates of the columns that decode returned as low and high, fp32."""
    if ROTARY == 0 or (ROTARY == D and not INTERLEAVED):
        mate_low, mate_high = high, low
    else:
        i = tl.arange(0, HALF)
        mask = inside[:, None] & (i < D // 2)[None, :]
        column = mate(i, ROTARY, INTERLEAVED)
        mate_low = _decode_columns(codes, affine, row, inside, mask, column, pairs, D, BITS, DTYPE)
        column = mate(i + D // 2, ROTARY, INTERLEAVED)
        mate_high = _decode_columns(codes, affine, row, inside, mask, column, pairs, D, BITS, DTYPE)
    return mate_low.to(tl.float32), mate_high.to(tl.float32)


@triton.jit
def column_angles(cos, sin, position, inside, column, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """cos and sin [B, W] fp32 of columns [W] at positions [B], signed as in angles()."""
    if INTERLEAVED:
        angle = column // 2
        first = column % 2 == 0
    else:
        angle = column % (ROTARY // 2)
        first = column < ROTARY // 2
    address = position.to(tl.int64)[:, None] * (ROTARY // 2) + angle[None, :]
    mask = inside[:, None] & (column < ROTARY)[None, :]
    s = tl.load(sin + address, mask=mask, other=0.0)
    return tl.load(cos + address, mask=mask, other=1.0), tl.where(first[None, :], -s, s)


@triton.jit
def angles(
    cos, sin, position, inside, D: tl.constexpr, HALF: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """cos and sin [B, HALF] fp32 of both halves (cos, sin, cos, sin) at position [B].

    The sign of a column's role is in its sin: a vector is turned to `position` by x * cos + mate * sin, and
    back by x * cos - mate * sin.
    """
    i = tl.arange(0, HALF)
    if ROTARY == D and not INTERLEAVED:
        address = position.to(tl.int64)[:, None] * (D // 2) + i[None, :]
        mask = inside[:, None] & (i < D // 2)[None, :]
        cos_low = tl.load(cos + address, mask=mask, other=1.0)
        sin_high = tl.load(sin + address, mask=mask, other=0.0)
        sin_low = -sin_high
        cos_high = cos_low
    else:
        cos_low, sin_low = column_angles(cos, sin, position, inside, i, ROTARY, INTERLEAVED)
        cos_high, sin_high = column_angles(cos, sin, position, inside, i + D // 2, ROTARY, INTERLEAVED)
    return cos_low, sin_low, cos_high, sin_high


@triton.jit
def turn(low, high, mate_low, mate_high, here, there):
    """Halves [B, HALF] turned from one position to another, fp32, by the difference of their angles().

    The angles of a position come from `angles`, the mates from `mates`.
    """
    cos, sin, cos_there, sin_there = here[0], here[1], there[0], there[1]
    low = low * (cos * cos_there + sin * sin_there) + mate_low * (sin_there * cos - cos_there * sin)
    cos, sin, cos_there, sin_there = here[2], here[3], there[2], there[3]
    high = high * (cos * cos_there + sin * sin_there) + mate_high * (sin_there * cos - cos_there * sin)
    return low, high


@triton.jit
def turn_back(
    codes, affine, row, inside, low, high, pairs, here,
    D: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows [B] that decode returned as low and high, turned to position 0, fp32; here: the angles() where they lie."""
    mate_low, mate_high = mates(codes, affine, row, inside, low, high, pairs, D, HALF, BITS, DTYPE, ROTARY, INTERLEAVED)
    low = low.to(tl.float32) * here[0] - mate_low * here[1]
    return low, high.to(tl.float32) * here[2] - mate_high * here[3]


@triton.jit
def store_encoded(
    codes, affine, row, inside, low, high, pairs, D: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr
):
    """Store two [B, HALF] fp32 as coded vectors in rows [B], see slot.encode. pairs: of the head, see pairs_of."""
    if BITS == 16:
        store_halves(codes, row, inside, low, high, D, HALF)
    elif _is_paired(BITS):
        _store_pairs(codes, affine, row, inside, low, high, pairs, D, HALF, BITS)
    else:
        _store_affine(codes, affine, row, inside, low, high, D, HALF, BITS)


@triton.jit
def _store_pairs(codes, gains, row, inside, low, high, pairs, D: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr):
    """See pairs.encode."""
    WIDE: tl.constexpr = _pair_counts(D, BITS)[0]
    CODED: tl.constexpr = WIDE + _pair_counts(D, BITS)[1]
    i = tl.arange(0, HALF)
    place, step, most = _pair(pairs, i, i < D // 2, D, BITS)
    most = most.to(tl.float32)
    coded = (step > 0)[None, :]
    reach = tl.where(coded, (step * most)[None, :], 1.0)
    farthest = tl.maximum(tl.abs(low), tl.abs(high))
    gain = tl.max(tl.where(coded, tl.div_rn(farthest, tl.broadcast_to(reach, farthest.shape)), 0.0), 1)
    gain = tl.minimum(gain, _LARGEST).to(tl.float16)
    tl.store(gains + row, gain, mask=inside)
    level = gain.to(tl.float32)[:, None] * step[None, :]
    level = tl.where(level > 0, level, float("inf"))
    code_low = _pair_code(low, level, most)
    code_high = _pair_code(high, level, most)
    wide = (place < WIDE)[None, :]
    byte = codes + row[:, None] * (WIDE + CODED) + place[None, :]
    second = tl.where(wide, code_high, code_low | (code_high << 4))
    tl.store(byte, code_low.to(tl.uint8), mask=inside[:, None] & wide)
    tl.store(byte + WIDE, second.to(tl.uint8), mask=inside[:, None] & (place < CODED)[None, :])


@triton.jit
def _store_affine(codes, affine, row, inside, low, high, D: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr):
    """In 8 or 4 bits, with a scale and a zero for each group."""
    i = tl.arange(0, HALF)[None, :]
    mask = inside[:, None] & (i < D // 2)
    GROUP: tl.constexpr = _group_size(D, BITS)
    scale_low = tl.zeros_like(low)
    scale_high = tl.zeros_like(low)
    zero_low = tl.zeros_like(low)
    zero_high = tl.zeros_like(low)
    for group in tl.static_range(D // GROUP):
        in_low = (i < D // 2) & (i // GROUP == group)
        in_high = (i < D // 2) & ((i + D // 2) // GROUP == group)
        least = tl.minimum(
            tl.min(tl.where(in_low, low, float("inf")), 1), tl.min(tl.where(in_high, high, float("inf")), 1)
        )
        most = tl.maximum(
            tl.max(tl.where(in_low, low, float("-inf")), 1), tl.max(tl.where(in_high, high, float("-inf")), 1)
        )
        least = tl.minimum(tl.maximum(least, -_LARGEST_CODED), _LARGEST_CODED)
        most = tl.minimum(tl.maximum(most, -_LARGEST_CODED), _LARGEST_CODED)
        zero = least.to(tl.float16)
        scale = tl.div_rn(most - zero.to(tl.float32), tl.full(most.shape, 2**BITS - 1, tl.float32)).to(tl.float16)
        tl.store(affine + (row * (D // GROUP) + group) * 2, scale, mask=inside)
        tl.store(affine + (row * (D // GROUP) + group) * 2 + 1, zero, mask=inside)
        scale = scale.to(tl.float32)[:, None]
        zero = zero.to(tl.float32)[:, None]
        scale_low = tl.where(in_low, scale, scale_low)
        scale_high = tl.where(in_high, scale, scale_high)
        zero_low = tl.where(in_low, zero, zero_low)
        zero_high = tl.where(in_high, zero, zero_high)
    code_low = _code(low, scale_low, zero_low, BITS)
    code_high = _code(high, scale_high, zero_high, BITS)
    if BITS == 8:
        store_halves(codes, row, inside, code_low, code_high, D, HALF)
    else:
        both = (code_low | (code_high << 4)).to(tl.uint8)
        tl.store(codes + row[:, None] * (D // 2) + i, both, mask=mask)


@triton.jit
def _code(x, scale, zero, BITS: tl.constexpr):
    step = tl.where(scale > 0, tl.div_rn(x - zero, tl.where(scale > 0, scale, 1.0)), 0.0)
    return tl.minimum(tl.maximum(tl.floor(step + 0.5), 0.0), 2**BITS - 1).to(tl.int32)


@triton.jit
def _pair_code(x, level, most):
    code = tl.floor((tl.div_rn(x, level) + most[None, :]) * 0.5 + 0.5)
    return tl.minimum(tl.maximum(code, 0.0), most[None, :]).to(tl.int32)
