"""What a matrix product should take: a model from bytes, instructions and tensor-core peaks. Never a measurement.

    bytes   = packed weight + 2 M K + 2 M N                             (qfarm.kernels.pack)
    memory  = bytes / bandwidth
    issue   = passes * N K * instructions per weight / (processors * 128 * clock)
    matrix  = 2 M N K / peak, M rounded up to 16
    goal    = 2 us per launch + max((bytes + extra) / bandwidth / 0.80, issue / 0.90, matrix / 0.70)

As `qfarm.kernels.ops` multiplies: a pass takes one row of inputs, on tensor cores 64, and every further pass reads the
weight again (extra). With more rows than a format's kernel is for, the weight is dequantized first: two launches, and
the float16 weight is written and read (extra). Instructions are those of one row, on tensor cores of 16.

0.80 is what cuBLAS reaches of an A100's bandwidth on the largest shape of LUT-GEMM's table (1,591 of 2,039 GB/s); 0.90
and 0.70 are assumptions, 2 us is a launch inside a CUDA graph. A measured kernel is judged by memory / measured.
"""

from __future__ import annotations

import dataclasses

from qfarm.kernels.ops import GEMV_ROWS, SMALL_ROWS
from qfarm.kernels.pack import weight_bytes

LAUNCH_S = 2e-6
REACHED = {"memory": 0.80, "issue": 0.90, "matrix": 0.70}  # share of each bound that a good kernel reaches
LANES = 128  # instructions a multiprocessor issues per clock, counted per thread
GROUP = 128
TENSOR_CORE_ROWS = 16  # M is rounded up to this


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPU:
    """Vendors' figures: dense float16 with float32 sums, boost clock."""

    name: str
    bandwidth: float  # bytes/s
    processors: int
    clock: float  # Hz
    peak: float  # flop/s
    device: str  # as CUDA calls this one; others of a similar name have other figures


GPUS = {
    "a100": GPU(
        name="A100 80 GB SXM",
        bandwidth=2039e9,
        processors=108,
        clock=1.41e9,
        peak=312e12,
        device="NVIDIA A100-SXM4-80GB",
    ),
    "h100": GPU(
        name="H100 SXM", bandwidth=3350e9, processors=132, clock=1.755e9, peak=989e12, device="NVIDIA H100 80GB HBM3"
    ),
    "h200": GPU(name="H200", bandwidth=4800e9, processors=132, clock=1.755e9, peak=989e12, device="NVIDIA H200"),
    "rtx4090": GPU(
        name="RTX 4090", bandwidth=1008e9, processors=128, clock=2.52e9, peak=165e12, device="NVIDIA GeForce RTX 4090"
    ),
    "a10": GPU(name="A10", bandwidth=600e9, processors=72, clock=1.695e9, peak=125e12, device="NVIDIA A10"),
}

# (n, k) of the latency table of LUT-GEMM (arXiv 2206.09557), batch 1.
SHAPES = (
    (512, 2048),
    (1024, 4096),
    (2048, 8192),
    (4096, 16384),
    (7168, 28672),
    (8192, 32768),
    (12288, 49152),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How weights are stored, and what a kernel executes per weight."""

    bits: int
    kind: str  # "dense", "tiles" or "planes"
    instructions: float = 0.0  # per weight and pass; 0: a library's kernel
    rows: int = 1  # of inputs that a pass takes
    most: int | None = None  # rows that packed codes are multiplied with; more: dequantized first; None: any number


# Instructions as compiled for sm_80 (`python -m qfarm.kernels.aot --targets sm_80`): groups of 128, 128 rows, w4 on
# tensor cores, bcq3 with mu = 4; bcq4 is 4 / 3 of it.
FORMATS = {
    "fp16": Format(bits=16, kind="dense"),
    "w8": Format(bits=8, kind="tiles", instructions=4.58, most=GEMV_ROWS),
    "w4": Format(bits=4, kind="tiles", instructions=2.53, rows=SMALL_ROWS, most=SMALL_ROWS),
    "w3": Format(bits=3, kind="tiles", instructions=5.82, most=GEMV_ROWS),
    "bcq4": Format(bits=4, kind="planes", instructions=6.37),
    "bcq3": Format(bits=3, kind="planes", instructions=4.78),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    moved: int  # bytes
    memory_s: float  # the roofline: all of them at full bandwidth
    issue_s: float
    matrix_s: float
    goal_s: float
    limit: str  # which of the three decides: memory, issue, matrix


def profile(device: str) -> str | None:
    """The name in `GPUS` of a device that CUDA calls so; None for one whose figures are not there."""
    return next((name for name, gpu in GPUS.items() if gpu.device == device), None)


def refusal(form: Format, k: int) -> str | None:
    """Why a weight with k inputs cannot be stored so; None where it can."""
    grouped = form.kind == "planes" or (form.kind == "tiles" and form.bits != 8)
    return f"groups of {GROUP} do not divide {k} inputs" if grouped and k % GROUP else None


def stored_bytes(form: Format, n: int, k: int) -> int:
    """Bytes of a weight [n, k]: groups of 128 with integer zeros (offsets for planes), 8 bits with a scale per row."""
    if form.kind == "dense":
        return n * k * form.bits // 8
    if form.kind == "planes":
        return n * k * form.bits // 8 + k // GROUP * n * 2 * (form.bits + 1)
    if form.bits == 8:
        return weight_bytes(n, k, 8, k, zero_bytes=0)
    return weight_bytes(n, k, form.bits, GROUP)


def predict(gpu: GPU, form: Format, m: int, n: int, k: int) -> Prediction:
    """The model for x [m, k] times a weight [n, k] in that format."""
    stored = stored_bytes(form, n, k)
    moved = stored + 2 * m * k + 2 * m * n
    if form.most is not None and m > form.most:
        passes, launches, extra = 0, 2, 2 * 2 * n * k  # no passes: the dequantizer's instructions are not counted
    else:
        passes = -(-m // form.rows) if form.instructions else 1
        launches = passes if form.kind == "planes" else 1
        extra = (passes - 1) * stored
    rows = -(-m // TENSOR_CORE_ROWS) * TENSOR_CORE_ROWS
    bounds = {
        "memory": moved / gpu.bandwidth,
        "issue": passes * n * k * form.instructions / (gpu.processors * LANES * gpu.clock),
        "matrix": 2 * rows * n * k / gpu.peak,
    }
    paid = bounds | {"memory": (moved + extra) / gpu.bandwidth}
    needed = {name: seconds / REACHED[name] for name, seconds in paid.items()}
    limit = max(needed, key=lambda name: needed[name])
    return Prediction(
        moved=moved,
        memory_s=bounds["memory"],
        issue_s=bounds["issue"],
        matrix_s=bounds["matrix"],
        goal_s=launches * LAUNCH_S + needed[limit],
        limit=limit,
    )
