"""PyTorch's threads for compiled functions: OpenMP's, which are awake while a model computes; and what they count."""

import ctypes
from pathlib import Path

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_INT, _LONG, _BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()

_OWN = "deltamem_"  # before the names of what is PyTorch's: in a process with two OpenMPs any may answer to the others
# The one that PyTorch brings along, else the system's
_openmp = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"), "libgomp.so.1")))
for _name in (
    "GOMP_parallel_loop_dynamic", "GOMP_loop_dynamic_next", "GOMP_loop_end_nowait", "omp_set_max_active_levels"
):  # fmt: skip
    llvm.add_symbol(_OWN + _name, ctypes.cast(getattr(_openmp, _name), ctypes.c_void_p).value)


@intrinsic
def each(typingctx, task, count, given):
    """Call the compiled task(i, given) for every i < count, each by a thread that is free; returns how many failed.

    given: a tuple.
    """
    wanted = task.get_call_type(typingctx, (types.int64, given), {})

    def codegen(context, builder, signature, values):
        overload = task.dispatcher.overloads[wanted.args]
        context.active_code_library.add_linking_library(overload.library)
        kind = context.get_value_type(given)
        shared = cgutils.alloca_once(builder, ir.LiteralStructType([kind, _LONG]))
        builder.store(values[2], cgutils.gep_inbounds(builder, shared, 0, 0))
        builder.store(_LONG(0), cgutils.gep_inbounds(builder, shared, 0, 1))
        body = _body(context, builder.module, overload.fndesc, wanted, kind)
        start = _declared(
            builder.module, "GOMP_parallel_loop_dynamic", ir.VoidType(),
            [body.type, _BYTES, _INT, _LONG, _LONG, _LONG, _LONG, _INT],
        )  # fmt: skip
        # Numba's own threads, with which vLLM finds drafts, allow regions in regions: MKL then divides products further
        levels = _declared(builder.module, "omp_set_max_active_levels", ir.VoidType(), [_INT])
        builder.call(levels, [_INT(1)])
        data = builder.bitcast(shared, _BYTES)
        builder.call(start, [body, data, _INT(0), _LONG(0), values[1], _LONG(1), _LONG(1), _INT(0)])
        return builder.load(cgutils.gep_inbounds(builder, shared, 0, 1))

    return types.int64(task, types.int64, given), codegen


def _body(context, module, fndesc, wanted, kind):
    """What every thread does: take the next numbers, as long as there are any."""
    name = f"each_{fndesc.mangled_name}"
    body = ir.Function(module, ir.FunctionType(ir.VoidType(), [_BYTES]), name)
    body.linkage = "internal"
    builder = ir.IRBuilder(body.append_basic_block())
    shared = builder.bitcast(body.args[0], ir.LiteralStructType([kind, _LONG]).as_pointer())
    given = builder.load(cgutils.gep_inbounds(builder, shared, 0, 0))
    first, last = (cgutils.alloca_once(builder, _LONG) for _ in range(2))
    take = _declared(module, "GOMP_loop_dynamic_next", ir.IntType(8), [_LONG.as_pointer()] * 2)
    function = context.declare_function(module, fndesc)
    again, work, done = (body.append_basic_block() for _ in range(3))
    builder.branch(again)
    builder.position_at_end(again)
    more = builder.icmp_unsigned("!=", builder.call(take, [first, last]), ir.IntType(8)(0))
    builder.cbranch(more, work, done)
    builder.position_at_end(work)
    numbers = [builder.load(first), given]
    status, _ = context.call_conv.call_function(builder, function, wanted.return_type, wanted.args, numbers)
    with builder.if_then(status.is_error):
        builder.atomic_rmw("add", cgutils.gep_inbounds(builder, shared, 0, 1), _LONG(1), "monotonic")
    builder.branch(again)
    builder.position_at_end(done)
    builder.call(_declared(module, "GOMP_loop_end_nowait", ir.VoidType(), []), [])
    builder.ret_void()
    return body


@intrinsic
def value(typingctx, x, i):
    """x[i], of int64, with what other threads have done before they changed it."""

    def codegen(context, builder, signature, values):
        return builder.load_atomic(_place(context, builder, signature, values), "acquire", 8)

    return types.int64(x, types.int64), codegen


@intrinsic
def add(typingctx, x, i, count):
    """Add to x[i], of int64; returns what it was."""

    def codegen(context, builder, signature, values):
        return builder.atomic_rmw("add", _place(context, builder, signature, values), values[2], "acq_rel")

    return types.int64(x, types.int64, types.int64), codegen


@intrinsic
def replace(typingctx, x, i, old, new):
    """Whether x[i], of int64, was `old`, in place of which there is `new` then."""

    def codegen(context, builder, signature, values):
        place = _place(context, builder, signature, values)
        return builder.extract_value(builder.cmpxchg(place, values[2], values[3], "acq_rel", "acquire"), 1)

    return types.boolean(x, types.int64, types.int64, types.int64), codegen


def _place(context, builder, signature, values):
    return builder.gep(context.make_array(signature.args[0])(context, builder, values[0]).data, [values[1]])


def _declared(module, name, result, arguments):
    return cgutils.get_or_insert_function(module, ir.FunctionType(result, arguments), _OWN + name)
