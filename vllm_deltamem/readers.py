"""Requests under way, from whose slot others that begin alike start with a copy.

What vLLM's prefix caching does for the samples of one request (`n`) and for prompts that differ in their end only: of
several that come at once one is read, the others wait for it.
"""

from typing import NamedTuple

from vllm.v1.request import Request, RequestStatus

from vllm_deltamem.transfers import Prompt, Span
from vllm_deltamem.vacancies import Kind


class Beginning(NamedTuple):
    """Whole segments of a prompt, but for its last token, and what a memory of them depends on besides."""

    closed: int
    digest: bytes
    pins: tuple[tuple[int, ...], ...]
    salt: str | None
    short: bool


class Readers:
    """chunk: the most tokens of a prompt that a step computes."""

    def __init__(self, segment: int, chunk: int):
        self._segment, self._chunk = segment, chunk
        self._alike: dict[Beginning, dict[str, Request]] = {}
        self._beginnings: dict[str, Beginning] = {}  # by request

    def add(self, request: Request, prompt: Prompt, kind: Kind) -> None:
        """A request arrives that may read for others, or have others read for it."""
        closed = (len(prompt.ids) - 1) // self._segment * self._segment
        if closed:
            pins = tuple(map(tuple, kind.pins))
            beginning = Beginning(closed, prompt.digest(closed), pins, kind.salt, kind.short)
            self._beginnings[request.request_id] = beginning
            self._alike.setdefault(beginning, {})[request.request_id] = request

    def remove(self, request_id: str) -> None:
        beginning = self._beginnings.pop(request_id, None)
        if beginning is not None:
            del self._alike[beginning][request_id]
            if not self._alike[beginning]:
                del self._alike[beginning]

    def find(self, request: Request) -> tuple[str | None, int]:
        """Whose slot holds how many tokens of a request's, or will hold more if that one waits (0).

        A prompt that ends with a segment has no moment at which its last token alone is missing: there it is what was
        read before the last chunk, unless parts keep all tokens as they are.
        """
        beginning, waiting_for = self._beginnings.get(request.request_id), None
        for other in self._alike.get(beginning, {}).values():
            if other.status != RequestStatus.RUNNING:
                continue
            read, end = other.num_computed_tokens, beginning.closed + self._segment
            left = other.num_prompt_tokens - read
            if left > 0 and (other.num_tokens < end or left > self._chunk or beginning.short):
                waiting_for = other.request_id
            elif 0 < read and (read < end or beginning.short):
                span = Span.of(other.all_token_ids[:read], None if beginning.short else self._segment)
                return other.request_id, span.shared(Prompt(request.all_token_ids))
        return waiting_for, 0
