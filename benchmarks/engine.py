"""One vLLM engine in a process of its own: reads a plan from standard input, runs what of it is not yet kept."""

import os

from tqdm import tqdm
from transformers import AutoConfig

from . import outputs as store
from .plan import Plan
from .suites import Sample
from .suites.language import TOP


def start(model: str, settings: dict | None, length: int, **options):
    """The engine for `length` tokens of prompt and answer; full attention ends at the trained positions.

    settings: deltamem's, or None for full attention by vLLM's own backend; options: further ones of vLLM's engine.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process is the engine's own already
    trained = AutoConfig.from_pretrained(model).max_position_embeddings
    options |= {"model": model, "seed": 0, "max_logprobs": TOP}
    options |= {"enforce_eager": True}  # compiling takes longer than most runs
    options |= {"scheduling_policy": "priority"}  # see run
    if settings is None:
        length = min(length, trained)
    else:
        options |= {"attention_backend": "DELTAMEM", "additional_config": {"deltamem": settings}}
        if length > trained:
            os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    from vllm import LLM

    return LLM(max_model_len=length, **options).llm_engine


def session_of(suite: str, sample: Sample) -> str:
    return f"{suite}-{sample.seed}"


def extra_args(suite: str, sample: Sample, i: int, settings: dict | None) -> dict | None:
    """What prompt i of a sample asks of deltamem: a pin, if its settings allow any, and a session to start from."""
    if settings is None:
        return None
    asked, session = {}, session_of(suite, sample)
    if sample.growing:
        asked["deltamem_session"] = session
    if sample.shared:
        asked["deltamem_session_from"] = session
    if sample.pinned and sample.pinned[i] and settings.get("pinned") != 0:
        asked["deltamem_pin"] = sample.pinned[i]
    return asked or None


def shared_prompt(suite: str, sample: Sample, settings: dict | None):
    """What deltamem reads before the prompts that begin with it, and how; vLLM's own backend has its prefix cache."""
    from vllm import SamplingParams

    if settings is None or not sample.shared:
        return None
    kept = SamplingParams(max_tokens=1, extra_args={"deltamem_session": session_of(suite, sample)})
    return sample.prompt([])[: sample.shared], kept


def sampling(sample: Sample, asked: dict | None, tokenizer):
    """Greedy decoding, and whatever log-probabilities the sample wants."""
    from vllm import SamplingParams

    stops = [tokenizer.encode(text, add_special_tokens=False) for text in sample.stop]
    return SamplingParams(
        extra_args=asked,
        temperature=0,
        max_tokens=sample.max_tokens,
        stop=list(sample.stop),
        stop_token_ids=[ids[0] for ids in stops if len(ids) == 1],  # vLLM aborts at a string: no session is saved
        logprob_token_ids=list(sample.choices) or None,
        prompt_logprobs=TOP if sample.scored else None,
        flat_logprobs=bool(sample.scored),
        detokenize=not sample.scored,  # vLLM would decode every one of the log-probabilities' tokens
    )


def extract(sample: Sample, request) -> dict:
    """The output of one finished request, see Sample."""
    completion = request.outputs[0]
    output = {"text": completion.text}
    if sample.choices:
        found = completion.logprobs[0]
        output["choice"] = max(sample.choices, key=lambda token: found[token].logprob)
    if sample.scored:
        output |= {"nll": [], "top": []}
        tokens = request.prompt_token_ids
        for i in range(len(tokens) - sample.scored, len(tokens)):
            entry = request.prompt_logprobs[i]
            ranked = sorted(entry, key=lambda token: entry[token].rank)[:TOP]
            output["nll"].append(round(-entry[tokens[i]].logprob, 5))
            output["top"].append((ranked, [round(entry[token].logprob, 5) for token in ranked]))
    return output


def run(engine, plan: Plan, waiting: list[tuple[str, Sample]]) -> None:
    """Run the samples, each (suite, sample); an answer that asks for another prompt queues it at once.

    That prompt comes before those of later samples, as long as what it shares with the one before is in the cache.
    """
    longest = engine.model_config.max_model_len
    running, place = {}, {(suite, sample.seed): i for i, (suite, sample) in enumerate(waiting)}

    def add(suite: str, sample: Sample, outputs: list[dict] | None, prompt: list[int], params) -> None:
        name = f"{suite}/{sample.seed}/{'shared' if outputs is None else len(outputs)}"
        rendered = engine.renderer.render_cmpl([{"prompt_token_ids": prompt}])[0]
        engine.add_request(name, rendered, params, priority=place[suite, sample.seed])
        running[name] = suite, sample, outputs

    def submit(suite: str, sample: Sample, outputs: list[dict]) -> bool:
        prompt = sample.prompt(outputs)
        if prompt is None or len(prompt) + sample.max_tokens > longest:
            return False
        asked = extra_args(suite, sample, len(outputs), plan.settings)
        add(suite, sample, outputs, prompt, sampling(sample, asked, engine.renderer.tokenizer))
        return True

    for suite, sample in waiting:
        shared = shared_prompt(suite, sample, plan.settings)
        if shared is not None:
            add(suite, sample, None, *shared)
        elif not submit(suite, sample, []):
            raise ValueError(
                f"{suite}: prompt and answer are longer than the {longest} tokens that full attention was "
                "trained for: give a shorter --context."
            )
    with tqdm(total=len(waiting), unit="sample", desc=os.path.basename(plan.outputs)) as bar:
        while engine.has_unfinished_requests():
            for request in engine.step():
                if not request.finished:
                    continue
                suite, sample, outputs = running.pop(request.request_id)
                outputs = [] if outputs is None else [*outputs, extract(sample, request)]
                if not submit(suite, sample, outputs):
                    store.keep(plan.path(suite), sample, outputs)
                    bar.update()


def main() -> None:
    plan = Plan.read()
    waiting = plan.waiting()
    if waiting:
        shared = {} if plan.cache is None else {"kv_cache_memory_bytes": plan.cache, "gpu_memory_utilization": 0.01}
        run(start(plan.model, plan.settings, plan.context, **shared), plan, waiting)


if __name__ == "__main__":
    main()
