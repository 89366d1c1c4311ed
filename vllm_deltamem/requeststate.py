"""What the scheduler's side of the connector knows of a request that has not finished."""

from dataclasses import dataclass

from vllm.sampling_params import SamplingParams

from vllm_deltamem.transfers import Reach, Turn


@dataclass
class RequestState:
    params: SamplingParams | None
    turn: Turn | None = None  # of the session that it will be saved as
    answer: int | None = None  # where the first merge after its prompt will be, before which a memory may be kept
    kept: int = 0  # tokens of that memory
    counted: int | None = None  # tokens up to which it is counted what was written; None: nothing was
    matched: tuple[Turn, Reach] | None = None  # what to restore once there is a slot
    restoring: int = 0  # tokens of what workers are restoring
    outcome: dict | None = None  # what became of its session, for its response
