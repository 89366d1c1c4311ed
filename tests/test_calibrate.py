"""Calibration on a tiny random model: influence is a derivative, budgets an optimum, runs repeat."""

import json
import random
import re
from dataclasses import dataclass

import pytest
import torch
from engines import MIXED, save_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.tiny_llama import save_tiny_llama
from vllm_deltamem import calibrate, layers
from vllm_deltamem import profile as profiles
from vllm_deltamem.calibration import (
    budgets,
    cases,
    codes,
    dialogues,
    gates,
    importance,
    influence,
    observations,
    pairs,
    prompts,
    simulate,
    tables,
    trials,
    windowshare,
)
from vllm_deltamem.calibration.frozen import FrozenModel, full_attention
from vllm_deltamem.kernels import reference
from vllm_deltamem.kernels.pairs import pair_code, pair_counts
from vllm_deltamem.kernels.slot import rotate
from vllm_deltamem.memory import Shape

TEXT = "The tower stood by the sea, and no keeper had climbed it for many a long and weary winter night. " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
    return FrozenModel(folder)


def nothing_seen(none):
    return influence.Observation(*[none] * len(influence.Observation._fields))


def biased(bias, near):
    """Full attention with a bias [L, G, T] on the logits of keys that are at least `near` tokens back."""

    def attention(layer, q, k, v, scale, sinks=None):
        tokens = q.shape[1]
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
        k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
        by_head = bias[layer].repeat_interleave(len(q) // len(bias[layer]), 0)
        logits = (q @ k.mT * scale + by_head[:, None] * (distance >= near)).masked_fill(distance < 0, -torch.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks[:, None, None].expand(-1, tokens, 1)], -1)
        return logits.softmax(-1)[..., :tokens] @ v

    return attention


def test_influence_is_the_derivative_by_the_bias_of_a_key(model):
    ids = torch.randint(1, 96, (150,), generator=torch.Generator().manual_seed(3))
    prompt = prompts.Prompt(ids, ((120, 150),), recall=False)
    seen = influence.observe(model, prompt, seed=9)
    bias = torch.zeros(2, 2, 150, requires_grad=True)
    wanted = torch.arange(120, 150)
    logits = model.logits(ids, biased(bias, influence.NEAR), wanted, grad=True)
    signs = torch.randint(0, 2, (30, 1), generator=torch.Generator().manual_seed(9)) * 2 - 1
    (logits.log_softmax(1).gather(1, ids[wanted][:, None]) * signs).sum().backward()
    expected = bias.grad[:, :, : 150 - influence.NEAR]
    expected[:, :, :4] = 0
    torch.testing.assert_close(seen.influence, expected / expected.square().sum().sqrt(), atol=1e-4, rtol=1e-3)


def test_influence_heeds_sinks():
    def given():
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(heads, 150, 32, generator=generator).requires_grad_() for heads in (4, 2, 2)]

    seen, sinks, bias = {}, torch.tensor([0.5, 2.0, -1.0, 4.0]), torch.zeros(1, 2, 150, requires_grad=True)
    ours, theirs = given(), given()
    grad = torch.randn(4, 150, 32, generator=torch.Generator().manual_seed(2))
    out = influence._Attention.apply(*ours, 0.2, sinks, seen, 0)
    expected = biased(bias, influence.NEAR)(0, *theirs, 0.2, sinks)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(seen[0], bias.grad[0], atol=1e-4, rtol=1e-4)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, atol=1e-4, rtol=1e-4)


def test_observed_keys_are_those_before_rotation(model):
    ids = torch.randint(1, 96, (100,), generator=torch.Generator().manual_seed(4))
    rotated = {}

    def attention(layer, q, k, v, scale):
        rotated[layer] = k
        return full_attention(layer, q, k, v, scale)

    model.logits(ids, attention, torch.tensor([99]))
    seen = influence.observe(model, prompts.Prompt(ids, ((90, 100),), recall=False), seed=0)
    turned = rotate(seen.key[1].float(), torch.arange(36), model.rope(1, 100))
    torch.testing.assert_close(turned, torch.nn.functional.normalize(rotated[1][:, :36], dim=-1), atol=2e-3, rtol=0)


def test_memory_larger_than_the_context_is_full_attention(model):
    prompt = prompts.text_prompt(model.tokenizer, TEXT, 300, random.Random(0))
    full = simulate.score(model, [prompt])
    whole = simulate.score(model, [prompt], simulate.memory_attention(model, None, 300, 1.3, fidelity="bf16"))
    small = simulate.score(model, [prompt], simulate.memory_attention(model, None, 300, 0.3))
    assert whole.loss == pytest.approx(full.loss, rel=1e-4)
    assert small.loss != pytest.approx(full.loss, rel=1e-4)


def test_a_cpu_slow_at_bfloat16_computes_in_float32_what_is_held_in_bfloat16(folder, tmp_path, monkeypatch):
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    own, fast = FrozenModel(tmp_path), FrozenModel(tmp_path, fast=True)
    assert (own.model.dtype, fast.model.dtype) == (torch.bfloat16, torch.float32)
    assert own.shape(300) == fast.shape(300)
    prompt = prompts.text_prompt(own.tokenizer, TEXT, 300, random.Random(0))
    losses = [simulate.score(m, [prompt], simulate.memory_attention(m, None, 300, 0.3)).loss for m in (own, fast)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and losses[0] != losses[1]


def test_prompts_follow_from_their_seed_and_mark_the_answers(model):
    drawn = [prompts.recall_prompt(model.tokenizer, TEXT, 900, random.Random(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0].ids, drawn[1].ids) and not torch.equal(drawn[0].ids, drawn[2].ids)
    fact = prompts._variable(random.Random(5))
    assert fact.statement == f"{fact.lead} {fact.value}"
    assert all(0 < begin < end <= len(drawn[0].ids) for begin, end in drawn[0].spans)


def test_dialogues_ask_for_calls_that_the_dialogue_determines(model):
    drawn = [dialogues.dialogue_prompt(model.tokenizer, TEXT, 1200, random.Random(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0].ids, drawn[1].ids) and not torch.equal(drawn[0].ids, drawn[2].ids)
    text, reports = model.tokenizer.decode, 0
    for prompt in drawn[1:]:
        calls = [(text(prompt.ids[:begin]), text(prompt.ids[begin:end])) for begin, end in prompt.spans]
        assert len(calls) > 3 and prompt.spans[-1][1] == len(prompt.ids)
        for before, call in calls:
            tool = re.findall(r"\w+", call.removeprefix('{"tool": "'))[0]
            assert tool in before.split("[ready]")[0], "the instructions name every tool"
            if tool.lower() in dialogues.REPORT:
                reports += 1
                assert re.findall(r"[\w:$.]+", call)[-1] in before, "what is asked for was told"
    assert reports


@pytest.mark.parametrize("seed", range(8))
def test_tables_ask_for_records_that_stand_in_them_once(model, seed):
    prompt = tables.table_prompt(model.tokenizer, TEXT, 1400, random.Random(seed))
    assert torch.equal(prompt.ids, tables.table_prompt(model.tokenizer, TEXT, 1400, random.Random(seed)).ids)
    text = model.tokenizer.decode
    listed = text(prompt.ids[: prompt.spans[0][0]])
    assert len(prompt.spans) == 8 and prompt.spans[-1][1] == len(prompt.ids)
    for begin, end in prompt.spans:
        assert text(prompt.ids[begin:end]).strip() in listed
    records = re.findall(r'^ "([0-9a-f-]+)": ', listed, re.MULTILINE)
    assert len(records) == len(set(records))


@pytest.mark.parametrize("seed", range(8))
def test_cases_ask_for_calls_whose_arguments_were_told(model, seed):
    prompt = cases.case_prompt(model.tokenizer, TEXT * 8, 6000, random.Random(seed))
    again = cases.case_prompt(model.tokenizer, TEXT * 8, 6000, random.Random(seed))
    assert torch.equal(prompt.ids, again.ids)
    text = model.tokenizer.decode
    assert 5000 < len(prompt.ids) < 6500 and prompt.spans[-1][1] == len(prompt.ids)
    looked_up = [span for span in prompt.spans if text(prompt.ids[slice(*span)]).startswith("find_")]
    assert len(looked_up) >= 3 and len(prompt.spans) > len(looked_up)
    for begin, end in prompt.spans:
        before, call = text(prompt.ids[:begin]), text(prompt.ids[begin:end])
        name, arguments = call.split('"', 1)[0].split()[0], json.loads(re.search(r"{[^{}]*}", call)[0])
        assert f"- {name}(" in before
        assert name == "report" or {str(value) in before for value in arguments.values()} == {True}


def test_instructions_move_into_the_first_message_where_a_template_has_no_place_for_them(model, monkeypatch):
    turns = [prompts.Turn("Hello.", "", "world", wanted=True)]
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}<{{ m.content }}>"
    )
    monkeypatch.setattr(model.tokenizer, "chat_template", template + "{% endfor %}")
    said = model.tokenizer.decode(prompts.conversation(model.tokenizer, turns, "Be brief.").ids)
    assert said == "<Be brief.\n\nHello.>world"


def test_importance_head_learns_what_a_key_tells():
    torch.manual_seed(1)
    unit = torch.nn.functional.normalize
    key, value = unit(torch.randn(1, 2, 3000, 16), dim=-1), unit(torch.randn(1, 2, 3000, 16), dim=-1)
    wanted = torch.exp(4 * key[..., 3] + 3 * value[..., 5].abs())
    none = torch.zeros(1, 2, 0)
    seen = nothing_seen(none)._replace(key=key.half(), value=value.half(), influence=wanted, exposure=torch.ones(3000))
    weights = importance.fit([seen], seed=0, units=16, steps=300)
    score = importance.scores(seen, weights)
    assert torch.corrcoef(torch.stack([score[0, 0], wanted[0, 0].log()]))[0, 1] > 0.9
    again = importance.fit([seen], seed=0, units=16, steps=300)
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


def test_importance_is_what_a_token_is_worth_to_each_question_however_few_come_after_it():
    torch.manual_seed(2)
    unit = torch.nn.functional.normalize
    key, late = torch.randn(1, 1, 3000, 16), torch.arange(3000) / 3000
    key[..., 7] = 6 * late  # as keys tell how much was read before them
    key, exposure = unit(key, dim=-1), (1 - late).clamp(min=0.1)
    worth = torch.exp(4 * key[..., 3])
    none = torch.zeros(1, 1, 0)
    seen = nothing_seen(none)._replace(key=key.half(), value=key.half(), influence=worth * exposure, exposure=exposure)
    slopes = []
    for exposed in (exposure, torch.ones(3000)):
        score = importance.scores(seen, importance.fit([seen._replace(exposure=exposed)], seed=0, units=16, steps=300))
        slopes.append((score[0, 0, :300].mean() - score[0, 0, -300:].mean()).item())
    assert abs(slopes[0]) < 0.3 < 1 < slopes[1]


def test_a_token_is_exposed_to_the_answers_that_find_it_out_of_their_window(model):
    ids = torch.randint(1, 96, (200,), generator=torch.Generator().manual_seed(7))
    seen = influence.observe(model, prompts.Prompt(ids, ((120, 124), (196, 200)), recall=False), seed=0)
    last = 119 - influence.NEAR  # the first answer's first token is predicted at 119
    assert seen.exposure[: last + 1].tolist() == [1.0] * (last + 1)
    assert seen.exposure[last + 1 : last + 6].tolist() == [0.875, 0.75, 0.625, 0.5, 0.5]
    assert len(seen.exposure) == seen.key.shape[2] == 200 - influence.NEAR
    assert not seen.influence[:, :, seen.exposure == 0].any()


def test_budgets_go_where_the_loss_falls():
    needy, idle = 1 - budgets.GRID, 0.01 * (1 - budgets.GRID)
    loss = torch.stack([torch.stack([needy, idle]), torch.stack([idle, idle])])
    shape = Shape(2, 2, 64, torch.bfloat16, budgets.CONTEXT)
    small, large = (budgets.allocate(loss, shape, ("k8v4", "k8v4"), size) for size in (0.05, 0.5))
    assert small.mean() == pytest.approx(1) and large.mean() == pytest.approx(1)
    assert (small[0, 0] > 2 * small.flatten()[1:]).all()
    assert large.max() < 1.2, "at half of the context nearly everything fits into coarse entries"


def test_bytes_go_first_where_entries_are_cheaper():
    loss = ((1 - budgets.GRID) ** 2).expand(2, 2, -1)
    shape = Shape(2, 2, 64, torch.bfloat16, budgets.CONTEXT)
    small, large = (budgets.allocate(loss, shape, ("bf16", "k3v4"), size) for size in (0.05, 0.5))
    assert (small[1] > 4 * small[0]).all()
    assert (large[1] < large[0]).all(), "where the cheap ones all fit, the others are left"


def test_a_logit_error_is_what_the_codes_of_keys_bring_into_logits():
    torch.manual_seed(5)
    k, q = torch.randn(1, 200, 32), torch.randn(2, 200, 32)
    k[..., 3] += 100  # a bias: all columns are coded in eight bits in steps of 102 / 255
    q[..., 8:16] = q[..., 24:] = 0  # columns that no query looks at
    three, five, eight = trials.logit_errors(q, k, 0.25, torch.Generator().manual_seed(0))[0].tolist()
    assert eight == pytest.approx(0.25 * 16**0.5 * 102 / 255 / 12**0.5, rel=0.2), "as evenly spread rounding errors are"
    assert five < three < 2 * eight, "the bias has eight bits of its own, and nothing is coded that nobody looks at"


def test_keys_are_coded_where_queries_look():
    keys, queries = torch.tensor([[4.0, 1, 9, 1] * 8]), torch.tensor([[1.0, 0, 1, 5] * 8])
    made = pairs.fit(keys, queries)
    assert made.place[0, :4].tolist() == [16, 24, 0, 8] and pair_counts(64, 3) == (2, 20)
    step = pair_code(made, 3, 1, "cpu").step[0]
    assert step[1] == 0 and step[0] == pytest.approx(2 / 15) and step[2] == pytest.approx(1.5 * 3 / 255)


def test_keys_are_coded_as_coarsely_as_their_layer_stands():
    none = torch.zeros(2, 1, 0)
    fine, coarse = [0.01, 0.005, 0.001], [9.0, 0.02, 0.01]
    errors = torch.tensor([[fine, fine], [coarse, fine], [[9.0, 9.0, 0.9], [70.0, 9.0, 4.0]]])
    seen = nothing_seen(none)._replace(logit_error=errors)
    shape = Shape(4, 2, 64, torch.bfloat16, budgets.CONTEXT, windows=(None, 48, None, None))
    lost = ((1 - budgets.GRID) ** 4).expand(3, 2, -1) / 6
    fidelity, with_codes = codes.choose([seen, seen], lost, shape, 0.3)
    assert fidelity == ("k3v4", "k8v4", "k5v4", "bf16")
    torch.testing.assert_close(with_codes[2], lost[2])
    torch.testing.assert_close(with_codes[1, 0], lost[1, 0] + 1e-4 * (1 / 6 - lost[1, 0]))


def test_hull_leaves_out_what_lies_above():
    assert budgets._hull([0.0, 1.0, 2.0, 3.0], [4.0, 3.9, 1.0, 0.0]) == [0, 2, 3]


def test_calibrate_ends_with_a_profile_of_the_model_and_what_it_gains(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gates, "CANDIDATES", {"drop": gates.CANDIDATES["drop"]})
    made = calibrate.calibrate(folder, tmp_path / "a.safetensors", [TEXT * 8], prompts=12, length=1024, held_out=1)
    read = profiles.load(tmp_path / "a.safetensors")
    profiles.check(read, FrozenModel(folder).config)
    assert torch.equal(read.budgets, made.budgets) and read.meta["gate"].split(";")[0] in ("drop", "fitted")
    assert read.fidelity == made.fidelity and len(read.fidelity[0]) == 2
    assert all(map(torch.equal, read.pairs, made.pairs))
    assert read.window_share == made.window_share in windowshare.CANDIDATES
    assert "15%, no profile" in capsys.readouterr().out
    assert not (tmp_path / "a.safetensors.partial").exists()


@pytest.mark.parametrize(
    "family",
    ["gemma3-mixed", pytest.param("cohere2-mixed", marks=pytest.mark.slow)],  # two ropes; no rope in full layers
)
def test_only_full_layers_of_a_mixed_model_are_calibrated(family, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "CANDIDATES", {})
    tokenizer.save_pretrained(tmp_path)
    made = calibrate.calibrate(
        str(save_model(tmp_path, family)), tmp_path / "a", [TEXT * 8], prompts=12, length=1024, held_out=1
    )
    sliding = [kind == "sliding_attention" for kind in MIXED]
    for weight in (*made.importance[:3], made.gate):
        assert [not row.any() for row in weight] == sliding
    assert (made.budgets[:, sliding] == 1).all() and made.budgets[1, ~torch.tensor(sliding)].std() > 0
    profiles.check(profiles.load(tmp_path / "a"), AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    "family, attending",
    [(f"{name}-mixed", {2, 4}) for name in ("gemma3", "mistral", "cohere2", "exaone4")]
    + [(name, {0, 1}) for name in ("granite-hybrid", "falcon-h1", "nemotron-h")]
    + [("gpt-oss-mixed", {1, 3})],
)
def test_attention_that_is_ours_to_replace_changes_no_logits(family, attending, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "BEFORE", ())  # vLLM's Cohere 2 sees one token more than that of transformers
    tokenizer.save_pretrained(tmp_path)
    model = FrozenModel(str(save_model(tmp_path, family)))
    ids, wanted = torch.randint(2, 96, (150,), generator=torch.Generator().manual_seed(6)), torch.arange(1, 150)
    seen = set()

    def attention(layer, *given):
        seen.add(layer)
        return full_attention(layer, *given)

    logits = model.logits(ids, attention, wanted)
    assert seen == attending
    usual = "eager" if family == "gpt-oss-mixed" else "sdpa"  # which has no sinks
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", attn_implementation=usual)
    torch.testing.assert_close(logits, theirs(ids[None]).logits[0, :-1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "family, interleaved",
    [
        ("llama3-rope", [False] * 2),
        ("cohere", [True] * 2),
        ("glm", [True] * 2),
        ("smollm3", [False, None]),
        ("granite-hybrid", [False] * 2),
    ],
)
def test_keys_are_turned_back_as_the_model_turned_them(family, interleaved, tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path)
    model = FrozenModel(str(save_model(tmp_path, family)))
    ropes = [model.rope(layer, 64) for layer in range(2)]
    assert [rope and rope.interleaved for rope in ropes] == interleaved
    wrong = ropes[0]._replace(interleaved=not ropes[0].interleaved)
    monkeypatch.setattr(FrozenModel, "rope", lambda *_: wrong)
    with pytest.raises(ValueError, match=f"does not know how {model.config.model_type} models turn keys"):
        FrozenModel(str(tmp_path))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"held_out": 0}, "at least one prompt of each kind"),
        ({"out": "."}, "Cannot write the profile"),
        ({"out": "missing/a.safetensors"}, "Cannot write the profile"),
        ({"device": "abacus"}, "Cannot calibrate on the device 'abacus'"),
    ],
)
def test_what_calibrate_cannot_do_it_says_at_once(folder, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(observations, "observe", None)
    given = {"out": "a.safetensors", "texts": [TEXT * 8], "prompts": 12, "length": 1024} | changes
    with pytest.raises(ValueError, match=message):
        calibrate.calibrate(folder, out=tmp_path / given.pop("out"), **given)


@pytest.mark.parametrize("family", ["bloom", "gptj"])
def test_a_model_whose_attention_cannot_be_replaced_is_not_calibrated(family, tokenizer, tmp_path):
    shape = dict(hidden_size=32, n_layer=2, n_head=2, rotary_dim=16, num_key_value_heads=2, vocab_size=96)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"does not let calibration into the attention of {family} models"):
        FrozenModel(str(tmp_path))


def test_calibrate_goes_on_where_it_was_interrupted(model, tmp_path, monkeypatch):
    drawn = [prompts.text_prompt(model.tokenizer, TEXT, 400, random.Random(0))]
    first = observations.observed(model, drawn, tmp_path)
    monkeypatch.setattr(observations, "observe", None)
    second = observations.observed(model, drawn, tmp_path)
    assert torch.equal(first[0].influence, second[0].influence)


def test_calibrate_does_not_go_on_from_other_texts(model, tmp_path):
    first, other = (prompts.text_prompt(model.tokenizer, text, 400, random.Random(0)) for text in (TEXT, TEXT[::-1]))
    observations.observed(model, [first], tmp_path)
    (seen,) = observations.observed(model, [other], tmp_path)
    assert not torch.equal(seen.influence, observations.observed(model, [first], tmp_path)[0].influence)


def test_trial_merge_of_equal_tokens_gives_everything_back():
    torch.manual_seed(2)
    plain, v = torch.randn(1, 400, 16), torch.randn(1, 400, 16)
    plain[:, 1:200:2], v[:, 1:200:2] = plain[:, 0:200:2], v[:, 0:200:2]  # no positions: twins are equal
    score = torch.zeros(1, 400)
    score[:, 0:200:2] = 1 + torch.rand(100)
    score[:, 0:200:2] *= torch.arange(100) < 60  # only the first of these are entries
    found = trials.trial_merges(
        torch.randn(2, 400, 16), plain, v, plain, score, None, 0.25, torch.Generator().manual_seed(0)
    )
    twins = found.cosine[0] > 0.999
    assert 5 < twins.sum() < 64
    torch.testing.assert_close(found.given_back[0, twins], found.size[0, twins], atol=1e-5, rtol=1e-3)
    assert (found.given_back[0, ~twins] - found.size[0, ~twins]).abs().max() > 1e-4


def test_fitted_gate_opens_where_merging_gives_back():
    cosine = torch.linspace(-1, 1, 64).expand(1, 1, 64)
    helps = torch.where(cosine > 0.3, 1.0, -0.5)
    none = torch.zeros(1, 1, 0)
    seen = nothing_seen(none)._replace(cosine=cosine, given_back=helps, size=torch.ones(1, 1, 64))
    gate = gates.fit([seen])
    opened = reference.gate(torch.tensor([[0.9, -0.5]]), torch.ones(1, 2), gate[0])
    assert opened[0, 0] > 0.9 and opened[0, 1] < 0.1


def test_heads_that_recall_carry_most_of_what_answers_depend_on():
    none = torch.zeros(2, 2, 0)
    shares = torch.tensor([[0.1, 0.55], [0.05, 0.3]])  # of the squared influence
    seen = nothing_seen(none)._replace(influence=shares.sqrt()[..., None])
    assert gates.recalling([seen, seen]).tolist() == [[False, True], [False, True]]
    assert not gates.recalling([seen._replace(influence=torch.zeros(2, 2, 1))]).any()


@pytest.mark.parametrize("kept", ["drop", "cosine above 0.6; none in heads that recall"])
def test_the_gate_with_the_least_loss_is_taken(kept, monkeypatch):
    @dataclass
    class Gated:
        gate: torch.Tensor

    drop, open_ = (torch.tensor(gates.CANDIDATES[name]) for name in ("drop", "cosine above 0.6"))
    best = torch.stack([drop, drop if kept == "drop" else open_])[None]
    monkeypatch.setattr(gates, "total_loss", lambda model, profile, asked: (profile.gate - best).abs().sum())
    recall = torch.tensor([[True, False]])
    name, chosen = gates.choose(None, Gated(best), torch.ones(1, 2, 3), recall, [])
    assert name == kept
    assert torch.equal(chosen.gate, best)


@pytest.mark.parametrize("best", windowshare.CANDIDATES)
def test_the_window_with_the_least_loss_is_taken(best, monkeypatch):
    @dataclass
    class Windowed:
        window_share: float

    monkeypatch.setattr(windowshare, "total_loss", lambda model, profile, asked: abs(profile.window_share - best))
    assert windowshare.choose(None, Windowed(1.0), []).window_share == best


def test_losses_add_up_over_prompts_and_sizes(model):
    profile = profiles.Profile(model.fingerprint, (1.0,), torch.ones(1, 2, 2), torch.zeros(2, 2, 3))
    asked = [prompts.text_prompt(model.tokenizer, TEXT * 8, 1024, random.Random(seed)) for seed in range(2)]
    losses = [simulate.total_loss(model, profile, [prompt]) for prompt in asked]
    alone = [
        simulate.score(model, asked[:1], simulate.memory_attention(model, profile, 1024, share)).loss
        for share in simulate.SHARES
    ]
    assert losses[0] == sum(alone) and alone[0] != alone[1]
    assert simulate.total_loss(model, profile, asked) == pytest.approx(sum(losses))
