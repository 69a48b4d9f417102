"""The benchmark of weight methods: the yardstick solves the same problem, and measuring changes nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qfarm import cli, environment
from qfarm.bench import methods as bench
from qfarm.bench import tasks as asking
from qfarm.bench import yardstick
from qfarm.bench.show import render_tasks
from qfarm.bench.stopwatch import SECTIONS, Stopwatch, timed
from qfarm.calibrate import quantize_weights
from qfarm.errors import InvalidInput
from qfarm.inputs import Collector, InputStatistics, Statistic
from qfarm.methods.gptq import GPTQ
from qfarm.methods.rtn import RTN
from qfarm.quantizer import Grid
from qfarm.solver import factorise, solve
from qfarm.tasks.build import Options, build_task
from qfarm.tasks.model import SessionLM
from tests.tasks_example import choice_task
from tests.test_method_gptq import correlated, loss
from tests.test_models import loaded

ALL_ITEMS = Options(few_shot=None, limit=None, seed=1234, chat_template=False)
WINDOWS = torch.randint(0, 256, (4, 32), generator=torch.manual_seed(0))


# -- the yardstick ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [-1, 16, 64, 128])
def test_the_yardstick_solves_the_same_problem(group_size: int) -> None:
    """Natural order: the published blocks and our halving give one solution, up to float32 in the factor."""
    n = 256
    weight, hessian = torch.randn(24, n, generator=torch.manual_seed(1)), correlated(n, 2, tokens=1024)
    grid = Grid(bits=4, group_size=group_size)
    codes, values = yardstick.solve(weight, hessian.clone(), grid)
    natural = GPTQ(act_order=False, group_aware=False)
    sample = torch.randn(8, n, generator=torch.manual_seed(3))
    ours = natural.quantize_linear(weight, InputStatistics(hessian=hessian, sample=sample), grid)
    assert float((ours.codes.float() == codes).float().mean()) > 0.98  # a rounding tie moves its row
    assert loss(weight, values, hessian) == pytest.approx(loss(weight, ours.dequantize(), hessian), rel=5e-3)
    assert loss(weight, values, hessian) < 0.9 * loss(weight, grid.quantize(weight).dequantize(), hessian)


def test_the_yardsticks_hessian_is_twice_the_mean_over_batches() -> None:
    x = torch.randn(30, 8, generator=torch.manual_seed(0))
    running = yardstick.RunningHessian(torch.zeros(8, 8))
    for part in x.split([7, 3, 20]):
        running.add(part[None])
    torch.testing.assert_close(running.total, 2 * x.T @ x / 30)


def test_the_yardsticks_factor() -> None:
    hessian = correlated(32, 5)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(32)
    upper = yardstick.inverse_factor(hessian.clone()).double()
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(32).double(), rtol=0, atol=1e-2)
    assert torch.equal(upper, upper.triu())


# -- the stopwatch ----------------------------------------------------------------------------------------------------


def test_nested_sections_are_counted_once() -> None:
    times = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])  # start; into a; into b; out of b; out of a; stop
    watch = Stopwatch(lambda: next(times))
    with watch("forwards"), watch("statistics"):
        pass
    assert watch.stop() == 31
    assert watch.seconds == {"forwards": 2 + 8, "statistics": 4, "solving": 0, "rest": 1 + 16}


def test_timing_leaves_classes_as_they_were() -> None:
    class Parent:
        def work(self) -> int:
            return 1

    class Child(Parent):
        pass

    own = Parent.work
    times = iter(range(100))
    watch = Stopwatch(lambda: float(next(times)))
    with pytest.raises(ZeroDivisionError), timed(watch, {(Child, "work"): "solving", (Parent, "work"): "forwards"}):
        assert Child().work() == 1 and watch.seconds["solving"] == 1 and watch.seconds["forwards"] == 0
        1 / 0  # noqa: B018
    assert Parent.work is own and "work" not in Child.__dict__


# -- the run ----------------------------------------------------------------------------------------------------------


def settings(**changes: Any) -> bench.Settings:
    return bench.Settings(**({"model": "tiny", "blocks": 2, "group_size": 16, "repeats": 2} | changes))


def test_measuring_changes_no_result_and_puts_the_weights_back(tiny: Path) -> None:
    model = loaded(tiny)
    before = [parameter.detach().clone() for parameter in model.model.parameters()]
    seen = []
    grid = Grid(bits=4, group_size=16)
    plain = quantize_weights(model, GPTQ(), lambda role: grid, WINDOWS, sequential=True, report=lambda *_: None)
    model.restore()
    original = bench.quantize_weights

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(original(*args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "quantize_weights", spy)
        report = bench.measure(model, WINDOWS, settings(), {"gptq": GPTQ(), "rtn": RTN()}, {})
    assert seen[0] == seen[2] == plain  # gptq, rtn, gptq, rtn
    assert all(torch.equal(a, b) for a, b in zip(before, model.model.parameters(), strict=True))
    assert [result.method for result in report.results] == ["yardstick", "gptq", "rtn"]
    for result in report.results:
        assert list(result.shares) == list(SECTIONS) and sum(result.shares.values()) == pytest.approx(1)
        assert result.runs == 2 and result.seconds > 0
    first, gptq, rtn = report.results
    assert first.ratio == 1 and all(first.shares[name] > 0 for name in ("forwards", "statistics", "solving"))
    assert all(gptq.shares[name] > 0 for name in SECTIONS)
    assert rtn.shares["forwards"] == rtn.shares["statistics"] == 0 < rtn.shares["solving"]


def test_the_bound_counts_what_it_says(tiny: Path) -> None:
    model = loaded(tiny)  # hidden 64, MLP 128, keys and values 32 wide, float32
    inside = (64 + 64) + 2 * (64 + 32) + (64 + 64) + 2 * (64 + 128) + (128 + 64)
    activations = 4 * (2 * 5000 * 64 + 4096 * inside)
    assert bench.bound_bytes(model, 5000, squares=0) == activations
    assert bench.bound_bytes(model, 5000, squares=2) == activations + 4 * 2 * (3 * 64**2 + 128**2)
    assert bench.bound_bytes(model, 5000, squares=1, per_layer=True) == activations + 4 * (6 * 64**2 + 128**2)


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "methods", *arguments])
    return int(str(ended.value.code or 0))


def test_the_command_prints_json_and_a_table(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--model", str(tiny), "--samples", "2", "--length", "16", "--group", "16", "--repeats", "1")
    assert command(*small, "--methods", "gptq", "--blocks", "1", "--format", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in found["results"]] == ["yardstick", "gptq"]
    assert found["settings"]["blocks"] == 1 and found["machine"]["threads"] >= 1
    assert command(*small, "--methods", "rtn") == 0
    shown = capsys.readouterr().out
    assert "2 blocks, 32 tokens, w4 g16" in shown and "yardstick" in shown and "threads" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "gptk"), 'unknown method "gptk", did you mean "gptq"'),
        (("--methods", "qera"), "qera is no weight solver"),
        (("--methods", "ptq161"), "ptq161 cannot run with --bits 4 --group 16: "),
        (("--methods", "rtn", "--blocks", "3"), "--blocks 3: the model has 2"),
        (("--methods", "rtn", "--blocks", "0"), "--blocks is at least 1, got 0"),
        (("--methods", "rtn", "--group", "128"), "--group 128 does not divide the 64 columns of a layer"),
        (("--methods", "rtn", "--group", "48"), "--group is -1 or divides the yardstick's 128 columns, got 48"),
        (("--methods", "rtn", "--bits", "9"), "--bits is 2..8, got 9"),
    ],
)
def test_bad_input(tiny: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    assert command("--model", str(tiny), "--samples", "1", "--length", "8", "--group", "16", *arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors


def test_methods_that_cannot_run_are_listed_when_all_were_asked_for() -> None:
    chosen, refused = bench._solvers(settings())
    assert (
        "gptq" in chosen
        and "qera" not in chosen
        and "ptq161" in refused
        and "autoround" in refused
        and not set(chosen) & set(refused)
    )


# -- what was made faster gives the same results ----------------------------------------------------------------------


@pytest.mark.parametrize("n", [8, 192, 200, 777])
def test_products_by_panels_are_the_second_moment(n: int) -> None:
    x = torch.randn(300, n, generator=torch.manual_seed(n))
    collector = Collector(frozenset({Statistic.HESSIAN}), 300)
    for part in x.split(100):
        collector.add(part)
    hessian = collector.result().hessian
    assert hessian is not None and torch.equal(hessian, hessian.T)
    expected = x.double().T @ x.double() / 300
    assert float((hessian - expected).abs().max()) < 300 * 2**-24 * float(expected.diagonal().max())


@pytest.mark.parametrize("n", [8, 200, 777])
def test_output_error_by_panels(n: int) -> None:
    weight, noise = torch.randn(2, 6, n, generator=torch.manual_seed(n)).unbind()
    hessian = correlated(n, n)
    stats = InputStatistics(hessian=hessian, sample=torch.randn(20, n, generator=torch.manual_seed(1)))
    w, e, h = weight.double(), (weight - (weight + noise)).double(), hessian.double()
    expected = float(((e @ h) * e).sum() / ((w @ h) * w).sum())
    assert stats.output_error(weight, weight + noise) == pytest.approx(expected, rel=1e-4)
    assert stats.ordinary_errors(weight)(weight + noise) == stats.ordinary_error(weight, weight + noise)


@pytest.mark.parametrize("n", [1, 3, 128, 129, 400])
def test_the_factor_is_that_of_the_plain_formula(n: int) -> None:
    hessian = correlated(n, n, tokens=2 * n)
    order = torch.randperm(n, generator=torch.manual_seed(0))
    upper = factorise(hessian, order, 0.01, 0.01).upper
    h = hessian.double()[order][:, order]
    h += 0.01 * h.diagonal().mean() * torch.eye(n)
    expected = torch.linalg.inv(torch.linalg.cholesky(h.flip(0, 1))).flip(0, 1)
    assert torch.equal(upper, upper.triu())
    assert float((upper - expected).abs().max()) <= 2**-22 * float(expected.abs().max())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("convention", ["restricted", "full_range_offset", "deepspeed"])
@pytest.mark.parametrize("size", [1, 8, 64])
def test_rounding_inside_the_loop_is_the_grids(symmetric: bool, convention: Any, size: int) -> None:
    weight, hessian = torch.randn(5, 64, generator=torch.manual_seed(0)), correlated(64, 1)
    weight[2] *= 1e-6
    upper = factorise(hessian, torch.arange(64), 0.01, 0.01).upper
    grid = Grid(bits=3, group_size=size, symmetric=symmetric, convention=convention)

    def fit(_: int, current: Tensor) -> tuple[Tensor, Tensor]:
        return grid.fit(current.T)

    def rounding(_: int, column: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        codes = grid.encode(column, scale, zero)
        return codes, (codes - zero) * scale

    inside, outside = (solve(weight, upper, grid, size=size, fit=fit, rounding=r) for r in (None, rounding))
    for name in ("codes", "values", "updated", "scale", "zero"):
        assert torch.equal(getattr(inside, name), getattr(outside, name)), name
    assert inside.loss == outside.loss


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_a_task_asked_twice(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny model: the counts are those of its items, and a changed answer would be counted as one."""
    task = choice_task(tmp_path)
    settings = asking.Settings(model=str(tiny), tasks=(f"{task}:7",), batch_size=2)
    monkeypatch.setattr(asking, "lm_evals_own", lambda leaf, source: build_task(leaf, ALL_ITEMS, source))
    (result,) = asking.run(settings).results
    assert (result.items, result.same_answer, result.same_score) == (7, 7, 7)
    assert result.accuracy == result.accuracy_lm_eval and 0 < result.largest_difference < 1e-3
    assert result.ratio == pytest.approx(result.seconds_lm_eval / (result.prepare_s + result.seconds))
    shown = render_tasks(asking.Report(settings=settings, machine=environment.provenance(), results=(result,)), 120)
    assert "animals x7" in shown

    score = SessionLM._score_positions
    monkeypatch.setattr(SessionLM, "_score_positions", lambda self, o, s, t: score(self, o, -s, t))
    (other,) = asking.run(settings).results
    assert other.same_answer < 7 and other.largest_difference > 0.1


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ((), "expected names of tasks"),
        (("arc_easy:many",), 'arc_easy: expected a number of items after ":", got "many"'),
        (("arc_easy:0",), 'got "0"'),
        (("gsm8k",), "gsm8k: expected one task whose questions have choices"),
        (("mmlu",), "mmlu: expected one task"),
        (("arc_eazy",), "arc_eazy"),
    ],
)
def test_tasks_that_cannot_be_asked_twice(tasks: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        asking.run(asking.Settings(model="nowhere", tasks=tasks))
