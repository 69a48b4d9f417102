"""Kernel: counts against brute force, per layer and in total, under a cell's own quantizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qfarm.errors import InvalidInput, NonFinite
from qfarm.evaluate import build_evaluator, parse_evaluation
from qfarm.evaluate.kernel import Kernel
from qfarm.layers.install import install_sites
from qfarm.layers.kernel import Kernel as Counts
from qfarm.layers.kernel import KernelRemoved, PerTensor, kernel
from qfarm.layers.linear import by_sequence
from qfarm.layers.rtn import Asymmetric, Symmetric
from qfarm.recipe import Recipe
from qfarm.scheme import parse_scheme
from qfarm.worker import Session
from tests.test_layers_worker import run_all
from tests.test_models import loaded
from tests.test_perplexity import make_cell

OPTIONS: dict[str, Any] = {"text": "python-docs", "length": 32, "windows": 6}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.manual_seed(seed))


# -- the counter ------------------------------------------------------------------------------------------------------


def test_counts_equal_brute_force() -> None:
    x = draw(3, 5, 16) ** 3
    x[0, 0, :4] = 0
    found = kernel(x, Symmetric(bits=4))
    by_hand = 0
    for row in x.reshape(-1, 16):
        step = float(row.abs().max()) / 7
        by_hand += sum(abs(float(value)) <= step / 2 for value in row)
    assert found == Counts(elements=240, zeroed=by_hand, zeros=4)
    assert found.share == by_hand / 240 and found.share_of_nonzero == (by_hand - 4) / 236


def test_exact_zeros_count_by_definition() -> None:
    x = draw(1, 4, 32)
    before = kernel(x, Symmetric(bits=4))
    padded = kernel(torch.cat([x, torch.zeros(1, 4, 32)], dim=-1), Symmetric(bits=4))
    assert (padded.elements, padded.zeroed, padded.zeros) == (256, before.zeroed + 128, 128)
    assert padded.share > before.share and padded.share_of_nonzero == before.share_of_nonzero
    assert kernel(x, None) == Counts(elements=128, zeroed=0, zeros=0)
    assert Counts().share == Counts().share_of_nonzero == 0
    assert before + padded == Counts(elements=384, zeroed=2 * before.zeroed + 128, zeros=128)


def test_a_tie_belongs_to_the_kernel_and_small_numbers_are_not_lost() -> None:
    x = torch.tensor([[[7.0, 0.5, 0.51, -0.5]]])
    assert kernel(x, Symmetric(bits=4)).zeroed == 2
    tiny = torch.full((1, 1, 8), 6e-8, dtype=torch.float16)  # the smallest subnormal number
    assert kernel(tiny, Symmetric(bits=8)).zeroed == 0
    assert kernel(torch.tensor([[[-1.0, 0.02, 2.0]]]), Asymmetric(bits=4)).zeroed == 1


def test_per_tensor_steps_are_per_sequence() -> None:
    x = draw(2, 6, 8)
    x[1, 3, 2] = 50.0
    out = PerTensor(bits=8)(x)
    assert torch.equal(PerTensor(bits=8)(x[:1]), out[:1])
    scale = x[1].abs().max() / 127
    torch.testing.assert_close(out[1], torch.round(x[1] / scale) * scale)
    assert kernel(x, PerTensor(bits=8)).zeroed > kernel(x, Symmetric(bits=8)).zeroed


def test_removing_the_kernel_changes_nothing_else() -> None:
    x = draw(2, 3, 16)
    removed, rounded = KernelRemoved(quantize=Symmetric(bits=3))(x), Symmetric(bits=3)(x)
    assert torch.equal(removed == 0, rounded == 0) and torch.equal(removed[rounded != 0], x[rounded != 0])


# -- the evaluator ----------------------------------------------------------------------------------------------------


@pytest.fixture
def session(tiny: Path) -> Session:
    session = Session(None)
    session.begin(make_cell(tiny))
    return session


def run(session: Session, **options: Any) -> tuple[dict[str, float], dict[str, Any]]:
    result = Kernel(**OPTIONS | options).run(session, lambda done, total: None)
    return {m.metric: m.value for m in result.metrics}, {d.document: d for d in result.documents}


def inputs(session: Session, module: str) -> Tensor:
    """What one layer is fed on the evaluation's windows, [windows, tokens, features]."""
    found: list[Tensor] = []
    hook = session.loaded.model.get_submodule(module).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        session.loaded.body(session.windows("python-docs", 32, 6).ids)
    hook.remove()
    return found[0].reshape(6, 32, -1)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_layers_and_totals_against_brute_force(tiny_models: dict[str, Path], family: str) -> None:
    session = Session(None)
    session.begin(make_cell(tiny_models[family]))
    install_sites(session.loaded, Recipe(), parse_scheme("a4"), {})
    metrics, documents = run(session, bits=6)
    assert len(documents) == 2 * len(session.loaded.architecture.roles) * 3
    total = zeroed = zeros = 0
    for block in range(2):
        for role in session.loaded.architecture.roles:
            module = session.loaded.module_name(block, role)
            x = inputs(session, module)
            for name, quantize in {
                "installed": Symmetric(bits=4),
                "per_token": Symmetric(bits=6),
                "per_tensor": PerTensor(bits=6),
            }.items():
                row = documents[f"{module} {name}"]
                assert (row.cluster, row.task, row.elements) == (module, name, x.numel())
                assert row.zeroed == int((quantize(x) == 0).sum()) and row.zeros == int((x == 0).sum())
            total += x.numel()
            zeros += int((x == 0).sum())
            zeroed += documents[f"{module} installed"].zeroed
    assert metrics["kernel"] == zeroed / total
    assert metrics["kernel_nonzero"] == (zeroed - zeros) / (total - zeros)
    assert 0 < metrics["kernel_per_token"] < metrics["kernel_per_tensor"] < metrics["kernel"]


def test_it_changes_nothing_and_repeats(session: Session) -> None:
    install_sites(session.loaded, Recipe(), parse_scheme("a4"), {})
    before = {name: len(module._forward_pre_hooks) for name, module in session.loaded.model.named_modules()}
    ids = torch.arange(24)[None]
    with torch.no_grad():
        plain = session.loaded.body(ids)
        first, second = run(session), run(session)
        assert first == second and torch.equal(session.loaded.body(ids), plain)
    assert {name: len(module._forward_pre_hooks) for name, module in session.loaded.model.named_modules()} == before


def test_batches_do_not_matter(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(session)[0]
    monkeypatch.setattr("qfarm.evaluate.kernel.BATCH_TOKENS", 32)
    apart = run(session)[0]
    assert apart == pytest.approx(whole, abs=2e-4)  # the last bits of an input may move


def test_relu_makes_zeros_and_unquantized_cells_have_no_more(tiny_models: dict[str, Path]) -> None:
    session = Session(None)
    session.begin(make_cell(tiny_models["opt"]))
    metrics, documents = run(session)
    down = documents[session.loaded.module_name(0, "down") + " installed"]
    up = documents[session.loaded.module_name(0, "up") + " installed"]
    assert down.zeroed == down.zeros > 0.2 * down.elements and up.zeros == 0
    assert metrics["kernel"] > 0 and metrics["kernel_nonzero"] == 0
    assert metrics["kernel_per_token"] > metrics["kernel"]


def test_sequences_stay_apart_where_a_family_flattens_them(tiny_models: dict[str, Path]) -> None:
    model = loaded(tiny_models["opt"])
    seen: list[tuple[int, ...]] = []

    def quantize(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x

    with model.temporary(), torch.no_grad():
        wrapped = by_sequence(model, 0, quantize)
        fed: list[Tensor] = []
        hook = model.linears(0)["up"].register_forward_pre_hook(lambda _, args: fed.append(wrapped(args[0])))
        model.on_restore(hook.remove)
        model.body(torch.zeros(3, 5, dtype=torch.long))
    assert seen == [(3, 5, 64)] and fed[0].shape == (15, 64)


def test_a_broken_model_is_an_error(session: Session) -> None:
    linear = session.loaded.linears(0)["q"]
    session.loaded.replace_weight(linear, torch.full_like(linear.weight, float("nan")))
    with pytest.raises(NonFinite, match="^kernel python-docs 32 x6: a hidden state of windows 0 and on"):
        run(session)


def test_labels_and_options() -> None:
    assert build_evaluator("kernel", OPTIONS).label == "kernel python-docs 32 x6"
    assert build_evaluator("kernel", {"text": "python-docs", "bits": 4}).label == "kernel python-docs 2048 4 bits"
    (found,) = parse_evaluation({"kernel": {"text": "wikitext2"}})
    assert found.tokens() == 150 * 2048 and found.window == 2048 and not found.needs_baseline
    with pytest.raises(InvalidInput, match="^kernel: bits: "):
        build_evaluator("kernel", OPTIONS | {"bits": 1})


JOB = """
models: [{model}]
methods: [rtn, smoothquant, crossquant, crossquant+gptq]
bits: [w8a8, w8a4]
dtype: float32
calibration: {{text: python-docs, samples: 4, length: 32}}
evaluate:
  - kernel: {{text: python-docs, length: 32, windows: 6}}
  - perplexity: {{text: python-docs, length: 32, windows: 6}}
resources: {{gpus: 0}}
"""


def test_perplexity_can_be_drawn_against_it(tmp_path: Path, tiny: Path) -> None:
    farm = run_all(tmp_path, tiny, JOB)
    cells = {row["cell_id"]: (row["recipe"], row["scheme"]) for row in farm.table("cells")}
    found: dict[str, dict[tuple[str, str], float]] = {}
    for row in farm.table("metrics"):
        found.setdefault(row["metric"], {})[cells[row["cell_id"]]] = row["value"]
    assert found["kernel"].keys() == found["perplexity"].keys() == set(cells.values())
    assert found["kernel"]["baseline", "w16"] == 0 < found["kernel_per_token"]["baseline", "w16"]
    assert found["kernel"]["rtn", "w8a4"] == found["kernel_per_token"]["rtn", "w8a4"] > found["kernel"]["rtn", "w8a8"]
    assert found["kernel"]["crossquant", "w8a4"] < found["kernel_per_token"]["crossquant", "w8a4"]
    rows = [row for row in farm.table("documents") if row["elements"] is not None]
    assert len(rows) == 9 * 2 * 7 * 3 and {row["task"] for row in rows} == {"installed", "per_token", "per_tensor"}
