"""An OpenAI-compatible application on Ray Serve: `serve run serve.yaml`.

A `Gateway` takes the HTTP requests; each replica of `Engine` behind it is one vLLM engine, with slots of its
own, under vLLM's own OpenAI server app. The requests of a session go to the replica that Ray Serve's
consistent-hash router gives its name, as long as that replica lives; then another takes over, and restores
the session from the directory that the replicas share.

Why not `ray.serve.llm`: that of Ray 2.60 pins vLLM 0.29.0, and has routes, engine options and metrics of its
own. vLLM's app behind a handle keeps all of `vllm serve`: its options, routes, API keys and endpoint plugins.

Neither Ray nor vLLM is imported before `app` or a constructor needs it: the gateway never imports vLLM.
"""

from typing import TYPE_CHECKING, Any

from vllm_deltamem.gateway import Gateway
from vllm_deltamem.replica import Engine

if TYPE_CHECKING:
    from ray.serve import Application

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"

# A replica takes whatever comes and lets vLLM queue it: a full replica would send sessions to another one.
QUEUE = 4096


def app(options: dict[str, Any]) -> "Application":
    """The application: a gateway in front of replicas of the engine.

    `options`, the `args` of the application in the YAML file, are those of `vllm serve`, named as on its
    command line without the dashes. Raises ValueError when they name no model.
    """
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    if not options.get("model"):
        raise ValueError("serve needs a model: set `model` in args to a folder or a name on Hugging Face")
    engines = serve.deployment(
        Engine,
        max_ongoing_requests=QUEUE,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        health_check_period_s=2,
        graceful_shutdown_timeout_s=60,
    )
    gateway = serve.deployment(Gateway, max_ongoing_requests=QUEUE, ray_actor_options={"num_cpus": 0})
    return gateway.bind(engines.bind(options))
