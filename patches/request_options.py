"""Checks a request's deltamem options where it enters, with the prompt's tokens at hand."""

from functools import wraps


def apply() -> None:
    """Wrap InputProcessor.process_inputs. A VLLMValidationError from there is HTTP 400, of that request alone."""
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs
    if hasattr(original, "deltamem"):
        return

    @wraps(original)
    def process_inputs(self, *args, **kwargs):
        from vllm.exceptions import VLLMValidationError

        from vllm_deltamem.config import DeltaMemConfig
        from vllm_deltamem.options import SESSIONS, check_session, resolve
        from vllm_deltamem.plan import plan_memory
        from vllm_deltamem.startup import is_chosen

        request = original(self, *args, **kwargs)
        params = request.sampling_params
        if params is not None and params.extra_args and is_chosen(self.vllm_config):
            if not hasattr(self, "deltamem_quota"):  # planning takes milliseconds
                self.deltamem_quota = plan_memory(self.vllm_config).layout.pinned
            tokenizer = self.renderer.tokenizer
            try:
                prompt = request.prompt_token_ids
                params.extra_args = resolve(params.extra_args, prompt, tokenizer, self.deltamem_quota)
                if params.extra_args.keys() & SESSIONS:
                    directory = DeltaMemConfig.from_vllm(self.vllm_config).sessions.get("directory")
                    parallel = self.vllm_config.parallel_config
                    workers = parallel.tensor_parallel_size * parallel.data_parallel_size
                    check_session(request, workers, directory)
            except ValueError as error:
                raise VLLMValidationError(str(error)) from error
        return request

    process_inputs.deltamem = True
    InputProcessor.process_inputs = process_inputs
