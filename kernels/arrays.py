"""Slots and readouts as compiled functions see them; floats of the model's dtype as their bits."""

import math
from typing import NamedTuple

import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from .pairs import is_paired, pair_counts
from .rows import KINDS, as_bits, compiled, encode, encode_pairs, load, turn
from .slot import EMPTY, MAX_POSITION, LayerSlots, Policy, Rope, forgetting

FIELDS = (
    "ring_k", "ring_v", "key_sum", "pins", "exact_k", "exact_v", "exact_rank", "coarse_k", "coarse_v",
    "coarse_k_affine", "coarse_v_affine", "coarse_mass", "coarse_rank",
)  # fmt: skip


class LayerArrays(NamedTuple):
    """The slots and readouts of a layer.

    Fields of slots by address and extents: as arrays they would be of another type where one is empty.
    """

    kind: int  # of the model's dtype, see rows.KINDS
    address: np.ndarray  # [13], of the FIELDS of slot 0
    stride: int  # bytes from one slot to the next
    cells: int
    pins: int
    key_bytes: int  # of a coarse entry
    value_bytes: int
    key_affine: tuple[int, int]
    value_affine: tuple[int, int]
    exact_start: np.ndarray
    coarse_start: np.ndarray
    pair_place: np.ndarray
    pair_step: np.ndarray
    wide: int  # pairs with 8 bits
    key_bits: int
    value_bits: int
    start: np.ndarray  # [R, G + 1], where each readout begins its heads
    k: np.ndarray  # of Storage, as what follows
    v: np.ndarray
    plain: np.ndarray
    bias: np.ndarray
    mass: np.ndarray
    rank: np.ndarray
    cos: np.ndarray  # [P, 0] where the model has no rotary embedding
    sin: np.ndarray
    interleaved: bool

    @classmethod
    def of(cls, slots: LayerSlots, storage, start: np.ndarray, rope: Rope | None) -> "LayerArrays":
        """Valid as long as these slots are."""
        cos, sin = (rope.cos, rope.sin) if rope is not None else 2 * (torch.empty(1, 0),)
        key_bits, value_bits = slots.codec
        return cls(
            kind=KINDS[slots.ring_k.dtype],
            address=np.array([getattr(slots, name).data_ptr() for name in FIELDS]),
            stride=slots.ring_k.stride(0) * slots.ring_k.itemsize,
            cells=slots.ring_k.shape[2],
            pins=slots.pins.shape[1],
            key_bytes=slots.coarse_k.shape[2] * slots.coarse_k.itemsize,
            value_bytes=slots.coarse_v.shape[2] * slots.coarse_v.itemsize,
            key_affine=tuple(slots.coarse_k_affine.shape[2:]),
            value_affine=tuple(slots.coarse_v_affine.shape[2:]),
            exact_start=slots.exact_start.numpy(),
            coarse_start=slots.coarse_start.numpy(),
            pair_place=slots.pairs.place.numpy(),
            pair_step=slots.pairs.step.numpy(),
            wide=pair_counts(slots.ring_k.shape[3], key_bits)[0],
            key_bits=key_bits,
            value_bits=value_bits,
            start=start,
            k=as_bits(storage.k),
            v=as_bits(storage.v),
            plain=storage.plain.numpy(),
            bias=storage.bias.numpy(),
            mass=storage.mass.numpy(),
            rank=storage.rank.numpy(),
            cos=cos.contiguous().numpy(),
            sin=sin.contiguous().numpy(),
            interleaved=rope is not None and rope.interleaved,
        )


class Arrays(NamedTuple):
    """Of one slot the fields of LayerSlots, and of its readout, by the names they have there; codes as bytes."""

    kind: int  # of the model's dtype, see rows.KINDS
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
    exact_start: np.ndarray
    coarse_start: np.ndarray
    pair_place: np.ndarray
    pair_step: np.ndarray
    wide: int
    key_bits: int
    value_bits: int
    start: np.ndarray
    k: np.ndarray
    v: np.ndarray
    plain: np.ndarray
    bias: np.ndarray
    mass: np.ndarray
    rank: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    interleaved: bool
    limit: int  # see Rope


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
def _at(typingctx, address, shape, dtype):
    """The array that lies there, valid as long as its memory is."""
    array = types.Array(dtype.dtype, len(shape), "C")

    def codegen(context, builder, signature, values):
        made, extents = context.make_array(array)(context, builder), cgutils.unpack_tuple(builder, values[1])
        itemsize = context.get_constant(types.intp, array.dtype.bitwidth // 8)
        strides = [itemsize]
        for extent in reversed(extents[1:]):
            strides.insert(0, builder.mul(strides[0], extent))
        data = builder.inttoptr(values[0], context.get_value_type(array.dtype).as_pointer())
        populate_array(made, data=data, shape=extents, strides=strides, itemsize=itemsize, meminfo=None)
        return made._getvalue()

    return array(address, shape, dtype), codegen


@compiled
def one_of(layer: LayerArrays, slot, row, limit):
    """A slot of a layer, with its readout in a row of the storage."""
    heads, size, bits, a = len(layer.exact_start) - 1, layer.k.shape[2], layer.k.dtype, layer.address
    exact, coarse, here = np.int64(layer.exact_start[-1]), np.int64(layer.coarse_start[-1]), slot * layer.stride
    ring, (kg, kn), (vg, vn) = (heads, layer.cells, size), layer.key_affine, layer.value_affine
    return Arrays(
        layer.kind,
        _at(a[0] + here, ring, bits), _at(a[1] + here, ring, bits), _at(a[2] + here, (heads, size), np.float32),
        _at(a[3] + here, (layer.pins, 2), np.int32),
        _at(a[4] + here, (exact, size), bits), _at(a[5] + here, (exact, size), bits),
        _at(a[6] + here, (exact,), np.int64),
        _at(a[7] + here, (coarse, layer.key_bytes), np.uint8), _at(a[8] + here, (coarse, layer.value_bytes), np.uint8),
        _at(a[9] + here, (coarse, kg, kn), np.uint16), _at(a[10] + here, (coarse, vg, vn), np.uint16),
        _at(a[11] + here, (coarse,), np.float32), _at(a[12] + here, (coarse,), np.int64),
        layer.exact_start, layer.coarse_start, layer.pair_place, layer.pair_step,
        layer.wide, layer.key_bits, layer.value_bits,
        layer.start[row], layer.k[row], layer.v[row], layer.plain[row],
        layer.bias[row], layer.mass[row], layer.rank[row],
        layer.cos, layer.sin, layer.interleaved, limit,
    )  # fmt: skip


@compiled
def ring_of(layer: LayerArrays, slot):
    """Keys and values [G, L, D] in the ring of a slot."""
    heads, size, bits, here = len(layer.exact_start) - 1, layer.k.shape[2], layer.k.dtype, slot * layer.stride
    ring = (heads, layer.cells, size)
    return _at(layer.address[0] + here, ring, bits), _at(layer.address[1] + here, ring, bits)


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
    """Copy the rows of x at W places into `rows` [W, D]."""
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
