"""RTN: every weight to the nearest point of its grid, nothing else touched, nothing looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfarm.calibrate import LayerResult, quantize_weights
from qfarm.methods.rtn import METHOD, RTN
from qfarm.models.load import LoadedModel
from qfarm.quantized import unpack_bits
from qfarm.quantizer import Convention, Grid
from tests.conftest import TINY
from tests.contract import by_threads
from tests.test_models import loaded


def quantize(model: LoadedModel, grid: Grid | None, solver: RTN | None = None) -> list[LayerResult]:
    quiet = {"sequential": True, "report": lambda done, total: None}
    return quantize_weights(model, solver or RTN(), lambda role: grid, None, **quiet)


def tensors(model: LoadedModel) -> dict[str, Tensor]:
    """Every parameter and buffer, the tied ones too."""
    named = [*model.model.named_parameters(remove_duplicate=False), *model.model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def linear_names(model: LoadedModel) -> set[str]:
    return {f"{model.module_name(i, role)}.weight" for i in range(len(model.blocks)) for role in model.linears(i)}


def weight(rows: int = 24, columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.manual_seed(seed)) * 0.1 + 0.02


GRIDS = [
    Grid(bits=bits, group_size=group, symmetric=symmetric, scale_dtype=dtype)
    for bits, group, symmetric, dtype in (
        (4, -1, False, torch.float16),
        (3, 16, False, torch.float16),
        (4, 16, True, torch.float16),
        (2, 32, False, torch.bfloat16),
        (8, -1, True, torch.float32),
    )
]


def test_it_is_what_a_job_calls_rtn() -> None:
    assert METHOD is RTN and RTN().name == "rtn"
    assert RTN().options() == {"search": False, "convention": "restricted", "per_tensor": False}
    assert RTN().identity() == {"search": False, "convention": "restricted"}  # ids of stored cells stay
    assert RTN(per_tensor=True).identity()["per_tensor"] is True
    assert not RTN().needs_text and not RTN().needs_seed and RTN().statistics() == frozenset()


# -- on matrices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weights_on_the_grid_stay_where_they_are(grid: Grid) -> None:
    rows, columns = 24, 64
    generator = torch.manual_seed(0)
    groups = columns // (columns if grid.group_size == -1 else grid.group_size)
    codes = torch.randint(int(grid.symmetric), grid.top + 1, (rows, groups, columns // groups), generator=generator)
    codes[..., 3], codes[..., 7] = int(grid.symmetric), grid.top  # the range of each group is used to its ends
    zero = torch.randint(0, grid.top + 1, (rows, groups, 1), generator=generator)
    if grid.symmetric:
        zero[:] = (grid.top + 1) // 2
    scale = torch.randint(1, 64, (rows, groups, 1), generator=generator) / 1024  # exact in every storage dtype
    w = ((codes - zero) * scale).reshape(rows, columns)
    q = RTN().quantize_linear(w, None, grid)
    assert torch.equal(q.dequantize(), w)
    assert torch.equal(q.codes, codes.reshape(rows, columns).to(torch.uint8))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [-1, 16])
def test_no_weight_moves_by_more_than_half_a_step(bits: int, group: int) -> None:
    grid = Grid(bits=bits, group_size=group, scale_dtype=torch.float32)
    w = weight()
    q = RTN().quantize_linear(w, None, grid).dequantize()
    size = w.shape[1] if group == -1 else group
    grouped = w.reshape(len(w), -1, size)
    step = (grouped.amax(-1).clamp(min=0) - grouped.amin(-1).clamp(max=0)) / (2**bits - 1)
    assert ((q - w).reshape(grouped.shape).abs() <= step[..., None] * 0.50001).all()


def test_a_row_by_hand() -> None:
    # Asymmetric, 2 bits: low -1, high 2, step 1, zero 1; codes 0 to 3 stand for -1, 0, 1, 2. Half goes to even.
    w = torch.tensor([[-1.0, -0.4, 0.5, 1.5, 2.0, 0.0]])
    q = RTN().quantize_linear(w, None, Grid(bits=2, scale_dtype=torch.float32))
    assert q.codes.tolist() == [[0, 1, 1, 3, 3, 1]]
    assert q.dequantize().tolist() == [[-1.0, 0.0, 0.0, 2.0, 2.0, 0.0]]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rows_are_rounded_one_by_one(grid: Grid) -> None:
    """So the order in which layers are quantized, or stacked, cannot matter."""
    w = weight()
    whole = RTN().quantize_linear(w, None, grid).dequantize()
    order = torch.randperm(len(w), generator=torch.manual_seed(1))
    assert torch.equal(RTN().quantize_linear(w[order], None, grid).dequantize(), whole[order])
    parts = [RTN().quantize_linear(part, None, grid).dequantize() for part in w.split(7)]
    assert torch.equal(torch.cat(parts), whole)


def test_search_lowers_the_error_that_it_searches_for() -> None:
    w = weight()
    w[:, 5] *= 12  # an outlier that a clipped range gives up
    grid = Grid(bits=3, group_size=-1)

    def error(solver: RTN) -> float:
        return float((solver.quantize_linear(w, None, grid).dequantize() - w).abs().pow(2.4).sum())

    assert error(RTN(search=True)) < 0.9 * error(RTN())


@pytest.mark.parametrize(
    ("convention", "step"), [("restricted", 1 / 7), ("full_range_offset", 2 / 15), ("deepspeed", 1 / 8)]
)
def test_conventions_of_symmetric_grids(convention: Convention, step: float) -> None:
    w = torch.tensor([[-1.0, 0.3, 0.5, 1.0]])
    grid = Grid(bits=4, symmetric=True, scale_dtype=torch.float32)
    q = RTN(convention=convention).quantize_linear(w, None, grid)
    steps = q.dequantize() / step
    assert torch.allclose(steps, steps.round(), atol=1e-4) and q.solver == "rtn"


def test_one_grid_for_the_whole_matrix_by_hand() -> None:
    # 2 bits: low -1, high 2 over both rows, so step 1 and zero 1; by rows the second would be exact.
    w = torch.tensor([[-1.0, 2.0, 0.4], [0.0, 0.3, 0.9]])
    grid = Grid(bits=2, scale_dtype=torch.float32)
    q = RTN(per_tensor=True).quantize_linear(w, None, grid)
    assert q.dequantize().tolist() == [[-1.0, 2.0, 0.0], [0.0, 0.0, 1.0]]
    assert q.scale.tolist() == [[1.0]] and q.zero is not None and q.zero.tolist() == [[1]]
    assert not torch.equal(RTN().quantize_linear(w, None, grid).dequantize()[1], q.dequantize()[1])
    one_row = weight(1)
    by_row, whole = (RTN(per_tensor=flag).quantize_linear(one_row, None, grid) for flag in (False, True))
    assert torch.equal(whole.dequantize(), by_row.dequantize()) and whole.stored_bytes() == by_row.stored_bytes()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 4),
    size=st.integers(1, 19),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    per_tensor=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_storage(
    rows: int, groups: int, size: int, bits: int, symmetric: bool, per_tensor: bool, dtype: torch.dtype
) -> None:
    columns = groups * size
    grid = Grid(bits=bits, group_size=-1 if per_tensor else size, symmetric=symmetric, scale_dtype=dtype)
    q = RTN(per_tensor=per_tensor).quantize_linear(weight(rows, columns), None, grid)
    tensors = q.packed()
    assert q.stored_bytes() == sum(t.numel() * t.element_size() for t in tensors.values())
    scale = tensors["weight_scale"].float()
    codes = unpack_bits(tensors["weight_packed"], bits, columns).float().reshape(rows, scale.shape[1], -1)
    zero = torch.full_like(scale, 2.0 ** (bits - 1))
    if not symmetric:
        zero = unpack_bits(tensors["weight_zero_point"].T.contiguous(), bits, len(scale)).T.float()
    assert torch.equal(((codes - zero[..., None]) * scale[..., None]).reshape(rows, columns), q.dequantize())
    part = q.row_range(rows // 2, rows)
    assert torch.equal(part.dequantize(), q.dequantize()[rows // 2 :])
    assert part.stored_bytes() == sum(t.numel() * t.element_size() for t in part.packed().values())


def test_effective_bits() -> None:
    w = weight(64, 256)
    for grid, solver, expected in (
        (Grid(bits=4, group_size=128), RTN(), 4 + 20 / 128),
        (Grid(bits=4, group_size=128, symmetric=True), RTN(), 4 + 16 / 128),
        (Grid(bits=4), RTN(), 4 + 20 / 256),
        (Grid(bits=4, symmetric=True), RTN(per_tensor=True), 4 + 16 / (64 * 256)),
        (Grid(bits=4), RTN(per_tensor=True), 4 + (16 + 32) / (64 * 256)),  # the zero takes a word
    ):
        assert 8 * solver.quantize_linear(w, None, grid).stored_bytes() / w.numel() == pytest.approx(expected)


def test_threads_do_not_change_the_result() -> None:
    """Bit for bit, at an odd size: nothing here is summed in an order that depends on the number of threads."""
    solver, grid = RTN(search=True), Grid(bits=3, group_size=77)
    one, two = by_threads(lambda: solver.quantize_linear(weight(333, 770), None, grid).dequantize(), 1, 2)
    assert torch.equal(one, two)


def test_per_tensor_refuses_groups_and_stacks() -> None:
    assert "group size -1" in str(RTN(per_tensor=True).refusal(64, False))
    assert RTN(per_tensor=True).refusal(-1, True) is None and RTN().refusal(64, False) is None
    assert RTN().stackable and not RTN(per_tensor=True).stackable


# -- on models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY)
def test_only_decoder_linears_change(tiny_models: dict[str, Path], family: str) -> None:
    model = loaded(tiny_models[family])
    before = tensors(model)
    results = quantize(model, Grid(bits=3, group_size=16))
    after = tensors(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == linear_names(model)
    assert [(r.solver, r.bits, r.group_size) for r in results] == [("rtn", 3, 16)] * len(linear_names(model))


@pytest.mark.parametrize("family", TINY)
def test_each_layer_is_its_own_weight_rounded(tiny_models: dict[str, Path], family: str) -> None:
    """Whatever the walk does with order and stacking, each layer is what RTN makes of its weight alone."""
    model = loaded(tiny_models[family])
    grid = Grid(bits=4, group_size=32)
    blocks = range(len(model.blocks))
    alone = {
        (i, role): RTN().quantize_linear(linear.weight.detach(), None, grid).dequantize()
        for i in reversed(blocks)
        for role, linear in reversed(model.linears(i).items())
    }
    quantize(model, grid)
    assert all(torch.equal(model.linears(i)[role].weight, values) for (i, role), values in alone.items())


def test_each_layer_has_a_grid_of_its_own_per_tensor(tiny: Path) -> None:
    model = loaded(tiny)
    grid = Grid(bits=4)
    solver = RTN(per_tensor=True)
    alone = {role: solver.quantize_linear(li.weight.detach(), None, grid) for role, li in model.linears(0).items()}
    assert all(len(q.dequantize().unique()) <= 16 for q in alone.values())
    quantize(model, grid, solver)
    assert all(torch.equal(model.linears(0)[role].weight, q.dequantize()) for role, q in alone.items())


def test_16_bits_change_nothing(tiny: Path) -> None:
    model = loaded(tiny, "bfloat16")
    ids = torch.arange(40)[None]
    before, logits = tensors(model), model.model(ids).logits
    results = quantize(model, None)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(model).items())
    assert torch.equal(model.model(ids).logits, logits)
    assert {(r.solver, r.bits, r.reason) for r in results} == {(None, None, "the scheme leaves this layer at 16 bits")}


def test_logits_move_less_with_more_bits(tiny: Path) -> None:
    model = loaded(tiny)
    ids = torch.arange(60)[None]
    logits = model.model(ids).logits
    moved = []
    for bits in (8, 6, 4, 2):
        quantize(model, Grid(bits=bits))
        moved.append(float((model.model(ids).logits - logits).norm() / logits.norm()))
        model.restore()
    assert moved == sorted(moved) and moved[0] < 0.05 and moved[-1] > 0.2


def test_weights_are_those_that_are_stored(tiny: Path) -> None:
    """Half precision models hold the dequantized weight rounded once more, and nothing else."""
    model = loaded(tiny, "bfloat16")
    grid = Grid(bits=4, group_size=16)
    original = model.linears(1)["down"].weight.detach().clone()
    quantize(model, grid)
    expected = RTN().quantize_linear(original, None, grid).dequantize().to(torch.bfloat16)
    assert torch.equal(model.linears(1)["down"].weight, expected)
