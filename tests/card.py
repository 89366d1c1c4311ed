"""vLLM as it serves on a GPU, on a CPU: its second runner, steps ahead of their results, Triton kernels, CUDA graphs.

A model is traced and split at attention, as vLLM does by default: decoding is one graph, what lies between the
attention of other steps is one graph each.

Kernels run in Triton's interpreter. A graph is the list of operations and kernels that ran while it was captured, done
again on the same tensors: what Python decided then is decided, as on a device, and reading a value back is an error.
Import this first, in a process of its own: Triton and vLLM find out at import what they run on.
"""

import os
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.backends import backends
from triton.runtime.interpreter import GridExecutor, InterpretedFunction

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # so that vLLM uses it

from vllm.model_executor.layers.attention.attention import unified_attention_with_output  # noqa: E402
from vllm.model_executor.layers.mamba.mamba_mixer2 import mamba_mixer2  # noqa: E402

from vllm_deltamem import pool  # noqa: E402
from vllm_deltamem.kernels import cuda  # noqa: E402

pool.ON_CPU, pool.kernels = False, cuda

CAPTURED = [1, 2, 4, 16, 40]  # tokens of the graphs
GRAPH_OF_A_PIECE = "vllm.compilation.cuda_graph.CUDAGraphWrapper"
LAYERS = {  # to PyTorch one operation, which launches kernels of its own
    "vllm.unified_attention_with_output": unified_attention_with_output,
    "vllm.mamba_mixer2": mamba_mixer2,
}
WAITS = {"aten._local_scalar_dense", "aten.lift_fresh", "aten.nonzero"}  # for the device, or copy from pageable memory


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    replays = 0  # of all graphs

    def __init__(self):
        self.calls = []

    def replay(self) -> None:
        Graph.replays += 1
        for call in self.calls:
            call()


class Capture(TorchDispatchMode):
    """Stands for torch.cuda.graph."""

    def __init__(self, graph: Graph, *_, **__):
        super().__init__()
        self.calls = graph.calls

    def __enter__(self):
        self.launch = patch.object(GridExecutor, "__call__", self.launcher(GridExecutor.__call__))
        self.launch.start()
        return super().__enter__()

    def __exit__(self, *raised):
        self.launch.stop()
        return super().__exit__(*raised)

    def launcher(self, run):
        def launch(kernel, *args, **kwargs):
            self.calls.append(lambda: run(kernel, *args, **kwargs))
            with _disable_current_modes():
                run(kernel, *args, **kwargs)

        return launch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func.overloadpacket) in WAITS:
            raise RuntimeError(f"{func} in a graph that is being captured")
        kwargs = kwargs or {}
        if layer := LAYERS.get(str(func.overloadpacket)):
            super().__enter__()
            try:
                return layer(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
        made = func(*args, **kwargs)

        def call():
            for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.calls.append(call)
        return made


compiled: set[tuple] = set()  # what Triton would have compiled of ours: kernels, with what each of them is made for


def recording(run):
    def recorded(kernel, *args, grid, warmup, **options):
        if kernel.fn.__module__.startswith("vllm_deltamem."):
            values = dict(zip(kernel.arg_names, args, strict=False)) | options
            changing, said = kernel.kwargs.get("do_not_specialize") or (), set(filter(str.islower, kernel.arg_names))
            made_for = [(x, special(value, x in changing) if x in said else value) for x, value in values.items()]
            compiled.add((kernel.__name__, *sorted(made_for)))
        return run(kernel, *args, grid=grid, warmup=warmup, **options)

    return recorded


def special(value, changing: bool):
    """What Triton looks at in an argument."""
    if isinstance(value, tuple):
        return tuple(special(x, changing) for x in value)
    if isinstance(value, torch.Tensor):
        return str(value.dtype), changing or value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return "int" if changing else ("int", value == 1, value % 16 == 0)
    return type(value).__name__ if isinstance(value, float) else value


@contextmanager
def card():
    """Engines made inside serve as on a GPU."""
    from vllm import SamplingParams
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu.warmup import warmup_kernels
    from vllm.v1.worker.workspace import init_workspace_manager

    from tests.engines import ahead

    settle, measure, warm_up = (
        CpuPlatform.check_and_update_config,
        CPUWorker.determine_available_memory,
        CPUWorker.compile_or_warm_up_model,
    )

    def with_graphs(config):
        settle(config)
        graphs = config.compilation_config
        graphs.mode, graphs.cudagraph_mode = CompilationMode.VLLM_COMPILE, CUDAGraphMode.FULL_AND_PIECEWISE
        graphs.backend, graphs.compile_sizes = "eager", []
        graphs.cudagraph_capture_sizes, graphs.max_cudagraph_capture_size = CAPTURED, CAPTURED[-1]
        graphs.set_splitting_ops_for_v1(config.parallel_config.all2all_backend)
        for fusion in fields(graphs.pass_config):  # of kernels that the CPU build does not have
            if getattr(graphs.pass_config, fusion.name) is True:
                setattr(graphs.pass_config, fusion.name, False)

    def measured(worker):
        init_workspace_manager(worker.device, 1)
        recurrent = worker.model_config.is_hybrid  # such layers give anything while vLLM profiles, NaN among it
        with patch.object(worker.model_runner, "_dummy_sampler_run") if recurrent else nullcontext():
            worker.model_runner.profile_run()
            worker.model_runner.profile_cudagraph_memory()
            return measure(worker)

    def warmed_up(worker):
        with patch.object(SamplingParams, "for_sampler_warmup", SamplingParams):  # the interpreter can't do all of it
            warmup_kernels(worker.model_runner, worker.execute_model, lambda grammar: worker.sample_tokens(None))
        worker.model_runner.capture_model()
        return warm_up(worker)

    tensor = torch.tensor
    with (
        patch.object(CpuPlatform, "check_and_update_config", staticmethod(with_graphs)),
        patch.object(CpuPlatform, "opaque_attention_op", return_value=True),
        patch.object(CpuPlatform, "get_static_graph_wrapper_cls", return_value=GRAPH_OF_A_PIECE),
        patch("vllm.compilation.cuda_graph.weak_ref_tensors", lambda made: made),
        patch.object(CpuPlatform, "graph_pool_handle", return_value=(0, 0), create=True),
        patch.object(CPUWorker, "determine_available_memory", measured),
        patch.object(CPUWorker, "compile_or_warm_up_model", warmed_up),
        patch("torch.tensor", lambda *args, pin_memory=False, **kwargs: tensor(*args, **kwargs)),
        patch.object(InterpretedFunction, "run", recording(InterpretedFunction.run)),
        patch.object(GridExecutor, "_restore_args_dev", MagicMock()),  # a copy of every tensor to itself
        patch("torch.accelerator.get_memory_info", return_value=(0, 0)),
        patch.multiple("torch.cuda", CUDAGraph=Graph, graph=Capture, set_stream=MagicMock()),
        ahead(),
    ):
        yield
