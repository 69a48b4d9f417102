"""Makes Triton's interpreter trustworthy: bounds of every access, bfloat16 as hardware has it, inline PTX evaluated.

Import only in a process that set TRITON_INTERPRET before triton was imported. Patches triton 3.9's internals, and says
so where another version is installed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

KNOWN = "3.9."  # versions whose internals are as patched here
BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
Words = Any  # uint32 array or scalar

_storages: list[tuple[int, int]] = []  # [start, end) of every tensor given to the running kernel, sorted


def install() -> None:
    """Patch the interpreter of this process, once. Raises RuntimeError for versions of triton that are not known."""
    if not triton.__version__.startswith(KNOWN):
        raise RuntimeError(f"triton {triton.__version__}: tests/interpreter.py knows the interpreter of {KNOWN}x")
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "trusted", False):
        return
    builder.trusted = True
    builder.create_dot = _with_bfloat16_dot(builder.create_dot)
    builder.cast_impl = _with_rounded_cast(builder.cast_impl)
    builder.binary_op = _without_bfloat16_arithmetic(builder.binary_op)
    builder.create_inline_asm = _inline_asm
    builder.create_masked_load = _checked(builder.create_masked_load, "tl.load", pointers=0, mask=1)
    builder.create_masked_store = _checked(builder.create_masked_store, "tl.store", pointers=0, mask=2)
    builder.create_atomic_rmw = _checked(builder.create_atomic_rmw, "tl.atomic", pointers=1, mask=3)
    executor: Any = interpreter.GridExecutor
    executor._init_args_hst = _remembering_storages(executor._init_args_hst)


# -- bounds -----------------------------------------------------------------------------------------------------------


def _remembering_storages(original: Callable[..., Any]) -> Callable[..., Any]:
    def begin(self: Any, args: Any, kwargs: Any) -> Any:
        hosted = original(self, args, kwargs)
        storages = [
            tensor.untyped_storage()
            for tensor in [*hosted[0], *hosted[1].values()]
            if hasattr(tensor, "untyped_storage")
        ]
        _storages[:] = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages})
        return hosted

    return begin


def _checked(original: Callable[..., Any], what: str, pointers: int, mask: int) -> Callable[..., Any]:
    def access(self: Any, *args: Any) -> Any:
        shape = np.broadcast_shapes(args[pointers].data.shape, args[mask].data.shape)
        wanted = np.broadcast_to(args[mask].data, shape).astype(bool)
        addresses = np.broadcast_to(args[pointers].data, shape)[wanted].astype(np.uint64)
        size = max(1, args[pointers].get_element_ty().primitive_bitwidth // 8)
        starts = np.array([start for start, _ in _storages], np.uint64)
        ends = np.array([end for _, end in _storages], np.uint64)
        index = np.searchsorted(starts, addresses, side="right").astype(np.int64) - 1
        outside = (index < 0) | (addresses + np.uint64(size) > ends[np.maximum(index, 0)])
        if outside.any():
            raise IndexError(f"{what}: {int(outside.sum())} of {addresses.size} addresses lie outside every argument")
        return original(self, *args)

    return access


# -- bfloat16, which the interpreter keeps as raw 16 bits -------------------------------------------------------------


def _widen(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: Any) -> Any:
    """Round to nearest even, as hardware does; the interpreter truncates."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _with_bfloat16_dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [
            interpreter.TensorHandle(_widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        ]
        return original(self, *wide, *rest)

    return dot


def _with_rounded_cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: Any, to: Any) -> Any:
        if to.scalar == tl.bfloat16 and source.dtype.scalar in (tl.float32, tl.float16):
            return interpreter.TensorHandle(_narrow(source.data.astype(np.float32)), tl.bfloat16)
        if to.scalar == tl.float16 and source.dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_widen(source.data).astype(np.float16), tl.float16)
        return original(self, source, to)

    return cast


def _without_bfloat16_arithmetic(original: Callable[..., Any]) -> Callable[..., Any]:
    def compute(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if tl.bfloat16 in (left.dtype.scalar, right.dtype.scalar) and operation not in BITWISE:
            raise NotImplementedError("bfloat16 arithmetic would be done on raw bits: cast to float32 first")
        return original(self, left, right, operation)

    return compute


# -- inline PTX -------------------------------------------------------------------------------------------------------


class _Results:
    def __init__(self, handles: list[Any]) -> None:
        self.handles = handles

    def get_result(self, index: int) -> Any:
        return self.handles[index]


def _inline_asm(self: Any, text: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int) -> Any:
    """`pack` elements at a time, in 32-bit registers: several small elements share one."""
    shape = np.broadcast_shapes(*[value.data.shape for value in values])
    inputs: list[Words] = []
    for value in values:
        packed = np.ascontiguousarray(np.broadcast_to(value.data, shape)).reshape(-1, pack).view(np.uint32)
        inputs += [packed[:, i].copy() for i in range(packed.shape[1])]
    scalars = [getattr(kind, "scalar", kind) for kind in types]
    counts = [max(1, pack * scalar.primitive_bitwidth // 32) for scalar in scalars]
    outputs = evaluate_ptx(text, inputs, sum(counts))
    handles, first = [], 0
    for scalar, count in zip(scalars, counts, strict=True):
        registers = np.ascontiguousarray(np.stack(outputs[first : first + count], -1).astype(np.uint32))
        elements = registers.view(interpreter._get_np_dtype(scalar))[:, :pack].reshape(shape)
        handles.append(interpreter.TensorHandle(elements, scalar))
        first += count
    return _Results(handles)


def evaluate_ptx(text: str, inputs: Sequence[Words], outputs: int) -> list[Words]:
    """Run instructions on arrays of 32-bit words; operands $0 .. are outputs, then inputs. KeyError: one not known."""
    registers: dict[str, Words] = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    for line in re.split(r"[;\n]", text):
        line = line.strip().strip("{}").strip()
        if not line or line.startswith((".reg", "//")):
            continue
        name, operands = line.split(None, 1)
        target, *sources = [operand.strip() for operand in operands.split(",")]
        registers[target] = _PTX[name.split(".")[0]](*[_operand(registers, source) for source in sources])
    return [registers[f"${i}"] for i in range(outputs)]


def _operand(registers: dict[str, Words], text: str) -> Words:
    return registers[text] if text in registers else np.uint32(int(text, 0) & 0xFFFFFFFF)


def _prmt(a: Words, b: Words, selector: Words) -> Words:
    """Byte i of the result is the byte of b:a that nibble i selects."""
    both = np.asarray(a, np.uint64) | (np.asarray(b, np.uint64) << np.uint64(32))
    result = np.zeros(both.shape, np.uint64)
    for i in range(4):
        nibble = (int(selector) >> (4 * i)) & 0xF
        assert nibble < 8, "modes that replicate a sign are not emulated"
        result |= ((both >> np.uint64(8 * nibble)) & np.uint64(0xFF)) << np.uint64(8 * i)
    return result.astype(np.uint32)


def _lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    """Any function of three bits: bit 4 a + 2 b + c of the table."""
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for index in range(8):
        if (int(table) >> index) & 1:
            terms = [word if (index >> shift) & 1 else ~word for word, shift in ((a, 2), (b, 1), (c, 0))]
            result |= terms[0] & terms[1] & terms[2]
    return result


_PTX: dict[str, Callable[..., Words]] = {
    "prmt": _prmt,
    "lop3": _lop3,
    "shr": lambda a, count: np.asarray(a, np.uint32) >> np.uint32(count),
    "shl": lambda a, count: np.asarray(a, np.uint32) << np.uint32(count),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "mov": lambda a: a,
}
