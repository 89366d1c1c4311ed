"""A profile: what was learned about one model. Shares of every head, fidelities, importance heads and merge gates.

One safetensors file per model. Letters: L attention layers, G kv heads, D head size, U hidden units.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import lru_cache
from math import log
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from vllm_deltamem.config import DeltaMemConfig
from vllm_deltamem.kernels.pairs import Pairs
from vllm_deltamem.kernels.slot import FIDELITIES, PAIRED, Policy
from vllm_deltamem.layers import FULL, find_attending
from vllm_deltamem.memory import WINDOW_SHARE, Layout, Shape, plan_layout

SHIPPED = Path(__file__).parent / "profiles"
FORMAT = "deltamem-profile-2"
WEIGHTS = ("w1", "b1", "w2", "b2")
DEFAULT_GATE = (-6.2, 5.4, 0.0)  # training-free: the median of what heads of SmolLM2-135M were fitted to
CLOSED_GATE = (-24.0, 0.0, 0.0)  # nothing is merged


@dataclass(frozen=True, eq=False)
class Profile:
    """What `deltamem calibrate` found out about one model."""

    fingerprint: dict  # see fingerprint_of
    sizes: tuple[float, ...]  # ascending memory sizes, as a fraction of the context, that `budgets` is for
    budgets: torch.Tensor  # [sizes, L, G] fp32, share of a head in the memory, mean 1
    gate: torch.Tensor  # [L, G, 3] fp32, see kernels.reference.gate
    fidelity: tuple[tuple[str, ...], ...] | None = None  # [sizes][L] of coarse entries, slot.FIDELITIES; None: default
    pairs: Pairs | None = None  # [L, G, D / 2] each; only fidelities with keys in 5 or 3 bits need them
    window_share: float = WINDOW_SHARE  # of a small memory, see memory.plan_layout
    importance: tuple[torch.Tensor, ...] | None = None  # w1 [L, G, 2D, U], b1 [L, G, U], w2 [L, G, U], b2 [L, G]
    meta: dict = field(default_factory=dict)  # training texts, seed and what it gained, for people

    def budgets_for(self, memory: float, context: float) -> torch.Tensor:
        """Shares [L, G], mean 1, for a memory of that many tokens in a context of up to `context` tokens.

        Between the calibrated sizes it interpolates over the logarithm of memory / context.
        """
        size = self._size(memory, context)
        above = next(i for i, s in enumerate(self.sizes) if s >= size)
        below = max(above - 1, 0)
        if above == below:
            return self.budgets[above]
        part = log(size / self.sizes[below]) / log(self.sizes[above] / self.sizes[below])
        return self.budgets[below].lerp(self.budgets[above], part)

    def fidelity_for(self, memory: float, context: float) -> tuple[str, ...] | None:
        """Fidelities [L] for such a memory: those of the calibrated size that is nearest, as a ratio."""
        size = self._size(memory, context)
        nearest = min(range(len(self.sizes)), key=lambda i: abs(log(self.sizes[i] / size)))
        return self.fidelity and self.fidelity[nearest]

    def _size(self, memory: float, context: float) -> float:
        return min(max(memory / context, self.sizes[0]), self.sizes[-1])

    @property
    def digest(self) -> str:
        """Names the learned weights and shares, for what was computed with them."""
        state = hashlib.blake2b(json.dumps([self.fingerprint, self.sizes, self.fidelity]).encode(), digest_size=16)
        for tensor in (self.budgets, self.gate, *(self.pairs or ()), *(self.importance or ())):
            state.update(tensor.float().numpy().tobytes())
        return state.hexdigest()

    def policy(self, layer: int, heads: slice = slice(None), device: torch.device | str = "cpu") -> Policy:
        """What the kernels need in one layer, for the kv heads of one tensor-parallel worker, in fp32."""
        weights = self.importance and tuple(w[layer, heads].float().to(device) for w in self.importance)
        return Policy(weights, self.gate[layer, heads].float().to(device))

    def pairs_of(self, layer: int, heads: slice = slice(None)) -> Pairs | None:
        """The pairs of one layer, for the kv heads of one tensor-parallel worker."""
        return self.pairs and Pairs(*(part[layer, heads] for part in self.pairs))


def training_free(kv_heads: int, device: torch.device | str = "cpu") -> Policy:
    """The policy of a model that has no profile: KeyDiff scores and the default gate."""
    return Policy(None, torch.tensor(DEFAULT_GATE, device=device).repeat(kv_heads, 1))


def divide(shape: Shape, settings: DeltaMemConfig, profile: Profile | None) -> Layout:
    """The layout of all kv heads, by the profile's budgets if there is one.

    Raises ValueError as plan_layout does, and when the fidelity takes a profile that is not there.
    """
    if settings.fidelity in PAIRED and not (profile and profile.pairs):
        raise ValueError(
            f"deltamem setting 'fidelity': {settings.fidelity} takes a profile, which says how keys are coded. "
            "Make one with `deltamem calibrate MODEL -o PROFILE`, or choose another fidelity."
        )
    if profile is None:
        return plan_layout(shape, settings)
    size = plan_layout(shape, settings, window_share=profile.window_share).memory_tokens, shape.max_model_len
    return plan_layout(shape, settings, profile.budgets_for(*size), profile.fidelity_for(*size), profile.window_share)


def fingerprint_of(hf_config) -> dict:
    """What tells one model from another: the shape and positions of its full attention, its widths and vocabulary.

    Weights stay out of it, so that a fine-tune or a quantised copy may use the profile of its base model. None for what
    a config does not say, as those of models with one kv head for all query heads (GPTBigCode, Falcon).
    """
    text = hf_config.get_text_config()
    rope, layer = getattr(text, "rope_parameters", None) or {}, text
    if getattr(text, "per_layer_attributes", None):
        layer = text.per_layer_config[text.layer_types.index(FULL)]
    return {
        "model_type": text.model_type,
        "layers": len(find_attending(text)),
        "heads": layer.num_attention_heads,
        "kv_heads": getattr(layer, "num_key_value_heads", None),
        "head_size": getattr(layer, "head_dim", None) or text.hidden_size // layer.num_attention_heads,
        "hidden_size": text.hidden_size,
        "intermediate_size": getattr(text, "intermediate_size", None),
        "vocab_size": text.vocab_size,
        "rope_theta": rope.get("rope_theta", getattr(text, "rope_theta", None)),
    }


def check(profile: Profile, hf_config) -> None:
    """Raise ValueError, naming what differs, unless the profile was made for this model."""
    actual = fingerprint_of(hf_config)
    differing = [
        f"{name} is {value} in the profile and {actual.get(name)} in the model"
        for name, value in profile.fingerprint.items()
        if actual.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"The deltamem profile was made for another model: {'; '.join(differing)}. "
            'Make one with `deltamem calibrate MODEL -o PROFILE`, or set profile to "none".'
        )


@lru_cache
def load(path: str | Path) -> Profile:
    """Read a profile. Raises ValueError when the file is missing, is no profile or is not consistent."""
    tensors = {}
    try:
        with safe_open(str(path), "pt") as file:
            header = (file.metadata() or {}).get("deltamem")
            for name in file.offset_keys():
                tensors[name] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"Cannot read the deltamem profile {str(path)!r}: {error}") from error
    header = json.loads(header) if header else {}
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} is not a deltamem profile of format {FORMAT}. One that an earlier version made has to be "
            "made again: `deltamem calibrate MODEL -o PROFILE`."
        )
    try:
        profile = _parse(header, tensors)
        _check_tensors(profile, path)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"The deltamem profile {str(path)!r} is damaged: {error!r} ends the reading of it.") from error
    return profile


def _parse(header: dict, tensors: dict[str, torch.Tensor]) -> Profile:
    return Profile(
        fingerprint=header["fingerprint"],
        sizes=tuple(header["sizes"]),
        budgets=tensors["budgets"].float(),
        gate=tensors["gate"].float(),
        fidelity=tuple(map(tuple, header.get("fidelity") or ())) or None,
        pairs=Pairs(tensors["pair_place"].int(), tensors["pair_reach"].float()) if "pair_place" in tensors else None,
        window_share=header.get("window_share", WINDOW_SHARE),
        importance=tuple(tensors[name] for name in WEIGHTS) if "w1" in tensors else None,
        meta=header["meta"],
    )


def save(profile: Profile, path: str | Path) -> None:
    """Write a profile as safetensors; importance weights in fp16, the rest in fp32."""
    tensors = {"budgets": profile.budgets.float(), "gate": profile.gate.float()}
    if profile.importance is not None:
        tensors |= {name: w.half() for name, w in zip(WEIGHTS, profile.importance, strict=True)}
    if profile.pairs is not None:
        tensors |= {"pair_place": profile.pairs.place.short(), "pair_reach": profile.pairs.reach.float()}
    header = {
        "format": FORMAT,
        "fingerprint": profile.fingerprint,
        "sizes": profile.sizes,
        "fidelity": profile.fidelity,
        "window_share": profile.window_share,
        "meta": profile.meta,
    }
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    packed = safetensors.torch.save(tensors, {"deltamem": json.dumps(header, sort_keys=True)})
    Path(path).write_bytes(packed)  # safetensors' own files are for their owner alone, whatever the umask says
    load.cache_clear()  # another profile may have been there


def find(hf_config) -> Profile | None:
    """The shipped profile for a model, or None."""
    fingerprint = fingerprint_of(hf_config)
    for path in sorted(SHIPPED.glob("*.safetensors")):
        profile = load(path)
        if profile.fingerprint == fingerprint:
            return profile
    return None


def choose(setting: str | None, hf_config) -> Profile | None:
    """The profile that the setting 'profile' asks for: a path, "none", or None for a shipped one if there is.

    Raises ValueError when the file cannot be read or was made for another model.
    """
    if setting == "none":
        return None
    if setting is None:
        return find(hf_config)
    profile = load(setting)
    check(profile, hf_config)
    return profile


def _check_tensors(profile: Profile, path) -> None:
    shape = profile.fingerprint
    heads = (shape["layers"], shape["kv_heads"])
    expected = {"budgets": (len(profile.sizes), *heads), "gate": (*heads, 3)}
    actual = {"budgets": profile.budgets, "gate": profile.gate}
    if profile.importance is not None:
        units = profile.importance[0].shape[-1]
        extents = (2 * shape["head_size"], units), (units,), (units,), ()
        expected |= {name: heads + extent for name, extent in zip(WEIGHTS, extents, strict=True)}
        actual |= dict(zip(WEIGHTS, profile.importance, strict=True))
    if profile.pairs is not None:
        columns = (*heads, shape["head_size"] // 2)
        expected |= {"pair_place": columns, "pair_reach": columns}
        actual |= {"pair_place": profile.pairs.place, "pair_reach": profile.pairs.reach}
    for name, extent in expected.items():
        if tuple(actual[name].shape) != extent or not actual[name].isfinite().all():
            raise ValueError(
                f"The deltamem profile {str(path)!r} is damaged: {name} must be finite with shape {extent}, "
                f"is {tuple(actual[name].shape)}."
            )
    fidelity = profile.fidelity
    if fidelity is not None and not (
        len(fidelity) == len(profile.sizes)
        and all(len(row) == shape["layers"] and set(row) <= FIDELITIES.keys() for row in fidelity)
    ):
        raise ValueError(
            f"The deltamem profile {str(path)!r} is damaged: fidelity must be one of {', '.join(FIDELITIES)} for each "
            f"size and layer, is {fidelity!r:.200}."
        )
    if profile.pairs is None and any(PAIRED & set(row) for row in fidelity or ()):
        raise ValueError(f"The deltamem profile {str(path)!r} is damaged: it lacks the pairs that its fidelities take.")
    if profile.pairs is not None:
        places = profile.pairs.place.sort(-1).values
        ordered = torch.arange(places.shape[-1], dtype=places.dtype, device="cpu").expand(places.shape)
        if not places.equal(ordered) or (profile.pairs.reach <= 0).any():
            raise ValueError(
                f"The deltamem profile {str(path)!r} is damaged: pairs must each have a place of their own and a reach "
                "above 0."
            )
    share = profile.window_share
    if not isinstance(share, float) or not 0 < share <= 1:
        raise ValueError(
            f"The deltamem profile {str(path)!r} is damaged: window_share must be above 0 and at most 1, "
            f"is {share!r:.200}."
        )
    rising = list(profile.sizes) == sorted(set(profile.sizes))
    if not profile.sizes or not rising or profile.sizes[0] <= 0 or (profile.budgets <= 0).any():
        raise ValueError(f"The deltamem profile {str(path)!r} is damaged: sizes must rise and budgets be positive.")
