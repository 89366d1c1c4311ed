"""Slots and readouts as compiled functions see them; floats of the model's dtype as their bits."""

import math
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from .pairs import is_paired, pair_counts
from .rows import KINDS, as_bits, compiled, encode, encode_pairs, load, turn
from .slot import EMPTY, MAX_POSITION, LayerSlots, Policy, Rope, forgetting


class Arrays(NamedTuple):
    """Fields of LayerSlots and of Storage by the names they have there: of a layer, or of one slot and its readout."""

    kind: int  # of the model's dtype, see rows.KINDS
    exact_start: np.ndarray
    coarse_start: np.ndarray
    start: np.ndarray  # [R, G + 1], or of one
    ring_k: np.ndarray
    ring_v: np.ndarray
    key_sum: np.ndarray
    pins: np.ndarray
    exact_k: np.ndarray
    exact_v: np.ndarray
    exact_rank: np.ndarray
    coarse_k: np.ndarray
    coarse_v: np.ndarray
    coarse_k_affine: np.ndarray
    coarse_v_affine: np.ndarray
    coarse_mass: np.ndarray
    coarse_rank: np.ndarray
    pair_place: np.ndarray
    pair_step: np.ndarray
    wide: int  # pairs with 8 bits
    key_bits: int
    value_bits: int
    k: np.ndarray
    v: np.ndarray
    plain: np.ndarray
    bias: np.ndarray
    mass: np.ndarray
    rank: np.ndarray
    cos: np.ndarray  # [P, 0] where the model has no rotary embedding
    sin: np.ndarray
    interleaved: bool
    limit: int  # see Rope

    @classmethod
    def of(cls, slots: LayerSlots, storage, start: np.ndarray, rope: Rope | None) -> "Arrays":
        """Of a layer, with the storage of its readouts, each of which begins its heads at start [R, G + 1]."""
        cos, sin = (rope.cos, rope.sin) if rope is not None else 2 * (torch.empty(1, 0),)
        coded = "ring_k", "ring_v", "exact_k", "exact_v", "coarse_k", "coarse_v", "coarse_k_affine", "coarse_v_affine"
        plain = "key_sum", "pins", "exact_rank", "coarse_mass", "coarse_rank", "exact_start", "coarse_start"
        return cls(
            **{name: as_bits(getattr(slots, name)) for name in coded},
            **{name: getattr(slots, name).numpy() for name in plain},
            **{name: as_bits(getattr(storage, name)) for name in ("k", "v")},
            **{name: getattr(storage, name).numpy() for name in ("plain", "bias", "mass", "rank")},
            start=start,
            kind=KINDS[slots.ring_k.dtype],
            pair_place=slots.pairs.place.numpy(),
            pair_step=slots.pairs.step.numpy(),
            wide=pair_counts(slots.ring_k.shape[3], slots.codec.key_bits)[0],
            key_bits=slots.codec.key_bits,
            value_bits=slots.codec.value_bits,
            cos=cos.contiguous().numpy(),
            sin=sin.contiguous().numpy(),
            interleaved=rope is not None and rope.interleaved,
            limit=0,
        )


class Weights(NamedTuple):
    """A policy as arrays; w1 has no units where scores are training-free."""

    w1: np.ndarray  # [G, 2D, U] fp32
    b1: np.ndarray  # [G, U] fp32
    w2: np.ndarray  # [G, U] fp32
    b2: np.ndarray  # [G] fp32
    gate: np.ndarray  # [G, 3] fp32
    forgetting: float  # see slot.forgetting

    @classmethod
    def of(cls, policy: Policy, rope: Rope | None) -> "Weights":
        heads = len(policy.gate)
        nothing = (torch.empty(heads, *extent) for extent in ((0, 0), (0,), (0,), ()))
        weights = (*(policy.importance or nothing), policy.gate)
        return cls(*(w.contiguous().numpy() for w in weights), float(forgetting(rope, policy)))


@intrinsic
def _row(typingctx, x, i):
    """x[i], all of whose elements lie side by side; valid as long as x is."""
    row = types.Array(x.dtype, x.ndim - 1, "C")

    def codegen(context, builder, signature, values):
        source, made = context.make_array(x)(context, builder, values[0]), context.make_array(row)(context, builder)
        (_, *shape), (stride, *strides) = (cgutils.unpack_tuple(builder, y) for y in (source.shape, source.strides))
        place = builder.gep(builder.bitcast(source.data, ir.IntType(8).as_pointer()), [builder.mul(values[1], stride)])
        data = builder.bitcast(place, source.data.type)
        populate_array(made, data=data, shape=shape, strides=strides, itemsize=source.itemsize, meminfo=None)
        return made._getvalue()

    return row(x, types.int64), codegen


@compiled
def one_of(layer, slot, row, limit):
    """The Arrays of a slot, with its readout in a row of the storage, among those of a layer."""
    return Arrays(
        layer.kind, layer.exact_start, layer.coarse_start, _row(layer.start, row),
        _row(layer.ring_k, slot), _row(layer.ring_v, slot), _row(layer.key_sum, slot), _row(layer.pins, slot),
        _row(layer.exact_k, slot), _row(layer.exact_v, slot), _row(layer.exact_rank, slot),
        _row(layer.coarse_k, slot), _row(layer.coarse_v, slot),
        _row(layer.coarse_k_affine, slot), _row(layer.coarse_v_affine, slot),
        _row(layer.coarse_mass, slot), _row(layer.coarse_rank, slot),
        layer.pair_place, layer.pair_step, layer.wide, layer.key_bits, layer.value_bits,
        _row(layer.k, row), _row(layer.v, row), _row(layer.plain, row),
        _row(layer.bias, row), _row(layer.mass, row), _row(layer.rank, row),
        layer.cos, layer.sin, layer.interleaved, limit,
    )  # fmt: skip


MASKED = -1e30  # finite, so that a row whose memory is empty yields weight 0 instead of NaN

paired = compiled(is_paired)

# A call with a tuple of arrays costs as much as coding a row does: these take many rows at a time, or no tuple.


@compiled
def rank_position(rank):
    """See slot.rank_position, of one entry."""
    return MAX_POSITION - (rank & MAX_POSITION)


@compiled
def key_position(rank, limit):
    """See slot.key_position, of one entry."""
    position = rank_position(rank)
    return 0 if rank == EMPTY or position < limit else position


@compiled
def weigh(mass, rank, places, bias):
    """The bias of the entries at these places: the log of their mass, of exact ones 0, MASKED where there is none."""
    for place in places:
        bias[place] = math.log(mass[place]) if mass[place] > 0 else np.float32(0)
        if rank[place] == EMPTY:
            bias[place] = MASKED


@compiled
def read_plain(arrays: Arrays, places):
    """The keys at these places of the readout as they were before RoPE, into `plain`; 0 where there is no entry."""
    shape = len(places), arrays.k.shape[1]
    key, plain = np.empty(shape, np.float32), np.empty(shape, np.float32)
    position = np.empty(len(places), np.int64)
    for i in range(len(places)):
        position[i] = key_position(arrays.rank[places[i]], arrays.limit)
    load_rows(arrays.k, places, arrays.kind, key)
    turn(key, position, arrays.cos, arrays.sin, arrays.interleaved, True, plain)
    for i in range(len(places)):
        if arrays.rank[places[i]] == EMPTY:
            for d in range(plain.shape[1]):
                plain[i, d] = 0
    _scatter(plain, places, arrays.plain)


@compiled
def read_all_plain(layer: Arrays, row, limit):
    """Those of the readout in this row of a layer's storage."""
    arrays = one_of(layer, 0, row, limit)
    read_plain(arrays, np.arange(arrays.start[-1]))


@compiled
def store(arrays: Arrays, g, places, k, v, mass, rank):
    """Write coarse entries of head g, in the slot and at W places of the readout: k, v [W, D] fp32, mass, rank [W]."""
    store_keys(arrays, g, places, k)
    entries, read = _entries_at(arrays, g, places), np.empty(v.shape, arrays.v.dtype)
    codes, affine = _rows_like(arrays.coarse_v, len(v)), _rows_like(arrays.coarse_v_affine, len(v))
    encode(v, arrays.value_bits, arrays.kind, codes, affine, read)
    _scatter(codes, entries, arrays.coarse_v)
    _scatter_groups(affine, entries, arrays.coarse_v_affine)
    _scatter(read, places, arrays.v)
    for i in range(len(places)):
        arrays.mass[places[i]] = arrays.coarse_mass[entries[i]] = mass[i]
        arrays.rank[places[i]] = arrays.coarse_rank[entries[i]] = rank[i]
    weigh(arrays.mass, arrays.rank, places, arrays.bias)
    read_plain(arrays, places)


@compiled
def store_keys(arrays: Arrays, g, places, k):
    """The keys alone, of which `plain` stays as it was."""
    entries, read = _entries_at(arrays, g, places), np.empty(k.shape, arrays.k.dtype)
    codes, affine = _rows_like(arrays.coarse_k, len(k)), _rows_like(arrays.coarse_k_affine, len(k))
    if paired(arrays.key_bits):
        place, step = arrays.pair_place[g], arrays.pair_step[g]
        encode_pairs(k, place, step, arrays.wide, arrays.kind, codes, affine, read)
    else:
        encode(k, arrays.key_bits, arrays.kind, codes, affine, read)
    _scatter(codes, entries, arrays.coarse_k)
    _scatter_groups(affine, entries, arrays.coarse_k_affine)
    _scatter(read, places, arrays.k)


@compiled
def _entries_at(arrays, g, places):
    """Which coarse entries of the slot those of head g at these places are."""
    return places + (arrays.coarse_start[g] - arrays.start[g] - (arrays.exact_start[g + 1] - arrays.exact_start[g]))


@compiled
def gather(x, places, rows):
    for i in range(len(places)):
        for d in range(x.shape[1]):
            rows[i, d] = x[places[i], d]


@compiled
def load_rows(x, places, kind, out):
    """Rows of the model's dtype at these places as fp32 [W, D]."""
    bits = np.empty(out.shape, x.dtype)
    gather(x, places, bits)
    load(bits.reshape(-1), kind, out.reshape(-1))


@compiled
def _scatter(rows, places, x):
    for i in range(len(places)):
        for d in range(x.shape[1]):
            x[places[i], d] = rows[i, d]


@compiled
def _scatter_groups(rows, places, x):
    for i in range(len(places)):
        for g in range(x.shape[1]):
            for j in range(x.shape[2]):
                x[places[i], g, j] = rows[i, g, j]


@compiled
def _rows_like(x, count):
    return np.empty((count, *x.shape[1:]), x.dtype)
