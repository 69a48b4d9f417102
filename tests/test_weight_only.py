"""Weight-only quantization as a user compares it: every weight solver in one matrix, alone and in every composition."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qfarm import cli
from qfarm.job import load_job
from qfarm.matrix import expand
from qfarm.plan import make_plan
from qfarm.recipe import Transform, WeightSolver, lookup, method_names
from qfarm.store import Store
from tests.conftest import save_tiny
from tests.contract import FAST, allowed, recipe_of, run, widths
from tests.job_example import FACTS
from tests.test_models import loaded

ROOT = Path(__file__).parents[1]
# Those that also transform the model (resq, svdquant) are of another family.
SOLVERS = [n for n in method_names() if issubclass(lookup(n), WeightSolver) and not issubclass(lookup(n), Transform)]
OPTIONS = FAST | {"autoround": {"iterations": 1, "batch": 1}, "awq": {"samples": 1}, "ptq161": {"epochs": 0}}
JOB = """
models: [{model}]
dtype: float32
group_sizes: [16]
calibration: {{text: python-docs, samples: 2, length: 32}}
evaluate: [perplexity: {{text: python-docs, length: 32, windows: 2}}]
resources: {{gpus: 0}}
store: out
include: {include}
"""


def chain(*names: str) -> Any:
    options = {name: OPTIONS[name] for name in names if name in OPTIONS}
    return {"+".join(names): options if len(names) > 1 else options.get(names[0])}


def compositions(solver: str) -> Iterator[dict[str, Any]]:
    """The solver alone, behind smoothing and below a low-rank term; with other sites quantized and without."""
    widths, group_size = lookup(solver).widths, -1 if solver in ("ptq161", "llm_int8") else 16
    bits = 4 if 4 in widths else widths.start
    inputs = "a8" if "linear_in" in lookup(solver).claims - lookup(solver).optional else ""
    alone, more = f"w{bits}{inputs}", f"w{bits}a8kv4"
    for recipe, schemes in (
        (chain(solver), [alone, more]),
        (chain("smoothquant", solver), [more]),
        (chain(solver, "qera"), [alone]),
    ):
        yield {"methods": [recipe], "bits": schemes, "group_sizes": [group_size]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One job of all of them on a model of one block, run through the command line."""
    folder = tmp_path_factory.mktemp("all")
    model = save_tiny(folder / "model", "llama", num_hidden_layers=1)
    include = json.dumps([part for solver in SOLVERS for part in compositions(solver)])
    (folder / "all.yaml").write_text(JOB.format(model=model, include=include))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("QFARM_CACHE", str(folder / "cache"))
        with pytest.raises(SystemExit) as done:
            cli.main(["submit", "all.yaml", "--local"])
        assert done.value.code == 0
    yield folder


def test_one_matrix_of_every_solver_in_every_composition(folder: Path) -> None:
    store = Store.open(folder / "out")
    plan = make_plan(load_job(folder / "all.yaml"), store, None)
    assert all(planned.done for planned in plan.cells)
    assert {row["outcome"] for row in store.read("attempts").to_pylist()} == {"ok"}
    asked = [name for solver in SOLVERS for name in (solver, solver, f"smoothquant+{solver}", f"{solver}+qera")]
    found = [planned.cell.recipe for planned in plan.cells[1:]] + [bad.label.split()[0] for bad in plan.invalid]
    assert sorted(found) == sorted(asked) and len(SOLVERS) > 12
    rules = [bad.rule for bad in plan.invalid]
    assert rules == ["llm_int8: its layers multiply int8 codes; qera can stand on rtn or gptq"]

    values = {r["cell_id"]: r["value"] for r in store.read("metrics").to_pylist() if r["metric"] == "perplexity"}
    assert len(values) == len(plan.cells) and all(map(math.isfinite, values.values()))
    assert len(set(values.values())) > len(values) - 5  # smoothing, terms and other sites each make a difference
    layers = store.read("layers").to_pylist()
    for row in store.read("cells").to_pylist():
        own = [layer for layer in layers if layer["cell_id"] == row["cell_id"]]
        solver = "rtn" if row["recipe"] == "baseline" else next(n for n in row["recipe"].split("+") if n in SOLVERS)
        assert len(own) == 7 and row["layers_quantized"] == (0 if row["recipe"] == "baseline" else 7)
        for layer in own:
            assert row["recipe"] == "baseline" or layer["solver"].split("+")[0] == solver, layer
            assert layer["solver"] is None or layer["solver"].endswith("+qera") == row["recipe"].endswith("+qera")


def test_the_job_of_a_real_model_holds_them_all_and_gptq_in_natural_order() -> None:
    job = load_job(ROOT / "jobs" / "weight_only.yaml")
    cells = expand(job, lambda reference: dataclasses.replace(FACTS, reference=reference), str).cells
    others = {"llm_int8", "zeroquant", "qrazor"}  # of weights and activations: jobs/weight_activation.yaml
    assert {name for cell in cells for name in cell.recipe.split("+")} >= {*SOLVERS, "qera"} - others
    natural = {cell.group_size: cell for cell in cells if "act_order=false" in cell.variant}
    assert set(natural) == {-1, 64}
    for cell in natural.values():
        (spec,) = cell.methods
        assert spec["options"]["on_worse"] == "report"
        assert spec["options"]["act_order"] is spec["options"]["group_aware"] is False


def digests(model: str, threads: int) -> dict[str, str]:
    """By weight method: a hash of all packed tensors that it makes of a model."""
    torch.set_num_threads(threads)
    found = {}
    for name in sorted({*SOLVERS, "qera"}):
        recipe = recipe_of(name)
        made = run(loaded(Path(model)), recipe, widths(recipe).start, allowed(recipe)[0], seed=3)
        digest = hashlib.sha256()
        for key in sorted(made.quantized):
            for part, tensor in sorted(made.quantized[key].packed().items()):
                digest.update(f"{key} {part} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        found[name] = digest.hexdigest()
    return found


@pytest.mark.slow
def test_a_fresh_process_makes_the_same_bits(tiny: Path) -> None:
    """As a worker that was restarted: other addresses, another hash seed, nothing left of what ran before."""
    threads = torch.get_num_threads()
    here = digests(str(tiny), threads)
    code = f"import json, tests.test_weight_only as t; print(json.dumps(t.digests({str(tiny)!r}, {threads})))"
    environ = os.environ | {"PYTHONHASHSEED": "1234"}
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == here
    assert len(set(here.values())) == len(here) > 13
