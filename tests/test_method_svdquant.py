"""SVDQuant: the smoothing's search, the branch and its refinement, what is shared and stored once, what it gains."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qfarm.inputs import Collector, InputStatistics
from qfarm.layers.linear import Branch
from qfarm.layers.observe import observe
from qfarm.layers.sites import Place
from qfarm.methods.svdquant import Grouped, SharedTerm, SVDQuant, output_error, sketched, smoothings, truncated
from qfarm.models.load import LoadedModel
from qfarm.quantizer import Grid
from tests.conftest import TINY
from tests.job_example import changed, labels, matrix
from tests.test_fuse import PROBE, lively, logits
from tests.test_layers_worker import JOB, METHODS, run_all, values
from tests.test_models import loaded

GRID = Grid(bits=4, group_size=64, symmetric=True)


def problem() -> tuple[Tensor, Tensor]:
    """A weight [192, 256] with a component of rank 4, and inputs [400, 256] with every 37th channel 20 times larger."""
    draw = torch.manual_seed(0)
    weight = torch.randn(192, 256, generator=draw)
    weight += 4 * torch.randn(192, 4, generator=draw) @ torch.randn(4, 256, generator=draw)
    x = torch.randn(400, 256, generator=draw)
    x[:, ::37] *= 20
    return weight, x


def statistics(x: Tensor, bits: int = 16, **more: Any) -> InputStatistics:
    found = InputStatistics(tokens=len(x), sample=x, max_abs=x.abs().amax(0), bits=bits)
    for name, value in more.items():
        setattr(found, name, value)
    return found


def result(x: Tensor, made: SharedTerm, bits: int = 4) -> Tensor:
    """What a layer with that weight gives."""
    quantize = Grouped(bits=bits, group_size=64) if bits < 16 else lambda v: v
    branch = Branch(left=made.left.float(), right=made.right.float())
    return quantize(x) @ made.base.dequantize().T + branch(x)


# -- quantizer --------------------------------------------------------------------------------------------------------


def test_vector_of_a_group() -> None:
    row = torch.tensor([-0.9, 0.0, 0.45, 2.0])
    step = float(torch.tensor(2 / 7).bfloat16())
    assert (Grouped(bits=4, group_size=4)(row) / step).round().tolist() == [-3, 0, 2, 7]
    made = GRID.quantize(torch.cat([row, torch.zeros(60)])[None])
    assert (made.codes[0, :4].int() - 8).tolist() == [-3, 0, 2, 7]
    assert (made.dequantize() / made.scale.float()).abs().max() <= 7


def test_groups_have_scales_of_their_own_and_zeros_stay() -> None:
    x = torch.randn(3, 2, 128, generator=torch.manual_seed(0))
    x[..., 64:] = 0
    made = Grouped(bits=4, group_size=64)(x)
    assert not made[..., 64:].any() and torch.isfinite(made).all()
    assert torch.equal(made[..., :64], Grouped(bits=4, group_size=-1)(x[..., :64].contiguous()))


# -- smoothing --------------------------------------------------------------------------------------------------------


def test_candidates() -> None:
    largest, weights = torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 1.0])
    found = list(smoothings(largest, weights, 4))
    assert len(found) == 7 and found[0].tolist() == [1, 1, 1]
    assert found[3].tolist() == [2, 1, 1]  # alpha 1/2, beta 0; a channel of zeros keeps one
    torch.testing.assert_close(found[4], torch.tensor([2.0, 0.5, 1.0]))  # beta 1/2
    endless = torch.tensor([float("inf"), 1.0, 1.0])
    assert all(torch.isfinite(lam).all() for lam in smoothings(endless, weights, 4))
    assert all(torch.equal(lam, lam.bfloat16().float()) for lam in found)


def test_the_search_takes_the_best_candidate() -> None:
    weight, x = problem()
    method, quantize = SVDQuant(candidates=5, rank=8), Grouped(bits=4, group_size=64)
    largest = x.abs().amax(0)
    found = method.search(weight, x, largest, GRID, quantize)
    errors = []
    for lam in smoothings(largest, weight.abs().amax(0), 5):
        term = sketched(weight * lam, 8)
        assert term is not None
        rest = GRID.quantize(weight * lam - term[0] @ term[1]).dequantize()
        errors.append((output_error(x @ weight.T, x / lam, rest, term, quantize), lam))
    best = min(errors, key=lambda pair: pair[0])
    assert torch.equal(found, best[1]) and best[0] < errors[0][0]


# -- branch -----------------------------------------------------------------------------------------------------------


def test_truncated_svd_leaves_the_smallest_rest() -> None:
    weight, _ = problem()
    singular = torch.linalg.svdvals(weight.double())
    rests = []
    for rank in (0, 1, 8, 64, 500):
        left, right = truncated(weight, rank, torch.bfloat16)
        assert left.shape == (192, min(rank, 192)) and left.dtype == torch.bfloat16
        left, right = truncated(weight, rank, torch.float64)
        rest = float((weight.double() - left @ right).square().sum())
        assert rest == pytest.approx(float(singular[rank:].square().sum()), rel=1e-6, abs=1e-6)
        rests.append(rest)
    assert all(fewer >= more for fewer, more in itertools.pairwise(rests))
    sketch = sketched(weight, 8)
    assert sketch is not None and sketched(weight, 0) is None
    assert float((weight - sketch[0] @ sketch[1]).square().sum()) < 1.02 * rests[2]


def test_full_rank_leaves_nothing_and_rank_zero_is_rounding() -> None:
    weight, x = problem()
    whole = SVDQuant(rank=192, term_dtype="float16").quantize_linear(weight, statistics(x), GRID)
    # Factors of 11 significant bits, and 4 more for what they leave.
    error = float((result(x, whole, 16) - x @ weight.T).norm() / (x @ weight.T).norm())
    assert error < 2.0**-14, error
    rest = weight - whole.left.float() @ whole.right.float()
    assert torch.equal(whole.base.dequantize(), GRID.quantize(rest).dequantize())
    assert 0 < float(rest.norm() / weight.norm()) < 2.0**-10
    none = SVDQuant(rank=0).quantize_linear(weight, statistics(x), GRID)
    assert torch.equal(none.dequantize(), GRID.quantize(weight).dequantize())


def test_refinement_returns_the_best_step() -> None:
    weight, x = problem()
    errors = {}
    for count in (1, 2, 3, 30):
        made = SVDQuant(iterations=count).quantize_linear(weight, statistics(x, bits=4), GRID)
        errors[count] = made.notes["branch_error"]
        assert errors[count] == pytest.approx(float((result(x, made) - x @ weight.T).square().sum()), rel=1e-3)
        assert made.notes["steps"] <= count
    assert errors[1] >= errors[2] >= errors[3] >= errors[30]


def test_order_of_what_helps() -> None:
    """Rounding alone, smoothing, the branch without smoothing, both, both refined."""
    weight, x = problem()
    wanted = x @ weight.T

    def error(smooth: bool, rank: int, iterations: int = 1) -> float:
        method = SVDQuant(rank=rank, iterations=iterations, candidates=10)
        lam = torch.ones(256)
        if smooth:
            lam = method.search(weight, x, x.abs().amax(0), GRID, Grouped(bits=4, group_size=64))
        made = method.quantize_linear(weight * lam, statistics(x / lam, bits=4), GRID)
        return float((result(x / lam, made) - wanted).norm() / wanted.norm())

    rtn, smoothing, branch, both = (error(smooth, rank) for rank in (0, 32) for smooth in (False, True))
    refined = error(True, 32, 20)
    assert rtn > 1.3 * smoothing > 1.3 * both and rtn > 1.3 * branch > 1.3 * both and both >= refined


def test_dead_channels_and_groups() -> None:
    weight, x = problem()
    weight[:, :64], x[:, 3] = 0, 0
    method = SVDQuant(candidates=3)
    lam = method.search(weight, x, x.abs().amax(0), GRID, Grouped(bits=4, group_size=64))
    assert torch.isfinite(lam).all() and bool((lam > 0).all())
    made = method.quantize_linear(weight * lam, statistics(x / lam, bits=4), GRID)
    assert torch.isfinite(made.dequantize()).all()


# -- what is shared ---------------------------------------------------------------------------------------------------


def test_layers_share_the_right_factor_and_store_it_once() -> None:
    weight, x = problem()
    lam = torch.full((256,), 2.0)
    made = SVDQuant(rank=16).quantize_linear(weight, statistics(x, divided=lam), GRID)
    parts = [made.row_range(0, 128), made.row_range(128, 192)]
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), made.dequantize())
    assert all(part.right is made.right for part in parts)
    for part in (made, *parts):
        assert part.stored_bytes() == sum(t.numel() * t.element_size() for t in part.packed().values())
    assert made.stored_bytes() == sum(part.stored_bytes() for part in parts)
    assert (
        "weight_input_scale" in parts[0].packed()
        and not {"weight_right", "weight_input_scale"} & parts[1].packed().keys()
    )


def test_bits_of_a_large_layer() -> None:
    """4096 x 4096, rank 32, groups of 64: 4.504 bits per weight."""
    base = GRID.quantize(torch.zeros(1, 4096))
    base.codes, base.scale = base.codes.expand(4096, -1), base.scale.expand(4096, -1)
    factors = torch.zeros(4096, 32, dtype=torch.bfloat16)
    lam = torch.ones(4096, dtype=torch.bfloat16)
    made = SharedTerm(base=base, left=factors, right=factors.T, smoothing=lam, branch=True, solver="svdquant")
    assert 8 * made.stored_bytes() / 4096**2 == pytest.approx(4.504, abs=1e-3)


# -- the whole of it --------------------------------------------------------------------------------------------------


def smooth(model: LoadedModel, method: SVDQuant) -> list[str]:
    observed = observe(model, PROBE, method.transform_statistics())
    return method.transform(model, observed, 0)


@pytest.mark.parametrize("family", TINY)
def test_smoothing_changes_nothing(tiny_models: dict[str, Path], family: str) -> None:
    model = lively(loaded(tiny_models[family]))
    plain = logits(model)
    notes = smooth(model, SVDQuant(candidates=3, rank=4))
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-4)
    assert notes[0].startswith("inputs of q, k, v divided by factors up to ") and len(model.divided) == 8
    collector = Collector(frozenset(SVDQuant().statistics()), tokens=1)
    assert collector.wanted
    model.restore()
    assert torch.equal(logits(model), plain) and not model.divided


def test_what_it_is_asked_for() -> None:
    place = Place("linear_in", 0, "q")
    assert SVDQuant().resolve(64).quantizer(place, 4, {}) == Grouped(bits=4, group_size=64)
    assert SVDQuant(activation_group=32).resolve(64).quantizer(place, 4, {}) == Grouped(bits=4, group_size=32)
    entries = "[svdquant, svdquant: {activation_group: 96}, svdquant: {activation_group: 1}, svdquant+quarot]"
    found = matrix(changed(methods=entries, bits="[w4a4]", group_sizes="[64]"))
    assert labels(found) == ["svdquant w4a4 g64"]
    rules = [invalid.rule for invalid in found.invalid]
    assert rules[0] == "svdquant: activation_group 96 does not divide the 256 inputs of q"
    assert rules[1] == "svdquant: activation_group is -1 or at least 2, not 1" and "it folds the norms" in rules[2]


def test_the_worker_runs_it(tmp_path: Path, tiny: Path) -> None:
    entry = "svdquant: {{rank: 8, candidates: 3, iterations: 3}}"
    job = JOB.replace(METHODS, f"[rtn, {entry}]").replace("[w8a8, w4a8, w4a16, w4kv4, w8a8kv4]", "[w4a4, w4a4kv4]")
    farm = run_all(tmp_path, tiny, job + "symmetric: true\ngroup_sizes: [32]\n")
    kl = values(farm, "kl")
    assert 0 < kl["svdquant", "w4a4"] < 0.8 * kl["rtn", "w4a4"]
    rows = {(row["recipe"], row["scheme"]): row for row in farm.table("cells")}
    layers = [layer for layer in farm.table("layers") if layer["cell_id"] == rows["svdquant", "w4a4"]["cell_id"]]
    assert {layer["solver"] for layer in layers} == {"svdquant"} and len(layers) == 14
    # Codes, scales of groups of 32, left; right and lam with q, o, gate, down.
    bits = {(layer["layer"], layer["role"]): layer["stored_bytes"] for layer in layers}
    assert bits[0, "k"] == 32 * 64 // 2 + 32 * 2 * 2 + 32 * 8 * 2
    assert bits[0, "q"] == 64 * 64 // 2 + 64 * 2 * 2 + 64 * 8 * 2 + 8 * 64 * 2 + 64 * 2


def test_a_second_branch_is_refused() -> None:
    found = matrix(changed(methods="[svdquant+qera, svdquant]", bits="[w4a4]", group_sizes="[64]"))
    assert [invalid.rule for invalid in found.invalid] == [
        "svdquant: it keeps a low-rank branch itself; raise its rank instead of adding qera"
    ]
    assert "svdquant w4a4 g64" in labels(found)
