"""A slot and its readout as the compiled functions of merging see them; floats of the model's dtype as their bits."""

from typing import NamedTuple

import numpy as np

from .pairs import is_paired
from .rows import compiled, encode, encode_pairs, load, turn
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
    pair_place: np.ndarray
    pair_step: np.ndarray
    wide: int  # pairs with 8 bits
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


paired = compiled(is_paired)

# A call with a tuple of arrays costs as much as coding a row does: these take many rows at a time, or no tuple.


@compiled
def key_position(rank, limit):
    """See slot.key_position, of one entry."""
    position = MAX_POSITION - (rank & MAX_POSITION)
    return 0 if rank == EMPTY or position < limit else position


@compiled
def read_plain(arrays: Arrays, places):
    """The keys at these places of the readout as they were before RoPE, into `plain`; 0 where there is no entry."""
    key = np.empty(arrays.k.shape[1], np.float32)
    for place in places:
        if arrays.rank[place] == EMPTY:
            arrays.plain[place] = 0
            continue
        position = key_position(arrays.rank[place], arrays.limit)
        load(arrays.k[place], arrays.kind, key)
        turn(key, arrays.cos[position], arrays.sin[position], arrays.interleaved, True, arrays.plain[place])


@compiled
def store(arrays: Arrays, g, places, k, v, mass, rank):
    """Write coarse entries of head g, in the slot and at W places of the readout: k, v [W, D] fp32, mass, rank [W]."""
    first = arrays.coarse_start[g] - arrays.start[g] - (arrays.exact_start[g + 1] - arrays.exact_start[g])
    key_bits, value_bits, kind = arrays.key_bits, arrays.value_bits, arrays.kind
    pair_place, pair_step = arrays.pair_place[g], arrays.pair_step[g]
    for i in range(len(places)):
        place, entry = places[i], first + places[i]
        codes, affine = arrays.coarse_k[entry], arrays.coarse_k_affine[entry]
        if paired(key_bits):
            encode_pairs(k[i], pair_place, pair_step, arrays.wide, kind, codes, affine, arrays.k[place])
        else:
            encode(k[i], key_bits, kind, codes, affine, arrays.k[place])
        encode(v[i], value_bits, kind, arrays.coarse_v[entry], arrays.coarse_v_affine[entry], arrays.v[place])
        arrays.mass[place] = arrays.coarse_mass[entry] = mass[i]
        arrays.rank[place] = arrays.coarse_rank[entry] = rank[i]
    read_plain(arrays, places)
