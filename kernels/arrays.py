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
def read_plain(arrays: Arrays, place):
    """The key at a place of the readout as it was before RoPE, into `plain`."""
    position, key = key_position(arrays, arrays.rank[place]), np.empty(arrays.k.shape[1], np.float32)
    load(arrays.k[place], arrays.kind, key)
    turn(key, arrays.cos[position], arrays.sin[position], arrays.interleaved, True, arrays.plain[place])


@compiled
def read_all_plain(arrays: Arrays):
    """The same of all places, 0 where there is no entry."""
    for place in range(len(arrays.rank)):
        if arrays.rank[place] == EMPTY:
            arrays.plain[place] = 0
        else:
            read_plain(arrays, place)


@compiled
def store(arrays: Arrays, g, place, k, v, mass, rank):
    """Write a coarse entry of head g, in the slot and at a place of the readout: k, v [D] fp32."""
    entry = arrays.coarse_start[g] + place - arrays.start[g] - (arrays.exact_start[g + 1] - arrays.exact_start[g])
    encode(k, arrays.key_bits, arrays.kind, arrays.coarse_k[entry], arrays.coarse_k_affine[entry], arrays.k[place])
    encode(v, arrays.value_bits, arrays.kind, arrays.coarse_v[entry], arrays.coarse_v_affine[entry], arrays.v[place])
    arrays.mass[place] = arrays.coarse_mass[entry] = mass
    arrays.rank[place] = arrays.coarse_rank[entry] = rank
    read_plain(arrays, place)
