"""Takes back what chunks of a prompt draw from a request's seed on the CPU, where vLLM's own way ends the engine."""

from functools import wraps


def apply() -> None:
    """Wrap _sample and _bookkeeping_sync of CPUModelRunner."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    sample, bookkeeping = CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync
    if hasattr(sample, "deltamem"):
        return

    @wraps(sample)
    def _sample(self, *args, **kwargs):
        """Tokens sampled before a prompt's last chunk are dropped: afterwards its seed is where it was."""
        generators, dropped = self.input_batch.generators, self.discard_request_mask.np
        before = [(generator, generator.get_state()) for i, generator in generators.items() if dropped[i]]
        output = sample(self, *args, **kwargs)
        for generator, state in before:
            generator.set_state(state)
        return output

    @wraps(bookkeeping)
    def _bookkeeping_sync(self, *args, **kwargs):
        """It would turn the generators of dropped tokens back by an offset, which only those of GPUs have."""
        generators, self.input_batch.generators = self.input_batch.generators, {}
        try:
            return bookkeeping(self, *args, **kwargs)
        finally:
            self.input_batch.generators = generators

    _sample.deltamem = True
    CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync = _sample, _bookkeeping_sync
