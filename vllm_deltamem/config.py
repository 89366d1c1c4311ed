"""The plugin's settings: `--additional-config '{"deltamem": {...}}'`."""

from dataclasses import dataclass, field, fields
from difflib import get_close_matches

from vllm_deltamem.kernels.slot import FIDELITIES

LARGEST = 1 << 48  # of a setting: what is computed from it stays exact


@dataclass(frozen=True)
class DeltaMemConfig:
    """Settings of the working memory, validated once. Sizes are in tokens.

    Raises:
        ValueError: a value is of the wrong type, out of range or contradicts another one.
    """

    memory: int | None = None  # size of a slot as tokens per head on average, each at full precision
    memory_bytes: int | None = None  # the same as bytes per sequence, of all workers; give one or neither
    window: int | None = None  # most recent tokens kept exact, besides those of the open segment
    segment: int | None = None  # tokens leave the window this many at a time, on an absolute grid
    sinks: int = 4  # first tokens of the sequence, never merged
    pinned: int | None = None  # quota of tokens that a client may pin
    fidelity: str | None = None  # storage of coarse entries: bf16, or bits of key and value codes; None: the profile's
    profile: str | None = None  # path of a profile, or "none" for training-free scores and equal budgets
    merge: bool = True  # merge what loses its entry; False drops it
    sessions: dict = field(default_factory=dict)  # see sessionsettings.py

    def __post_init__(self):
        for name in ("memory", "memory_bytes", "window", "segment", "sinks", "pinned"):
            value = getattr(self, name)
            if value is None and name != "sinks":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < LARGEST:
                raise ValueError(f"deltamem setting {name!r} must be an integer from 0 to 2^48, got {value!r:.200}.")
        if self.memory is not None and self.memory_bytes is not None:
            raise ValueError(
                "deltamem settings 'memory' and 'memory_bytes' both give the size of a slot: set one of them."
            )
        if self.fidelity is not None and self.fidelity not in list(FIDELITIES):
            raise ValueError(
                f"deltamem setting 'fidelity' must be one of {', '.join(FIDELITIES)}; got {self.fidelity!r}."
            )
        if self.segment is not None and (self.segment < 8 or self.segment & (self.segment - 1)):
            raise ValueError(f"deltamem setting 'segment' must be a power of two of at least 8, got {self.segment}.")
        if self.window == 0:
            raise ValueError("deltamem setting 'window' must be at least 1.")
        if not isinstance(self.merge, bool):
            raise ValueError(f"deltamem setting 'merge' must be true or false, got {self.merge!r}.")
        if self.profile is not None and not isinstance(self.profile, str):
            raise ValueError(f"deltamem setting 'profile' must be a path or \"none\", got {self.profile!r}.")
        if not isinstance(self.sessions, dict):
            raise ValueError(f"deltamem setting 'sessions' must be an object, got {self.sessions!r}.")

    @classmethod
    def from_vllm(cls, vllm_config) -> "DeltaMemConfig":
        """Read `additional_config["deltamem"]`.

        Raises ValueError for an unknown setting, naming it, and for settings that lie beside "deltamem".
        """
        additional = vllm_config.additional_config
        additional = additional if isinstance(additional, dict) else {}
        settings, known = additional.get("deltamem", {}), [f.name for f in fields(cls)]
        if not isinstance(settings, dict):
            raise ValueError(f"additional-config 'deltamem' must be an object of settings, got {settings!r:.200}.")
        for name in () if "deltamem" in additional else additional:
            if name in known or get_close_matches(name, ["deltamem"]):
                raise ValueError(f'additional-config {name!r}: settings go into {{"deltamem": {{...}}}}.')
        for name in settings:
            if name not in known:
                raise ValueError(f"Unknown deltamem setting {name!r}; known settings: {', '.join(known)}.")
        return cls(**settings)
