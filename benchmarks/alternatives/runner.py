"""One alternative on the samples of a plan, in a process of its own: the counterpart of benchmarks/engine.py."""

import torch
from tqdm import tqdm

from vllm_deltamem.calibration.frozen import FrozenModel

from .. import outputs as store
from ..plan import Plan
from ..suites import Sample
from ..suites.language import TOP
from . import ALTERNATIVES
from .reader import Reader


def answer(reader: Reader, sample: Sample, prompt: list[int]) -> dict:
    """The output for one prompt, see Sample, decoded greedily; and `bytes`, what the sequence held at its end."""
    hidden = reader.ask(prompt, whole=bool(sample.scored))
    output = {}
    if sample.choices:
        found = reader.model.predict(hidden[-1])
        output["choice"] = max(sample.choices, key=lambda token: found[token].item())
    if sample.scored:
        output |= scored(reader.model, hidden[-sample.scored - 1 : -1], prompt[-sample.scored :])
    return output | {"text": generate(reader, hidden[-1], sample), "bytes": reader.bytes}


def generate(reader: Reader, hidden: torch.Tensor, sample: Sample) -> str:
    """The text that follows a last hidden state [E], up to a stop string, which is left out, or the model's end."""
    known = reader.model.model.generation_config.eos_token_id
    ends = {reader.model.tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
    tokens, text = [], ""
    while len(tokens) < sample.max_tokens:
        token = int(reader.model.predict(hidden).argmax())
        if token in ends:
            break
        tokens.append(token)
        text = reader.model.tokenizer.decode(tokens, skip_special_tokens=True)
        found = [text.index(stop) for stop in sample.stop if stop in text]
        if found:
            return text[: min(found)]
        if len(tokens) < sample.max_tokens:
            hidden = reader.read([token])[-1]
    return text


def scored(model: FrozenModel, hidden: torch.Tensor, tokens: list[int]) -> dict:
    """`nll` and `top` of tokens [S], given the hidden states [S, E] before each."""
    output = {"nll": [], "top": []}
    for states, labels in zip(hidden.split(128), torch.tensor(tokens).split(128), strict=True):
        logs = model.predict(states).log_softmax(-1)
        output["nll"] += [round(-x, 5) for x in logs.cpu().gather(1, labels[:, None])[:, 0].tolist()]
        best = logs.topk(TOP)
        for ranked, found in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            output["top"].append((ranked, [round(x, 5) for x in found]))
    return output


def run(reader: Reader, suite: str, sample: Sample, longest: int) -> list[dict]:
    """All outputs of a sample; it ends early at a prompt that is past the positions the model was trained for."""
    outputs: list[dict] = []
    while (prompt := sample.prompt(outputs)) is not None:
        if len(prompt) + sample.max_tokens > longest:
            if not outputs:
                raise ValueError(
                    f"{suite}: prompt and answer are longer than the {longest} tokens that the model was trained "
                    "for: give a shorter --context."
                )
            break
        outputs.append(answer(reader, sample, prompt))
    return outputs


def main() -> None:
    plan = Plan.read()
    waiting = plan.waiting()
    if not waiting:
        return
    alternative = ALTERNATIVES[plan.alternative]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reader = Reader(FrozenModel(plan.model, device), alternative, plan.room, plan.segment)
    longest = plan.context if alternative.unbounded else reader.model.config.max_position_embeddings
    for suite, sample in tqdm(waiting, unit="sample", desc=plan.alternative):
        store.keep(plan.path(suite), sample, run(reader, suite, sample, longest))


if __name__ == "__main__":
    main()
