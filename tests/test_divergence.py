"""Divergence of logits: float64 definitions, blocks, rounding, the histogram."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qfarm import divergence, sums
from qfarm.divergence import EDGES, histogram, histogram_counts, histogram_quantile, refuse_negative, score
from qfarm.sums import Functions

PLAIN = Functions(sums.one, sums.both)  # what is compiled, op by op


def logits(tokens: int, vocabulary: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


def definition(after: Tensor, before: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Everything in float64, straight from log-probabilities."""
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    right, right_before = after.argmax(-1) == targets, before.argmax(-1) == targets
    return {
        "loss": -q.gather(-1, targets[:, None])[:, 0],
        "baseline_loss": -p.gather(-1, targets[:, None])[:, 0],
        "kl": (p.exp() * (p - q)).sum(-1),
        "kl_reverse": (q.exp() * (q - p)).sum(-1),
        "correct": right.double(),
        "agree": (after.argmax(-1) == before.argmax(-1)).double(),
        "lost": (right_before & ~right).double(),
        "gained": (right & ~right_before).double(),
    }


@pytest.fixture(params=[None, PLAIN], ids=["by blocks", "by sums"])
def functions(request: pytest.FixtureRequest) -> Functions | None:
    """What computes the figures: blocks, or the functions that are compiled for large evaluations."""
    return request.param  # type: ignore[no-any-return]  # pytest's params are Any


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 2), (7, 50), (33, 1000), (40, 20_000)])
def test_figures_equal_their_definition_in_float64(
    tokens: int, vocabulary: int, dtype: torch.dtype, functions: Functions | None
) -> None:
    before = logits(tokens, vocabulary).to(dtype)
    after = (before.float() + logits(tokens, vocabulary, 0.3, seed=1)).to(dtype)
    targets = torch.where(torch.arange(tokens) % 2 == 0, before.argmax(-1), after.argmax(-1))
    found = score(after, targets, before, functions)
    expected = definition(after, before, targets)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        # KL is a difference of terms of size 1, each with float32's rounding.
        assert torch.allclose(found[name].double(), values, rtol=1e-6, atol=1e-6), name
    assert expected["lost"].sum() > 0 or tokens < 33


def test_means_are_closer_than_the_last_digits_that_are_shown(functions: Functions | None) -> None:
    """The rounding of many tokens does not add up: a mean KL of 0.04 to a relative 1e-6, losses to 1e-7."""
    before = logits(200, 20_000).bfloat16()
    after = (before.float() + logits(200, 20_000, 0.3, seed=1)).bfloat16()
    targets = torch.arange(200)
    found, expected = score(after, targets, before, functions), definition(after, before, targets)
    assert found["kl"].mean().item() == pytest.approx(expected["kl"].mean().item(), rel=1e-6)
    assert found["kl_reverse"].mean().item() == pytest.approx(expected["kl_reverse"].mean().item(), rel=1e-6)
    assert found["loss"].mean().item() == pytest.approx(expected["loss"].mean().item(), rel=1e-7)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    after, before, targets = logits(37, 300), logits(37, 300, seed=1), torch.arange(37)
    whole = score(after, targets, before)
    monkeypatch.setitem(divergence.BLOCK, "cpu", 5 * 300)
    blocks = score(after, targets, before)
    assert all(torch.equal(whole[name], blocks[name]) for name in whole)


def test_the_given_logits_are_not_altered(functions: Functions | None) -> None:
    after, before = logits(5, 30), logits(5, 30, seed=1)
    kept = after.clone(), before.clone()
    score(after, torch.arange(5), before, functions)
    assert torch.equal(after, kept[0]) and torch.equal(before, kept[1])


def test_equal_logits_diverge_by_nothing_at_all(functions: Functions | None) -> None:
    same = logits(9, 5000).bfloat16()
    found = score(same, torch.arange(9), same.clone(), functions)
    assert not found["kl"].any() and not found["kl_reverse"].any() and bool(found["agree"].all())


def test_without_a_baseline_only_the_models_own_figures(functions: Functions | None) -> None:
    assert set(score(logits(3, 20), torch.arange(3), None, functions)) == {"loss", "correct"}


def test_ties_go_to_the_first_token_on_both_sides(functions: Functions | None) -> None:
    tied = torch.tensor([[1.0, 5.0, 5.0, 0.0]])
    found = score(tied, torch.tensor([1]), tied.clone(), functions)
    assert found["correct"].item() == 1 and score(tied, torch.tensor([2]), None, functions)["correct"].item() == 0


def test_large_logits_stay_finite(functions: Functions | None) -> None:
    found = score(logits(4, 50, 1e3), torch.zeros(4, dtype=torch.long), logits(4, 50, 1e3, seed=1), functions)
    assert all(torch.isfinite(values).all() for values in found.values()) and bool((found["kl"] >= 0).all())


def test_nan_is_not_hidden(functions: Functions | None) -> None:
    broken = logits(2, 50)
    broken[1, 7] = float("nan")
    found = score(broken, torch.zeros(2, dtype=torch.long), logits(2, 50, seed=1), functions)
    assert torch.isfinite(found["kl"]).tolist() == torch.isfinite(found["loss"]).tolist() == [True, False]


@pytest.mark.slow
def test_compiled_sums_are_those_of_the_functions() -> None:
    for dtype, tokens, vocabulary in ((torch.bfloat16, 37, 5003), (torch.float32, 1, 300)):
        found = sums.compiled(dtype)
        assert not isinstance(found, str), found
        after, before, targets = (
            logits(tokens, vocabulary).to(dtype),
            logits(tokens, vocabulary, seed=1).to(dtype),
            torch.arange(tokens),
        )
        for other in (before, None):
            here, there = score(after, targets, other, found), score(after, targets, other, PLAIN)
            for name, values in there.items():
                assert torch.allclose(here[name].double(), values.double(), rtol=1e-9, atol=1e-6), name


def test_rounding_stays_and_bugs_do_not() -> None:
    assert refuse_negative(np.array([0.0, -1e-7, 2.0]), "KL") == 0
    assert refuse_negative(np.array([-2e-7, -9e-5, 0.0]), "KL") == 2
    with pytest.raises(ArithmeticError, match="^KL of window 3 is -0.0002 nats for a token"):
        refuse_negative(np.array([1.0, -2e-4]), "KL of window 3")
    assert refuse_negative(np.array([]), "KL") == 0


def test_the_histogram_counts_every_token_once() -> None:
    values = np.concatenate([[-1e-7, 0.0, 1e-7, 99.9, 100.0, 1e6], np.geomspace(1e-6, 10, 500)])
    counts = histogram_counts(histogram(values))
    assert counts.sum() == len(values) and counts[0] == 2 and counts[-1] == 2
    by_hand = [int(((values >= low) & (values < high)).sum()) for low, high in zip(EDGES, EDGES[1:], strict=False)]
    assert counts[1:-1].tolist() == by_hand


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9, 0.99])
def test_quantiles_of_the_histogram_are_within_a_bin(q: float) -> None:
    values = np.random.default_rng(0).lognormal(-3, 2, 5000)
    exact = float(np.quantile(values, q, method="inverted_cdf"))
    assert exact <= histogram_quantile(histogram_counts(histogram(values)), q) <= exact * 1.086


def test_quantiles_beyond_the_histogram() -> None:
    assert histogram_quantile(histogram_counts(histogram(np.zeros(3))), 0.5) == 0
    assert histogram_quantile(histogram_counts(histogram(np.full(3, 1e9))), 0.5) == float("inf")
