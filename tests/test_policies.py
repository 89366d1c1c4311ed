"""What the quality benchmark compares: bytes, ablations and the table of them. No weights."""

import os
import signal
from pathlib import Path
from threading import Barrier, Thread
from time import monotonic, sleep

import pytest
from transformers import LlamaConfig

from benchmarks import engine, outputs, quality, size
from benchmarks.plan import Plan
from benchmarks.policies import POLICIES
from benchmarks.suites.sample import Sample, ask
from benchmarks.table import table
from vllm_deltamem import profile as profiles


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A plan for a model of the shape that a shipped profile is for."""
    monkeypatch.setattr(outputs, "FOLDER", tmp_path / "raw")
    shape = profiles.load(sorted(profiles.SHIPPED.glob("SmolLM2*.safetensors"))[0]).fingerprint
    LlamaConfig(
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        vocab_size=shape["vocab_size"],
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_theta"]},
        dtype="bfloat16",
    ).save_pretrained(tmp_path / "model")
    return Plan(str(tmp_path / "model"), str(tmp_path), 2048, ["needle1"], 2000, 2)


@pytest.mark.parametrize("reduction", [0.5, 0.85, 0.95])
@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_gets_more_bytes_than_deltamem(base, policy, reduction):
    whole, run = quality.prepare(base, "deltamem", reduction), quality.prepare(base, policy, reduction)
    assert whole.held([], {}) == whole.allowed == run.allowed
    assert 0.97 * run.allowed < run.held([], {}) <= run.allowed
    assert run.plan.outputs == quality.prepare(base, policy, reduction).plan.outputs
    assert (run.plan.outputs == whole.plan.outputs) == (policy == "deltamem")


def test_an_ablation_lacks_its_part_and_nothing_else(base):
    def of(policy):
        plan = quality.prepare(base, policy, 0.85).plan
        return size.layout_of(base.model, 2048, plan.settings), profiles.load(plan.settings["profile"])

    shipped = profiles.load(sorted(profiles.SHIPPED.glob("SmolLM2*.safetensors"))[0])
    equal, stripped = of("no_budgets")
    kinds = {(codec, entries) for codec, row in zip(equal.codecs, equal.coarse, strict=True) for entries in row}
    assert len(kinds) == len(set(equal.codecs)) and stripped.importance is not None
    ragged, stripped = of("no_importance")
    assert len({entries for row in ragged.coarse for entries in row}) > 1 and stripped.importance is None
    assert (stripped.budgets == shipped.budgets).all() and (stripped.gate == shipped.gate).all()


def test_nothing_can_be_left_out_of_no_profile(base):
    config = LlamaConfig.from_pretrained(base.model)
    config.vocab_size += 1
    config.save_pretrained(base.model)
    with pytest.raises(ValueError, match="No profile is shipped"):
        quality.prepare(base, "no_budgets", 0.85)


def test_full_attention_holds_what_it_read(base):
    run = quality.prepare(base, "full", 0.0)
    sample = Sample(2000, ask([1] * 10, [1] * 30), lambda *_: {})
    per_token = 2 * 2 * 64 * 3 * 30
    assert run.held([sample], {2000: [{"text": ""}] * 2}) == 30 * per_token


def test_engines_at_a_time_share_the_cores(monkeypatch):
    seen, both = [], Barrier(2)

    def execute(run, engines):
        both.wait(10)
        seen.append(os.sched_getaffinity(0))

    before = os.sched_getaffinity(0)
    monkeypatch.setattr(quality, "execute", execute)
    assert list(quality.executed([1, 2], jobs=2)) == [1, 2]
    assert set.union(*seen) == before == os.sched_getaffinity(0)
    assert len(before) == 1 or not set.intersection(*seen)


def test_an_engine_that_fails_is_named(base, monkeypatch):
    monkeypatch.setattr(quality.sys, "executable", "/bin/false")
    with pytest.raises(ChildProcessError, match="engine of full at 0% ended with status 1; the same command goes on"):
        list(quality.executed([quality.prepare(base, "full", 0.0)], jobs=1))


def test_a_benchmark_that_is_killed_ends_its_engine(base, tmp_path, monkeypatch):
    engine = tmp_path / "engine"
    engine.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    engine.chmod(0o700)
    monkeypatch.setattr(quality.sys, "executable", str(engine))

    def kill():
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before, killer, began = signal.getsignal(signal.SIGTERM), Thread(target=kill), monotonic()
    monkeypatch.setattr(quality, "prepare", lambda plan, *_: quality.Run("full", 0.0, None, None, plan))
    killer.start()
    try:
        with pytest.raises(SystemExit, match="Terminated; the same command goes on"):
            quality.main(["--model", base.model, "--data", base.data, "--suites", "needle1"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert monotonic() - began < 30
    command = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/cmdline")
    assert not command.exists() or b"sleep" not in command.read_bytes(), "another process may have its number by now"


def test_only_deltamem_is_asked_for_pins_and_sessions():
    sample = Sample(7, ask([1], [1]), None, pinned=("x", None), growing=True)
    assert engine.extra_args("toy", sample, 0, None) is None
    assert engine.extra_args("toy", sample, 0, {}) == {"deltamem_session": "toy-7", "deltamem_pin": "x"}
    assert engine.extra_args("toy", sample, 1, {}) == {"deltamem_session": "toy-7"}
    assert engine.extra_args("toy", sample, 0, {"pinned": 0}) == {"deltamem_session": "toy-7"}


def test_what_prompts_share_is_read_once():
    sample = Sample(7, ask([1, 2, 3], [1, 2, 4]), None, shared=2)
    assert engine.shared_prompt("toy", sample, None) is None, "vLLM's own backend has its prefix cache"
    prompt, params = engine.shared_prompt("toy", sample, {})
    assert prompt == [1, 2] and params.max_tokens == 1 and params.extra_args == {"deltamem_session": "toy-7"}
    assert engine.extra_args("toy", sample, 1, {}) == {"deltamem_session_from": "toy-7"}


def test_the_table_compares_the_same_prompts_only():
    def row(suite, policy, score, n=6):
        ends = [score - 1.0, score - 0.5]
        return {
            "suite": suite, "policy": policy, "score": score, "full_score": 1.0, "ci95": ends, "n": n,
            "seed": 2000, "bytes_per_sequence": 1000,
        }  # fmt: skip

    rows = [row("needle1", "deltamem", 0.9), row("needle1", "keydiff", 0.5), row("needle1/digits", "deltamem", 1.0)]
    rows += [row("mmlu", "deltamem", 0.8), row("mmlu", "keydiff", 0.4, n=3), row("babi", "keydiff", 0.1)]
    lines = table(rows, ["deltamem", "keydiff"])
    assert lines[0] == "| | n | full attention | deltamem | keydiff |" and lines[1].count("|") == 6
    assert lines[2].endswith("| 6 | 1 | 0.9 (-0.1 to +0.4) | 0.5 (-0.5 to +0) |")
    assert lines[3].endswith("| 6 | 1 | 0.8 (-0.2 to +0.3) |  |") and "babi" not in "".join(lines).lower()
    assert lines[-2].endswith("| 1,000 | 1,000 |") and lines[-1].endswith("| 85% (2) | 50% (1) |")
