"""The Triton kernels compiled for GPUs that need not be there: no error, shared memory that fits, few spills.

Registers are judged where tiles were chosen: with Triton 3.6, which vLLM 0.32 brings on CUDA, for an A100 and an
H100; on cards of capability 8.9 and 12.0, which have less shared memory, and on 10.0 tiles need only fit.

python -m tests.test_cubins 90        # a table of every kernel, for compute capability 9.0
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
SPILLED = 64  # bytes per thread that cost nothing one could measure
TUNED, JUDGED = "3.6.", (80, 90)
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes of a program
SHAPES = [  # fidelity, head size, heads of a group, rope, learned, segment, trained tokens (0: any)
    ("k8v4", 128, 4, "neox", True, 512, 0),
    ("k8v4", 128, 4, "neox", False, 512, 2048),
    ("bf16", 64, 3, "interleaved", False, 64, 0),
    ("k3v4", 128, 4, "neox", True, 512, 0),
    ("k3v4", 96, 7, "partial", False, 16, 512),
    ("bf16", 256, 4, "neox", False, 64, 2048),
]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}-{shape[6]}")
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_kernels_compile(capability, shape):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.test_cubins", str(capability), json.dumps(shape)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    names = set("_write _reset attend_token attend_prompt _combine".split())
    names |= set("prepare rank count pick order exchange nearest group update".split())
    names |= ({"score"} if shape[4] else set()) | ({"demote"} if shape[6] else set())
    names |= {"read_coarse"} if shape[0] != "bf16" else set()
    assert {kernel["name"] for kernel in kernels} == names
    for kernel in kernels:
        assert kernel["shared_bytes"] <= SHARED_MEMORY[capability], kernel
        if triton.__version__.startswith(TUNED) and capability in JUDGED:
            assert kernel["spilled_bytes"] <= SPILLED, kernel


class Absent:
    """In place of Triton's driver: a CUDA device of this capability that nothing is launched on."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_for(capability: int) -> None:
    """From here on a launch only compiles, and prints what came of it as a line of JSON."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from vllm_deltamem.kernels import attend, launch

    driver.set_active(Absent(capability))
    launch.shared_memory = attend.shared_memory = lambda device: SHARED_MEMORY[capability]
    run, seen = JITFunction.run, set()

    def only_compile(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            found = {"name": self.fn.__name__, **resources(kernel.asm["cubin"])}
            found |= {"shared_bytes": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
            print(json.dumps(found), flush=True)
        return kernel

    JITFunction.run = only_compile


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, and the bytes of stack that those which did not fit were spilled to."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    return {"registers": int(found[1]), "spilled_bytes": int(found[2])}


def launch_all(fidelity, size, group, kind, learned, segment, trained) -> None:
    """Every kernel as decoding and a prompt call them."""
    import torch

    from tests.layers import make_batch, make_layer, make_policy, make_rope, make_tokens
    from vllm_deltamem.kernels import cuda

    sizes = dict(exact=(4, 0, 60), coarse=(200, 0, 1600), window=segment // 2, segment=segment)
    slab, view = make_layer(fidelity, size, dtype=torch.bfloat16, **sizes)
    slots = view(slab)
    rope, policy, none = make_rope(kind, size, trained), make_policy(3, size, learned), (0, 0, 0)
    slab_of_parts, view = make_layer("bf16", size, none, none, 3 * segment, segment, torch.bfloat16, cells=2 * segment)
    parts = view(slab_of_parts)
    for batch, longest in (([(2, 1, 150), (0, 1, 9)], 1), ([(2, segment, 4 * segment)], segment)):
        rows = make_batch(batch)
        in_parts = make_batch([((slot, 1), *row) for slot, *row in batch])
        k, v, q = make_tokens(sum(count for _, count, _ in batch), 3, size, group, torch.bfloat16)
        cuda.reset(slab, *rows)
        cuda.reset(slab_of_parts, *in_parts, cells=2 * segment)
        for each, own in ((slots, rows), (parts, in_parts)):
            cuda.write(k, v, each, *own, max_query_len=longest)
        for sink_logits in (None, q.new_zeros(q.shape[1])):
            for each, own in ((slots, rows), (parts, in_parts)):
                cuda.attend(q, each, *own, size**-0.5, torch.empty_like(q), rope, sink_logits, max_query_len=longest)
        cuda.merge(slots, *rows, rope, policy)


if __name__ == "__main__":
    compile_for(int(sys.argv[1]))
    for shape in [json.loads(sys.argv[2])] if len(sys.argv) > 2 else SHAPES:
        launch_all(*shape)
