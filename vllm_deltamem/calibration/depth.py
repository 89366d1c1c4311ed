"""The same prompts read one after another: a head must judge a token alike however much was read before it.

Keys and values change with the number of tokens before them, and heads fitted to short prompts alone score what
comes late in a long one lower and lower.
"""

import torch

from vllm_deltamem.calibration.frozen import FrozenModel, full_attention
from vllm_deltamem.calibration.influence import Observation, directions
from vllm_deltamem.calibration.prompts import Prompt
from vllm_deltamem.kernels.slot import rotate

Reading = dict[str, torch.Tensor]  # key and value of a prompt's tokens, as in its Observation


def read(model: FrozenModel, prompts: list[Prompt]) -> list[Reading]:
    """What every prompt is when all of them are one sequence."""
    ids = torch.cat([prompt.ids for prompt in prompts])
    position, rope, read = torch.arange(len(ids), device=model.device), model.rope(len(ids)), {}

    def attention(layer, q, k, v, scale):
        read[layer] = directions(rotate(k.float(), position, rope, inverse=True)), directions(v)
        return full_attention(layer, q, k, v, scale)

    model.logits(ids, attention, torch.tensor([len(ids) - 1]))
    key, value = (torch.stack(part) for part in zip(*(read[layer] for layer in sorted(read)), strict=True))
    lengths = [len(prompt.ids) for prompt in prompts]
    pieces = zip(key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return [{"key": key.contiguous(), "value": value.contiguous()} for key, value in pieces]


def deepened(observation: Observation, reading: Reading) -> Observation:
    """An observation of the same tokens, whose keys and values are those of a reading."""
    tokens = observation.influence.shape[-1]
    return observation._replace(**{name: part[:, :, :tokens] for name, part in reading.items()})
