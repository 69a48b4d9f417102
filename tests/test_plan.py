"""Plans of models that are larger than a GPU: in parts over several, streamed, or refused with the reason."""

from __future__ import annotations

import pytest

from qfarm.job import parse_job
from qfarm.memory import Arrangement, arrange
from qfarm.plan import Plan, make_plan

LARGE = "meta-llama/Llama-3.1-70B"  # described by the table of known models
JOB = f"""
models: [{LARGE}]
methods: [rtn]
bits: [w4]
resources: {{gpus: GPUS, gpu_memory: 80}}
evaluate:
  - perplexity: {{text: python-docs, length: 2048, windows: 2}}
"""
STREAMED = "more than 1 GPU(s) of 80 GB: its blocks will be streamed from the host's memory"


def plan(gpus: float, text: str = JOB) -> Plan:
    return make_plan(parse_job(text.replace("GPUS", str(gpus)), "job.yaml"), None, None, allow_provisional=True)


def test_a_model_that_fits_on_several_gpus_takes_so_many() -> None:
    made = plan(8)
    # 141 GB of weights and 137 of new ones; tables, two blocks and 17 to round gate and up in on each; a fifth more.
    assert {item.cell.recipe: item.gpus for item in made.cells} == {"baseline": 3, "rtn": 7}
    assert made.invalid == () and not any("streamed" in note for note in made.notes)
    for item in made.cells:  # and the worker lays it so
        placed = arrange(item.estimate.needed, int(item.gpus), int(79e9), movable=True)
        assert placed == Arrangement(gpus=int(item.gpus), streamed=False)


def test_a_model_that_does_not_fit_is_streamed_to_one_gpu() -> None:
    made = plan(1)
    assert [item.gpus for item in made.cells] == [1, 1] and made.invalid == ()
    told = [note for note in made.notes if note.endswith(STREAMED)]
    assert [note.partition(" of ")[0] for note in told] == ["baseline w16", "rtn w4"]


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        (JOB.replace("[rtn]", "[smoothquant+rtn]"), {"smoothquant+rtn w4": "only methods of weights"}),
        (
            JOB.replace("  - perplexity", "  - analysis: {text: python-docs}\n  - perplexity"),
            {"baseline w16": "analysis compares blocks", "rtn w4": "analysis compares blocks"},
        ),
        (
            JOB.replace("gpu_memory: 80", "gpu_memory: 4"),
            {"baseline w16": "even if its blocks are streamed", "rtn w4": "even if its blocks are streamed"},
        ),
    ],
)
def test_what_cannot_be_streamed_is_not_run(text: str, rules: dict[str, str]) -> None:
    made = plan(1, text)
    assert {item.label: item.rule for item in made.invalid}.keys() == rules.keys()
    assert all(rules[item.label] in item.rule and "more than 1 GPU(s) of " in item.rule for item in made.invalid)
    assert len(made.cells) == 2 - len(rules)


def test_a_cell_that_is_too_large_to_be_packed_is_still_run_as_fake() -> None:
    made = plan(8, JOB + "run: [fake, packed]\n")
    runs = {item.cell.recipe: [spec.protocol["run"] for spec in item.missing] for item in made.cells}
    assert runs == {"baseline": ["fake", "packed"], "rtn": ["fake"]}
    [refused] = made.invalid
    assert refused.label == "rtn w4 packed" and "a packed run has its layers on one device" in refused.rule
    whole = {item.cell.recipe: item.gpus for item in plan(8).cells}
    assert {item.cell.recipe: item.gpus for item in made.cells} == whole


def test_a_part_of_a_gpu_is_no_place_to_stream_to() -> None:
    made = plan(0.5)
    assert made.cells == () and all("more than 0.5 GPU(s) of 80 GB" in item.rule for item in made.invalid)


def test_a_job_that_says_nothing_of_memory_has_all_of_it_run() -> None:
    made = plan(1, JOB.replace(", gpu_memory: 80", ""))
    assert [item.gpus for item in made.cells] == [1, 1] and made.invalid == ()
