"""A slot and its readout as the compiled functions of merging see them; floats of the model's dtype as their bits."""

from typing import NamedTuple

import numpy as np

from .rows import compiled, encode, load, turn
from .slot import EMPTY, MAX_POSITION


class Arrays(NamedTuple):
    """Of one slot the fields of LayerSlots, and of its Readout, by the names they have there."""

    kind: int  # of the model's dtype, see rows.KINDS
    exact_start: np.ndarray
    coarse_start: np.ndarray
    start: np.ndarray
    exact_k: np.ndarray
    exact_v: np.ndarray
    exact_rank: np.ndarray
    coarse_k: np.ndarray
    coarse_v: np.ndarray
    coarse_k_affine: np.ndarray
    coarse_v_affine: np.ndarray
    coarse_mass: np.ndarray
    coarse_rank: np.ndarray
    key_bits: int
    value_bits: int
    k: np.ndarray
    v: np.ndarray
    plain: np.ndarray
    mass: np.ndarray
    rank: np.ndarray
    cos: np.ndarray  # [P, 0] where the model has no rotary embedding
    sin: np.ndarray
    interleaved: bool
    limit: int


@compiled
def key_position(arrays: Arrays, rank):
    """See slot.key_position, of one entry."""
    position = MAX_POSITION - (rank & MAX_POSITION)
    return 0 if rank == EMPTY or position < arrays.limit else position


@compiled
def read_plain(arrays: Arrays):
    """Fill `plain`: keys as they were before RoPE, 0 where there is no entry."""
    key = np.empty(arrays.k.shape[1], np.float32)
    for place in range(len(arrays.rank)):
        if arrays.rank[place] == EMPTY:
            arrays.plain[place] = 0
            continue
        position = key_position(arrays, arrays.rank[place])
        load(arrays.k[place], arrays.kind, key)
        turn(key, arrays.cos[position], arrays.sin[position], arrays.interleaved, True, arrays.plain[place])


@compiled
def store(arrays: Arrays, g, place, k, v, mass, rank):
    """Write a coarse entry of head g, in the slot and at a place of the readout: k, v [D] fp32."""
    entry = arrays.coarse_start[g] + place - arrays.start[g] - (arrays.exact_start[g + 1] - arrays.exact_start[g])
    keys, values = arrays.k[place], arrays.v[place]
    encode(k, arrays.key_bits, arrays.kind, arrays.coarse_k[entry], arrays.coarse_k_affine[entry], keys)
    encode(v, arrays.value_bits, arrays.kind, arrays.coarse_v[entry], arrays.coarse_v_affine[entry], values)
    position, as_read = key_position(arrays, rank), np.empty(len(k), np.float32)
    load(keys, arrays.kind, as_read)
    turn(as_read, arrays.cos[position], arrays.sin[position], arrays.interleaved, True, arrays.plain[place])
    arrays.mass[place] = arrays.coarse_mass[entry] = mass
    arrays.rank[place] = arrays.coarse_rank[entry] = rank
