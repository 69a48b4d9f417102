"""Statistics of inputs: second moments on narrow units lose nothing, and no setting outlives them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qfarm import inputs
from qfarm.inputs import Collector, Statistic

TOKENS, WIDTH = 3000, 200  # more columns than one panel
MATMUL = torch.backends.mkldnn.matmul if hasattr(torch.backends.mkldnn, "matmul") else None


def hessian(x: Tensor) -> Tensor:
    collector = Collector(frozenset({Statistic.HESSIAN}), len(x))
    for part in x.split(700):
        collector.add(part)
    found = collector.result().hessian
    assert found is not None
    return found


def error(found: Tensor, x: Tensor) -> float:
    """Largest deviation from float64, relative to the product of the two columns' norms."""
    exact = x.double().T @ x.double() / len(x)
    size = exact.diagonal().sqrt()
    return float(((found.double() - exact).abs() / size.outer(size)).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_second_moments_are_exact_to_float32(dtype: torch.dtype) -> None:
    """Rounding inputs to bfloat16 would show as 1e-4 and more."""
    x = torch.randn(TOKENS, WIDTH, generator=torch.manual_seed(0)).to(dtype)
    assert error(hessian(x), x) < 2e-6


@pytest.mark.skipif(MATMUL is None, reason="this torch has no precision setting for products on the CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_units_see_narrow_inputs_only(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MATMUL is not None
    plain, seen = inputs._add_product, []

    def watched(total: Tensor | None, x: Tensor) -> Tensor:
        seen.append(MATMUL.fp32_precision)
        return plain(total, x)

    monkeypatch.setattr(inputs, "_add_product", watched)
    before = MATMUL.fp32_precision
    x = torch.randn(900, 8, generator=torch.manual_seed(0)).to(dtype)
    collector = Collector(frozenset({Statistic.HESSIAN, Statistic.NORMALISED_HESSIAN}), len(x))
    collector.add(x)  # the second product is of tokens scaled in float32, which no narrow unit could hold
    assert seen == (["bf16", before] if dtype is torch.bfloat16 else [before, before])
    assert before != "bf16" and MATMUL.fp32_precision == before


@pytest.mark.skipif(MATMUL is None, reason="this torch has no precision setting for products on the CPU")
def test_a_failed_product_leaves_the_setting_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MATMUL is not None
    before = MATMUL.fp32_precision
    monkeypatch.setattr(inputs, "_add_product", lambda total, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Collector(frozenset({Statistic.HESSIAN}), 4).add(torch.zeros(4, 2, dtype=torch.bfloat16))
    assert MATMUL.fp32_precision == before
