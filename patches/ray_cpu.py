"""Lets `--distributed-executor-backend ray` run on vLLM's CPU platform.

vLLM asks its platform for the name of a Ray resource (`ray_device_key`) and stops with 'current platform cpu
does not support ray' where there is none, as on the CPU. Ray counts CPUs, but hands out no ids for them, and
takes them as `num_cpus` rather than among custom resources. With this patch a worker holds one CPU of Ray's,
and runs as many OpenMP threads as Ray gives to a worker: one, unless OMP_NUM_THREADS says otherwise.
"""


def apply() -> None:
    """Give the CPU platform a `ray_device_key`. Only who starts workers on Ray asks for it, so Ray is loaded then."""
    from vllm.platforms import current_platform

    type(current_platform).ray_device_key = property(lambda platform: prepare_executor())


def prepare_executor() -> str:
    """Patch vLLM's Ray executor in this process; the name of Ray's resource."""
    from ray import cloudpickle
    from vllm.v1.executor import ray_executor_v2

    ray_executor_v2.RayWorkerProc.get_node_and_physical_gpu_ids = node_without_device_ids
    # A worker is asked for its node before it loads any plugin: its class must bring the method along.
    cloudpickle.register_pickle_by_value(ray_executor_v2)
    # The bundle of the placement group reserves the CPU: the actor in it asks for nothing more.
    ray_executor_v2.RayExecutorV2._get_actor_resource_kwargs = staticmethod(no_more_resources)
    return "CPU"


def no_more_resources() -> dict:
    """Instead of RayExecutorV2._get_actor_resource_kwargs."""
    return {"num_gpus": 0}


def node_without_device_ids(worker) -> tuple[str, list[int]]:
    """Instead of RayWorkerProc.get_node_and_physical_gpu_ids: the node's id, and no ids of devices."""
    import ray

    return ray.get_runtime_context().get_node_id(), []
