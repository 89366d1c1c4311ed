"""What the connector's two sides tell one another: turns, what to save and restore, and what came of it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

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
    length: int = 0  # of a restore: how many of the saved tokens its request goes on from
    pins: list[list[int]] = field(default_factory=list)  # of a restore: spans that its request pins


@dataclass(frozen=True)
class Note:
    """What the scheduler keeps of a save that is in a worker's host memory: enough to tell how far it serves a prompt.

    A memory can be taken back to any length inside the segment that was open when it was saved: the tokens of that
    one, and the window before it, are still exact, and nothing later than them is looked at.
    """

    save_id: str
    closed: int  # tokens of whole segments
    digest: bytes  # of these tokens
    rest: tuple[int, ...]  # those of the open segment

    @classmethod
    def of(cls, save_id: str, tokens: Sequence[int], segment: int) -> "Note":
        ids = np.asarray(tokens, dtype=np.int32)
        closed = len(ids) // segment * segment
        return cls(save_id, closed, _digest(ids[:closed]), tuple(ids[closed:].tolist()))

    def shared(self, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt need not be computed; one always has to be."""
        if len(prompt) <= self.closed or _digest(prompt[: self.closed]) != self.digest:
            return 0
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(self.rest, prompt[self.closed : -1], strict=False))
        return self.closed + len(list(alike))


def _digest(tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.asarray(tokens, dtype=np.int32).tobytes(), digest_size=32).digest()


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
