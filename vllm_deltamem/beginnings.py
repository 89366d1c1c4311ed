"""Where prompts part: of what several begin with, as with a system prompt, a copy is worth a slot.

As for the states of hybrid models (Pan et al. 2024, Marconi, arXiv 2411.19379): a memory can't be taken back to where a
prompt parts from it, so that one is kept as it is there, once a second prompt has shown where that is.
"""

from collections import OrderedDict
from collections.abc import Hashable
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from vllm_deltamem.transfers import Prompt

LEAST = 512  # tokens: to read fewer costs less than a slot that a conversation may go on in
MOST = 1 << 16  # segments of prompts that are remembered


class Seen(NamedTuple):
    """What is remembered of whole segments that a prompt lately began with."""

    rest: np.ndarray | None  # int32, the tokens after them, None if that is another segment
    request_id: str  # of the last prompt that began so


class Beginnings:
    """What prompts lately began with, as far as MOST whole segments go."""

    def __init__(self, segment: int):
        self._segment = segment
        self._seen: OrderedDict[tuple[bytes, Hashable], Seen] = OrderedDict()  # by digest and kind

    def part(self, prompt: Prompt, kind: Hashable, request_id: str) -> tuple[int, str | None]:
        """Remember a prompt. Returns how many tokens, in whole segments, it shares with one that it parts from: whose.

        0 and None where it does not part, but goes on from the earlier one. kind: what both must have alike besides.
        """
        ends = range(self._segment, len(prompt.ids) + 1, self._segment)
        keys = [(prompt.digest(end), kind) for end in ends]
        known = len(list(takewhile(self._seen.__contains__, keys)))
        shared, last = known * self._segment, self._seen[keys[known - 1]] if known else Seen(prompt.ids[:0], "")
        goes_on = last.rest is not None and np.array_equal(last.rest, prompt.ids[shared : shared + len(last.rest)])
        for i, key in enumerate(keys, 1):
            longer = i < len(keys) or (i == known and last.rest is None)
            self._seen[key] = Seen(None if longer else prompt.ids[ends[-1] :].copy(), request_id)
            self._seen.move_to_end(key)
        while len(self._seen) > MOST:
            self._seen.popitem(last=False)
        return (0, None) if goes_on else (shared, last.request_id)
