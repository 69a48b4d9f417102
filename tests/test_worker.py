"""run_cell: what reaches the store from good and bad cells, without Ray."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qfarm import cli, predictions, worker
from qfarm.errors import Failure, InvalidInput, NonFinite, StoreFull
from qfarm.evaluate import perplexity
from qfarm.job import Job, parse_job
from qfarm.models.load import LoadedModel
from qfarm.plan import Outcome, Plan, Task, make_plan, shares
from qfarm.recipe import parse_recipe
from qfarm.report.plan import render_plan
from qfarm.solver import Factor, factorise
from qfarm.store import Store
from qfarm.worker import Session, run_cell

JOB = """
models: [{model}]
methods: [rtn, gptq]
bits: [w3, w4/8]
group_sizes: [16]
dtype: float32
calibration: {{text: python-docs, samples: 4, length: 64}}
evaluate: [perplexity: {{text: python-docs, length: 64, windows: 30}}]
resources: {{gpus: 0}}
"""


def make_job(model: Path, text: str = JOB) -> Job:
    return parse_job(text.format(model=model), "job.yaml")


class Farm:
    """A store and a session, and every cell of a plan run in order."""

    def __init__(self, folder: Path, job: Job) -> None:
        self.store = Store.open(folder, create=True)
        self.session, self.job, self.count = Session(None), job, 0
        self.stages: list[tuple[str, int, int]] = []

    def plan(self) -> Plan:
        return make_plan(self.job, self.store, None)

    def run(self, index: int, share: tuple[str, ...] = (), ahead: tuple[str, str] | None = None) -> Outcome:
        planned = self.plan().cells[index]
        self.count += 1
        task = Task(
            job="job",
            cell=planned.cell,
            evaluations=planned.missing,
            store=self.store.location,
            attempt_id=f"attempt{self.count}",
            number=1,
            data=None,
            share=share,
            ahead=ahead,
        )
        return run_cell(task, self.session, lambda *event: self.stages.append(event))

    def table(self, name: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.store.read(name).to_pylist()
        return rows


@pytest.fixture
def farm(tmp_path: Path, tiny: Path) -> Farm:
    return Farm(tmp_path / "store", make_job(tiny))


def test_a_whole_matrix(farm: Farm) -> None:
    outcomes = [farm.run(index) for index in range(5)]
    assert all(outcome.failure is None for outcome in outcomes)
    assert all(planned.done for planned in farm.plan().cells)
    cells = {(row["recipe"], row["scheme"]): row for row in farm.table("cells")}
    assert set(cells) == {("baseline", "w16"), *((r, s) for r in ("rtn", "gptq") for s in ("w3", "w4/8"))}
    values = {row["cell_id"]: row["value"] for row in farm.table("metrics") if row["metric"] == "perplexity"}
    perplexity = {key: values[row["cell_id"]] for key, row in cells.items()}
    assert len(set(perplexity.values())) == 5
    # 3 bits plus 16 for the scale and 3 for the zero of 16 weights; zeros of few rows fill whole words.
    assert cells["rtn", "w3"]["linear_bits"] == pytest.approx(3 + 19 / 16, abs=0.02)
    assert cells["baseline", "w16"]["linear_bits"] == 32  # float32 model
    # The whole model: 2 blocks of 4 and 3 linears, 260 tied embeddings of 64 and 5 norms, none of them quantized.
    linear = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    others = 260 * 64 + 5 * 64
    assert cells["baseline", "w16"]["model_bytes"] == 4 * (linear + others)
    for row in cells.values():
        assert row["model_bytes"] == row["linear_bytes"] + 4 * (others + (row["recipe"] == "baseline") * linear)
        assert row["model_bits"] == 8 * row["model_bytes"] / (linear + others)
        layers = [layer for layer in farm.table("layers") if layer["cell_id"] == row["cell_id"]]
        assert len(layers) == 14 and row["layers_quantized"] + row["layers_skipped"] == 14
        assert sum(layer["stored_bytes"] for layer in layers if layer["solver"]) == row["linear_bytes"]
    bits = {
        layer["role"]: layer["bits"]
        for layer in farm.table("layers")
        if layer["cell_id"] == cells["rtn", "w4/8"]["cell_id"]
    }
    assert bits["q"] == bits["o"] == 8 and bits["up"] == bits["down"] == 4
    stages = [stage for stage, _, _ in farm.stages]
    assert "load" in stages and "calibrate + quantize" in stages and any(s.startswith("evaluate") for s in stages)


def test_sharing_statistics_changes_no_row(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = JOB.replace("[rtn, gptq]", "[gptq, spqr]").replace("[w3, w4/8]", "[w3]") + "statistics: independent\n"
    alone = Farm(tmp_path / "alone", make_job(tiny, text))
    together = Farm(tmp_path / "together", make_job(tiny, text))
    share = next(iter(shares(planned.cell for planned in together.plan().cells).values()))
    for index in range(3):
        assert alone.run(index).failure is together.run(index, share if index else ()).failure is None
    for table, ignored in (("layers", set()), ("documents", set()), ("cells", {"attempt_id", "created"})):
        rows = [
            [{k: v for k, v in row.items() if k not in ignored} for row in farm.table(table)]
            for farm in (alone, together)
        ]
        assert rows[0] == rows[1] and rows[0], table
    assert len(together.session._shared) == 1 and alone.session._shared == {}

    # Where memory does not allow it, every cell collects for itself and says so.
    monkeypatch.setattr("qfarm.shared.spare_bytes", lambda: 10)
    poor = Farm(tmp_path / "poor", make_job(tiny, text))
    assert poor.run(0).failure is poor.run(1, share).failure is None
    assert poor.session._shared == {}
    assert any("statistics not kept for other cells" in row["notes"] for row in poor.table("attempts"))
    ids = {row["cell_id"] for row in poor.table("layers")}
    assert poor.table("layers") == [row for row in alone.table("layers") if row["cell_id"] in ids]


def test_layers_that_another_solver_made_are_told_in_the_report(
    farm: Farm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(hessian: torch.Tensor, *options: Any) -> Factor:
        if len(hessian) == 128:  # of down
            raise NonFinite("not factored")
        return factorise(hessian, *options)

    monkeypatch.setattr("qfarm.methods.gptq.factorise", fail)
    labels = [planned.cell.label for planned in farm.plan().cells]
    for label in ("baseline w16", "rtn w3 g16", "gptq w3 g16"):
        assert farm.run(labels.index(label)).failure is None
    notes = {row["label"]: json.loads(row["notes"]) for row in farm.table("attempts")}
    told = "2 of 14 layers by rtn, not gptq: the Hessian could not be factored, or the result was not finite"
    assert notes["gptq w3 g16"] == [told] and notes["rtn w3 g16"] == notes["baseline w16"] == []
    with pytest.raises(SystemExit):
        cli.main(["report", farm.store.location])
    assert f"gptq w3: {told}" in " ".join(capsys.readouterr().out.split())


FOREIGN = """
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from qfarm.recipe import STRICT, WeightSolver


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Halves(WeightSolver):
    source = "a test"
    bound: float = Field(0.5, gt=0, description="weights are clipped to it")

    def quantize_linear(self, weight, inputs, grid):
        made = grid.quantize(weight.clamp(-self.bound, self.bound))
        made.solver = "halves"
        return made


METHOD = Halves
"""


def test_a_solver_of_another_package_runs_like_one_of_ours(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder on the path with a module and the metadata that pip would write: nothing of qfarm is touched."""
    package, metadata = tmp_path / "site" / "acme", tmp_path / "site" / "acme-1.0.dist-info"
    package.mkdir(parents=True)
    metadata.mkdir()
    (package / "__init__.py").touch()
    (package / "halves.py").write_text(FOREIGN)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[qfarm.methods]\nhalves = acme.halves\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    text = JOB.replace("[rtn, gptq]", "[{{halves: {{bound: 0.25}}}}, halves+qera: {{qera: {{rank: 2}}}}]")
    farm = Farm(tmp_path / "store", make_job(tiny, text.replace("[w3, w4/8]", "[w3]")))
    outcomes = [farm.run(index) for index in range(3)]
    assert [outcome.error for outcome in outcomes] == [None] * 3
    rows = {row["recipe"]: row for row in farm.table("cells")}
    assert {"halves", "halves+qera"} < set(rows) and rows["halves"]["layers_quantized"] == 14
    assert {layer["solver"] for layer in farm.table("layers")} == {None, "halves", "halves+qera"}
    assert json.loads(rows["halves"]["spec"])["methods"][0]["options"] == {"bound": 0.25}
    with pytest.raises(InvalidInput, match="halves: bound: input should be greater than 0"):
        parse_recipe({"halves": {"bound": 0.0}})


def test_results_do_not_depend_on_what_the_worker_did_before(farm: Farm, tmp_path: Path, tiny: Path) -> None:
    for index in range(5):
        farm.run(index)
    alone = Farm(tmp_path / "other", make_job(tiny))
    alone.run(0)
    alone.run(4)
    expected = {row["cell_id"]: row["loss"] for row in farm.table("documents")}
    assert alone.table("documents")
    for row in alone.table("documents"):
        assert row["cell_id"] in expected
    key = [(r["cell_id"], r["document"], r["loss"], r["kl"]) for r in alone.table("documents")]
    ids = {r["cell_id"] for r in alone.table("documents")}
    full = [(r["cell_id"], r["document"], r["loss"], r["kl"]) for r in farm.table("documents") if r["cell_id"] in ids]
    assert sorted(key) == sorted(full)


def test_attempts_tell_what_a_result_was_made_with(farm: Farm) -> None:
    farm.run(0)
    (attempt,) = farm.table("attempts")
    assert attempt["outcome"] == "ok" and attempt["wall_s"] > 0 and attempt["error"] is None
    provenance = json.loads(attempt["provenance"])
    assert provenance["packages"]["torch"] == torch.__version__ and provenance["threads"] >= 1
    assert sum(json.loads(attempt["stages"]).values()) <= attempt["wall_s"]
    text = json.dumps(attempt)
    assert "HF_TOKEN" not in text and "SECRET" not in text


def test_a_bug_ends_the_attempt_only(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: LoadedModel, ids: Any) -> None:
        raise RuntimeError("first line\nsecond line")

    with monkeypatch.context() as patch:
        patch.setattr(LoadedModel, "body", broken)
        outcome = farm.run(0)
    assert outcome.failure == Failure.BUG and outcome.error == "RuntimeError: first line second line"
    (attempt,) = farm.table("attempts")
    assert attempt["outcome"] == "bug" and attempt["stage"].startswith("evaluate")
    assert "second line" in attempt["traceback"] and "broken" in attempt["traceback"]
    assert farm.run(0).failure is None
    assert len(farm.table("attempts")) == 2 and farm.plan().cells[0].done


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), Failure.OOM),
        (MemoryError(), Failure.OOM),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate"), Failure.OOM),
        (ConnectionError("hub"), Failure.UNAVAILABLE),
        (KeyError("x"), Failure.BUG),
    ],
)
def test_failures_are_told_apart(farm: Farm, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: Failure) -> None:
    def broken(self: LoadedModel, ids: Any) -> None:
        raise error

    monkeypatch.setattr(LoadedModel, "body", broken)
    assert farm.run(0).failure == kind


def test_a_model_that_changed_since_planning_is_refused(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = farm.plan()
    monkeypatch.setattr(Farm, "plan", lambda self: plan)
    changed = dataclasses.replace(plan.cells[0].cell, fingerprint="sha256:other")
    object.__setattr__(plan.cells[0], "cell", changed)
    outcome = farm.run(0)
    assert outcome.failure == Failure.INVALID and "was planned with" in str(outcome.error)


def test_a_full_store_is_not_the_cells_fault(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> bool:
        raise StoreFull("no space")

    monkeypatch.setattr(Store, "publish_cell", full)
    with pytest.raises(StoreFull):
        farm.run(0)


def test_only_missing_evaluations_run(farm: Farm, tiny: Path) -> None:
    for index in range(5):
        farm.run(index)
    more = JOB.replace("]\nresources", ", perplexity: {{text: python-docs, length: 32, windows: 5}}]\nresources")
    farm.job = make_job(tiny, more)
    plan = farm.plan()
    assert [len(planned.missing) for planned in plan.cells] == [1] * 5
    before = {row["cell_id"]: row["attempt_id"] for row in farm.table("cells")}
    farm.run(0)
    farm.run(4)
    assert {row["cell_id"]: row["attempt_id"] for row in farm.table("cells")} == before  # the first wins
    assert len({row["eval_id"] for row in farm.table("metrics")}) == 2


STOPPING = """[
  perplexity: {{text: python-docs, length: 32, windows: 200}},
  perplexity: {{text: python-docs, length: 64, windows: 60, stop: {{above: 1.5}}}},
  perplexity: {{text: python-docs, length: 32, windows: 5}}]
"""


def spoil_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized cells predict confidently and wrongly."""
    real = worker.quantize_cell

    def spoiled(session: Session, *arguments: Any) -> Any:
        done = real(session, *arguments)
        head = session.loaded.head
        if not session.cell.is_baseline:
            session.loaded.replace_weight(head, -10.0 * head.weight)
        return done

    monkeypatch.setattr(worker, "quantize_cell", spoiled)
    monkeypatch.setattr(predictions, "BATCH_TOKENS", 256)  # 15 groups of 4 windows


def test_a_hopeless_cell_is_measured_by_nothing_else(farm: Farm, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_quantized(monkeypatch)
    usual = "[perplexity: {{text: python-docs, length: 64, windows: 30}}]\n"
    farm.job = make_job(tiny, JOB.replace(usual, STOPPING))
    plan = farm.plan()
    stop, cheap, dear = (spec.label for spec in plan.cells[1].missing)  # what may stop first, then by tokens
    assert stop.endswith("stop above 1.5x") and cheap.endswith("x5") and dear.endswith("x200")
    assert farm.run(0).failure is farm.run(1).failure is None
    ids = [planned.cell.cell_id for planned in plan.cells]
    evaluated = {
        cell_id: {m["evaluation"] for m in farm.table("metrics") if m["cell_id"] == cell_id} for cell_id in ids
    }
    assert evaluated[ids[0]] == {stop, cheap, dear} and evaluated[ids[1]] == {stop}
    assert 0 < max(m["stopped_early"] or 0 for m in farm.table("metrics")) < 60
    notes = next(json.loads(row["notes"]) for row in farm.table("attempts") if row["cell_id"] == ids[1])
    assert any(f"which ended the cell; not run: {cheap}, {dear}" in note for note in notes)
    # What was not run is not missing, for this cell alone.
    again = farm.plan()
    assert again.cells[1].done and [spec.label for spec in again.cells[1].skipped] == [cheap, dear]
    assert len(again.cells[2].missing) == 3 and not again.cells[2].skipped
    assert "stopped early" in render_plan(again, 120)
    without = JOB.replace(usual, STOPPING.replace(", stop: {{above: 1.5}}", ""))
    farm.job = make_job(tiny, without)
    assert len(farm.plan().cells[1].missing) == 3


def test_the_plan_says_what_alpha_is_for_all_cells(farm: Farm, tiny: Path) -> None:
    assert not farm.plan().notes
    farm.job = make_job(tiny, JOB.replace("windows: 30", "windows: 30, stop: {{above: 2}}"))
    (note,) = farm.plan().notes
    assert "alpha 0.01 is that of one cell; a chance of up to 0.04 that any of 4 cells at the limit is stopped" in note
    assert "(alpha: 0.0025 would make it 0.01)" in note


@pytest.mark.parametrize(("factor", "failure", "noted"), [(1.0, None, 0), (1.001, None, 1), (1.01, Failure.BUG, 1)])
def test_two_runs_of_one_cell_must_agree(
    farm: Farm, monkeypatch: pytest.MonkeyPatch, factor: float, failure: Failure | None, noted: int
) -> None:
    plan = farm.plan()
    monkeypatch.setattr(Farm, "plan", lambda self: plan)  # as a straggler has it: nothing is stored yet
    assert farm.run(0).failure is None
    before = [row for row in farm.table("metrics") if row["metric"] == "perplexity"]
    real = perplexity.metrics_of

    def other(*arguments: Any) -> Any:
        first, *rest = real(*arguments)
        return [dataclasses.replace(first, value=first.value * factor), *rest]

    monkeypatch.setattr(perplexity, "metrics_of", other)
    outcome = farm.run(0)
    assert outcome.failure == failure
    assert ("two runs of one cell differ by more than rounding" in str(outcome.error)) == (failure is not None)
    attempt = next(row for row in farm.table("attempts") if row["attempt_id"] == "attempt2")
    assert sum("in another attempt, whose results stand" in note for note in json.loads(attempt["notes"])) == noted
    assert [row for row in farm.table("metrics") if row["metric"] == "perplexity"] == before


def test_another_tokenizer_is_another_model(farm: Farm, tmp_path: Path, tiny: Path) -> None:
    """Same weights, another tokenizer: the worker must not go on with the one that it has loaded."""
    import shutil

    twin = shutil.copytree(tiny, tmp_path / "twin")
    tokenizer = (twin / "tokenizer.json").read_text()
    (twin / "tokenizer.json").write_text(tokenizer.replace('"e":68', '"e":70', 1).replace('"e": 68', '"e": 70', 1))
    assert (twin / "tokenizer.json").read_text() != tokenizer
    farm.job = make_job(tiny, JOB.replace("{model}", f"{{model}}, {twin}"))
    first, second = (p.cell for p in farm.plan().cells[:2])
    assert first.fingerprint == second.fingerprint and first.cell_id != second.cell_id
    farm.run(0)
    farm.run(1)
    alone = Farm(tmp_path / "alone", make_job(twin))
    alone.run(0)
    together = {(r["cell_id"], r["document"]): r["loss"] for r in farm.table("documents")}
    apart = {(r["cell_id"], r["document"]): r["loss"] for r in alone.table("documents")}
    assert apart.items() <= together.items()


def test_a_text_that_changed_since_planning_is_refused(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = farm.plan()
    monkeypatch.setattr(Farm, "plan", lambda self: plan)
    monkeypatch.setattr("qfarm.worker.text_hash", lambda name, part, data: "sha256:other")
    outcome = farm.run(0)
    assert outcome.failure == Failure.INVALID and "text python-docs (evaluation)" in str(outcome.error)
    assert not farm.table("metrics")


def test_windows_beyond_the_models_positions_are_refused(farm: Farm, tiny: Path) -> None:
    from qfarm.errors import JobError

    farm.job = make_job(tiny, JOB.replace("length: 64, windows: 30", "length: 512"))
    with pytest.raises(JobError, match="512 tokens at once, but .* reads at most 256"):
        farm.plan()


def test_evicted_baseline_states_do_not_matter_once_a_cell_has_begun(
    farm: Farm, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two evaluations whose states do not fit the cache together."""
    monkeypatch.setenv("QFARM_CACHE_LIMIT", "1")
    farm.job = make_job(
        tiny, JOB.replace("]\nresources", ", perplexity: {{text: python-docs, length: 32}}]\nresources")
    )
    assert farm.run(0).failure is None
    assert farm.run(1).failure is None
