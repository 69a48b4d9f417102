"""QRazor: vectors of both stages, what is stored, GPTQ's loop on its grid, the cache, every operating point."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfarm.errors import InvalidInput, NonFinite
from qfarm.inputs import InputStatistics
from qfarm.layers.inject import install_cache
from qfarm.layers.packing import unpack_codes
from qfarm.layers.sites import Place
from qfarm.methods.gptq import GPTQ
from qfarm.methods.qrazor import GROUPS, PreRopeRazorLayer, QRazor, RazorLayer
from qfarm.quantized import unpack_bits
from qfarm.quantizer import Grid
from qfarm.razor import (
    RazorGrid,
    RazorQuantizer,
    RazorWeight,
    Ties,
    base_integers,
    base_scale,
    find_flags,
    flag_bits,
    flag_values,
    payload_bits,
    razor,
    spread,
    steps,
)
from qfarm.recipe import parse_recipe
from qfarm.solver import factorise, group_aware_order
from tests.conftest import TINY
from tests.job_example import CONFIG, changed, labels, matrix
from tests.test_layers_worker import run_all, values
from tests.test_models import loaded

# base integers, r, flag, codes with halves to the even neighbour
VECTORS = [
    ([100, -37, 5, 0, 64, -127, 12, -8], 4, 4, [6, -2, 0, 0, 4, -7, 1, 0]),
    ([7, -6, 5, 0, 1, -2, 3, -7], 4, 0, [7, -6, 5, 0, 1, -2, 3, -7]),
    ([8, -6, 5, 0, 1, -2, 3, -7], 4, 1, [4, -3, 2, 0, 0, -1, 2, -4]),
    ([15, -6, 5, 0, 1, -2, 3, -7], 4, 1, [7, -3, 2, 0, 0, -1, 2, -4]),
    ([127, -127, 119, 120, 121, -120, 60, 8], 4, 4, [7, -7, 7, 7, 7, -7, 4, 0]),
    ([32767, -12345, 255, 256, -4096, 1, 2048, 6144], 4, 12, [7, -3, 0, 0, -1, 0, 0, 2]),
    ([32767, -12345, 255, 256, -4096, 1, 2048, 6144], 8, 8, [127, -48, 1, 1, -16, 0, 8, 24]),
    ([0] * 8, 4, 0, [0] * 8),
]
# The same with halves up, by hand; those that are not here hold no half.
HALVES_UP = {
    0: [6, -2, 0, 0, 4, -7, 1, -1],  # -8 / 16
    2: [4, -3, 3, 0, 1, -1, 2, -4],  # 5 / 2, 1 / 2
    3: [7, -3, 3, 0, 1, -1, 2, -4],
    4: [7, -7, 7, 7, 7, -7, 4, 1],  # 8 / 16; 120 / 16 is capped either way
    5: [7, -3, 0, 0, -1, 0, 1, 2],  # 2048 / 4096
}
groups = st.lists(st.integers(-127, 127), min_size=8, max_size=8)


def razored(base: list[int] | Tensor, bits: int = 4, size: int = 8, ties: Ties = "even") -> Tensor:
    """q_hat of base integers."""
    tensor = torch.as_tensor(base).float()
    codes, flags = razor(tensor, bits, size, ties)
    return codes * spread(steps(flags), size, tensor.shape[-1])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.manual_seed(seed))


# -- the second stage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(VECTORS)))
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("ties", ["even", "up"])
def test_vectors(number: int, sign: int, ties: Ties) -> None:
    base, bits, flag, codes = VECTORS[number]
    codes = HALVES_UP.get(number, codes) if ties == "up" else codes
    found, flags = razor(sign * torch.tensor(base).float(), bits, 8, ties)
    assert flags.tolist() == [flag] and (sign * found).int().tolist() == codes
    assert (sign * razored(sign * torch.tensor(base), bits, ties=ties)).int().tolist() == [c * 2**flag for c in codes]


def test_halves_go_to_even_or_up() -> None:
    base = [64, 24, 40, 8, -24, -8, 0, 1]  # in steps of 16: 4, 1.5, 2.5, 0.5, -1.5, -0.5
    assert razored(base).tolist() == [64, 32, 32, 0, -32, 0, 0, 0]
    assert razored(base, ties="up").tolist() == [64, 32, 48, 16, -32, -16, 0, 0]


def brute(base: list[int], bits: int, ties: Ties = "even") -> list[int]:
    """By shifts and comparisons of integers, one element after another."""
    union = 0
    for q in base:
        union |= abs(q)
    flag = max(0, union.bit_length() - (bits - 1))
    out = []
    for q in base:
        low, rest = abs(q) >> flag, abs(q) & ((1 << flag) - 1)
        half = (1 << flag) >> 1
        code = low + (rest > half or (flag > 0 and rest == half and (ties == "up" or low % 2 == 1)))
        out.append((-1 if q < 0 else 1) * min(code, (1 << (bits - 1)) - 1) << flag)
    return out


@settings(max_examples=80, deadline=None)
@given(groups, st.integers(2, 8))
def test_against_integer_arithmetic_and_its_invariants(base: list[int], bits: int) -> None:
    out = razored(base, bits)
    assert out.int().tolist() == brute(base, bits)
    assert razored(base, bits, ties="up").int().tolist() == brute(base, bits, "up")
    assert torch.equal(razored(out, bits), out), "razoring again changes nothing"
    assert torch.equal(razored([-q for q in base], bits), -out)
    codes, flags = razor(torch.tensor(base).float(), bits, 8)
    assert codes.abs().max() <= 2 ** (bits - 1) - 1 and flags.max() < flag_values(8, bits)
    error, f = (out - torch.tensor(base)).abs(), int(flags[0])
    clipped = torch.tensor(base).abs() > (2 ** (bits - 1) - 1) * 2**f
    assert bool((error[~clipped] <= 2**f / 2).all()) and bool((error[clipped] < 2**f).all())
    order = torch.randperm(8, generator=torch.manual_seed(sum(base) % 100))
    assert torch.equal(razored(torch.tensor(base)[order], bits), out[order])
    if max(map(abs, base)) >= 2 ** (bits - 1):  # f > 0, and so for the doubled group
        assert torch.equal(razored([2 * q for q in base], bits), 2 * out)


@settings(max_examples=60, deadline=None)
@given(groups)
def test_more_bits_and_smaller_groups_do_not_hurt(base: list[int]) -> None:
    tensor = torch.tensor(base).float()
    errors = [float((razored(base, bits) - tensor).abs().sum()) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0, "as many bits as the base: lossless"
    large, small = find_flags(tensor, 4, 8), find_flags(tensor, 4, 4)
    assert bool((small <= large).all())


def test_groups_never_cross_rows() -> None:
    """Twelve columns in groups of eight: the last four have the flag of their own row."""
    base = torch.tensor([[1.0] * 12, [127.0] * 12])
    _, flags = razor(base, 4, 8)
    assert flags.tolist() == [[0, 0], [4, 4]] and torch.equal(razored(base)[0], base[0])


# -- effective bits ---------------------------------------------------------------------------------------------------


def test_effective_bits() -> None:
    table = {
        (8, 4): [4.375, 4.1875, 4.09375, 4.046875, 4.0234375],
        (16, 4): [4.5, 4.25, 4.125, 4.0625, 4.03125],
        (16, 8): [8.5, 8.25, 8.125, 8.0625, 8.03125],
    }
    for (base, bits), expected in table.items():
        assert [payload_bits(base, bits, g) for g in GROUPS] == [Fraction(e) for e in expected]
    assert (flag_bits(8, 4), flag_bits(16, 4), flag_bits(16, 8), flag_bits(8, 8)) == (3, 4, 4, 0)


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize(("bits", "base_bits", "size"), [(4, 8, 8), (3, 8, 32), (8, 8, 16), (4, 16, 64), (2, 8, 128)])
def test_what_is_packed_gives_the_weight_back(axis: Any, bits: int, base_bits: int, size: int) -> None:
    grid = RazorGrid(bits=bits, base_bits=base_bits, group_size=size, axis=axis)
    made = grid.nearest(draw(128, 256))
    tensors = made.packed()
    assert made.stored_bytes() == sum(t.numel() * t.element_size() for t in tensors.values())
    # 128 rows and 256 columns fill whole words: no padding.
    assert made.stored_bytes() == 128 * 256 * payload_bits(base_bits, bits, size) / 8 + 2 * 128
    signed = unpack_bits(tensors["weight_packed"], bits, 256).int()
    sign = 1 << (bits - 1)
    codes = torch.where(signed >= sign, sign - signed, signed).float()
    width = flag_bits(base_bits, bits)
    lines = unpack_bits(tensors["weight_flags"], width, 128 if axis == "in" else 256) if width else None
    flags = made.flags if lines is None else (lines.T if axis == "in" else lines)
    step = steps(flags.int())
    both = spread(step, size, 256) if axis == "in" else spread(step.T, size, 128).T
    assert torch.equal(codes * both * tensors["weight_scale"].float(), made.dequantize())


def test_rows_of_a_weight() -> None:
    made = RazorGrid(bits=4, group_size=16, axis="out").nearest(draw(64, 32))
    part = made.row_range(16, 48)
    assert torch.equal(part.dequantize(), made.dequantize()[16:48])
    with pytest.raises(InvalidInput, match="^rows 8 to 48 are not whole groups of 16 output rows$"):
        made.row_range(8, 48)


# -- weights ----------------------------------------------------------------------------------------------------------


def test_both_stages_in_closed_form() -> None:
    """A row whose largest weight is 127 times a power of two has exact base integers."""
    base = torch.tensor([VECTORS[0][0] + VECTORS[4][0]]).float()
    made = RazorGrid(bits=4, group_size=8).nearest(base / 64)
    assert made.scale.item() == 1 / 64 and made.flags.tolist() == [[4, 4]]
    assert (made.dequantize() * 64).int().tolist() == [[96, -32, 0, 0, 64, -112, 16, 0, *(112, -112, 112, 112, 112)] + [
        -112, 64, 0
    ]]  # fmt: skip
    assert made.notes["zeros"] == 4 / 16


def test_base_scales_per_row_or_group() -> None:
    weight = draw(8, 256)
    for base_group, size in ((-1, 256), (128, 128)):
        made = RazorGrid(bits=8, group_size=32, base_group=base_group).nearest(weight)
        largest = weight.reshape(8, -1, size).abs().amax(-1)
        torch.testing.assert_close(made.scale.float(), largest / 127, rtol=1e-3, atol=0)
    with pytest.raises(NonFinite, match="NaN or Inf"):
        RazorGrid(bits=4, group_size=8).nearest(weight.index_fill(1, torch.tensor([3]), float("nan")))
    with pytest.raises(NonFinite, match="does not fit torch.float16"):
        RazorGrid(bits=4, group_size=8).nearest(weight * 1e8)


def test_refitted_scales_never_hurt_a_row() -> None:
    weight = draw(64, 256) ** 3
    plain, refitted = (RazorGrid(bits=4, group_size=64, refit=refit).nearest(weight) for refit in (False, True))
    before, after = ((w.dequantize() - weight).square().sum(1) for w in (plain, refitted))
    assert bool((after <= before).all()) and float(after.sum()) < 0.99 * float(before.sum())
    assert torch.equal(plain.codes, refitted.codes)


def test_rows_of_zeros() -> None:
    made = RazorGrid(bits=4, group_size=8).nearest(torch.zeros(2, 16))
    assert made.scale.tolist() == [[1.0], [1.0]] and made.flags.max() == 0 and made.dequantize().abs().max() == 0


# -- inside GPTQ's loop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("order", ["natural", "groups", "torn"])
@pytest.mark.parametrize("static", [False, True])
def test_without_feedback_the_loop_is_rounding_to_nearest(axis: Any, order: str, static: bool) -> None:
    weight = draw(32, 64)
    orders = {
        "natural": torch.arange(64),
        "groups": group_aware_order(draw(64, seed=1), 16),
        "torn": torch.randperm(64, generator=torch.manual_seed(2)),
    }
    grid = RazorGrid(bits=4, group_size=16, axis=axis)
    made = grid.compensate(weight, factorise(torch.eye(64), orders[order], 0.01, 0.01), static=static)
    nearest = grid.nearest(weight)
    assert torch.equal(made.codes, nearest.codes) and torch.equal(made.flags, nearest.flags)
    assert torch.equal(made.scale, nearest.scale) and made.notes["clipped"] <= 0.05


def statistics(columns: int, seed: int = 0) -> InputStatistics:
    x = draw(512, columns, seed=seed) @ draw(columns, columns, seed=seed + 1) / columns**0.5
    return InputStatistics(tokens=512, hessian=x.T @ x / 512, sample=x)


@pytest.mark.parametrize("options", [{}, {"static_groups": True}, {"act_order": True}, {"group_aware": False}])
def test_gptq_makes_up_for_errors_on_this_grid(options: dict[str, Any]) -> None:
    weight, inputs, grid = draw(32, 64), statistics(64), RazorGrid(bits=4, group_size=16)
    made = GPTQ(**options).quantize_linear(weight, inputs, grid)
    assert isinstance(made, RazorWeight) and made.solver == "gptq+qrazor" and made.bits == 4
    error, nearest = (inputs.ordinary_error(weight, w.dequantize()) for w in (made, grid.nearest(weight)))
    assert error < 0.8 * nearest
    assert made.notes["ordinary_error_rtn"] == pytest.approx(nearest)
    assert {"loss", "clipped", "zeros"} <= made.notes.keys()
    again = GPTQ(**options).quantize_linear(weight, inputs, grid)
    assert isinstance(again, RazorWeight) and torch.equal(again.codes, made.codes)


def test_flags_are_found_on_current_weights() -> None:
    """Frozen at a group's first column, brute force over one row in natural order."""
    weight, size = draw(1, 16), 8
    weight[0, 8:] *= 0.05  # small, so that feedback moves the second group's largest
    x = draw(256, 16) @ (0.3 * torch.eye(16) + draw(16, 16, seed=5))
    factor = factorise(x.T @ x, torch.arange(16), 0.01, 0.01)
    made = RazorGrid(bits=4, group_size=size, scale_dtype=torch.float32).compensate(weight, factor)
    w, u = weight[0].clone(), factor.upper
    scale = weight.abs().max() / 127
    codes, flags = [], []
    for j in range(16):
        if j % size == 0:
            flags.append(find_flags(base_integers(w[j : j + size], scale, 8), 4, size).item())
        step = 2.0 ** flags[-1]
        base = torch.round(w[j] / scale).clamp(-127, 127)
        code = base.sign() * torch.round(base.abs() / step).clamp(max=7)
        w[j:] -= (w[j] - code * step * scale) / u[j, j] * u[j, j:]
        codes.append(int(code))
    assert made.flags.tolist() == [flags] and made.codes.tolist() == [codes]
    assert flags != RazorGrid(bits=4, group_size=size).nearest(weight).flags[0].tolist()


def test_dead_inputs_and_a_broken_hessian() -> None:
    inputs, weight = statistics(32), draw(8, 32)
    assert inputs.hessian is not None
    inputs.hessian[3] = inputs.hessian[:, 3] = 0
    grid = RazorGrid(bits=4, group_size=8)
    made = GPTQ().quantize_linear(weight, inputs, grid)
    assert float(made.dequantize()[:, 3].abs().max()) == 0
    inputs.hessian = -torch.eye(32)
    fallen_back = GPTQ().quantize_linear(weight, inputs, grid)
    assert fallen_back.solver in ("qrazor", "gptq+qrazor")


# -- activations ------------------------------------------------------------------------------------------------------


def test_an_activation_in_closed_form() -> None:
    base = torch.tensor([[VECTORS[5][0]]]).float()
    eight = RazorQuantizer(bits=8, group_size=8)(base / 1024)
    assert (eight * 1024).int().tolist() == [[[32512, -12288, 256, 256, -4096, 0, 2048, 6144]]]
    half = RazorQuantizer(bits=8, group_size=8)(base.bfloat16())
    assert half.dtype == torch.bfloat16


def test_activation_scales_per_token_or_sequence() -> None:
    x = draw(2, 5, 48)
    x[0, 4] *= 100
    per_token = RazorQuantizer(bits=4, group_size=32)
    whole = per_token(x)
    assert all(torch.equal(per_token(x[b : b + 1, t : t + 1])[0, 0], whole[b, t]) for b in range(2) for t in range(5))
    per_sequence = RazorQuantizer(bits=4, group_size=32, per_tensor=True)
    scale = base_scale(x[0].abs().max(), 16)
    expected = razored(base_integers(x[0], scale, 16), 4, 32) * scale
    assert torch.equal(per_sequence(x)[0], expected) and torch.equal(per_sequence(x[:1]), per_sequence(x)[:1])
    assert QRazor(per_tensor=True).causal is False and QRazor().causal is True
    assert torch.isnan(per_token(torch.full((1, 1, 8), float("nan")))).all()
    assert per_token(torch.zeros(1, 1, 8)).tolist() == [[[0.0] * 8]]


def test_an_outlier_swallows_its_group_only() -> None:
    x = torch.full((1, 1, 32), 0.01)
    x[..., 3] = 1.0
    out = RazorQuantizer(bits=4, group_size=8)(x)
    assert (out[0, 0, :8] == 0).sum() == 7
    torch.testing.assert_close(out[0, 0, 8:], x[0, 0, 8:], rtol=0.05, atol=0)


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "base_bits", "group", "width"), [(4, 8, 8, 64), (8, 8, 32, 64), (3, 16, 32, 80)])
def test_the_cache_holds_what_the_quantizer_gives(bits: int, base_bits: int, group: int, width: int) -> None:
    keys, past = draw(2, 4, 7, width), draw(2, 4, 7, width, seed=1)
    layer = RazorLayer(bits, base_bits, group)
    layer.append(keys, past)
    for found, tensor in zip(layer.read(), (keys, past), strict=True):
        scale = base_scale(tensor.abs().amax(-1, keepdim=True), base_bits, torch.float16)
        expected = razored(base_integers(tensor, scale, base_bits), bits, group) * scale
        assert torch.equal(found, expected), "per head, never across heads"
    stepwise = RazorLayer(bits, base_bits, group)
    for t in range(7):
        stepwise.append(keys[:, :, t : t + 1], past[:, :, t : t + 1])
    assert all(torch.equal(layer.state[name], stepwise.state[name]) for name in layer.state)
    padded = RazorLayer(bits, base_bits, group)
    padded.append(*(torch.cat([torch.zeros(2, 4, 3, width), t], dim=2) for t in (keys, past)))
    assert all(torch.equal(a[:, :, 3:], b) for a, b in zip(padded.read(), layer.read(), strict=True))


@pytest.mark.parametrize(("group", "heads"), [(8, 2), (32, 4), (128, 8)])
def test_stored_bits_of_the_cache(group: int, heads: int) -> None:
    layer = RazorLayer(4, 8, group)
    tensor = draw(1, heads, 5, 128)
    layer.append(tensor, tensor)
    bits = Fraction(8 * layer.stored_bytes(), 2 * tensor.numel())
    assert bits == payload_bits(8, 4, group) + Fraction(16, 128)
    assert unpack_codes(layer.state["k_codes"], 4, 128).max() < 16


def test_heads_may_be_repeated_before_or_after() -> None:
    keys, past = draw(1, 2, 5, 32), draw(1, 2, 5, 32, seed=1)
    few, many = RazorLayer(4, 8, 8), RazorLayer(4, 8, 8)
    few.append(keys, past)
    many.append(keys.repeat_interleave(3, dim=1), past.repeat_interleave(3, dim=1))
    for a, b in zip(few.read(), many.read(), strict=True):
        assert torch.equal(a.repeat_interleave(3, dim=1), b)


@pytest.mark.parametrize("kind", [RazorLayer, PreRopeRazorLayer])
def test_a_cache_gives_tokens_back(kind: type[RazorLayer]) -> None:
    layer, tensor, angle = kind(4, 8, 8), draw(1, 2, 6, 16), draw(1, 6, 8).repeat(1, 1, 2)
    layer.rotation = angle.cos(), angle.sin()
    whole, _ = layer.update(tensor, tensor)
    layer.crop(-2)
    layer.rotation = angle[:, 4:].cos(), angle[:, 4:].sin()
    assert torch.equal(layer.update(tensor[:, :, 4:], tensor[:, :, 4:])[0], whole) and layer.get_seq_length() == 6


def test_nan_is_not_hidden_by_a_razor() -> None:
    tensor = draw(1, 2, 6, 16)
    broken = RazorLayer(4, 8, 8)
    broken.append(tensor.index_fill(-1, torch.tensor([0]), float("nan")), tensor)
    assert torch.isnan(broken.read()[0]).all() and torch.isfinite(broken.read()[1]).all()


def test_where_keys_are_razored() -> None:
    for option, kind in ((False, RazorLayer), (True, PreRopeRazorLayer)):
        layer = QRazor(pre_rope=option).resolve(-1).cache_layer(0, 4, {})()
        assert type(layer) is kind and layer.pre_rope is option and layer.group_size == 8


# -- options, plans and cells -----------------------------------------------------------------------------------------


def test_groups_follow_the_job() -> None:
    found = QRazor().resolve(-1)
    assert (found.group, found.activation_group, found.cache_group) == (32, 32, 8)
    found = QRazor().resolve(16)
    assert (found.group, found.activation_group, found.cache_group) == (16, 16, 16)
    found = QRazor(activation_group=64, cache_group=128).resolve(8)
    assert (found.group, found.activation_group, found.cache_group) == (8, 64, 128)
    assert QRazor().provide(Grid(bits=4, group_size=64)).group_size == 64
    quantizer = QRazor().resolve(-1).quantizer(Place("linear_in", 0, "q"), 4, {})
    assert quantizer == RazorQuantizer(bits=4, base_bits=16, group_size=32)
    with pytest.raises(InvalidInput, match="^qrazor: group: razor groups are 8, 16, 32, 64, 128, got 24$"):
        QRazor(group=24)


@pytest.mark.parametrize(
    ("entry", "size", "rule"),
    [
        ("qrazor", 4, "qrazor: razor groups are 8, 16, 32, 64, 128; the job's group size is 4"),
        ("qrazor: {group: 8}", 16, "qrazor: group 8 contradicts the job's group size 16; leave one of them out"),
        ("qrazor: {base_group: 40}", 16, "qrazor: base_group 40 is no multiple of the razor group 16"),
        ("qrazor: {base_group: 96}", 32, "qrazor: base_group 96 does not divide the 256 inputs of q"),
        ("qrazor: {sdr_axis: out}", -1, "qrazor: sdr_axis: out groups output rows; take group size -1 and give the "),
        ("gptq+qrazor: {gptq: {search: true}}", 16, "qrazor: gptq's option search is of uniform grids; leave it out"),
        ("gptq+qrazor: {qrazor: {refit_scale: true}}", 16, "qrazor: refit_scale would undo what gptq made up for"),
    ],
)
def test_refusals(entry: str, size: int, rule: str) -> None:
    (invalid,) = matrix(changed(methods=f"[rtn, {entry}]", group_sizes=f"[{size}]")).invalid
    assert invalid.rule.startswith(rule)


def test_groups_of_output_rows_divide_every_layer() -> None:
    entry = "[rtn, qrazor: {sdr_axis: out, group: 128}]"
    config = CONFIG | {"num_key_value_heads": 1}
    (invalid,) = matrix(changed(methods=entry, group_sizes="[-1]"), config=config).invalid
    assert invalid.rule == "qrazor: sdr_axis: out: group 128 does not divide the 64 outputs of k"


def test_chains() -> None:
    recipe = parse_recipe("qrazor+gptq")
    assert recipe.name == "gptq+qrazor" and recipe.solver == GPTQ()
    assert isinstance(recipe.grid(Grid(bits=4, group_size=16)), RazorGrid)
    alone = parse_recipe("smoothquant+qrazor")
    own = QRazor().provide(Grid(bits=4))
    assert alone.solver == QRazor() and alone.grid(Grid(bits=4)) == own == QRazor().provide(own)
    with pytest.raises(InvalidInput, match=r"awq has a grid of its own and takes none from qrazor"):
        parse_recipe("awq+qrazor")


def test_every_operating_point_is_a_cell() -> None:
    chains = "[qrazor, smoothquant+qrazor, gptq+qrazor, smoothquant+gptq+qrazor]"
    schemes = ["w4", "w4a8", "w4a4", "w4kv4", "w4a4kv4"]
    found = matrix(changed(methods=chains, bits=f"[{', '.join(schemes)}]", group_sizes="[8, 128]"))
    assert found.invalid == () and len(labels(found)) == 40
    assert {"qrazor w4 g8", "smoothquant+gptq+qrazor w4a4kv4 g128"} <= set(labels(found))
    assert all(not cell.rounded for cell in found.cells), "nothing is left to round to nearest"
    alone = matrix(changed(methods="[qrazor]", bits="[kv4, a4]", group_sizes="[8]"))
    assert labels(alone) == ["qrazor kv4", "qrazor a4"]


JOB = """
models: [{model}]
methods: [qrazor, gptq+qrazor]
bits: [w4, w4a8, w4a4, w4kv4, w4a4kv4]
group_sizes: [8]
dtype: float32
calibration: {{text: python-docs, samples: 4, length: 64}}
evaluate: [perplexity: {{text: python-docs, length: 64, windows: 16}}]
resources: {{gpus: 0}}
"""


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_stored_keys_are_the_razored_keys_before_the_rotary_embedding(
    tiny_models: dict[str, Path], family: str
) -> None:
    """Exactly: what the model's key projection (or its norm) returns, both stages by hand, and nothing after it."""
    model = loaded(tiny_models[family])
    method = QRazor(pre_rope=True, cache_group=8)
    makers = [method.cache_layer(block, 4, {}) for block in range(2)]
    layers = [make() for make in makers]
    install_cache(model, [lambda layer=layer: layer for layer in layers])  # type: ignore[misc]
    keys: list[Tensor] = []
    for block in range(2):
        model.key_maker(block).register_forward_hook(lambda module, args, output: keys.append(output))
    with torch.no_grad():
        model.model(torch.arange(24).reshape(2, 12))
    for layer, key in zip(layers, keys, strict=True):
        key = key.reshape(2, 12, -1, model.head_dim).transpose(1, 2)
        scale = base_scale(key.abs().amax(-1, keepdim=True), 8, torch.float16)
        assert torch.equal(layer.read()[0], razored(base_integers(key, scale, 8)) * scale)


def test_operating_points_run_and_errors_stand_in_order(tmp_path: Path, tiny: Path) -> None:
    farm = run_all(tmp_path, tiny, JOB)
    kl = values(farm, "kl")
    for recipe in ("qrazor", "gptq+qrazor"):
        w4, w4a8, w4a4, w4kv4, w4a4kv4 = (kl[recipe, s] for s in ("w4", "w4a8", "w4a4", "w4kv4", "w4a4kv4"))
        assert 0 < w4 < w4a4 < w4a4kv4 and w4 < w4kv4 < w4a4kv4 and abs(w4a8 - w4) < 0.2 * w4
    assert kl["gptq+qrazor", "w4"] < 0.8 * kl["qrazor", "w4"]
    rows = {(row["recipe"], row["scheme"]): row for row in farm.table("cells")}
    row = rows["gptq+qrazor", "w4a4kv4"]
    # Heads of 16: codes, three bits of flag for eight, and 16 bits of scale; likewise rows of 64 and 128 weights.
    assert row["kv_bits"] == 4 + 3 / 8 + 16 / 16 and row["causal"] is True
    assert 4.375 + 16 / 128 < row["linear_bits"] < 4.375 + 16 / 64
    layers = [layer for layer in farm.table("layers") if layer["cell_id"] == row["cell_id"]]
    assert {(layer["solver"], layer["bits"], layer["group_size"]) for layer in layers} == {("gptq+qrazor", 4, 8)}
    assert all("zeros" in json.loads(layer["notes"]) for layer in layers)


@pytest.mark.parametrize("family", sorted(TINY.keys() - {"llama"}))
def test_other_families(tmp_path: Path, tiny_models: dict[str, Path], family: str) -> None:
    text = JOB.replace("[qrazor, gptq+qrazor]", "[smoothquant+gptq+qrazor: {{qrazor: {{pre_rope: true}}}}]")
    text = text.replace("[w4, w4a8, w4a4, w4kv4, w4a4kv4]", "[w4a8kv4q8p8]").replace("[8]", "[-1]")
    kl = values(run_all(tmp_path / "store", tiny_models[family], text), "kl")
    assert 0 < kl["smoothquant+gptq+qrazor", "w4a8kv4q8p8"] < 0.5
