"""Records: the dataclasses are the schema."""

import dataclasses
import re
import types
import typing

import pyarrow as pa
import pytest

from qfarm import record

SUPPORTED = {str, bytes, int, float, bool, list[float]}
# Numbers without a unit in the metadata: names, counts, sizes in weights; `_s` and `_bytes` say theirs in the name.
UNITLESS = {
    "cells": {"group_size", "seed", "layers_quantized", "layers_skipped"},
    "attempts": set(),
    "metrics": {"value"},  # its unit is a column
    "documents": set(),
    "layers": {"layer", "rows", "columns", "bits", "group_size"},
    "analysis": {"layer"},
    "kernels": {"samples", "spills"},
}
COLUMNS = {
    "cells": "cell_id attempt_id job model fingerprint recipe scheme group_size seed symmetric scale_dtype dtype "
    "statistics spec linear_bits model_bits linear_bytes model_bytes layers_quantized layers_skipped kv_bits "
    "payload_bits activation_bits activation_bytes kernel_bytes kernel_causes kept_share causal created",
    "attempts": "attempt_id cell_id model label job number evaluations outcome stage error traceback worker node "
    "started wall_s stages peak_host_bytes peak_gpu_bytes notes provenance expected_s expected_from",
    "metrics": "metric value unit better n clusters standard_error low high stopped_early cell_id eval_id attempt_id "
    "evaluation protocol created",
    "documents": "document cluster window tokens loss correct answer choices task agree lost gained kl kl_reverse "
    "baseline_loss kl_histogram elements zeroed zeros cell_id eval_id",
    "layers": "cell_id layer role module rows columns solver reason bits group_size stored_bytes weight_error "
    "output_error notes",
    "analysis": "layer role tensor statistic value cell_id eval_id",
    "kernels": "kind gpu form m n k median_s p20_s p80_s samples moved_bytes gb_per_s memory_s efficiency predicted_s "
    "limit ratio_fp16 registers spills shared_bytes per_weight verdict error run_id created provenance",
}
SAMPLES = {str: "text", bytes: b"\x00\xff", int: 3, float: 0.25, bool: True, list[float]: [0.5, -1.0]}


def parts_of(hint: object) -> set[object]:
    return set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}


def sample(table: str, *, nulls: bool) -> object:
    """A row with every field set, or with every field None that may be."""
    hints = typing.get_type_hints(record.TABLES[table])
    values = {}
    for name, hint in hints.items():
        optional = types.NoneType in parts_of(hint)
        values[name] = None if nulls and optional else SAMPLES[next(iter(parts_of(hint) - {types.NoneType}))]
    return record.TABLES[table](**values)


@pytest.mark.parametrize("table", record.TABLES)
def test_annotations_are_a_supported_type_or_that_type_and_none(table: str) -> None:
    for name, hint in typing.get_type_hints(record.TABLES[table]).items():
        assert len(parts_of(hint) - {types.NoneType}) == 1, name
        assert parts_of(hint) - {types.NoneType} <= SUPPORTED, name


@pytest.mark.parametrize("table", record.TABLES)
def test_schema_follows_the_dataclass(table: str) -> None:
    hints = typing.get_type_hints(record.TABLES[table])
    arrow = {str: pa.string(), bytes: pa.binary(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    arrow |= {list[float]: pa.list_(pa.float64())}
    for field in record.schema(table):
        assert field.type == arrow[next(iter(parts_of(hints[field.name]) - {types.NoneType}))], field.name
        assert field.nullable == (types.NoneType in parts_of(hints[field.name])), field.name


@pytest.mark.parametrize("table", record.TABLES)
def test_units_stand_in_the_schema(table: str) -> None:
    schema = record.schema(table)
    units = {field.name: (field.metadata or {}).get(b"unit", b"").decode() for field in schema}
    declared = {field.name: field.metadata.get("unit", "") for field in dataclasses.fields(record.TABLES[table])}
    assert units == declared


@pytest.mark.parametrize("table", record.TABLES)
def test_every_number_has_a_unit(table: str) -> None:
    for field in record.schema(table):
        if pa.types.is_integer(field.type) or pa.types.is_floating(field.type):
            known = b"unit" in (field.metadata or {}) or re.search(r"_(s|bytes)$", field.name)
            assert known or field.name in UNITLESS[table], f"{table}.{field.name}"


@pytest.mark.parametrize("table", record.TABLES)
def test_the_order_of_columns_is_stable(table: str) -> None:
    assert record.schema(table).names == COLUMNS[table].split()


@pytest.mark.parametrize("table", record.TABLES)
def test_schema_says_its_table_and_format(table: str) -> None:
    metadata = record.schema(table).metadata
    assert metadata == {b"qfarm_format": str(record.FORMAT).encode(), b"qfarm_table": table.encode()}


@pytest.mark.parametrize("table", record.TABLES)
def test_rows_survive_the_way_through_arrow(table: str) -> None:
    rows = [sample(table, nulls=False), sample(table, nulls=True)]
    arrow = record.to_table(table, rows)
    assert arrow.schema.equals(record.schema(table), check_metadata=True)
    assert [record.TABLES[table](**row) for row in arrow.to_pylist()] == rows
    arrow.validate(full=True)


def test_no_rows_make_an_empty_table() -> None:
    assert record.to_table("cells", []).num_rows == 0


def test_a_value_of_another_type_is_refused() -> None:
    row = dataclasses.replace(sample("cells", nulls=False), group_size="128")
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError)):
        record.to_table("cells", [row])


def test_text_that_is_not_utf_8_does_not_lose_the_row() -> None:
    row = dataclasses.replace(sample("attempts", nulls=False), error="no file \udcff here")
    assert record.to_table("attempts", [row])["error"].to_pylist() == ["no file ? here"]
