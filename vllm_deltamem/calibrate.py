"""`deltamem calibrate MODEL -o PROFILE`: learn what a frozen model needs of its context, and write it down.

A prompt at a time it records how much every token matters in every head (calibration/influence.py), fits the
importance heads to that, chooses the fidelity of every layer, derives the budgets, chooses the gate and the window, and
prints what the profile gains on held-out prompts.
"""

import argparse
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from math import exp
from pathlib import Path

import torch

from vllm_deltamem.calibration import budgets, codes, gates, importance, observations, pairs, windowshare
from vllm_deltamem.calibration.cases import case_prompt
from vllm_deltamem.calibration.dialogues import dialogue_prompt
from vllm_deltamem.calibration.frozen import FrozenModel
from vllm_deltamem.calibration.influence import Observation
from vllm_deltamem.calibration.prompts import Prompt, default_text, recall_prompt, text_prompt
from vllm_deltamem.calibration.simulate import SHARES, Score, memory_attention, score
from vllm_deltamem.calibration.tables import table_prompt
from vllm_deltamem.kernels.pairs import Pairs
from vllm_deltamem.memory import Shape
from vllm_deltamem.profile import DEFAULT_GATE, Profile, save
from vllm_deltamem.startup import engine_config

# Of training prompts, in turn
KINDS = recall_prompt, dialogue_prompt, table_prompt, recall_prompt, case_prompt, text_prompt
ASKING = recall_prompt, table_prompt
LEAST_LENGTH = 1024  # tokens of a prompt: the smallest memory compared must hold what every head needs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `deltamem calibrate`."""
    parser.add_argument("model", help="folder of a Hugging Face model")
    parser.add_argument("-o", "--output", required=True, type=Path, help="profile to write (.safetensors)")
    parser.add_argument("--texts", nargs="+", type=Path, help="text files to hide facts in; default: Python's help")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=24, help="training prompts (default 24)")
    parser.add_argument("--length", type=int, default=1536, help="tokens of a prompt (default 1536)")
    parser.add_argument("--held-out", type=int, default=4, help="prompts of the closing comparison (default 4)")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for a model that the backend does not serve, and when a text cannot be read or is too short."""
    texts = args.texts and [_text(path) for path in args.texts]
    engine_config(args.model)
    calibrate(args.model, args.output, texts, args.seed, args.device, args.prompts, args.length, args.held_out)


def calibrate(
    model_folder: str,
    out: Path,
    texts: list[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    prompts: int = 24,
    length: int = 1536,
    held_out: int = 4,
) -> Profile:
    """Make and save a profile. Interrupted, it goes on where it was when called alike again.

    The same arguments give the same profile on the same machine. Raises ValueError when the prompts are too
    few or too short, or a text is, when the profile cannot be written or the device used, or when every layer of the
    model has a sliding window.
    """
    texts = texts or [default_text()]
    if prompts < 2 * len(KINDS):
        raise ValueError(f"Calibration takes at least {2 * len(KINDS)} prompts, got {prompts}.")
    if length < LEAST_LENGTH:
        raise ValueError(f"Prompts to calibrate with must have at least {LEAST_LENGTH} tokens, got length {length}.")
    for text in texts:
        if len(text) < 8 * length:
            raise ValueError(f"A text to calibrate with has {len(text)} characters: it takes at least {8 * length}.")
    if held_out < 1:
        raise ValueError(f"The closing comparison takes at least one prompt of each kind, got held_out {held_out}.")
    if out.is_dir() or not out.name or not os.access(out.parent, os.W_OK | os.X_OK):
        raise ValueError(f"Cannot write the profile {str(out)!r}: name a file in a folder that is there, with -o.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"Cannot calibrate on the device {device!r}: {str(error).splitlines()[0]}") from error
    model = FrozenModel(model_folder, device, fast=True)
    shape = model.shape(budgets.CONTEXT)
    partial = out.with_name(out.name + ".partial")
    training = [_draw(model, KINDS[i % len(KINDS)], texts, length, f"{seed}-{i}") for i in range(prompts)]
    seen = observations.observed(model, training, partial)
    weights = importance.fit(seen, seed, device=device)
    folds = [i // len(KINDS) % 2 for i in range(prompts)]  # each holds its share of every kind
    crossed = [
        importance.fit([o for o, f in zip(seen, folds, strict=True) if f != fold], seed, device=device)
        for fold in range(2)
    ]
    lost = budgets.losses(seen, [crossed[fold] for fold in folds])
    fidelity, shares = [], []
    for size in budgets.SIZES:
        chosen, with_codes = codes.choose(seen, lost, shape, size)
        fidelity.append(chosen)
        shares.append(budgets.allocate(with_codes, shape, chosen, size))
    profile = Profile(
        fingerprint=model.fingerprint,
        sizes=budgets.SIZES,
        budgets=torch.stack([_in_all_layers(share, shape, 1.0) for share in shares]),
        gate=torch.tensor(DEFAULT_GATE).expand(shape.layers, shape.kv_heads, 3),
        fidelity=tuple(fidelity),
        pairs=_pairs(seen, shape),
        importance=tuple(_in_all_layers(weight, shape) for weight in weights),
        meta={"model": Path(model_folder).name, "seed": seed, "prompts": prompts, "length": length},
    )
    asked = [o for i, o in enumerate(seen) if KINDS[i % len(KINDS)] in ASKING]
    fitted, recall = (_in_all_layers(learned, shape) for learned in (gates.fit(seen), gates.recalling(asked)))
    tuning = [_draw(model, draw, texts, length, f"{seed}-gate-{i}") for i, draw in enumerate(dict.fromkeys(KINDS))]
    profile.meta["gate"], profile = gates.choose(model, profile, fitted, recall, tuning)
    profile = windowshare.choose(model, profile, tuning)
    save(profile, out)  # the comparison takes its time, too
    profile.meta["gains"] = compare(model, profile, texts, seed, length, held_out)
    save(profile, out)
    shutil.rmtree(partial)
    return profile


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"Cannot read the text {str(path)!r} to calibrate with: {error}") from error


def compare(model: FrozenModel, profile: Profile, texts: list[str], seed: int, length: int, count: int) -> dict:
    """Print and return the scores of full attention, no profile and this one on prompts not trained on."""
    gains = {}
    for draw in dict.fromkeys(KINDS):
        kind = draw.__name__.removesuffix("_prompt")
        prompts = [_draw(model, draw, texts, length, f"{seed}-held-out-{i}") for i in range(count)]
        gains[kind] = {"full attention": asdict(score(model, prompts))}
        for share in SHARES:
            for name, candidate in (("no profile", None), ("this profile", profile)):
                scores = [score(model, [p], memory_attention(model, candidate, len(p.ids), share)) for p in prompts]
                gains[kind][f"{share:.0%}, {name}"] = asdict(_mean(scores))
    columns = {"recall": "answers", "table": "records", "dialogue": "tool calls", "case": "calls of cases"}
    print(f"{'held-out prompts':24}", *(f"{title:>14}" for title in columns.values()), f"{'text perplexity':>16}")
    for name in gains["text"]:
        exact = (f"{gains[kind][name]['exact']:14.3f}" for kind in columns)
        print(f"{name:24}", *exact, f"{exp(gains['text'][name]['loss']):16.2f}")
    return gains


def _pairs(seen: list[Observation], shape: Shape) -> Pairs:
    """Of the keys in every layer."""
    keys, queries = (torch.stack([getattr(o, f"{part}_square") for o in seen]).mean(0) for part in ("key", "query"))
    return pairs.fit(*(_in_all_layers(square, shape, 1.0) for square in (keys, queries)))


def _in_all_layers(learned: torch.Tensor, shape: Shape, other: float = 0.0) -> torch.Tensor:
    """What was learned of the layers with full attention [F, ...], by their place in the model [L, ...].

    other: fills the rows of sliding layers, which nothing reads.
    """
    rows = learned.new_full((shape.layers, *learned.shape[1:]), other)
    rows[shape.full_layers] = learned
    return rows


def _mean(scores: list[Score]) -> Score:
    answers = sum(s.answers for s in scores)
    return Score(
        answers,
        sum(s.exact * s.answers for s in scores) / answers,
        sum(s.tokens for s in scores) / len(scores),
        sum(s.loss for s in scores) / len(scores),
    )


def _draw(model: FrozenModel, draw: Callable[..., Prompt], texts: list[str], length: int, seed: str) -> Prompt:
    rng = random.Random(seed)
    prompt = draw(model.tokenizer, rng.choice(texts), length, rng)
    if len(prompt.ids) < length // 2:
        raise ValueError(
            f"Prompts of {length} tokens from these texts have {len(prompt.ids)}: give texts with more words."
        )
    return prompt
