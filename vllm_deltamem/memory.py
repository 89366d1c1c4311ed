"""The slot: how the bytes of one sequence's memory are divided. The only file that knows byte offsets.

A slot is one contiguous slab of `layers x page` bytes (vLLM's block, all layers side by side). Pages are
equal towards vLLM; inside the slab every (layer, kv head) has its own numbers of exact and coarse entries.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod

import torch

from vllm_deltamem.config import DeltaMemConfig
from vllm_deltamem.kernels.pairs import Pairs, is_paired, pair_bytes, pair_code
from vllm_deltamem.kernels.slot import FIDELITIES, Codec, LayerSlots, group_size

ALIGNMENT = 16  # bytes: the widest load of a kernel
STATE_ALIGNMENT = 128  # bytes, of recurrent layers' states: the kernels that read them are vLLM's
MAX_PINS = 32  # spans of tokens that a client may pin in one sequence
DEFAULT_FIDELITY = "k8v4"  # of a model without a profile: next to free on every model tried
DEFAULT_SHARE = 0.15  # of full attention at max_model_len
WINDOW_SHARE = 0.25  # of a small memory, without a profile that says otherwise
NEAR = 64  # tokens: importance is learned from queries that are at least so far from the token
PART_TOKENS = 256  # that a part of a slot has room for at least


@dataclass(frozen=True)
class Shape:
    """What of a model decides the size of its memory, for one tensor-parallel worker."""

    layers: int  # those that attend
    kv_heads: int  # of this worker
    head_size: int
    dtype: torch.dtype
    max_model_len: int
    windows: tuple[int | None, ...] = ()  # of every layer, see layers.find_windows; () when none slides
    sliding_heads: tuple[int, int] | None = None  # kv heads of this worker and their size, where sliding layers differ
    # of a hybrid model's recurrent layers, which keep their state beside the memory
    state_bytes: int = field(default=0, repr=False)

    def sliding(self, layer: int) -> int | None:
        """Tokens that the layer's sliding window sees; None for full attention."""
        return self.windows[layer] if self.windows else None

    def heads(self, layer: int) -> tuple[int, int]:
        """A layer's kv heads on this worker, and their size."""
        slides = self.sliding_heads is not None and self.sliding(layer) is not None
        return self.sliding_heads if slides else (self.kv_heads, self.head_size)

    @property
    def full_layers(self) -> list[int]:
        """Layers whose context the memory compresses."""
        return [i for i in range(self.layers) if not self.sliding(i)]

    @property
    def token_bytes(self) -> int:
        """Key and value of one token in one head at full precision."""
        return 2 * self.head_size * self.dtype.itemsize

    @property
    def full_token_bytes(self) -> int:
        """What a paged cache holds of one token in the full-attention layers of this worker."""
        return len(self.full_layers) * self.kv_heads * self.token_bytes

    def full_attention_bytes(self, tokens: int) -> int:
        """What a paged cache holds of a sequence on this worker: of sliding layers, the window; states are the same."""
        cached = sum(min(tokens, self.sliding(i) or tokens) * 2 * self._vectors(i) for i in range(self.layers))
        return cached + self.state_bytes

    def sliding_bytes(self, segment: int) -> int:
        """What all sliding layers hold of a sequence in a slot: rings, and sums of keys that stay zero."""
        rings = [(i, align((w + segment) * self._vectors(i))) for i, w in enumerate(self.windows) if w]
        return sum(2 * ring + align(4 * prod(self.heads(i))) for i, ring in rings)

    def _vectors(self, layer: int) -> int:
        """Bytes of one key of every head of a layer, at full precision."""
        return prod(self.heads(layer)) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """The division of a slab. Hashable and a function of shape, settings and budgets alone."""

    shape: Shape
    codecs: tuple[Codec, ...]  # of every layer
    window: int
    segment: int
    sinks: int
    pinned: int
    exact: tuple[tuple[int, ...], ...]  # entries of [layer][kv head], none in sliding layers
    coarse: tuple[tuple[int, ...], ...]
    cells: int = 0  # of a ring, where slots are parts; 0 where one holds the window and a segment
    least_page: int = 0  # vLLM wants equal pages on all workers: the largest worker's

    @property
    def ring(self) -> int:
        """Tokens of a sequence that a layer with full attention keeps as they are."""
        return self.window + self.segment

    @property
    def parts(self) -> int:
        """Of a sequence at most, where slots are parts; 0 else."""
        return self.ring // self.cells if self.cells else 0

    @cached_property
    def _fields(self) -> tuple[dict[str, tuple[int, tuple[int, ...], torch.dtype]], ...]:
        """Of every layer: name -> (byte offset in the slab, shape of one slot, dtype)."""
        shape, dtype = self.shape, self.shape.dtype
        offset = align(8 * MAX_PINS)  # `pins` come first, shared by all layers
        layers = []
        for layer, (exact, coarse, codec) in enumerate(zip(self.exact, self.coarse, self.codecs, strict=True)):
            ring = self.cells or (shape.sliding(layer) or self.window) + self.segment
            x, y, (g, size) = sum(exact), sum(coarse), shape.heads(layer)
            k_cells, k_dtype, k_affine = _coded(size, codec.key_bits, dtype)
            v_cells, v_dtype, v_affine = _coded(size, codec.value_bits, dtype)
            fields = {"pins": (0, (MAX_PINS, 2), torch.int32)}
            for name, extent, kind in (
                ("ring_k", (g, ring, size), dtype),
                ("ring_v", (g, ring, size), dtype),
                ("key_sum", (g, size), torch.float32),
                ("exact_k", (x, size), dtype),
                ("exact_v", (x, size), dtype),
                ("exact_rank", (x,), torch.int64),
                ("coarse_k", (y, k_cells), k_dtype),
                ("coarse_v", (y, v_cells), v_dtype),
                ("coarse_k_affine", (y, *k_affine), torch.float16),
                ("coarse_v_affine", (y, *v_affine), torch.float16),
                ("coarse_mass", (y,), torch.float32),
                ("coarse_rank", (y,), torch.int64),
            ):
                fields[name] = (offset, extent, kind)
                offset += align(prod(extent) * kind.itemsize)
            layers.append(fields)
        layers.append({"end": (offset, (0,), torch.uint8)})
        return tuple(layers)

    def extent(self, layer: int) -> slice:
        """The bytes in the slab that are this layer's alone."""
        first, following = self._fields[layer]["ring_k"], self._fields[layer + 1]
        return slice(first[0], following.get("ring_k", following.get("end"))[0])

    def placed(self, before: int, after: int) -> dict[str, float]:
        """Where the tokens went that left the ring while a sequence grew, mean of all heads with full attention.

        Nowhere in most steps of decoding, for which it must not cost anything.
        """
        gone = [max(n // self.segment * self.segment - self.window, 0) for n in (before, after)]
        if gone[0] == gone[1]:
            return {}
        exact, filled, left = (b - a for a, b in zip(*map(self._held, gone), strict=True))
        return {"exact": exact, "coarse": filled - exact, "merged": left - filled}

    def _held(self, gone: int) -> tuple[float, float, int]:
        """Of so many tokens that left the ring, those in exact entries, in any entry, all; means over heads."""
        exact, all_entries = self._entries
        return exact.clamp(max=gone).mean().item(), all_entries.clamp(max=gone).mean().item(), gone

    @cached_property
    def _entries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact and all entries of every head with full attention, fp64."""
        exact, coarse = (
            torch.tensor([rows[i] for i in self.shape.full_layers], dtype=torch.float64, device="cpu")
            for rows in (self.exact, self.coarse)
        )
        return exact, exact + coarse

    @property
    def used_bytes(self) -> int:
        return self._fields[-1]["end"][0]

    @property
    def page_bytes(self) -> int:
        """Size of one layer's page towards vLLM."""
        return max(align(-(-self.used_bytes // self.shape.layers)), self.least_page)

    @property
    def slot_bytes(self) -> int:
        """Bytes of the memory of a sequence on this worker, everything included but recurrent layers' states."""
        return self.page_bytes * self.shape.layers

    @property
    def memory_tokens(self) -> float:
        """Size of the slot in tokens per head with full attention, on average, each at full precision."""
        return (self.slot_bytes - self.shape.sliding_bytes(self.segment)) / self.shape.full_token_bytes

    def of_worker(self, rank: int, workers: int) -> "Layout":
        """The part of tensor-parallel worker `rank`: its kv heads, with the entries they have on one worker."""
        shape = self.shape
        held = [worker_heads(shape.heads(i)[0], rank, workers) for i in range(shape.layers)]
        exact, coarse = (
            tuple(row[own] for row, own in zip(rows, held, strict=True)) for rows in (self.exact, self.coarse)
        )
        heads = worker_heads(shape.kv_heads, rank, workers)
        if shape.sliding_heads:
            sliding = worker_heads(shape.sliding_heads[0], rank, workers)
            shape = replace(shape, sliding_heads=(sliding.stop - sliding.start, shape.sliding_heads[1]))
        shape = replace(shape, kv_heads=heads.stop - heads.start, state_bytes=shape.state_bytes // workers)
        return replace(self, shape=shape, exact=exact, coarse=coarse)

    def with_parts(self, parts: int) -> "Layout":
        """Where slots are parts, of which a sequence has so many at most: all of its tokens stay in their rings."""
        return replace(self, window=parts * self.cells - self.segment)

    def with_page(self, page_bytes: int) -> "Layout":
        """The same division in larger pages."""
        return replace(self, least_page=page_bytes)

    def views(self, slab: torch.Tensor, layer: int, pairs: Pairs | None = None) -> LayerSlots:
        """Typed views of one layer of `slab` [S, slot_bytes] uint8, whose rows may be strided.

        pairs: of the layer's heads, where a profile has them; a fidelity with keys in 5 or 3 bits takes them.
        """
        fields, codec = {}, self.codecs[layer]
        for name, (offset, extent, dtype) in self._fields[layer].items():
            count = prod(extent)
            flat = slab[:, offset : offset + count * dtype.itemsize].view(dtype)
            fields[name] = flat.unflatten(1, extent) if count else flat.new_empty(len(slab), *extent)
        return LayerSlots(
            **fields,
            exact_start=_starts(self.exact[layer], slab.device),
            coarse_start=_starts(self.coarse[layer], slab.device),
            pairs=pair_code(pairs, codec.key_bits, self.shape.heads(layer)[0], slab.device),
            codec=codec,
            window=self.shape.sliding(layer) or self.window,
            segment=self.segment,
            sinks=self.sinks,
            sliding=self.shape.sliding(layer) is not None,
            parted=self.cells > 0,
        )


def plan_layout(
    shape: Shape,
    config: DeltaMemConfig,
    budgets: torch.Tensor | None = None,
    fidelities: tuple[str, ...] | None = None,
    window_share: float = WINDOW_SHARE,
) -> Layout:
    """Divide the memory that the settings ask for among the heads with full attention; sliding layers come on top.

    budgets: [layers, kv_heads] relative shares of the memory, any positive scale; None shares equally. Those of
    sliding layers are ignored.
    fidelities: of every layer, where the settings name none; None is DEFAULT_FIDELITY.
    window_share: of the memory, for its window, up to NEAR tokens, where the settings name none.
    Raises ValueError when the memory is too small for what every head must hold.
    """
    layers, full = shape.full_layers, shape.full_token_bytes
    if config.memory_bytes is None:
        default = max(256, round(DEFAULT_SHARE * shape.max_model_len))
        memory = default if config.memory is None else config.memory
        segment = config.segment or _default_segment(memory)
        total = memory * full
    else:
        given = config.memory_bytes - shape.state_bytes
        segment = config.segment or _default_segment((given - shape.sliding_bytes(0)) // full)
        total = given - shape.sliding_bytes(segment)
        memory = max(total, 0) // full
    window = config.window or max(segment // 2, min(NEAR, int(memory * window_share)))
    pinned = config.pinned if config.pinned is not None else memory // 16
    if config.fidelity is not None or fidelities is None:
        fidelities = (config.fidelity or DEFAULT_FIDELITY,) * shape.layers
    codecs = tuple(FIDELITIES["bf16" if shape.sliding(i) else name] for i, name in enumerate(fidelities))

    exact_bytes = shape.token_bytes + 8
    coarse_bytes = [coarse_entry_bytes(shape, codecs[i]) for i in layers for _ in range(shape.kv_heads)]
    fixed = (window + segment) * shape.token_bytes + 4 * shape.head_size
    least = [fixed + (config.sinks + pinned) * exact_bytes + 3 * segment // 2 * bytes_ for bytes_ in coarse_bytes]
    heads, longest = len(least), max(shape.max_model_len - window, 0)  # tokens that can ever leave the ring
    divided = partial(Layout, shape, codecs, window, segment, config.sinks, pinned)
    if config.memory_bytes is None and memory >= shape.max_model_len:  # all tokens stay as they are, in every head
        return divided(_rows([longest] * heads, shape), _rows([0] * heads, shape))
    if total < sum(least):
        others = {"sliding": any(shape.windows) and shape.sliding_bytes(segment), "recurrent": shape.state_bytes}
        beside = "".join(f", beside {size:,} bytes for the {kind} layers" for kind, size in others.items() if size)
        raise ValueError(
            f"A deltamem memory of {memory} tokens per head is too small for window {window}, segment {segment}, "
            f"sinks {config.sinks} and pinned {pinned}: it takes at least "
            f"{-(-sum(least) // heads // shape.token_bytes)} tokens{beside}. Raise "
            f"'{'memory' if config.memory_bytes is None else 'memory_bytes'}' or lower the others."
        )
    shares = [1.0] * heads if budgets is None else budgets[layers].flatten().tolist()
    room = _share_out(total - align(8 * MAX_PINS), shares, least)
    exact, coarse = [], []
    for bytes_, entry in zip(room, coarse_bytes, strict=True):
        spare = bytes_ - fixed - 8 * ALIGNMENT
        # Coarse only as far as the bytes force it.
        x = max((spare - longest * entry) // max(exact_bytes - entry, 1), config.sinks + pinned)
        x = min(x, longest)
        exact.append(x)
        coarse.append(max(min((spare - x * exact_bytes) // entry, longest - x), 0))
    return divided(_rows(exact, shape), _rows(coarse, shape))


def plan_part(whole: Layout) -> Layout:
    """The division of a part of a slot: a ring of a whole segment or more in every head, and nothing else.

    A layer's sliding window is what it is in a whole slot, but what leaves it stays.
    """
    nothing = tuple((0,) * len(row) for row in whole.exact)
    codecs = (FIDELITIES["bf16"],) * len(whole.codecs)
    part = replace(
        whole,
        codecs=codecs,
        pinned=0,
        exact=nothing,
        coarse=nothing,
        cells=max(PART_TOKENS, whole.segment),
        least_page=0,
    )
    return part.with_parts(1)


def _rows(counts: list[int], shape: Shape) -> tuple[tuple[int, ...], ...]:
    """[layer][kv head] of counts that heads with full attention have, in order; 0 in sliding layers."""
    left = iter(counts)
    return tuple(
        tuple(0 if shape.sliding(i) else next(left) for _ in range(shape.heads(i)[0])) for i in range(shape.layers)
    )


def worker_heads(kv_heads: int, rank: int, workers: int) -> slice:
    """The kv heads of a tensor-parallel worker; with fewer heads than workers a head is on several."""
    held = max(kv_heads // workers, 1)
    first = rank * kv_heads // workers
    return slice(first, first + held)


def _share_out(total: int, shares: list[float], least: list[int]) -> list[int]:
    """Bytes of every head: in proportion to the shares, none below its `least`, the sum at most `total`."""
    shares = torch.tensor(shares, dtype=torch.float64, device="cpu")  # vLLM makes models with the GPU as default
    least = torch.tensor(least, dtype=torch.float64, device="cpu")
    floor = torch.zeros_like(shares, dtype=torch.bool)
    while True:
        spare = total - least[floor].sum()
        room = torch.where(floor, least, shares / shares[~floor].sum() * spare)
        below = (room < least) & ~floor
        if not below.any():
            return room.long().tolist()
        floor |= below


def _default_segment(memory: int) -> int:
    """An eighth of the memory at most: long segments mean few steps for a prompt, short ones a small ring."""
    return min(max(1 << max(memory // 8, 1).bit_length() - 1, 16), 512)


def _coded(size: int, bits: int, dtype: torch.dtype) -> tuple[int, torch.dtype, tuple[int, int]]:
    """Cells, cell dtype and fp16 numbers (groups, of each) of one coded vector."""
    if bits == 16:
        return size, dtype, (0, 2)
    if is_paired(bits):
        return pair_bytes(size, bits), torch.uint8, (1, 1)
    return size * bits // 8, torch.uint8, (size // group_size(size, bits), 2)


def coarse_entry_bytes(shape: Shape, codec: Codec) -> int:
    """What a coarse entry takes of a slot, mass and rank included."""
    coded = [_coded(shape.head_size, bits, shape.dtype) for bits in codec]
    return sum(cells * dtype.itemsize + prod(affine) * 2 for cells, dtype, affine in coded) + 4 + 8


def _starts(counts, device) -> torch.Tensor:
    return torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32)


def align(size: int, alignment: int = ALIGNMENT) -> int:
    """Bytes, rounded up to where the next may begin."""
    return -(-size // alignment) * alignment
