"""What the plugin adds to vLLM's /metrics."""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from vllm_deltamem.plan import plan_memory

GAUGES = {
    "slots_used": "Slots that sequences hold, parts taken together.",
    "slots_free": "Slots that wait for a sequence.",
    "parts_used": "Parts of slots that short sequences hold.",
    "bytes_per_sequence": "Bytes of one slot on all workers, whatever the length of its sequence.",
    "full_attention_bytes": "Bytes that full attention would hold for the longest sequence of the last step.",
    "longest_sequence_tokens": "Tokens of the longest sequence of the last step.",
}
COUNTERS = {
    "tokens_written": "Tokens whose keys and values entered a slot.",
    "tokens_exact": "Tokens that left a window into exact entries free to take them, mean of all heads.",
    "tokens_coarse": "Tokens for which a head then still had a free coarse entry, mean of all heads.",
    "tokens_merged": "Tokens that made some token lose its entry and be merged or dropped, mean of all heads.",
    "tokens_pinned": "Tokens that clients pinned.",
    "prompts_continued": "Prompts that went on in a slot as an earlier sequence had left it.",
    "tokens_continued": "Prompt tokens that were not computed again thanks to these slots.",
    "sessions_saved": "Sessions saved.",
    "sessions_restored": "Requests that continued a saved session.",
    "sessions_refused": "Requests whose saved session did not fit and was computed anew.",
    "session_tokens_reused": "Prompt tokens that were not computed again thanks to a session.",
}


@dataclass
class DeltaMemStats(KVConnectorStats):
    """Gauges and counter increments of some steps, by the names above."""

    data: dict[str, float] = field(default_factory=dict)

    def count(self, name: str, amount: float) -> None:
        if amount:
            self.data[name] = self.data.get(name, 0) + amount

    def reset(self):
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            if name in COUNTERS:
                self.count(name, value)
            else:
                self.data[name] = value
        return self

    def reduce(self) -> dict[str, float]:
        return {name: round(value, 1) for name, value in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


class DeltaMemPromMetrics(KVConnectorPromMetrics):
    """`vllm:deltamem_*`, one of each per engine."""

    def __init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics = {}
        for make, table in ((self._gauge_cls, GAUGES), (self._counter_cls, COUNTERS)):
            for name, text in table.items():
                extra = {"multiprocess_mode": "mostrecent"} if table is GAUGES else {}
                metric = make(name=f"vllm:deltamem_{name}", documentation=text, labelnames=labelnames, **extra)
                for engine, values in per_engine_labelvalues.items():
                    self._metrics[engine, name] = metric.labels(*values)
        blocks = (vllm_config.cache_config.num_gpu_blocks or 0) // len(per_engine_labelvalues)  # vLLM has their sum
        plan = plan_memory(vllm_config)
        for engine in per_engine_labelvalues:
            self.observe({"bytes_per_sequence": plan.bytes_per_sequence}, engine)
            if blocks:
                self.observe({"slots_free": (blocks - 1) // plan.parts}, engine)  # vLLM keeps one block for itself

    def observe(self, transfer_stats_data, engine_idx=0):
        for name, value in transfer_stats_data.items():
            metric = self._metrics.get((engine_idx, name))
            if metric is not None:
                metric.set(value) if name in GAUGES else metric.inc(value)
