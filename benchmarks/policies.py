"""What is compared: deltamem, and deltamem without each of its parts in turn or with other codes, in the same bytes.

Parts that are settings are left out by them; parts of the profile by a profile that lacks them.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig

from vllm_deltamem import profile as profiles
from vllm_deltamem.memory import Layout


class Policy(NamedTuple):
    """`settings` of deltamem next to its size; `missing`: the field of the profile that is left out."""

    settings: dict = {}
    missing: str | None = None


POLICIES = {
    "deltamem": Policy(),
    "no_profile": Policy({"profile": "none"}),
    "no_budgets": Policy(missing="budgets"),
    "no_importance": Policy(missing="importance"),
    "no_merging": Policy({"merge": False}),
    "no_fidelity": Policy({"fidelity": "bf16"}),
    "k8v4": Policy({"fidelity": "k8v4"}),
    "k8v8": Policy({"fidelity": "k8v8"}),
    "k5v4": Policy({"fidelity": "k5v4"}),
    "k3v4": Policy({"fidelity": "k3v4"}),
    "no_pins": Policy({"pinned": 0}),
}


def within(slot: Layout, policy: Policy) -> dict:
    """Settings of a policy that divide the bytes of deltamem's slot, with the same window, segment and quota."""
    sizes = {"window": slot.window, "segment": slot.segment, "pinned": slot.pinned}
    return {"memory_bytes": slot.slot_bytes, **sizes, **policy.settings}


def strip(model: Path, missing: str, out: Path) -> None:
    """Write the model's shipped profile without its budgets (equal ones) or its importance (training-free scores).

    Raises ValueError where no profile is shipped for the model.
    """
    profile = profiles.find(AutoConfig.from_pretrained(model))
    if profile is None:
        raise ValueError(f"No profile is shipped for {model.name}, so that nothing can be left out of it.")
    without = {"budgets": torch.ones_like(profile.budgets), "importance": None}
    profiles.save(replace(profile, **{missing: without[missing]}), out)
