"""How many replicas of the engine Ray Serve runs."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext


class SlotScaling:
    """Autoscaling policy: as many replicas as bring the share of slots in use to `target`.

    A request counts from its arrival, whether it holds a slot or waits for one.
    """

    def __init__(self, target: float = 0.8):
        if not 0 < target <= 1:
            raise ValueError(f"SlotScaling: target must be a share of the slots in (0, 1], not {target}")
        self.target = target

    def __call__(self, ctx: "AutoscalingContext") -> tuple[float, dict]:
        """Replicas wanted, before Ray Serve's bounds, factors and delays; no change while nothing reports."""
        metrics = ctx.aggregated_metrics or {}
        slots, wanted = metrics.get("slots"), metrics.get("slots_wanted")
        if not slots or not wanted:
            return ctx.target_num_replicas, {}
        demand = sum(wanted.values()) + (ctx.total_queued_requests or 0)
        return demand / (self.target * sum(slots.values()) / len(slots)), {}
