"""What the connector's two sides tell one another: turns, what to save and restore, and what came of it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata


@dataclass(frozen=True)
class Turn:
    """A request on a session, and the save that it will end in."""

    tenant: str
    name: str
    save_id: str


@dataclass(frozen=True)
class Transfer:
    """A session to save from a slot or to restore into it, and the save that it is."""

    request_id: str
    slot: int
    turn: Turn
    tokens: list[int] = field(default_factory=list)  # of a save
    pins: list[list[int]] = field(default_factory=list)  # of a restore: spans that its request pins


@dataclass(frozen=True)
class Note:
    """What the scheduler keeps of a save that is in a worker's host memory: enough to tell whether it fits."""

    save_id: str
    n_tokens: int
    digest: bytes  # of the tokens

    @classmethod
    def of(cls, save_id: str, tokens: Sequence[int]) -> "Note":
        ids = np.asarray(tokens, dtype=np.int32)
        return cls(save_id, len(ids), hashlib.blake2b(ids.tobytes(), digest_size=32).digest())

    def prefix_of(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt begins with the saved tokens, and goes on."""
        return self.n_tokens < len(prompt) and self == Note.of(self.save_id, prompt[: self.n_tokens])


@dataclass
class StepMetadata(KVConnectorMetadata):
    """What the scheduler asks of the workers in one step."""

    pins: dict[int, list[list[int]]] = field(default_factory=dict)  # of slots that a sequence just claimed
    restores: list[Transfer] = field(default_factory=list)
    saves: list[Transfer] = field(default_factory=list)
    begun: list[Turn] = field(default_factory=list)  # turns on sessions that only the worker keeps
    ended: list[Turn] = field(default_factory=list)


@dataclass
class Refusals(KVConnectorWorkerMetadata):
    """Sessions that a worker could not restore."""

    reasons: dict[str, str]  # by request

    def aggregate(self, other: "Refusals") -> "Refusals":
        return Refusals(self.reasons | other.reasons)
