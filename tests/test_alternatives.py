"""Published memories of the quality benchmark: each does what its paper says, within its bytes."""

import io
from pathlib import Path

import pytest
import torch
from engines import engine
from transformers import AutoModelForCausalLM

from benchmarks import outputs, quality, size
from benchmarks.alternatives import ALTERNATIVES, expected, infini, nearest, runner
from benchmarks.alternatives.entries import SINKS
from benchmarks.alternatives.reader import Reader
from benchmarks.alternatives.runner import answer, run
from benchmarks.alternatives.segment import LayerShape, Segment, turn
from benchmarks.plan import Plan
from benchmarks.suites.sample import Sample, ask
from benchmarks.tiny_llama import save_tiny_llama
from vllm_deltamem import models
from vllm_deltamem.calibration.frozen import FrozenModel
from vllm_deltamem.kernels.slot import Rope

SHAPE = LayerShape(heads=4, kv_heads=2, head_size=16, dtype=torch.float32)
SCALE = SHAPE.head_size**-0.5
ROOM, LARGE = 48 * SHAPE.token_bytes, 160 * SHAPE.token_bytes
BOUNDED = [name for name in ALTERNATIVES if name not in ("nearest", "everything")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return FrozenModel(str(save_tiny_llama(tmp_path_factory.mktemp("model"))))


def rope(positions):
    angle = torch.arange(positions)[:, None] * 100.0 ** -torch.linspace(0, 1, SHAPE.head_size // 2)
    return Rope(angle.cos(), angle.sin(), interleaved=False)


def tokens(length, seed=0):
    """q, k, v before RoPE of one layer."""
    generator = torch.Generator().manual_seed(seed)
    heads = SHAPE.heads, SHAPE.kv_heads, SHAPE.kv_heads
    return [torch.randn(h, length, SHAPE.head_size, generator=generator) for h in heads]


def stream(memory, q, k, v, sizes, after=None):
    """Attention of all tokens, given to the memory in pieces of these sizes."""
    table, outs, first = rope(q.shape[1] + expected.FUTURE), [], 0
    for length in sizes:
        piece, at = slice(first, first + length), torch.arange(first, first + length)
        parts = turn(q[:, piece], at, table), turn(k[:, piece], at, table), v[:, piece]
        outs.append(memory.read(Segment(*parts, first, table, SCALE)))
        first += length
        if after:
            after(memory)
    return torch.cat(outs, 1)


def dense(q, k, v, seen, places=None):
    """Attention of every query over the keys of positions seen(t); places(t) puts (query, keys) elsewhere."""
    table, out = rope(q.shape[1] + 1), torch.empty_like(q)
    for t in range(q.shape[1]):
        held = torch.tensor(seen(t))
        place, spots = places(t) if places else (t, held)
        turned = turn(q[:, t : t + 1], torch.tensor([place]), table)
        keys = turn(k[:, held], torch.as_tensor(spots), table)
        groups = SHAPE.heads // SHAPE.kv_heads
        keys, values = (x.repeat_interleave(groups, 0) for x in (keys, v[:, held]))
        out[:, t : t + 1] = (turned @ keys.mT * SCALE).softmax(-1) @ values
    return out


def test_what_holds_everything_is_full_attention_of_transformers(model):
    folder = model.model.config._name_or_path
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    ids = torch.randint(1, 90, (300,)).tolist()
    reader = Reader(model, ALTERNATIVES["everything"], 0, 16)
    ours = model.predict(torch.cat([reader.read(ids[:77]), reader.read(ids[77:78]), reader.read(ids[78:])]))
    with torch.inference_mode():
        torch.testing.assert_close(ours, theirs(torch.tensor([ids])).logits[0], rtol=1e-3, atol=1e-3)
    assert reader.bytes == 300 * 2 * 2 * 2 * 32 * 4


@pytest.mark.parametrize("sizes", [[1] * 150, [32] * 4 + [22], [150]])
def test_streaming_is_dense_attention_masked_to_sinks_and_window_at_places_in_the_cache(sizes):
    held = ROOM // SHAPE.token_bytes
    seen = lambda t: [*range(min(SINKS, t + 1)), *range(max(SINKS, t - held + SINKS + 1), t + 1)]  # noqa: E731
    places = lambda t: (len(seen(t)) - 1, range(len(seen(t))))  # noqa: E731
    q, k, v = tokens(150)
    memory = ALTERNATIVES["streaming"](SHAPE, ROOM)
    torch.testing.assert_close(stream(memory, q, k, v, sizes), dense(q, k, v, seen, places), rtol=1e-4, atol=1e-5)
    assert memory.bytes == ROOM


def test_nearest_is_dense_attention_to_window_and_best_keys():
    q, k, v = tokens(150)
    memory = ALTERNATIVES["nearest"](SHAPE, (nearest.TOP + SINKS + 12) * SHAPE.token_bytes)
    ours = stream(memory, q, k, v, [16] * 9 + [6])
    table, at = rope(151), torch.arange(150)
    logits = turn(q, at, table) @ turn(k, at, table).repeat_interleave(2, 0).mT * SCALE
    for t in range(150):
        old = range(SINKS, max(t - 11, SINKS))
        for head in range(SHAPE.heads):
            best = sorted(old, key=lambda i, t=t, head=head: -logits[head, t, i])[: nearest.TOP]
            seen = torch.tensor([*range(min(SINKS, t + 1)), *best, *range(max(SINKS, t - 11), t + 1)])
            want = logits[head, t, seen].softmax(-1) @ v[head // 2, seen]
            torch.testing.assert_close(ours[head, t], want, rtol=1e-4, atol=1e-5)
    assert memory.bytes == 150 * SHAPE.token_bytes


@pytest.mark.parametrize("name", BOUNDED)
def test_a_memory_stays_within_its_bytes_and_stops_growing(name):
    q, k, v = tokens(400)
    room, sizes = LARGE, []

    def check(memory):
        assert memory.bytes <= room
        sizes.append(memory.bytes)

    out = stream(ALTERNATIVES[name](SHAPE, room), q, k, v, [16] * 20 + [1] * 80, check)
    assert torch.isfinite(out).all() and out.shape == q.shape
    assert sizes[-1] == max(sizes) > room - 2 * SHAPE.token_bytes


@pytest.mark.parametrize("name", ["keydiff", "expected", "infini", "streaming"])
def test_nothing_is_lost_while_everything_fits(name):
    q, k, v = tokens(40)
    memory = ALTERNATIVES[name](SHAPE, LARGE)
    whole = dense(q, k, v, lambda t: list(range(t + 1)))
    torch.testing.assert_close(stream(memory, q, k, v, [16, 16, 8]), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in ALTERNATIVES if n != "everything"])
def test_too_few_bytes_are_refused(name):
    with pytest.raises(ValueError, match="give a larger memory"):
        ALTERNATIVES[name](SHAPE, SINKS * SHAPE.token_bytes)


@pytest.mark.parametrize("name", ["keydiff", "expected", "infini"])
def test_a_segment_larger_than_the_memory_is_refused(name):
    with pytest.raises(ValueError, match="cannot read a segment of 45"):
        stream(ALTERNATIVES[name](SHAPE, ROOM), *tokens(45), [45])


def common_keys(k):
    """Keys that share a direction that RoPE hardly turns, so that one without it stands out."""
    k = k / 4
    k[..., SHAPE.head_size // 2 - 1] += 3
    return k


def test_keydiff_keeps_sinks_window_and_the_key_unlike_the_others():
    q, k, v = tokens(200)
    k = common_keys(k)
    k[:, 20, SHAPE.head_size // 2 - 1] -= 6
    memory = ALTERNATIVES["keydiff"](SHAPE, ROOM)
    stream(memory, q, k, v, [8] * 25)
    held = memory.entries.v
    for position in (*range(SINKS), 20, *range(200 - 6, 200)):
        assert (held == v[:, position : position + 1]).all(-1).any(1).all(), position
    unit = memory.entries.k / memory.entries.k.norm(dim=-1, keepdim=True)
    anchor = unit.mean(1, keepdim=True)
    cosine = (unit * anchor).sum(-1) / anchor.norm(dim=-1)
    torch.testing.assert_close(memory.score(), -cosine)


def test_expected_attention_is_that_of_the_mean_query_at_the_positions_to_come():
    q, k, v = tokens(100)
    memory = ALTERNATIVES["expected"](SHAPE, LARGE)
    stream(memory, q, k, v, [3, 13, 1, 33, 50])
    table, ahead = rope(100 + expected.FUTURE), torch.arange(100, 100 + expected.FUTURE)
    queries = turn(q[:, SINKS:].mean(1, keepdim=True).expand(-1, expected.FUTURE, -1), ahead, table)
    keys = turn(k, torch.arange(100), table)[:, SINKS:].repeat_interleave(2, 0)
    weight = (queries @ keys.mT * SCALE).mean(1).softmax(-1).unflatten(0, (2, 2)).mean(1)
    want = (weight + expected.FLOOR) * v[:, SINKS:].norm(dim=-1)
    torch.testing.assert_close(memory.score(100, table, SCALE)[:, SINKS:], want)


def test_expected_attention_gives_heads_what_they_need_but_none_nothing():
    q, k, v = tokens(200)
    v[0] *= 10
    memory = ALTERNATIVES["expected"](SHAPE, ROOM)
    stream(memory, q, k, v, [8] * 25)
    large, small = memory.entries.valid.sum(1).tolist()
    assert large > 2 * small >= 2 * expected.SAFEGUARD * (memory.tokens - 8)
    for head in range(2):
        held = memory.entries.v[head][memory.entries.valid[head]]
        for position in (*range(SINKS), *range(194, 200)):
            assert (held == v[head, position]).all(-1).any(), (head, position)


def test_infini_recalls_what_left_the_window_and_writes_nothing_twice():
    memory = ALTERNATIVES["infini"](SHAPE, LARGE)
    k, v = (torch.randn(SHAPE.kv_heads, 1, SHAPE.head_size) for _ in range(2))
    memory.write(k, v)
    s = infini.feature(torch.randn(SHAPE.kv_heads, 1, SHAPE.head_size))
    recall = lambda: s @ memory.matrix / (s @ memory.norm[..., None])  # noqa: E731
    torch.testing.assert_close(recall(), v)
    before = memory.matrix.clone()
    memory.write(k, v)
    torch.testing.assert_close(memory.matrix, before)


def test_infini_joins_the_state_and_the_window_by_its_gate():
    """The first token after the first that left: the state holds one token, whose value it gives back."""
    q, k, v = tokens(60)
    memory = ALTERNATIVES["infini"](SHAPE, 60 * SHAPE.token_bytes)
    held = memory.tokens
    out = stream(memory, q[:, : held + 1], k[:, : held + 1], v[:, : held + 1], [1] * (held + 1))
    seen = [*range(SINKS), *range(SINKS + 1, held + 1)]
    local = dense(q[:, : held + 1], k[:, : held + 1], v[:, : held + 1], lambda t: seen if t == held else [0])[:, -1]
    recalled = v[:, SINKS].repeat_interleave(2, 0)
    want = infini.GATE * recalled + (1 - infini.GATE) * local
    torch.testing.assert_close(out[:, -1], want, rtol=1e-4, atol=1e-5)


def test_outputs_are_those_of_the_model(model):
    """Greedy text, choice, log-probabilities: against transformers' own generation and cross entropy."""
    folder = model.model.config._name_or_path
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    prompt = torch.randint(1, 90, (60,)).tolist()
    with torch.inference_mode():
        logits = theirs(torch.tensor([prompt])).logits[0]
        wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, 60:]
    text = model.tokenizer.decode(wanted)
    reader = Reader(model, ALTERNATIVES["everything"], 0, 16)
    output = answer(reader, Sample(0, ask(prompt), None, 6, choices=(5, 6, 7), scored=20), prompt)
    assert output["text"] == text and len(text) == 6
    assert output["choice"] == 5 + int(logits[-1, 5:8].argmax())
    logs = logits.log_softmax(-1)[39:59]
    labels = torch.tensor(prompt[40:])
    nll = torch.nn.functional.nll_loss(logs, labels, reduction="none")
    assert output["nll"] == pytest.approx(nll.tolist(), abs=1e-3)
    assert [ranked[0] for ranked, _ in output["top"]] == logs.argmax(-1).tolist()
    stopped = Sample(0, ask(prompt), None, 6, stop=(text[2:4],))
    assert answer(reader, stopped, prompt)["text"] == text[: text.index(text[2:4])]


def test_a_prompt_that_goes_on_from_the_last_one_is_not_read_anew(model):
    ids = torch.randint(1, 90, (60,)).tolist()
    reader, fresh = (Reader(model, ALTERNATIVES["everything"], 0, 16) for _ in range(2))
    assert len(reader.ask(ids[:40])) == 40
    added, whole = reader.ask(ids), fresh.ask(ids)
    assert len(added) == 20
    torch.testing.assert_close(added, whole[40:], rtol=1e-4, atol=1e-4)
    assert len(reader.ask(ids)) == 60 and len(reader.ask([*ids, 5], whole=True)) == 61
    assert len(reader.ask([7, *ids])) == 61


def test_a_prompt_past_the_trained_positions_is_refused_or_ends_the_sample(model):
    reader = Reader(model, ALTERNATIVES["everything"], 0, 16)
    with pytest.raises(ValueError, match="shorter --context"):
        run(reader, "toy", Sample(0, ask([1] * 90), None), 80)
    assert len(run(reader, "toy", Sample(0, ask([1] * 20, [1] * 90), None), 80)) == 1


def test_a_run_gets_the_bytes_of_deltamems_slot_and_holds_no_more(model, tmp_path, monkeypatch):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "pride.txt").write_text("It was a truth, and nobody doubted it. " * 300)
    monkeypatch.setattr(outputs, "FOLDER", tmp_path / "raw")
    base = Plan(model.model.config._name_or_path, str(tmp_path), 600, ["needle1", "language"], 2000, 2)
    planned = quality.prepare(base, "keydiff", 0.5)
    assert planned.plan.room == size.layout_of(Path(base.model), 600, {"memory": 300}).slot_bytes
    monkeypatch.setattr("sys.stdin", io.StringIO(planned.plan.written()))
    runner.main()
    for suite, samples in base.samples.items():
        kept = outputs.kept(planned.plan.path(suite), samples)
        assert kept.keys() == {2000, 2001}
        assert 0.9 * planned.plan.room < planned.held(samples, kept) <= planned.plan.room
        assert quality.rows(suite, samples, kept, kept)
    assert planned.plan.waiting() == []


@pytest.mark.slow
def test_full_attention_answers_as_the_stock_backend_of_vllm(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import SamplingParams

    model = FrozenModel(str(models.fetch_default_model(tmp_path / "model")))
    model.model.float()  # in bfloat16 roundings, which differ from CPU to CPU, decide between words
    text = (Path(quality.__file__).parent / "demo_text.txt").read_text()[:2000]
    questions = ("\n\nThe narrator left Munich at", "\n\nIn this text, the town of Bistritz is")
    prompts = [model.tokenizer(text + question).input_ids for question in questions]
    reader = Reader(model, ALTERNATIVES["everything"], 0, 64)
    ours = [answer(reader, Sample(0, ask(prompt), None, 8), prompt)["text"] for prompt in prompts]
    with engine(model.model.config._name_or_path, "CPU_ATTN", "float32") as llm:
        params = SamplingParams(temperature=0, max_tokens=8, detokenize=False)
        found = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    theirs = [model.tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True) for output in found]
    assert ours == theirs
