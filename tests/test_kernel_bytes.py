"""Kernel bytes: equal to what the packer allocates, and the causes of a difference add up to it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qfarm.kernel_bytes import CAUSES, KernelBytes, kernel_bytes, of_layers
from qfarm.kernels import pack
from qfarm.quantized import ColumnScaled, LowRank, UniformWeight
from qfarm.report.show import show
from tests.report_example import RTN, Example, example
from tests.test_products import uniform


@given(
    rows=st.integers(1, 40),
    tiles=st.integers(1, 5),
    group=st.sampled_from([16, 32, 64, 128, 0]),
    bits=st.integers(1, 8),
    zero=st.sampled_from(["none", "integer", "real"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    g_idx=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_bytes_are_those_of_the_packer_and_causes_are_the_difference(
    rows: int, tiles: int, group: int, bits: int, zero: str, dtype: torch.dtype, g_idx: bool
) -> None:
    columns = (group or 37) * tiles
    weight = uniform(rows, columns, bits, group or columns, zero, g_idx=g_idx and bool(group))
    weight = dataclasses.replace(weight, scale=weight.scale.to(dtype))
    found = kernel_bytes(weight)
    width = min(one for one in pack.WIDTHS if one >= bits)
    try:
        packed = pack.pack_weight(weight.codes, weight.scale, weight.zero, width, weight.group_size, weight.g_idx)
    except ValueError as error:
        assert isinstance(found, str) and "groups of" in str(error)
        return
    assert isinstance(found, KernelBytes) and found.total == packed.nbytes
    assert sum(found.causes.values()) == found.total - weight.stored_bytes() and set(found.causes) == set(CAUSES)


def test_the_formula_by_hand() -> None:
    """Four bits in groups of 128: 4.25 bits a weight with float16 zeros; what is stored has zeros of 4 bits."""
    found = kernel_bytes(uniform(64, 256, 4, 128))
    assert isinstance(found, KernelBytes) and found.total * 8 == 64 * 256 * 4.25
    assert found.causes == {"padding": 0, "wider_codes": 0, "scales": 0, "zeros": 64 * 2 * 2 - 2 * 64 * 4 // 8}
    # 200 inputs fill two tiles of 128: 56 codes of 4 bits more than the 25 words of a row.
    ragged = kernel_bytes(uniform(3, 200, 4, 200, "none"))
    assert isinstance(ragged, KernelBytes) and ragged.causes["padding"] == 3 * 28
    # Five bits are held in eight; one scale for the whole matrix becomes one per row.
    wide = kernel_bytes(uniform(8, 64, 5, 64, "none"))
    assert isinstance(wide, KernelBytes) and wide.causes["wider_codes"] == 8 * 64 * 3 // 8 and wide.total == 8 * 66
    one = uniform(1, 64, 8, 64, "none")
    shared = dataclasses.replace(one, codes=one.codes.repeat(8, 1))
    assert kernel_bytes(shared) == KernelBytes(
        total=8 * 66, causes={"padding": 0, "wider_codes": 0, "scales": 7 * 2, "zeros": 0}
    )


def test_what_stands_around_codes_is_kept_and_other_weights_have_a_reason() -> None:
    weight = uniform(16, 128, 4, 128)
    factor, left, right = torch.ones(128).half(), torch.ones(16, 3).half(), torch.ones(3, 128).half()
    around = LowRank(
        base=ColumnScaled(base=weight, factor=factor, folded=False, solver="x"), left=left, right=right, solver="x"
    )
    plain, found = kernel_bytes(weight), kernel_bytes(around)
    assert isinstance(plain, KernelBytes) and isinstance(found, KernelBytes)
    assert found.total == plain.total + 2 * (128 + 16 * 3 + 3 * 128) and found.causes == plain.causes
    assert kernel_bytes(uniform(16, 96, 4, 48)) == "groups of 48 fit no tile of 128 inputs"
    both = of_layers({"a": plain, "b": found})
    assert isinstance(both, KernelBytes) and both.total == plain.total + found.total
    assert both.causes["zeros"] == 2 * plain.causes["zeros"] > 0
    assert of_layers({"a": plain, "b": "Levels has no tiles"}) == "b: Levels has no tiles"

    class Other(UniformWeight):
        pass

    assert isinstance(kernel_bytes(Other(**vars(weight))), KernelBytes)


@pytest.mark.parametrize(
    ("kernel", "causes", "wanted"),
    [
        (
            67_000_000,
            {"padding": 1_500_000, "scales": 0, "zeros": -500_000},
            "67 MB of quantized layers (padding +1.5",
        ),
        (None, {"no_layout": "model.q: SpQRWeight has no tiles"}, "no layout: model.q: SpQRWeight has no tiles"),
    ],
)
def test_a_cell_tells_of_them(kernel: int | None, causes: dict[str, object], wanted: str) -> None:
    small: Example = example()
    index = next(i for i, cell in enumerate(small.store.rows["cells"]) if cell.cell_id == RTN)
    cell = small.store.rows["cells"][index]
    small.store.rows["cells"][index] = dataclasses.replace(cell, kernel_bytes=kernel, kernel_causes=json.dumps(causes))
    text = " ".join(show(small.store, RTN, width=200).split())
    assert wanted in text and ("zeros -" in text) == (kernel is not None)
