"""What the connector's two sides tell one another: turns, what to save and restore, and what came of it."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from vllm_deltamem.blocks import Moves, Slot

TOKEN_BYTES = 4


@dataclass(frozen=True)
class Turn:
    """A request on a session, and the save that it will end in."""

    tenant: str
    name: str
    save_id: str


class Reach(NamedTuple):
    """How far a saved memory serves a prompt: so many tokens need not be computed."""

    length: int
    earlier: bool  # the earlier memory of the save
    parts: int  # of slots that the save holds; 0: a whole slot


@dataclass(frozen=True)
class Transfer:
    """A session to save from a slot or to restore into it, and the save that it is."""

    request_id: str
    slot: Slot
    turn: Turn
    tokens: list[int] = field(default_factory=list)  # of a save
    n_earlier: int = 0  # of a save: how many of them the memory had read that the worker kept; 0 if it kept none
    from_kept: bool = False  # of a save: the memory that the worker kept is the one to save
    reach: Reach | None = None  # of a restore
    pins: list[list[int]] = field(default_factory=list)  # of a restore: spans that its request pins


@dataclass(frozen=True)
class Span:
    """Tokens of a sequence that a memory has read.

    It can be taken back to any length inside the segment that is open: the tokens of that one, and the window before
    it, are still exact, and nothing later than the last of them is looked at. Where layers are recurrent, segments are
    of one token here: none is ever open.
    """

    closed: int  # tokens of whole segments
    digest: bytes  # of these tokens
    rest: bytes  # those of the open segment, int32

    @classmethod
    def of(cls, tokens: Sequence[int], segment: int | None) -> "Span":
        """segment: None where the memory keeps all tokens as they are."""
        closed, read = len(tokens) // segment * segment if segment else 0, Prompt(tokens)
        return cls(closed, read.digest(closed), read.ids[closed:].tobytes())

    @property
    def length(self) -> int:
        return self.closed + len(self.rest) // TOKEN_BYTES

    def first(self, length: int) -> "Span":
        """The first of these tokens, some of the open segment among them."""
        return replace(self, rest=self.rest[: (length - self.closed) * TOKEN_BYTES])

    def shared(self, prompt: "Prompt") -> int:
        """How many tokens of a prompt need not be computed; one always has to be."""
        ids = prompt.ids
        if len(ids) <= self.closed or prompt.digest(self.closed) != self.digest:
            return 0
        rest = np.frombuffer(self.rest, np.int32)[: len(ids) - 1 - self.closed]
        other = np.flatnonzero(rest != ids[self.closed : self.closed + len(rest)])
        return self.closed + (int(other[0]) if len(other) else len(rest))


class Prompt:
    """The tokens of a request, to be compared with many spans."""

    def __init__(self, tokens: Sequence[int]):
        self.ids = np.asarray(tokens[:], dtype=np.int32)  # a slice of vLLM's list is one
        self._hashed = 0, hashlib.blake2b(digest_size=32)  # tokens, and their hash so far
        self._digests: dict[int, bytes] = {}

    def digest(self, length: int) -> bytes:
        """Of the first tokens. Quick where lengths ascend from call to call: every token is then hashed once."""
        if length not in self._digests:
            done, hasher = self._hashed if self._hashed[0] <= length else (0, hashlib.blake2b(digest_size=32))
            hasher.update(self.ids[done:length].tobytes())
            self._hashed, self._digests[length] = (length, hasher), hasher.digest()
        return self._digests[length]


@dataclass(frozen=True)
class Note:
    """What the scheduler keeps of a save in a worker's host memory: enough to tell how far it serves a prompt."""

    save_id: str
    spans: tuple[Span, ...]  # of the memory, and of the earlier one if there is one
    parts: int  # of slots that it lies in; 0: a whole slot

    @classmethod
    def of(cls, save_id: str, tokens: Sequence[int], n_earlier: int, parts: int, segment: int) -> "Note":
        reached = [tokens[:n] for n in (len(tokens), n_earlier) if n]
        return cls(save_id, tuple(Span.of(read, None if parts else segment) for read in reached), parts)

    def reach(self, prompt: Sequence[int]) -> Reach:
        asked = Prompt(prompt)
        return max(Reach(span.shared(asked), i > 0, self.parts) for i, span in enumerate(self.spans))


def clip(spans: list[list[int]], length: int) -> list[list[int]]:
    """What of pinned spans lies before a position."""
    return [[first, min(end, length)] for first, end in spans if first < length]


class Branch(NamedTuple):
    """What a whole slot holds in the middle of a step, once a piece of its prompt is read, goes to a vacant one."""

    slot: int
    target: int
    piece: int  # of those that the step cuts the prompt into, one per segment


@dataclass
class StepMetadata(KVConnectorMetadata):
    """What the scheduler asks of the workers in one step."""

    pins: dict[int, list[list[int]]] = field(default_factory=dict)  # of whole slots that a sequence just claimed
    restores: list[Transfer] = field(default_factory=list)
    saves: list[Transfer] = field(default_factory=list)
    kept: dict[str, Slot] = field(default_factory=dict)  # slots to copy as they are before this step, by request
    copies: dict[Slot, Slot] = field(default_factory=dict)  # likewise, by the slot that they are copied to
    branches: list[Branch] = field(default_factory=list)
    kinds: tuple[bool, bool] = (True, True)  # whether sequences of the step hold whole slots, and parts
    moves: Moves = field(default_factory=lambda: Moves({}, {}))  # after the forward pass
    begun: list[Turn] = field(default_factory=list)  # turns on sessions that only the worker keeps
    ended: list[Turn] = field(default_factory=list)
    waiting: bool = False  # whether there is nothing to do but to wait for what is being saved or restored


@dataclass
class Report(KVConnectorWorkerMetadata):
    """What came of sessions that workers were to save or to restore."""

    refused: dict[str, str]  # why a session could not be restored, by request
    written: Counter[str]  # how many workers are done with a save, by its id

    def aggregate(self, other: "Report") -> "Report":
        return Report(self.refused | other.refused, self.written + other.written)
