"""Has a sequence that has outgrown its parts of slots start anew in a whole one."""

import time
from functools import wraps


def apply() -> None:
    """Wrap Scheduler.schedule, which preempts others for a request that gets no blocks, or the request itself."""
    from vllm.v1.core.sched.scheduler import Scheduler

    original = Scheduler.schedule
    if hasattr(original, "deltamem"):
        return

    @wraps(original)
    def schedule(self, *args, **kwargs):
        from vllm_deltamem.connector import DeltaMemConnector

        if isinstance(self.connector, DeltaMemConnector):
            _preempt_outgrown(self)
        return original(self, *args, **kwargs)

    schedule.deltamem = True
    Scheduler.schedule = schedule


def _preempt_outgrown(scheduler) -> None:
    """They come first in the queue, in the order of their arrival, once all of their tokens under way are known.

    So do those that vLLM has preempted while nothing new is to begin.
    """
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.request import RequestStatus

    preempted = []
    for request in scheduler.connector.outgrown(scheduler.running):
        if request.num_in_flight_tokens:
            request.next_decode_eligible_step = scheduler.current_step + 2  # not in the step that is planned now
        else:
            preempted.append(request)
    for request in preempted:
        scheduler.running.remove(request)
        scheduler._preempt_request(request, time.monotonic())
        scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
    paused = scheduler._pause_state == PauseState.PAUSED_NEW  # which ends once all that had begun are answered
    if not preempted and not paused:
        return
    queue, begun = scheduler.kv_holding_waiting if paused else scheduler.waiting, []
    for waiting in (scheduler.waiting, queue):
        some = [request for request in waiting if request.status == RequestStatus.PREEMPTED]
        waiting.remove_requests(some)
        begun += some
    begun.sort(key=lambda request: (request.num_computed_tokens == 0, request.arrival_time))
    for request in begun if paused else reversed(begun):  # never before who holds parts, and may need more
        (queue.add_request if paused else queue.prepend_request)(request)
