"""Kernels compiled ahead of time for GPUs that are not there: registers, spills, load widths, instructions per weight.

    python -m qfarm.kernels.aot --targets sm_80,sm_90,gfx942 --json report.json

Every launch of `LAUNCHES` goes through the kernel's own launcher, with tensors of the meta device, so that alignment
and divisibility are those of a real launch; a stub stands for the driver. The compiler, assembler and disassembler are
those of triton's wheel. This proves that the compiler takes a kernel, that nothing spills, that shared memory suffices,
that loads are wide and tensor cores are used, and how many instructions an inner loop has. It proves neither correct
numbers (the interpreter does) nor speed. It must be a process of its own: with TRITON_INTERPRET set nothing compiles.

Budgets are data: those of a launch are what was read from compiled code when they were set, plus a tenth on counts.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget

from qfarm.kernels import tri_bcq, tri_int8, tri_kv, tri_misc, tri_weight
from qfarm.kernels.pack import BCQWeight, Int8Weight, PackedKV, T16Weight

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMITS = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "gfx942": 64}  # KiB a block may have
KIB = 1024
SPILLS = r"(LDL|STL)"
LOADS = r"(LDG|LDGSTS|UTMALDG)"
TENSOR_CORES = r"(HMMA|IMMA|QMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)"
WIDE = r"LDG\.E.*\.128"
WIDE_ASYNC = r"LDGSTS.*\.128"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What a launch may take on NVIDIA targets; spills are never allowed, anywhere."""

    registers: int
    registers_sm_90: int | None = None  # where the compiler takes more there
    shared: int  # bytes
    wanted: tuple[str, ...]  # patterns of instructions that must occur
    unwanted: tuple[str, ...] = ()
    per_element: float | None = None  # instructions per weight or element, of the loop, or of all where there is none
    loop: int | None = None  # instructions of the longest loop
    total: int | None = None  # instructions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    run: Callable[[], object]  # calls a launcher with meta tensors
    kernel: str  # of the kernels that the launcher starts, the one that is meant
    elements: int | None = None  # weights or elements that one program takes per turn of its loop, or in all
    budget: Budget


# -- what is compiled -------------------------------------------------------------------------------------------------


def _empty(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _weight(bits: int, rows: int = 4096, columns: int = 16384, group: int = 128) -> T16Weight:
    widths = {3: (2, 1)}.get(bits, (bits,))
    words = tuple(_empty(columns * width // 512, rows, 16, dtype=torch.int32) for width in widths)
    scale, zero = _empty(columns // group, rows), _empty(columns // group, rows)
    return T16Weight(bits=bits, columns=columns, group=group, words=words, scale=scale, zero=zero, scaled_zero=None)


def _gemv(bits: int, block: int) -> Callable[[], object]:
    return lambda: tri_weight.gemv(_empty(1, 16384), _weight(bits), block=block)


def _gemm_small(block: int) -> Callable[[], object]:
    return lambda: tri_weight.gemm_small(_empty(16, 16384), _weight(4), block=block)


def _planes(bits: int, run: int) -> Callable[[], object]:
    rows, columns = 4096, 16384
    weight = BCQWeight(
        columns=columns,
        group=128,
        planes=_empty(columns // 32, bits, rows, dtype=torch.int32),
        alpha=_empty(columns // 128, bits, rows),
        offset=_empty(columns // 128, rows),
    )
    return lambda: tri_bcq.gemv(_empty(columns), weight, run=run, block=512)


def _cache(bits: int, by_channel: bool, tokens: int = 8192, channels: int = 128) -> PackedKV:
    shape = (8, tokens // 32, channels) if by_channel else (8, tokens, channels // 32)
    words = _empty(8, tokens * bits // 32, channels, dtype=torch.int32)
    return PackedKV(
        bits=bits, group=32, words=words, scale=_empty(*shape), minimum=_empty(*shape), by_channel=by_channel
    )


def _int8() -> object:
    weight = Int8Weight(
        columns=4096, values=_empty(4096, 4096, dtype=torch.int8), scale=_empty(4096, dtype=torch.float32)
    )
    codes, scale = _empty(2048, 4096, dtype=torch.int8), _empty(2048, dtype=torch.float32)
    return tri_int8.gemm(codes, scale, weight, torch.float16)


LAUNCHES: dict[str, Launch] = {}


def _launch(name: str, run: Callable[[], object], kernel: str, elements: int | None = None, **budget: Any) -> None:
    LAUNCHES[name] = Launch(run=run, kernel=kernel, elements=elements, budget=Budget(**budget))


# What a launch runs stands on its first line, its budget on the next.
# fmt: off
_launch(
    "w4_gemv 128", _gemv(4, 128), "t16_gemv", 128 * 128,
    registers=96, shared=1024, wanted=(WIDE,), unwanted=("I2F",), per_element=3.9,
)
_launch(
    "w4_gemv 256", _gemv(4, 256), "t16_gemv", 256 * 128,
    registers=168, shared=2048, wanted=(WIDE,), unwanted=("I2F",), per_element=3.4,
)
_launch(
    "w4_gemm_small 128", _gemm_small(128), "w4_gemm_small", 128 * 128,
    registers=136, shared=26 * KIB, wanted=(WIDE_ASYNC, "HMMA"), per_element=2.7,
)
_launch(
    "w4_gemm_small 256", _gemm_small(256), "w4_gemm_small", 256 * 128,
    registers=200, registers_sm_90=210, shared=44 * KIB, wanted=(WIDE_ASYNC, "HMMA"), per_element=2.5,
)
_launch(
    "i8_gemm 128x128x64", _int8, "i8_gemm",
    registers=224, shared=64 * KIB, wanted=(r"(IMMA|IGMMA)", WIDE_ASYNC), loop=145,
)
_launch(
    "quant_rows_i8 4096", lambda: tri_int8.quantize_rows(_empty(128, 4096)), "quant_rows_i8",
    registers=40, shared=64, wanted=(WIDE,),
)
_launch(
    "cq_absmax 32x256", lambda: tri_misc.largest(_empty(2048, 4096)), "cq_absmax",
    registers=64, shared=4096, wanted=(WIDE,),
)
_launch(
    "cq_apply 8x256",
    lambda: tri_misc.apply_steps(
        _empty(2048, 4096), _empty(2048, dtype=torch.float32), _empty(4096, dtype=torch.float32), 8
    ),
    "cq_apply", registers=40, shared=1024, wanted=(WIDE,),
)
_launch(
    "hadamard 4096", lambda: tri_misc.rotate(_empty(128, 4096)), "hadamard",
    registers=40, shared=8192, wanted=(WIDE,), total=484,
)
_launch(
    "bcq_gemv 3 planes mu 4", _planes(3, 4), "bcq_gemv", 512 * 128,
    registers=80, shared=0, wanted=(WIDE,), per_element=5.0,
)
_launch(
    "bcq_gemv 3 planes mu 8", _planes(3, 8), "bcq_gemv", 512 * 128,
    registers=80, shared=0, wanted=(WIDE,), per_element=2.4,
)
# 214 registers on sm_80. Held to 200 (maxnreg), so that five programs of 64 threads share a processor instead of
# four, the compiler spills 20 of them.
_launch(
    "kivi_qk 2 bits", lambda: tri_kv.scores(_empty(8, 8, 128), _cache(2, True), 0.1), "kivi_qk", 32 * 16 * 128,
    registers=220, shared=20 * KIB, wanted=(WIDE, "HMMA"), per_element=2.6,
)
_launch(
    "w2_gemv 128", _gemv(2, 128), "t16_gemv", 128 * 256,
    registers=106, shared=1024, wanted=(WIDE,), unwanted=("I2F",), per_element=3.9,
)
_launch(
    "w3_gemv 128", _gemv(3, 128), "t16_gemv", 128 * 512,
    registers=141, registers_sm_90=255, shared=1024, wanted=(WIDE,), unwanted=("I2F",), per_element=6.4,
)
_launch(
    "w8_gemv 128", _gemv(8, 128), "t16_gemv", 128 * 64,
    registers=99, shared=1024, wanted=(WIDE,), unwanted=("I2F",), per_element=5.0,
)
_launch(
    "w4 dequantized", lambda: tri_weight.dequantize(_weight(4), torch.float16), "t16_dequantize", 64 * 128,
    registers=40, shared=0, wanted=(WIDE,), per_element=8.0,
)
_launch(
    "bcq_lut mu 4", lambda: tri_bcq.build_table(_empty(16384), 4), "bcq_lut",
    registers=32, shared=0, wanted=("STG",), total=115,
)
_launch(
    "kivi_qk 4 bits", lambda: tri_kv.scores(_empty(8, 8, 128), _cache(4, True), 0.1), "kivi_qk", 32 * 8 * 128,
    registers=200, shared=20 * KIB, wanted=(WIDE, "HMMA"), per_element=3.3,
)
_launch(
    "kivi_pv 2 bits", lambda: tri_kv.outputs(_empty(8, 8, 8192), _cache(2, False)), "kivi_pv", 32 * 16 * 32,
    registers=185, shared=20 * KIB, wanted=(WIDE_ASYNC, "HMMA"), per_element=9.1,
)
_launch(
    "kv_quant_pack keys", lambda: tri_kv.quantize(_empty(8, 128, 128), 2, 32, True), "kv_quant_pack",
    registers=64, shared=512, wanted=("LDG",), total=930,
)
_launch(
    "fake_quant_groups 128", lambda: tri_misc.fake_quantize(_empty(2048, 4096), 4, 128, False), "fake_quant_groups",
    registers=48, shared=512, wanted=(WIDE,), total=730,
)
# fmt: on


# -- compiling --------------------------------------------------------------------------------------------------------


class _Driver:
    """As much of a driver as compiling asks for. Compiled launches are kept by device, so each target is its own."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.device = [*TARGETS.values()].index(target)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def _compiling(target: GPUTarget, compiled: list[Any]) -> Iterator[None]:
    """Launches inside compile for `target` and run nothing."""
    driver, interface = triton.runtime.driver, triton.KernelInterface
    active, original = driver._active, interface.__getitem__

    def getitem(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: compiled.append(kernel.warmup(*args, grid=grid, **options))

    driver.set_active(_Driver(target))
    interface.__getitem__ = getitem
    try:
        yield
    finally:
        interface.__getitem__ = original
        driver._active = active


def compile_launch(run: Callable[[], object], kernel: str, target: str, elements: int | None = None) -> dict[str, Any]:
    """Facts of one kernel of a launcher's for a target of `TARGETS`."""
    compiled: list[Any] = []
    with _compiling(TARGETS[target], compiled):
        run()
    chosen = [each for each in compiled if each.metadata.name == kernel]
    assert chosen, f"{kernel} is none of {[each.metadata.name for each in compiled]}"
    facts = {"kernel": kernel, "target": target, "warps": chosen[0].metadata.num_warps}
    facts |= _nvidia(chosen[0]) if target.startswith("sm_") else _amd(chosen[0].asm["amdgcn"])
    facts["shared"] = chosen[0].metadata.shared
    if elements is not None and "instructions" in facts:
        turn = max(facts["loops"], default=facts["instructions"])
        facts["per_element"] = turn * facts["warps"] * 32 / elements
    return facts


def _nvidia(compiled: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        listing = _tool("nvdisasm", "-c", str(path))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    names, loops = disassembled(listing)
    counts = collections.Counter(names)
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "instructions": len(names),
        "loops": loops,
        "spills": sum(count for name, count in counts.items() if re.match(SPILLS, name)),
        "names": dict(sorted(counts.items())),
    }


def disassembled(listing: str) -> tuple[list[str], list[int]]:
    """Mnemonics of a listing of nvdisasm's in order, and the lengths of its loops: bodies of backward branches."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[int] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(names)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line):
            names.append(instruction[1].split()[0])
            branch = re.search(r"^BRA\S*\s+.*?`\((\.L\w+)\)", instruction[1])
            if branch and branch[1] in labels and labels[branch[1]] < len(names) - 1:  # not the final jump to itself
                loops.append(len(names) - labels[branch[1]])
    return names, loops


def _amd(assembly: str) -> dict[str, Any]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found, f"no {name} in the assembly"
        return int(found[1])

    names = collections.Counter(re.findall(r"\b((?:global|buffer)_load_\w+|v_mfma_\w+)", assembly))
    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
        "names": dict(sorted(names.items())),
    }


def _tool(name: str, *arguments: str) -> str:
    path = getattr(knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


# -- budgets ----------------------------------------------------------------------------------------------------------


def breaches(facts: dict[str, Any], budget: Budget) -> list[str]:
    """What a compiled launch takes beyond its budget, in words; on AMD spills and shared memory alone are held."""
    target = facts["target"]
    found = [f"{facts['spills']} spills"] if facts["spills"] else []
    if facts["shared"] > SHARED_LIMITS[target] * KIB:
        found.append(f"{facts['shared']} bytes of shared memory: {target} has {SHARED_LIMITS[target]} KiB a block")
    if not target.startswith("sm_"):
        return found
    limits: dict[str, float | None] = {
        "registers": (budget.registers_sm_90 if target == "sm_90" else None) or budget.registers,
        "shared": budget.shared,
        "per_element": budget.per_element,
        "instructions": budget.total,
    }
    longest = {"loop": max(facts["loops"], default=0)}
    for name, limit in [*limits.items(), ("loop", budget.loop)]:
        value = (facts | longest).get(name)
        if limit is not None and value is not None and value > limit:
            found.append(f"{name} {value:.4g}: expected at most {limit}")
    found += [f"no {pattern}" for pattern in budget.wanted if not occurs(facts, pattern)]
    return found + [f"{pattern} occurs" for pattern in budget.unwanted if occurs(facts, pattern)]


def occurs(facts: dict[str, Any], pattern: str) -> bool:
    """Whether an instruction of that pattern is in compiled code."""
    return any(re.match(pattern, name) for name in facts["names"])


def report(targets: Sequence[str], names: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Facts of launches (all, unless named) for targets, with their breaches."""
    for target in targets:
        for name in names or LAUNCHES:
            launch = LAUNCHES[name]
            facts = compile_launch(launch.run, launch.kernel, target, launch.elements)
            yield {"launch": name} | facts | {"breaches": breaches(facts, launch.budget)}


def summary(row: dict[str, Any]) -> str:
    """One line of a report."""
    words = [f"{row['target']:7s}{row['launch']:24s} {row['registers']:4d} registers {row['spills']:3d} spills"]
    words.append(f"{row['shared']:6d} B shared")
    if "per_element" in row:
        words.append(f"{row['per_element']:5.2f} instructions per element")
    elif "instructions" in row:
        words.append(f"{row['instructions']} instructions, longest loop {max(row['loops'], default=0)}")
    return "  ".join([*words, "FAIL: " + "; ".join(row["breaches"]) if row["breaches"] else "PASS"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print one line per launch and target; 1 where a budget is not met."""
    parser = argparse.ArgumentParser(prog="python -m qfarm.kernels.aot", description="Compile kernels without a GPU.")
    parser.add_argument("--targets", default="sm_80,sm_90,gfx942", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--only", default="", help="names of launches, separated by commas; all by default")
    parser.add_argument("--json", metavar="FILE", help="also write every fact here")
    chosen = parser.parse_args(arguments)
    targets, names = chosen.targets.split(","), [name for name in chosen.only.split(",") if name]
    for given, known in ((targets, TARGETS), (names, LAUNCHES)):
        for name in given:
            if name not in known:
                parser.error(f'unknown "{name}": expected some of {", ".join(known)}')
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing can be compiled in the interpreter")
    rows = []
    for row in report(targets, names):
        print(summary(row), flush=True)
        rows.append(row)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["breaches"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
