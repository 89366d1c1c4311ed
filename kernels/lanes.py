"""Tiles of fp32 products as values of compiled functions, which LLVM keeps in registers.

A tile is ROWS x WIDTH numbers. Arrays are contiguous fp32 of any shape, and numbers in them go by their place from the
first on: i, j. step: places from a row to the next.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

# What Numba compiles for, by which it also tells apart what lies in its cache
TARGET, _, FEATURES = cpu_target.target_context.codegen().magic_tuple()
LANES = 16 if "+avx512f" in FEATURES else 8
FUSED = "+fma" in FEATURES or not TARGET.startswith("x86")  # where they are not, a fused product is a call
ROWS, WIDTH = 4, 2 * LANES
_LANES = ir.VectorType(ir.FloatType(), LANES)
_TILE = ir.ArrayType(_LANES, 2 * ROWS)  # of every row two


class Tile(types.Type):
    """Numba's type of a tile."""

    def __init__(self):
        super().__init__(f"Tile[{ROWS}, {WIDTH}]")


tile = Tile()


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _TILE)


@intrinsic
def zeros(typingctx):
    """A tile of zeros."""

    def codegen(context, builder, signature, values):
        return ir.Constant(_TILE, None)

    return tile(), codegen


@intrinsic
def take(typingctx, x, i, step):
    """The tile that lies at x[i]."""

    def codegen(context, builder, signature, values):
        rows = _rows(context, builder, signature.args[0], *values, ROWS)
        return _pack(builder, [builder.load(_lanes(builder, row, half), align=4) for row in rows for half in range(2)])

    return tile(x, types.int64, types.int64), codegen


@intrinsic
def put(typingctx, held, x, i, step):
    """Write a tile to x[i]."""

    def codegen(context, builder, signature, values):
        rows = _rows(context, builder, signature.args[1], *values[1:], ROWS)
        for place, part in enumerate(_unpack(builder, values[0])):
            builder.store(part, _lanes(builder, rows[place // 2], place % 2), align=4)
        return context.get_dummy_value()

    return types.void(tile, x, types.int64, types.int64), codegen


@intrinsic
def add_products(typingctx, held, x, i, step, y, j):
    """A tile, and added to it the products of a column of x from x[i] on and of a row of y from y[j] on."""

    def codegen(context, builder, signature, values):
        column = _rows(context, builder, signature.args[1], *values[1:4], ROWS)
        (row,) = _rows(context, builder, signature.args[4], *values[4:], values[3], 1)
        halves = [builder.load(_lanes(builder, row, half), align=4) for half in range(2)]
        factors = [_fill(builder, builder.load(number)) for number in column]
        parts = enumerate(_unpack(builder, values[0]))
        return _pack(builder, [_fma(builder, factors[at // 2], halves[at % 2], part) for at, part in parts])

    return tile(tile, x, types.int64, types.int64, y, types.int64), codegen


@intrinsic
def scale(typingctx, held, x):
    """A tile whose rows are multiplied by x[0], x[1] and so on."""

    def codegen(context, builder, signature, values):
        first, one = (context.get_constant(types.int64, number) for number in range(2))
        column = _rows(context, builder, signature.args[1], values[1], first, one, ROWS)
        factors = [_fill(builder, builder.load(number)) for number in column]
        parts = enumerate(_unpack(builder, values[0]))
        return _pack(builder, [builder.fmul(factors[at // 2], part) for at, part in parts])

    return tile(tile, x), codegen


@intrinsic
def transpose(typingctx, x, i, step, y, j, to_step):
    """Write LANES rows of LANES numbers from x[i] on as columns from y[j] on."""

    def codegen(context, builder, signature, values):
        rows = _rows(context, builder, signature.args[0], *values[:3], LANES)
        parts = [builder.load(_lanes(builder, row, 0), align=4) for row in rows]
        span = LANES
        while span := span // 2:  # blocks of so many rows and columns beside the diagonal change places
            keep = [c if not c & span else LANES + (c ^ span) for c in range(LANES)]
            move = [c | span if not c & span else LANES + c for c in range(LANES)]
            for r in range(LANES):
                if not r & span:
                    pair = parts[r], parts[r | span]
                    parts[r], parts[r | span] = (_shuffle(builder, *pair, places) for places in (keep, move))
        for row, part in zip(_rows(context, builder, signature.args[3], *values[3:], LANES), parts, strict=True):
            builder.store(part, _lanes(builder, row, 0), align=4)
        return context.get_dummy_value()

    return types.void(x, types.int64, types.int64, y, types.int64, types.int64), codegen


def _rows(context, builder, kind, x, i, step, count):
    """Pointers to x[i], x[i + step] and so on."""
    data = context.make_array(kind)(context, builder, x).data
    return [builder.gep(data, [builder.add(i, builder.mul(step, ir.Constant(step.type, r)))]) for r in range(count)]


def _lanes(builder, row, half):
    """A pointer to LANES numbers of a row."""
    return builder.gep(builder.bitcast(row, _LANES.as_pointer()), [ir.Constant(ir.IntType(64), half)])


def _fill(builder, number):
    one = builder.insert_element(ir.Constant(_LANES, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    return _shuffle(builder, one, one, [0] * LANES)


def _shuffle(builder, a, b, places):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), LANES), places))


def _fma(builder, a, b, c):
    if not FUSED:
        return builder.fadd(builder.fmul(a, b), c)
    signature = ir.FunctionType(_LANES, [_LANES] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, f"llvm.fma.v{LANES}f32"), [a, b, c])


def _pack(builder, parts):
    held = ir.Constant(_TILE, ir.Undefined)
    for place, part in enumerate(parts):
        held = builder.insert_value(held, part, place)
    return held


def _unpack(builder, held):
    return [builder.extract_value(held, place) for place in range(2 * ROWS)]
