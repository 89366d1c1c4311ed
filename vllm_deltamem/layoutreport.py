"""The effective layout of a model and its settings, as text for people."""

from collections import Counter
from collections.abc import Iterator

from vllm_deltamem.kernels.slot import FIDELITIES
from vllm_deltamem.memory import Layout, Shape
from vllm_deltamem.plan import MemoryPlan


def report(plan: MemoryPlan) -> str:
    """What a sequence holds under this plan, on all tensor-parallel workers together."""
    layout, shape = plan.whole, plan.whole.shape
    held, workers = plan.bytes_per_sequence, plan.workers
    full = shape.full_attention_bytes(shape.max_model_len)
    compressed = shape.full_layers
    facts = {
        "bytes per sequence": f"{held:,}",
        "per worker": f"{held // workers:,} on each of {workers}",
        "full attention": f"{full:,} at max_model_len {shape.max_model_len:,}",
        "reduction": f"{1 - held / full:.1%}",
        "heads": _heads(shape),
        **_states(shape),
        **_short(plan),
        "window": f"{layout.window} tokens, and the open segment",
        "segment": f"{layout.segment} tokens",
        "sinks": f"{layout.sinks} tokens",
        "pinned": f"at most {layout.pinned} tokens",
        "fidelity": f"{_fidelity(layout)} in coarse entries",
        "merge": "what loses its entry is merged" if plan.merge else "what loses its entry is dropped",
        "profile": _profile(plan),
        "exact entries": _spread([count for i in compressed for count in layout.exact[i]]),
        "coarse entries": _spread([count for i in compressed for count in layout.coarse[i]]),
    }
    width = max(map(len, facts)) + 2
    lines = [f"{name:<{width}}{fact}" for name, fact in facts.items()]
    return "\n".join([*lines, "", *_table(plan)])


def _states(shape: Shape) -> dict[str, str]:
    counted = f"{shape.state_bytes:,} bytes of states, counted in all of these"
    return {"recurrent layers": counted} if shape.state_bytes else {}


def _short(plan: MemoryPlan) -> dict[str, str]:
    if not plan.part:
        return {}
    part = f"{plan.block_bytes * plan.workers:,} bytes, {plan.parts} to a slot, for every {plan.part.cells:,} tokens"
    return {"short sequences": f"up to {plan.part_tokens:,} tokens, exact: a part of {part}"}


def _heads(shape: Shape) -> str:
    alike = f"{shape.layers} layers x {shape.kv_heads} kv heads of size {shape.head_size}"
    return alike + (" (sliding: {} of size {})".format(*shape.sliding_heads) if shape.sliding_heads else "")


def _profile(plan: MemoryPlan) -> str:
    if plan.profile is None:
        return "none: equal heads and training-free scores"
    sizes = ", ".join(f"{size:.1%}" for size in plan.profile.sizes)
    return f"{plan.profile.digest[:12]}, budgets at {sizes} of the context"


def _fidelity(layout: Layout) -> str:
    layers = Counter(layout.codecs[i] for i in layout.shape.full_layers)
    names = {codec: name for name, codec in FIDELITIES.items()}
    if len(layers) == 1:
        return names[next(iter(layers))]
    counted = ((names[codec], f"{count} layer{'s' * (count > 1)}") for codec, count in layers.most_common())
    return ", ".join(f"{name} in {count}" for name, count in counted) + ","


def _table(plan: MemoryPlan) -> Iterator[str]:
    """A line per run of layers that have the same entries or window; counts are those of one kv head."""
    yield "layers     exact: min  mean   max   coarse: min  mean   max"
    windows = map(plan.whole.shape.sliding, range(plan.whole.shape.layers))
    rows = list(zip(plan.whole.exact, plan.whole.coarse, windows, strict=True))
    first = 0
    for last, (exact, coarse, window) in enumerate(rows):
        if rows[last + 1 : last + 2] == [(exact, coarse, window)]:
            continue
        label = str(last) if first == last else f"{first}-{last}"
        counts = [f"{min(c):>{w}}{sum(c) / len(c):>6.0f}{max(c):>6}" for c, w in ((exact, 11), (coarse, 14))]
        yield f"{label:<10} the last {window} tokens, exact" if window else f"{label:<10}{''.join(counts)}"
        first = last + 1


def _spread(counts: list[int]) -> str:
    return f"{min(counts)} to {max(counts)} per head, mean {sum(counts) / len(counts):.0f}"
