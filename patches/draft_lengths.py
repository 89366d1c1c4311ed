"""Keeps the drafts of a step, of speculative decoding, in the segment that is open."""

from functools import wraps


def apply() -> None:
    """Wrap Scheduler.update_draft_token_ids: a step that completes a segment merges, and can't be taken back."""
    from vllm.v1.core.sched.scheduler import Scheduler

    original = Scheduler.update_draft_token_ids
    if hasattr(original, "deltamem"):
        return

    @wraps(original)
    def update_draft_token_ids(self, draft_token_ids):
        from vllm_deltamem.connector import DeltaMemConnector

        original(self, draft_token_ids)
        if not isinstance(self.connector, DeltaMemConnector):
            return
        for request_id in draft_token_ids.req_ids:
            request = self.requests.get(request_id)
            if request is not None:
                request.spec_token_ids = request.spec_token_ids[: self.connector.most_drafts(request)]

    update_draft_token_ids.deltamem = True
    Scheduler.update_draft_token_ids = update_draft_token_ids
