"""Keeps the drafts of a step, of speculative decoding, in the segment that is open, and in their sequence's slot."""

from functools import wraps


def apply() -> None:
    """Wrap Scheduler.__init__ and update_draft_token_ids: what a step merges that completes a segment is final."""
    from vllm.v1.core.sched.scheduler import Scheduler

    init, original = Scheduler.__init__, Scheduler.update_draft_token_ids
    if hasattr(original, "deltamem"):
        return

    @wraps(init)
    def __init__(self, *args, **kwargs):
        from vllm_deltamem.connector import DeltaMemConnector

        init(self, *args, **kwargs)
        if isinstance(self.connector, DeltaMemConnector):
            # As if their number depended on the batch: then steps of one new token are not filled up with drafts.
            self.dynamic_sd_lookup = self.dynamic_sd_lookup or [self.num_spec_tokens] * (self.max_num_running_reqs + 1)
            self._spec_decode_step_blocks = 0  # a slot has room for them

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
    Scheduler.__init__, Scheduler.update_draft_token_ids = __init__, update_draft_token_ids
