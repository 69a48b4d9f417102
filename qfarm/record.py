"""Records: the rows of the store's tables, with units, as dataclasses and as Arrow schemas.

The dataclasses are the schema: a field's annotation gives the Arrow type, its metadata the unit. `FORMAT` is the
version of the whole layout; readers refuse stores of a newer one and fill columns that an older one lacks with nulls.
"""

from __future__ import annotations

import dataclasses
import datetime
import types
import typing
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

FORMAT = 1


def utc_now() -> str:
    """The time as every column and manifest holds it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _unit(text: str, default: Any = dataclasses.MISSING) -> Any:
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata={"unit": text})
    return dataclasses.field(default=default, metadata={"unit": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellRow:
    """A quantized cell: its axes, what it holds, how much of the model it covers."""

    cell_id: str
    attempt_id: str
    job: str
    model: str
    fingerprint: str
    recipe: str
    scheme: str
    group_size: int
    seed: int | None
    symmetric: bool
    scale_dtype: str
    dtype: str
    statistics: str | None
    spec: str = _unit("JSON of the whole cell")
    linear_bits: float = _unit("stored bits per weight of the quantized layers, metadata included")
    model_bits: float = _unit("stored bits per parameter of the whole model")
    linear_bytes: int = _unit("bytes of the quantized layers, packed")
    model_bytes: int = _unit(
        "bytes of the whole model: quantized layers packed, the rest in the model's dtype, what activations store"
    )
    layers_quantized: int
    layers_skipped: int
    kv_bits: float | None = _unit("stored bits per cached number after 2,048 tokens; None: 16 bits, or simulated", None)
    payload_bits: float | None = _unit(
        "bits per weight of the quantized layers, flags of groups included, scales and zeros not; None: unknown", None
    )
    activation_bits: float | None = _unit(
        "bits per number at linear inputs, flags of groups included, scales of a call not; None: not quantized", None
    )
    activation_bytes: int | None = _unit("bytes of what calibration fixed for activations; None: unknown", None)
    kernel_bytes: int | None = _unit(
        "bytes of the quantized layers in the layout that kernels read; None: unknown, or a layer has none", None
    )
    kernel_causes: str | None = _unit(
        "JSON: kernel_bytes - linear_bytes by cause (padding, wider_codes, scales, zeros), or no_layout: the reason",
        None,
    )
    kept_share: float | None = _unit("share of all parameters that are left in the model's dtype; None: unknown", None)
    causal: bool | None = _unit("no quantizer beside the weights looks across tokens; None: there is none", None)
    created: str = _unit("UTC, ISO 8601")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttemptRow:
    """One try of a cell on a worker, successful or not."""

    attempt_id: str
    cell_id: str
    model: str
    label: str = _unit("recipe, scheme, group and seed, for cells that never get a row of their own")
    job: str
    number: int = _unit("1 is the first try of this submission")
    evaluations: str = _unit("JSON: the eval_ids that it was to run")
    outcome: str = _unit("ok, or the kind of failure")
    stage: str = _unit("the last stage reached")
    error: str | None = _unit("one line", None)
    traceback: str | None = None
    worker: str
    node: str
    started: str = _unit("UTC, ISO 8601")
    wall_s: float
    stages: str = _unit("JSON: seconds per stage")
    peak_host_bytes: int | None = None
    peak_gpu_bytes: int | None = None
    notes: str = _unit("JSON: what the attempt did differently, e.g. a halved batch", "[]")
    provenance: str = _unit("JSON: versions, commit, hardware, threads, command")
    expected_s: float | None = _unit("seconds that the plan expected; None: it was not asked", None)
    expected_from: str | None = _unit("store, or the rate of the arithmetic", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of an evaluation."""

    metric: str
    value: float
    unit: str
    better: str = _unit("lower, higher, or none")
    n: int = _unit("units used: windows or items")
    clusters: int | None = _unit("independent clusters behind the standard error", None)
    standard_error: float | None = _unit("None where it cannot be known, e.g. below 10 clusters", None)
    low: float | None = _unit("lower end of the 95 % interval", None)
    high: float | None = _unit("upper end of the 95 % interval", None)
    stopped_early: int | None = _unit("windows seen when the hopeless stop ended the evaluation; None: all", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricRow(Metric):
    cell_id: str
    eval_id: str
    attempt_id: str
    evaluation: str = _unit("the evaluation's label")
    protocol: str = _unit("JSON: everything rows must agree on to be compared")
    created: str = _unit("UTC, ISO 8601")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """One entry of the ledger: a window's piece of one document, or a task's item."""

    document: str = _unit("hash of the token ids, not a position")
    cluster: str = _unit("hash of what is not independent: article, passage, twin pair")
    window: int | None = _unit("index of the window in the protocol's order", None)
    tokens: int = _unit("predicted tokens")
    loss: float | None = _unit("nats, summed over tokens", None)
    correct: int | None = _unit("tokens or items right", None)
    answer: str | None = _unit("index of the chosen answer, or the generated text", None)
    choices: list[float] | None = _unit("nats, log-likelihood of each choice of an item", None)
    task: str | None = _unit("the task of a suite that an item belongs to", None)
    agree: int | None = _unit("tokens whose top-1 equals the baseline's", None)
    lost: int | None = _unit("right in the baseline, wrong here", None)
    gained: int | None = _unit("wrong in the baseline, right here", None)
    kl: float | None = _unit("nats, KL(baseline || cell) summed over tokens", None)
    kl_reverse: float | None = _unit("nats, KL(cell || baseline) summed over tokens", None)
    baseline_loss: float | None = _unit("nats, summed, the baseline's on the same tokens", None)
    kl_histogram: bytes | None = _unit("token KL(baseline || cell) in 256 bins, see qfarm.divergence", None)
    elements: int | None = _unit("numbers at the input of a linear layer", None)
    zeroed: int | None = _unit("of those, numbers that are zero after their quantizer", None)
    zeros: int | None = _unit("of those, numbers that were zero before", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentRow(Document):
    cell_id: str
    eval_id: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One linear layer of a cell: quantized, or left alone with the reason."""

    cell_id: str
    layer: int
    role: str
    module: str
    rows: int
    columns: int
    solver: str | None = _unit("the solver that made the layer; None if it was left alone")
    reason: str | None = _unit("why it was left alone", None)
    bits: int | None = None
    group_size: int | None = None
    stored_bytes: int
    weight_error: float | None = _unit("||W - Q||^2 / ||W||^2", None)
    output_error: float | None = _unit("||(W - Q)X||^2 / ||WX||^2 on calibration inputs", None)
    notes: str = _unit("JSON: figures of the solver", "{}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerStatistic:
    """One figure of one tensor of one linear layer."""

    layer: int
    role: str
    tensor: str = _unit("weight, input, output, each also with _quantized; accumulated: the input, errors upstream")
    statistic: str = _unit("sqnr (dB), mse, mean, std, min, max, kurtosis (excess)")
    value: float = _unit("infinite SQNR: no error; NaN kurtosis: a constant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalysisRow(LayerStatistic):
    cell_id: str
    eval_id: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelFigures:
    """A kernel timed on a GPU, predicted for one, or compiled for one and not run: `kind` says which."""

    kind: str = _unit("measured, predicted or compiled: no column mixes them without it")
    gpu: str = _unit("measured: the device; predicted: a name of qfarm.kernels.roofline.GPUS; compiled: the target")
    form: str = _unit("format of the weight; baselines: fp16, bf16, copy (of the float16 weight); compiled: the launch")
    m: int | None = _unit("rows of inputs, of x [m, k] times a weight [n, k]; None: compiled", None)
    n: int | None = _unit("outputs", None)
    k: int | None = _unit("inputs", None)
    median_s: float | None = _unit("seconds per launch with a cold cache; None: not measured, or rejected", None)
    p20_s: float | None = _unit("seconds, 20th percentile", None)
    p80_s: float | None = _unit("seconds, 80th percentile", None)
    samples: int | None = None
    moved_bytes: int | None = _unit("weight, inputs and outputs once; copy: read and written", None)
    gb_per_s: float | None = _unit("1e9 bytes/s: moved_bytes / median_s", None)
    memory_s: float | None = _unit("seconds: moved_bytes / the GPU's bandwidth; None: no such figure of the GPU", None)
    efficiency: float | None = _unit("memory_s / median_s", None)
    predicted_s: float | None = _unit("seconds by qfarm.kernels.roofline, which is no measurement", None)
    limit: str | None = _unit("what decides predicted_s: memory, issue or matrix", None)
    ratio_fp16: float | None = _unit("seconds of the library's float16 product / this one's, of the same kind", None)
    registers: int | None = _unit("per thread", None)
    spills: int | None = None
    shared_bytes: int | None = None
    per_weight: float | None = _unit("instructions per weight, or per element of what is no weight", None)
    verdict: str | None = _unit("compiled: kept, or what breaches the launch's budget", None)
    error: str | None = _unit("why there are no times or predictions", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelRow(KernelFigures):
    """A kernel on one shape, timed on a GPU, predicted for one, or compiled and not run: `kind` says which."""

    run_id: str = _unit("one call of `qfarm bench kernels`")
    created: str = _unit("UTC, ISO 8601")
    provenance: str = _unit("JSON: versions, commit, hardware, seed; clocks, power limit, temperature before and after")


TABLES: dict[str, type] = {
    "cells": CellRow,
    "attempts": AttemptRow,
    "metrics": MetricRow,
    "documents": DocumentRow,
    "layers": LayerRow,
    "analysis": AnalysisRow,
    "kernels": KernelRow,
}

_ARROW = {
    str: pa.string(),
    bytes: pa.binary(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    list[float]: pa.list_(pa.float64()),
}


def schema(table: str) -> pa.Schema:
    """The Arrow schema of a table; units stand in the fields' metadata."""
    row = TABLES[table]
    hints = typing.get_type_hints(row)
    fields = []
    for field in dataclasses.fields(row):
        hint = hints[field.name]
        optional = isinstance(hint, types.UnionType)
        base = next(t for t in typing.get_args(hint) if t is not types.NoneType) if optional else hint
        metadata = {"unit": field.metadata["unit"]} if "unit" in field.metadata else None
        fields.append(pa.field(field.name, _ARROW[base], nullable=optional, metadata=metadata))
    return pa.schema(fields, metadata={"qfarm_format": str(FORMAT), "qfarm_table": table})


def to_table(table: str, rows: Iterable[Any]) -> pa.Table:
    """Rows of one table as Arrow."""
    target = schema(table)
    columns: dict[str, list[Any]] = {name: [] for name in target.names}
    for row in rows:
        for name, values in columns.items():
            values.append(getattr(row, name))
    try:
        return pa.table(columns, schema=target)
    except UnicodeEncodeError:
        # An error message may quote a file name that is not UTF-8; a failure must be recorded all the same.
        return pa.table({name: [_encodable(v) for v in values] for name, values in columns.items()}, schema=target)


def _encodable(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
