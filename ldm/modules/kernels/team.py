"""What the fused CPU kernels share: PyTorch's own OpenMP threads for functions compiled with Numba.

Numba's `parallel=True` would start threads of its own, or change PyTorch's number of threads when it starts. Here the
team that PyTorch computes with runs the kernel: GOMP_parallel of the OpenMP runtime that PyTorch has loaded calls it in
each thread.

A kernel is a function of one pointer to 64-bit integers: two counters, the number of tasks, then its arguments
(addresses of tensors, sizes, bits of numbers). The threads take tasks one by one, so that a result must not depend on
which thread computes what. Tensors of bfloat16 are read and written as 16-bit integers; arithmetic is in float32.
"""

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ldm.modules.kernels.openmp import gomp_parallel

# A NaN must stay one, so that a diverged training is seen: no "nnan", no "ninf".
FAST = {"reassoc", "contract", "arcp", "nsz"}
FLOATS, SHORTS = types.CPointer(types.float32), types.CPointer(types.int16)
LOG2E = np.float32(1.4426950408889634)
ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
LOWEST, HIGHEST = np.float32(-126), np.float32(127)
# 2^f on [-1/2, 1/2], least squares at Chebyshev nodes: relative error 1e-7.
P1, P2, P3 = np.float32(0.693146856), np.float32(0.24022238), np.float32(0.0555089295)
P4, P5 = np.float32(0.00967169794), np.float32(0.00132186725)


def jit(function: Callable) -> Any:
    """Compile a helper of kernels."""
    return numba.njit(function, fastmath=FAST, error_model="numpy")


@functools.cache
def _entry(kernel: Callable) -> Any:
    """A kernel as a C function, cached on disk if a folder for it can be written to."""
    try:
        return numba.cfunc("void(CPointer(int64))", cache=True)(kernel)
    except RuntimeError:
        return numba.cfunc("void(CPointer(int64))")(kernel)


def run(kernel: Callable, tasks: int, *arguments: torch.Tensor | int | float) -> None:
    """Run a kernel's tasks in as many threads as PyTorch uses. The caller keeps the tensors alive."""
    numbers = [0, 0, tasks, *map(_integer, arguments)]
    data = (ctypes.c_int64 * len(numbers))(*numbers)
    gomp_parallel()(_entry(kernel).address, ctypes.addressof(data), min(torch.get_num_threads(), tasks), 0)


def _integer(argument: torch.Tensor | int | float) -> int:
    """A tensor as its address, a float as the bits of its float32."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return struct.unpack("<i", struct.pack("<f", argument))[0] if isinstance(argument, float) else argument


def instruction(function: Callable) -> Any:
    """A function that kernels call, written in LLVM's instructions."""
    return intrinsic(function)


def _built(signature: Any, build: Callable) -> tuple[Any, Callable]:
    """What such a function returns: `build(builder, *arguments)` makes its instructions."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        # LLVM vectorises to 256 bits unless told otherwise; llvmlite's list of attributes lacks this one.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        result = build(builder, *arguments)
        return context.get_dummy_value() if result is None else result

    return signature, generate


@instruction
def floats(typing_context, address):
    """An address as a pointer to float32."""
    pointer = ir.FloatType().as_pointer()
    return _built(FLOATS(types.int64), lambda builder, a: builder.inttoptr(a, pointer))


@instruction
def shorts(typing_context, address):
    """An address as a pointer to the bits of bfloat16."""
    pointer = ir.IntType(16).as_pointer()
    return _built(SHORTS(types.int64), lambda builder, a: builder.inttoptr(a, pointer))


@instruction
def at(typing_context, pointer, offset):
    """The pointer `offset` elements further."""
    return _built(pointer(pointer, types.int64), lambda builder, p, k: builder.gep(p, [k]))


@instruction
def number(typing_context, bits):
    """The float32 whose bits are the lower half of a 64-bit integer."""
    return _built(
        types.float32(types.int64),
        lambda builder, b: builder.bitcast(builder.trunc(b, ir.IntType(32)), ir.FloatType()),
    )


@instruction
def take(typing_context, counter):
    """Read a counter and add one to it, in one step."""
    one = ir.Constant(ir.IntType(64), 1)
    return _built(
        types.int64(types.CPointer(types.int64)), lambda builder, c: builder.atomic_rmw("add", c, one, "monotonic")
    )


def _scope(builder: ir.IRBuilder, name: str) -> Any:
    """LLVM's name for a kind of memory."""
    module = builder.module
    return module.add_metadata([module.add_metadata([name, module.add_metadata(["kernels"])])])


@instruction
def load(typing_context, pointer, index):
    """An element of a tensor as float32. No `store` or `add_to` of the kernel may write to it: loops vectorise so."""

    def build(builder, p, k):
        value = builder.load(builder.gep(p, [k]))
        value.set_metadata("alias.scope", _scope(builder, "inputs"))
        if pointer == SHORTS:
            int32 = ir.IntType(32)
            value = builder.bitcast(builder.shl(builder.zext(value, int32), int32(16)), ir.FloatType())
        return value

    return _built(types.float32(pointer, types.int64), build)


@instruction
def store(typing_context, pointer, index, value):
    """Write a float32 to an element of a tensor; bfloat16 is rounded to nearest, ties to even."""

    def build(builder, p, k, number):
        if pointer == SHORTS:
            int32 = ir.IntType(32)
            bits = builder.bitcast(number, int32)
            odd = builder.and_(builder.lshr(bits, int32(16)), int32(1))
            number = builder.lshr(builder.add(bits, builder.add(odd, int32(0x7FFF))), int32(16))
            number = builder.trunc(number, ir.IntType(16))
        builder.store(number, builder.gep(p, [k])).set_metadata("noalias", _scope(builder, "inputs"))

    return _built(types.none(pointer, types.int64, types.float32), build)


@instruction
def load_row(typing_context, pointer, index):
    """An element of float32 memory that no `store_sum` of the kernel writes to."""

    def build(builder, p, k):
        value = builder.load(builder.gep(p, [k]))
        value.set_metadata("alias.scope", _scope(builder, "rows"))
        return value

    return _built(types.float32(pointer, types.int64), build)


@instruction
def store_sum(typing_context, pointer, index, value):
    """Write an element of float32 memory that no `load_row` of the kernel reads."""

    def build(builder, p, k, number):
        builder.store(number, builder.gep(p, [k])).set_metadata("noalias", _scope(builder, "rows"))

    return _built(types.none(pointer, types.int64, types.float32), build)


@instruction
def largest(typing_context, a, b):
    """The larger of two float32, neither of them NaN."""

    def build(builder, x, y):
        float32 = ir.FloatType()
        kind = ir.FunctionType(float32, [float32, float32])
        function = builder.module.declare_intrinsic("llvm.maxnum", [float32], kind)
        return builder.call(function, [x, y], fastmath=("nnan", "nsz"))

    return _built(types.float32(types.float32, types.float32), build)


@instruction
def nearest_integer(typing_context, value):
    """A float32 rounded to the nearest integer, still as float32."""

    def build(builder, x):
        function = builder.module.declare_intrinsic("llvm.rint", [ir.FloatType()])
        return builder.call(function, [x])

    return _built(types.float32(types.float32), build)


@instruction
def power_of_two(typing_context, exponent):
    """2 to the power of an integer in -126..127 that is given as float32."""

    def build(builder, x):
        int32 = ir.IntType(32)
        biased = builder.add(builder.fptosi(x, int32), int32(127))
        return builder.bitcast(builder.shl(biased, int32(23)), ir.FloatType())

    return _built(types.float32(types.float32), build)


@jit
def add_to(pointer, index, value):
    """Add to an element of float32 memory."""
    store(pointer, index, pointer[index] + value)


@jit
def exp2(t):
    """2^t to a relative error of 2e-7, in operations that vectorise; at least 2^-126, at most 2^127.5."""
    if t < LOWEST:
        t = LOWEST
    if t > HIGHEST:
        t = HIGHEST
    n = nearest_integer(t)
    f = t - n
    return (ONE + f * (P1 + f * (P2 + f * (P3 + f * (P4 + f * P5))))) * power_of_two(n)


@jit
def exp(x):
    """e^x, as 2^(x log2 e)."""
    return exp2(x * LOG2E)
