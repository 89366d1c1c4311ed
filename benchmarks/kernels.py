"""Each Triton kernel against the bytes it must move and the operations it must do, on the card at hand.

    python benchmarks/kernels.py                 checks, times and prints; appends rows to results.jsonl
    python benchmarks/kernels.py --interpret     the same at tiny sizes in Triton's interpreter; keeps no rows

Shares are of what this card was measured to do just before: copying device memory (bytes read plus bytes
written) and a bf16 matrix product. One layer of an 8B Llama is run on random memory; calls are captured in a CUDA
graph and rotate over slots, so that no memory comes from the cache. Full attention (PyTorch's, and FlashAttention
and xformers where they load) runs beside it over the whole context, and over as many keys as a memory has bytes for.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common
from benchmarks.random_memory import Memory, Scale, make_memory
from vllm_deltamem.kernels.slot import CANDIDATES, decode

REPEATS = 15
LONG = 10e-3  # seconds of calls in one CUDA graph: to start it takes 15 microseconds
LARGEST = 24 << 30  # bytes of keys and values that full attention is tried on
CARD = Scale(
    "Llama 8B shape, random", "cuda", torch.bfloat16, 8, 32, 128, 131_072, (19_660, 6_554), (1, 16, 64), 256 << 20, {}
)
TINY = Scale(
    "tiny", "cpu", torch.float32, 2, 4, 64, 1024, (160,), (1, 2), 1, dict(window=16, segment=16, pinned=4)
)  # fmt: skip


class Meter:
    """Times calls, knows what the card can do, prints the table and adds the rows to the results, if any are kept."""

    def __init__(self, scale: Scale, results: Path | None):
        self.scale, self.cuda, self.results = scale, scale.device == "cuda", results
        extent, side = (2 << 30, 8192) if self.cuda else (1 << 20, 64)
        source = torch.ones(extent, dtype=torch.uint8, device=scale.device)
        target = torch.empty_like(source)
        a, b = torch.randn(2, side, side, device=scale.device).to(scale.dtype)
        self.copy = 2 * extent / self.seconds([lambda: target.copy_(source)])
        self.matrix = 2 * side**3 / self.seconds([lambda: torch.mm(a, b)])
        print(f"copies {self.copy / 1e12:.2f} TB/s, bf16 matrix product {self.matrix / 1e12:.0f} TFLOP/s\n")
        print(f"{'call':32}{'memory':>8}{'batch':>6}{'us':>10}{'TB/s':>7}{'of copy':>9}{'TFLOP/s':>9}{'of matrix':>10}")

    def seconds(self, calls: list[Callable]) -> float:
        """Median time of one call, in a CUDA graph of all of them in turn, as often as it takes to be long."""
        for call in calls:
            call()
        if not self.cuda:
            return float("nan")
        once = self._replay(calls, 1)
        rounds = max(1, round(LONG / once))
        return self._replay(calls * rounds, REPEATS) / (rounds * len(calls))

    @staticmethod
    def _replay(calls: list[Callable], repeats: int) -> float:
        """Median time of a CUDA graph of these calls, in seconds."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        times = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return median(times)

    def add(self, call: str, memory: int, batch: int, calls: list[Callable], moved=0.0, operations=0.0, backend=None):
        """Time calls that each must move so many bytes and do so many operations."""
        seconds = self.seconds(calls)
        rate, work = moved / seconds, operations / seconds
        shares = rate / self.copy, work / self.matrix
        print(
            f"{call:32}{memory:8}{batch:6}{seconds * 1e6:10.1f}{rate / 1e12:7.2f}{shares[0]:9.1%}"
            f"{work / 1e12:9.1f}{shares[1]:10.1%}"
        )
        origin = {"model": self.scale.model, "n": REPEATS, "backend": backend or "DELTAMEM", "call": call}
        origin |= {"context": self.scale.context, "batch": batch, "memory_tokens": memory}
        metrics = {"us": seconds * 1e6, "bandwidth_share": shares[0], "matrix_share": shares[1]}
        if self.results:
            rows = [origin | {"metric": metric, "value": value} for metric, value in metrics.items()]
            common.append(rows, "kernels", self.results)


def attention(meter: Meter, kernels, memory: int, held: Memory, tokens: int) -> None:
    """Decoding (one token) or a piece of a prompt for each sequence of the batch."""
    scale, slots, batch = meter.scale, held.slots, held.batch
    length = scale.context - (slots.segment - 1 if tokens == 1 else 0)
    q = torch.randn(batch * tokens, scale.query_heads, scale.size, device=scale.device).to(scale.dtype)
    out = torch.empty_like(q)

    def attend(rows):
        kernels.attend(q, slots, *rows, scale.size**-0.5, out, max_query_len=tokens, live_tokens=len(q))

    rows = [held.rows(copy, tokens, length) for copy in range(held.copies)]
    attend(rows[0])
    check(held, rows[0], q, out)
    entries = ("exact_k", "exact_v", "coarse_k", "coarse_v", "coarse_k_affine", "coarse_v_affine", "coarse_mass")
    recent = scale.kv_heads * (slots.window + tokens)
    moved = batch * (held.field_bytes(*entries) + 2 * recent * scale.vector_bytes)
    keys = held.entries + scale.kv_heads * (slots.window + tokens / 2)
    operations = 4 * len(q) * scale.query_heads // scale.kv_heads * scale.size * keys
    name = f"{'decode' if tokens == 1 else f'prefill {tokens}'} {held.name}"
    meter.add(name, memory, batch, [lambda r=r: attend(r) for r in rows], moved, operations)


def check(held: Memory, rows, q, out) -> None:
    """The first sequence's last token against attention over the decoded entries in fp32."""
    slots, (indices, cu_seqlens, seq_lens) = held.slots, rows
    slot, row, length = int(indices[0]), int(cu_seqlens[1]) - 1, int(seq_lens[0])
    (kv_heads, ring), dtype, codec = slots.ring_k.shape[1:3], slots.ring_k.dtype, slots.codec
    gone = (length - 1) // slots.segment * slots.segment - slots.window
    cells = torch.arange(gone, length, device=q.device) % ring
    queries = q[row].float().unflatten(0, (kv_heads, -1)) * q.shape[2] ** -0.5
    for g in range(kv_heads):
        x, y = (slice(int(start[g]), int(start[g + 1])) for start in (slots.exact_start, slots.coarse_start))
        coarse_k = decode(
            slots.coarse_k[slot, y], slots.coarse_k_affine[slot, y], codec.key_bits, dtype, slots.pairs.of(g)
        )
        coarse_v = decode(slots.coarse_v[slot, y], slots.coarse_v_affine[slot, y], codec.value_bits, dtype)
        k = torch.cat([slots.exact_k[slot, x], coarse_k, slots.ring_k[slot, g, cells]]).float()
        v = torch.cat([slots.exact_v[slot, x], coarse_v, slots.ring_v[slot, g, cells]]).float()
        bias = torch.zeros(len(k), device=q.device)
        bias[x.stop - x.start : len(k) - len(cells)] = slots.coarse_mass[slot, y].log()
        expected = (queries[g] @ k.T + bias).softmax(-1) @ v
        actual = out[row].float().unflatten(0, (kv_heads, -1))[g]
        error = ((actual - expected).norm() / expected.norm()).item()
        if not error < (1e-4 if dtype == torch.float32 else 2e-2):
            raise SystemExit(f"attend is wrong: relative error {error:.2e} in head {g} of {held.name}.")


def merging(meter: Meter, kernels, memory: int, held: Memory) -> None:
    """Merges at a boundary, each call the sequences' next segment."""
    scale, slots, batch = meter.scale, held.slots, held.batch

    def merge(rows):
        kernels.merge(slots, *rows, held.rope, held.policy)
        rows[2].add_(slots.segment)

    rows = [held.rows(copy, 1, scale.context) for copy in range(held.copies)]
    before = slots.coarse_mass.double().sum()
    merge(rows[0])
    if not slots.coarse_mass.double().sum() > before:
        raise SystemExit("merge is wrong: it added no mass.")
    exchanged = 8 * scale.kv_heads * slots.segment * scale.vector_bytes
    searched = sum(min(coarse, CANDIDATES) for coarse in slots.coarse_start.diff().tolist())
    angles = 4 * scale.size * min(batch * searched, scale.context)
    keys = held.field_bytes("coarse_k", "coarse_k_affine") * searched // held.coarse
    moved = batch * (8 * held.entries + keys + exchanged) + angles
    operations = 2 * batch * slots.segment * scale.size * searched
    meter.add(f"merge {held.name}", memory, batch, [lambda r=r: merge(r) for r in rows], moved, operations)
    if meter.cuda:
        breakdown(lambda: merge(rows[0]))


def breakdown(call: Callable) -> None:
    """Print the time of every launch of a call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    for event in sorted(trace.key_averages(), key=lambda event: -event.device_time_total):
        print(f"    {event.key[:42]:42}{event.device_time_total:14.1f}")


def writing(meter: Meter, kernels, memory: int, held: Memory) -> None:
    """New tokens into the ring."""
    scale, rows = meter.scale, [held.rows(copy, 1, meter.scale.context) for copy in range(held.copies)]
    k, v = torch.randn(2, held.batch, scale.kv_heads, scale.size, device=scale.device).to(scale.dtype)
    calls = [lambda r=r: kernels.write(k, v, held.slots, *r, max_query_len=1) for r in rows]
    meter.add("write", memory, held.batch, calls, moved=2 * (k.nbytes + v.nbytes))


def clearing(meter: Meter, kernels, memory: int, held: Memory) -> None:
    """The slots of new sequences."""
    rows = [held.rows(copy, 1, 1) for copy in range(held.copies)]
    calls = [lambda r=r: kernels.reset(held.slab, *r) for r in rows]
    meter.add("reset", memory, held.batch, calls, moved=held.batch * held.slab[0].nbytes)


def full_attention(meter: Meter, keys: int, batch: int, tokens: int) -> None:
    """Other kernels over that many exact keys."""
    scale = meter.scale
    if 2 * batch * keys * scale.kv_heads * scale.vector_bytes > LARGEST:
        return
    k, v = torch.randn(2, batch, keys, scale.kv_heads, scale.size, device=scale.device, dtype=scale.dtype)
    q = torch.randn(batch, tokens, scale.query_heads, scale.size, device=scale.device, dtype=scale.dtype)
    operations = 4 * batch * tokens * scale.query_heads * scale.size * keys
    for backend, load in {"SDPA": sdpa, "FLASH_ATTN": flash_attention, "XFORMERS": xformers}.items():
        name = f"{backend} {'decode' if tokens == 1 else f'prefill {tokens}'}"
        try:
            call = load(q, k, v)
            call()
        except (ImportError, AttributeError, OSError, RuntimeError, NotImplementedError, ValueError) as error:
            print(f"{name:32}{keys:8}{batch:6}  does not run: {(str(error).strip() or '?').splitlines()[0][:60]}")
            continue
        meter.add(name, keys, batch, [call], k.nbytes + v.nbytes, operations, backend)


def sdpa(q, k, v) -> Callable:
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    return lambda: torch.nn.functional.scaled_dot_product_attention(*heads, enable_gqa=True)


def flash_attention(q, k, v) -> Callable:
    """vLLM's build, else the flash_attn package."""
    try:
        varlen = importlib.import_module("vllm.vllm_flash_attn").flash_attn_varlen_func
    except (ImportError, AttributeError, OSError):
        varlen = importlib.import_module("flash_attn").flash_attn_varlen_func
    (batch, tokens), keys = q.shape[:2], k.shape[1]
    steps = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    return lambda: varlen(
        *flat, cu_seqlens_q=steps * tokens, cu_seqlens_k=steps * keys, max_seqlen_q=tokens, max_seqlen_k=keys
    )


def xformers(q, k, v) -> Callable:
    fmha = importlib.import_module("xformers.ops").fmha
    group = q.shape[2] // k.shape[2]
    queries = q.unflatten(2, (-1, group))
    shared = [x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (k, v)]
    return lambda: fmha.memory_efficient_attention_partial(queries, *shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--interpret", action="store_true", help="tiny sizes in Triton's interpreter")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="file that the rows are added to")
    options = parser.parse_args()
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        raise SystemExit("No CUDA device: --interpret tries the script at tiny sizes.")
    kernels = importlib.import_module("vllm_deltamem.kernels.cuda")
    torch.manual_seed(0)
    scale = TINY if options.interpret else CARD
    meter = Meter(scale, None if options.interpret else options.results)
    for memory in scale.memories:
        for fidelity, ragged in (("k8v4", True), ("k3v4", True), ("bf16", False)):
            for batch in scale.batches:
                held = make_memory(scale, memory, fidelity, ragged, batch)
                attention(meter, kernels, memory, held, 1)
                if batch == 1:
                    attention(meter, kernels, memory, held, held.slots.segment)
                merging(meter, kernels, memory, held)
    for batch in scale.batches:
        writing(meter, kernels, scale.memories[-1], make_memory(scale, scale.memories[-1], "k8v4", False, batch))
    clearing(meter, kernels, scale.memories[0], make_memory(scale, scale.memories[0], "k8v4", False, 1))
    for keys in (scale.context, *scale.memories):
        for batch in scale.batches:
            full_attention(meter, keys, batch, 1)
        full_attention(meter, keys, 1, 512 if meter.cuda else 16)


if __name__ == "__main__":
    main()
