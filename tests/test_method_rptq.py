"""RPTQ: grids in closed form, clusters against brute force, what is shared by the heads of a group, cells."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qfarm.errors import NonFinite
from qfarm.inputs import InputStatistics
from qfarm.layers.observe import observe
from qfarm.layers.sites import Place
from qfarm.layers.static import StaticAsymmetric
from qfarm.methods.rptq import RPTQ, Multiples, cluster, cluster_grid
from qfarm.models.load import LoadedModel
from tests.conftest import TINY
from tests.job_example import changed, labels, matrix
from tests.test_models import loaded
from tests.test_worker import Farm, make_job

WINDOWS = torch.randint(0, 256, (6, 24), generator=torch.manual_seed(0))
RANGE = RPTQ().statistics()
every_family = pytest.mark.parametrize("family", TINY)


def ranges_of(x: Tensor) -> Tensor:
    """x [tokens, channels] -> [2, channels]."""
    return torch.stack([x.amax(0), x.amin(0)])


def as_one(ranges: Tensor) -> Tensor:
    """[2, channels] -> [2, windows, channels] of one window."""
    return ranges[:, None]


def scaled(channels: int = 48, tokens: int = 400, seed: int = 0) -> Tensor:
    """Channels of very different width and offset."""
    draw = torch.Generator().manual_seed(seed)
    width = torch.exp(torch.randn(channels, generator=draw) * 1.5)
    return torch.randn(tokens, channels, generator=draw) * width + torch.randn(channels, generator=draw) * 3


def labels_of(ranges: Tensor, count: int) -> Tensor:
    points = ranges.T.double().numpy()
    return torch.from_numpy(cluster(points.tobytes(), points.shape[1], count).copy())


# -- grids ------------------------------------------------------------------------------------------------------------


def test_closed_form() -> None:
    """n = 4, range -1 .. 3: scale 1/4, zero -4; the upper end is clipped by one step."""
    grid = cluster_grid(as_one(torch.tensor([[3.0], [-1.0]])), torch.zeros(1, dtype=torch.int64), 4)
    assert (grid.scale.item(), grid.zero.item()) == (0.25, -4.0)
    assert [grid(torch.tensor([x])).item() for x in (-1.0, 3.0, 9.0, -9.0, 0.3)] == [-1.0, 2.75, 2.75, -1.0, 0.25]
    assert (grid.clipped.numbers, grid.clipped.beyond) == (5, 3)


def test_scales_and_zeros_are_bounded() -> None:
    narrow = cluster_grid(as_one(torch.tensor([[5.0], [5.0]])), torch.zeros(1, dtype=torch.int64), 8)
    assert narrow.scale.item() == pytest.approx(1e-4) and narrow.zero.item() == -1e4
    wide = cluster_grid(as_one(torch.tensor([[1e9], [0.0]])), torch.zeros(1, dtype=torch.int64), 8)
    assert wide.scale.item() == 1e4


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_one_cluster_is_per_tensor_and_as_many_as_channels_is_per_channel(bits: int) -> None:
    x = scaled()
    ranges = ranges_of(x)

    def by_hand(values: Tensor, low: float, high: float) -> Tensor:
        scale = np.float32(np.clip((np.float32(high) - np.float32(low)) / np.float32(2**bits), 1e-4, 1e4))
        zero = np.round(-(np.float32(high) + np.float32(low)) / (2 * scale))
        codes = np.clip(np.round(values.numpy() / scale) + zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return torch.from_numpy((codes - zero) * scale)

    whole = cluster_grid(as_one(ranges), labels_of(ranges, 1), bits)
    torch.testing.assert_close(whole(x), by_hand(x, float(x.min()), float(x.max())))
    single = cluster_grid(as_one(ranges), labels_of(ranges, x.shape[1]), bits)
    columns = [by_hand(x[:, i : i + 1], float(x[:, i].min()), float(x[:, i].max())) for i in range(x.shape[1])]
    torch.testing.assert_close(single(x), torch.cat(columns, dim=1))


def test_it_is_permuting_rounding_side_by_side_and_permuting_back() -> None:
    """What the reference code does physically, with a stable sort by label."""
    x, bits = scaled(seed=5), 4
    found = labels_of(ranges_of(x), 6)
    order, counts = torch.argsort(found, stable=True), torch.bincount(found)
    assert int(counts.sum()) == x.shape[1] and bool((counts > 0).all())
    moved, parts = x[:, order], []
    for part in torch.split(moved, counts.tolist(), dim=1):
        low_high = torch.stack([part.max().expand(1), part.min().expand(1)])
        parts.append(cluster_grid(as_one(low_high), torch.zeros(1, dtype=torch.int64), bits)(part))
    back = torch.empty_like(x)
    back[:, order] = torch.cat(parts, dim=1)
    assert torch.equal(cluster_grid(as_one(ranges_of(x)), found, bits)(x), back)


def test_a_cluster_covers_its_channels_and_more_clusters_err_less() -> None:
    x = scaled(seed=2)
    ranges, errors = ranges_of(x), []
    for count in (1, 2, 4, 8, 16, 48):
        found = labels_of(ranges, count)
        grid = cluster_grid(as_one(ranges), found, 4)
        for one in range(int(found.max()) + 1):
            own = found == one
            width = ranges[0, own].max() - ranges[1, own].min()
            assert torch.allclose(grid.scale[own] * 16, width)
        errors.append(float((grid(x) - x).square().mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0]


def test_ranges_decay_over_windows_after_channels_are_joined() -> None:
    """Two channels of one cluster whose largest values are in different windows: the average is of the cluster's."""
    highs, lows = torch.tensor([[4.0, 1.0], [1.0, 8.0], [2.0, 2.0]]), torch.tensor([[-1.0, 0.0]] * 3)
    grid = cluster_grid(torch.stack([highs, lows]), torch.zeros(2, dtype=torch.int64), 4)
    high = 0.99 * (0.99 * 4 + 0.01 * 8) + 0.01 * 2  # of channels apart it would be 3.95 at most
    assert grid.scale.tolist() == pytest.approx([(high + 1) / 16] * 2)


@every_family
@pytest.mark.parametrize("batch_tokens", [24, 48, 4096])
def test_ranges_of_windows_are_those_of_windows(model: LoadedModel, batch_tokens: int) -> None:
    """In the order of the text, whatever shares a batch; families differ in how they hand inputs on."""
    place = Place("linear_in", 1, "down")
    found = observe(model, WINDOWS, RANGE, sites=RPTQ.observes, batch_tokens=batch_tokens)[place]
    assert found.highs is not None and found.lows is not None and found.highs.shape[0] == len(WINDOWS)
    for i, window in enumerate(WINDOWS):
        alone = observe(model, window[None], RANGE, sites=RPTQ.observes)[place]
        torch.testing.assert_close(found.highs[i], alone.high, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.lows[i], alone.low, rtol=1e-4, atol=1e-5)


def test_probabilities_are_multiples() -> None:
    p = torch.tensor([0.0, 1.0, 0.5, 1 / 255, 0.3])
    assert torch.equal(Multiples(bits=8)(p), torch.round(p * 255) / 255)


# -- clusters ---------------------------------------------------------------------------------------------------------


def test_clusters_are_the_best_there_are() -> None:
    """Against all partitions of nine points into three clusters."""
    points = np.random.default_rng(4).normal(size=(9, 2)) * [1.0, 3.0]

    def error(found: tuple[int, ...]) -> float:
        groups = [points[np.array(found) == one] for one in set(found)]
        return float(sum(((group - group.mean(0)) ** 2).sum() for group in groups))

    best = min(error(found) for found in itertools.product(range(3), repeat=9))
    mine = cluster(points.tobytes(), 2, 3)
    assert error(tuple(mine.tolist())) == pytest.approx(best, rel=1e-9)


def test_clusters_are_repeatable_and_never_empty() -> None:
    points = np.random.default_rng(1).normal(size=(200, 2))
    points[50:] = points[:1]  # 150 channels alike, 50 others
    cluster.cache_clear()
    first = cluster(points.tobytes(), 2, 8)
    cluster.cache_clear()
    assert np.array_equal(first, cluster(points.tobytes(), 2, 8))
    assert sorted(set(first.tolist())) == list(range(first.max() + 1)) and first.max() < 8
    assert cluster(np.zeros((5, 2)).tobytes(), 2, 4).tolist() == [0] * 5
    assert len(set(cluster(points.tobytes(), 2, 64).tolist())) == 50


# -- places -----------------------------------------------------------------------------------------------------------


def quantizer(method: RPTQ, place: Place, bits: int, observed: dict[Place, InputStatistics]) -> StaticAsymmetric:
    made = method.quantizer(place, bits, observed)
    assert isinstance(made, StaticAsymmetric)
    return made


@pytest.fixture
def model(tiny_models: dict[str, Path], family: str) -> LoadedModel:
    return loaded(tiny_models[family])


@every_family
def test_heads_and_their_groups(model: LoadedModel) -> None:
    observed = observe(model, WINDOWS, RANGE, sites=RPTQ.observes)
    width, method = model.head_dim, RPTQ()
    linears = model.linears(0)
    heads, kv = linears["q"].out_features // width, linears["v"].out_features // width
    assert (observed[Place("q", 0)].heads, observed[Place("k", 0)].heads) == (heads, kv)
    grids = {site: quantizer(method, Place(site, 0), 4, observed) for site in ("q", "k", "v")}
    assert [grid.scale.shape for grid in grids.values()] == [(heads, 1, width), (kv, 1, width), (kv, 1, width)]
    to_o = quantizer(method, Place("linear_in", 0, "o"), 4, observed).scale.reshape(heads, width)
    for head in range(heads):
        key = head * kv // heads
        for mine, others in (
            (grids["q"].scale[head, 0], grids["k"].scale[key, 0]),
            (to_o[head], grids["v"].scale[key, 0]),
        ):
            # Channels of one cluster have one grid here and there; at most four clusters in a head.
            assert len(set(mine.tolist())) <= 4 and len(set(others.tolist())) <= 4
            joint = set(zip(mine.tolist(), others.tolist(), strict=True))
            assert len(joint) <= 4
    assert method.quantizer(Place("k_pre_rope", 0), 4, observed) is None


@every_family
def test_nothing_of_the_calibration_text_lies_below_a_grid_or_a_step_above_it(model: LoadedModel) -> None:
    """Keys of the text itself: only the last step of a range is clipped."""
    method, observed = RPTQ(ranges="minmax"), observe(model, WINDOWS, RANGE, sites=RPTQ.observes)
    for place in (Place("linear_in", 1, "down"), Place("linear_in", 1, "o"), Place("k", 1), Place("q", 1)):
        grid, found = quantizer(method, place, 8, observed), observed[place]
        assert found.low is not None and found.high is not None
        low, high = (end.reshape(grid.scale.shape) for end in (found.low, found.high))
        assert bool(((grid(low) - low).abs() <= 1.01 * grid.scale).all())
        assert bool(((grid(high) - high).abs() <= 2.01 * grid.scale).all())


def test_what_queries_and_values_are_clustered_by() -> None:
    """One head of eight channels: ranges of keys tell even from odd ones, of the input of o the first half from the
    second, of queries the first channel from the others."""

    def stats(top: list[float], heads: int | None = None) -> InputStatistics:
        high = torch.tensor(top)
        return InputStatistics(high=high, low=-high, highs=high[None], lows=-high[None], heads=heads)

    o = Place("linear_in", 0, "o")
    observed = {
        Place("q", 0): stats([9.0] + [1.0] * 7, heads=1),
        Place("k", 0): stats([1.0, 5.0] * 4, heads=1),
        Place("v", 0): stats([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], heads=1),
        o: stats([1.0] * 4 + [30.0] * 4),
    }
    method = RPTQ(head_clusters=2)
    steps = {place: quantizer(method, place, 8, observed).scale.flatten() * 128 for place in observed}
    assert steps[Place("v", 0)].tolist() == [4.0] * 4 + [8.0] * 4 and steps[o].tolist() == [1.0] * 4 + [30.0] * 4
    # Two of queries' and keys' points are nearest to each other: the first channel stands apart by its queries.
    assert steps[Place("q", 0)].tolist() == [9.0] + [1.0] * 7
    assert steps[Place("k", 0)].tolist() == [1.0] + [5.0] * 7
    alone = RPTQ(head_clusters=3)
    assert quantizer(alone, Place("k", 0), 8, observed).scale.flatten().mul(128).tolist() == [1.0, 5.0] * 4


def test_norm_outputs_have_at_least_eight_bits_and_it_says_so(tiny: Path) -> None:
    observed = observe(loaded(tiny), WINDOWS, RANGE, sites=RPTQ.observes)
    found = {
        role: quantizer(RPTQ(), Place("linear_in", 0, role), 4, observed)
        for role in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert {role: grid.bits for role, grid in found.items()} == dict.fromkeys(("q", "k", "v", "gate", "up"), 8) | {
        "o": 4,
        "down": 4,
    }
    places = {Place("linear_in", 0, role): grid for role, grid in found.items()}
    assert "rptq: inputs of q, k, v, gate, up at 8 bits (norm_bits)" in RPTQ().report(places)
    equal = RPTQ(norm_bits=4)
    assert quantizer(equal, Place("linear_in", 0, "q"), 4, observed).bits == 4
    alike = {place: quantizer(equal, place, 4, observed) for place in places}
    assert equal.report(alike) == []


def test_ranges_that_are_not_finite_are_refused() -> None:
    place = Place("linear_in", 3, "down")
    broken = InputStatistics(low=torch.tensor([0.0, -1.0]), high=torch.tensor([1.0, float("inf")]))
    with pytest.raises(NonFinite, match="rptq: linear_in of layer 3 down: a range is not finite"):
        RPTQ().quantizer(place, 4, {place: broken})


# -- cells ------------------------------------------------------------------------------------------------------------


def test_schemes_and_rules() -> None:
    found = matrix(changed(methods="[rptq, rptq+gptq]", bits="[w4kv4, w4a8kv8, w4a4kv4q4p8, w4a8]"))
    assert labels(found) == [
        f"{name} {bits} g64" for name in ("rptq", "gptq+rptq") for bits in ("w4kv4", "w4a8kv8", "w4a4kv4q4p8")
    ]
    assert {bad.rule.split(" quantizes ")[1] for bad in found.invalid} == {"kv_cache, which w4a8 leaves at 16 bits"}


JOB = """
models: [{model}]
methods: [rptq, gptq+rptq]
bits: [w4kv4, w4a4kv4q4p8]
group_sizes: [32]
dtype: float32
calibration: {{text: python-docs, samples: 4, length: 32}}
evaluate: [perplexity: {{text: python-docs, length: 32, windows: 6}}]
resources: {{gpus: 0}}
"""


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_cells_run_and_are_repeatable(tiny_models: dict[str, Path], tmp_path: Path, family: str) -> None:
    kl = []
    for number in range(2):
        cluster.cache_clear()
        farm = Farm(tmp_path / str(number), make_job(tiny_models[family], JOB))
        for index in range(5):
            outcome = farm.run(index)
            assert outcome.failure is None, outcome.error
        names = {row["cell_id"]: (row["recipe"], row["scheme"]) for row in farm.table("cells")}
        kl.append({names[r["cell_id"]]: r["value"] for r in farm.table("metrics") if r["metric"] == "kl"})
    assert kl[0] == kl[1] and len(kl[0]) == 4
    assert all(0 < kl[0][name, "w4kv4"] < kl[0][name, "w4a4kv4q4p8"] for name in ("rptq", "gptq+rptq"))
    notes = [note for row in farm.table("attempts") for note in json.loads(row["notes"])]
    assert any("at 8 bits (norm_bits)" in note for note in notes)
    assert any("of numbers beyond static ranges at k, v" in note for note in notes)
    assert {row["causal"] for row in farm.table("cells") if row["recipe"] != "baseline"} == {True}
