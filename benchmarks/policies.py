"""The memories that are compared: name -> deltamem settings, next to the size that the run gives."""

POLICIES: dict[str, dict] = {
    "deltamem": {},
    "no_profile": {"profile": "none"},
    "no_merging": {"merge": False},
    "no_fidelity": {"fidelity": "bf16"},
    "no_pins": {"pinned": 0},
}
