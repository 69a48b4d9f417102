"""The matrix: which cells a job means, what their identity depends on, and which combinations cannot be."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest

from qfarm.errors import InvalidInput, JobError, Unavailable
from qfarm.evaluate import eval_id
from qfarm.job import load_job, parse_job
from qfarm.matrix import Cell, canonical_hash, expand, find_cell
from qfarm.plan import Plan, make_plan
from qfarm.recipe import Recipe, WeightSolver, lookup
from tests.job_example import CONFIG, FACTS, JOB, changed, ids, labels, matrix

ROOT = Path(__file__).parents[1]


# -- expansion --------------------------------------------------------------------------------------------------------


def test_cells_stand_in_the_jobs_order_after_the_baseline() -> None:
    text = changed(bits="[w4, w3]", group_sizes="[-1, 64]")
    found = matrix(text)
    assert [cell.label for cell in found.cells] == [
        *("baseline w16", "rtn w4", "rtn w4 g64", "rtn w3", "rtn w3 g64"),
        *("gptq w4", "gptq w4 g64", "gptq w3", "gptq w3 g64"),
    ]
    assert found == matrix(text) and found.invalid == () and found.notes == ()
    assert len(set(ids(text))) == 9


def test_each_model_has_one_baseline() -> None:
    job = parse_job(changed(models="[a, b, a]", methods="[gptq]", seeds="[0, 1]"), "x.yaml")
    found = expand(job, lambda name: dataclasses.replace(FACTS, reference=name, fingerprint=name), str)
    assert [(cell.model, cell.label) for cell in found.cells] == [
        *(("a", "baseline w16"), ("b", "baseline w16")),
        *(("a", "gptq w4 g64"), ("a", "gptq w4 g64 seed 1"), ("b", "gptq w4 g64"), ("b", "gptq w4 g64 seed 1")),
    ]
    assert len({cell.cell_id for cell in found.cells}) == 6


def test_two_names_of_the_same_model_give_the_cells_of_the_first() -> None:
    found = matrix(changed(models="[a, b]"))
    assert [(cell.model, cell.label) for cell in found.cells] == [
        *(("a", "baseline w16"), ("a", "rtn w4 g64"), ("a", "gptq w4 g64"))
    ]


def test_the_baseline_is_untouched() -> None:
    baseline = matrix(changed(symmetric="true", scale_dtype="float32", statistics="independent")).cells[0]
    assert baseline == matrix().cells[0]
    assert (baseline.recipe, baseline.methods, baseline.scheme, baseline.group_size) == ("baseline", (), "w16", -1)
    assert (baseline.calibration, baseline.statistics, baseline.seed, baseline.symmetric) == (None, None, None, False)


@pytest.mark.parametrize(
    ("once", "often"),
    [
        ({"bits": "[w4]"}, {"bits": "[w4, 4, '4', w4a16, W4]"}),
        ({"bits": "[w8]"}, {"bits": "[w8, w8/8]"}),
        ({"methods": "[rtn]"}, {"methods": "[rtn, rtn, rtn: , rtn: {search: false, convention: restricted}]"}),
        ({"methods": "[gptq]"}, {"methods": "[gptq, gptq: {damping: 0.01, on_worse: report}]"}),
        # What an automatic option means for the cell is what counts.
        ({"methods": "[gptq]"}, {"methods": "[gptq, gptq: {act_order: false, group_aware: true}]"}),
        (
            {"methods": "[gptq]", "group_sizes": "[-1]"},
            {"methods": "[gptq, gptq: {act_order: true}, gptq: {group_aware: false}]", "group_sizes": "[-1]"},
        ),
        ({"methods": "[rtn]"}, {"methods": "[rtn]", "seeds": "[0, 1, 2]"}),
        ({"group_sizes": "[64]"}, {"group_sizes": "[64, 64]"}),
        ({}, {"symmetric": "false"}),
        ({}, {"include": "[{}, {methods: [rtn], bits: [4]}]"}),
    ],
)
def test_equal_cells_collapse(once: dict[str, str], often: dict[str, str]) -> None:
    assert ids(changed(**often)) == ids(changed(**once))


def test_include_takes_what_it_does_not_say_from_the_matrix() -> None:
    text = changed(methods="[rtn]", include="[{bits: [w8]}, {methods: [gptq], group_sizes: [-1], seeds: [7]}]")
    assert labels(matrix(text)) == ["rtn w4 g64", "rtn w8 g64", "gptq w4 seed 7"]
    other = matrix(changed(methods=None, bits=None, include="[{models: [other], methods: [rtn], bits: [w4]}]"))
    assert labels(other) == ["rtn w4 g64"]


def test_exclude_removes_what_matches_every_field_given() -> None:
    axes = {"bits": "[w4, w3]", "group_sizes": "[-1, 64]"}

    def left(pattern: str) -> list[str]:
        found = matrix(changed(**axes, exclude=pattern))
        assert found.notes == () and found.cells[0].is_baseline
        return labels(found)

    assert left("[{method: gptq}]") == ["rtn w4", "rtn w4 g64", "rtn w3", "rtn w3 g64"]
    assert left("[{bits: 3}, {group_size: 64}]") == ["rtn w4", "gptq w4"]
    assert left("[{method: rtn, bits: w3a16, group_size: -1}]") == [
        *("rtn w4", "rtn w4 g64", "rtn w3 g64", "gptq w4", "gptq w4 g64", "gptq w3", "gptq w3 g64")
    ]
    assert labels(matrix(changed(methods="[gptq]", seeds="[0, 1]", exclude="[{seed: 0}]"))) == ["gptq w4 g64 seed 1"]


def test_exclude_reaches_included_cells() -> None:
    text = changed(include="[{bits: [w8]}]", exclude="[{method: gptq, bits: w8}]")
    assert labels(matrix(text)) == ["rtn w4 g64", "gptq w4 g64", "rtn w8 g64"]


def test_an_exclude_that_matches_nothing_is_noted() -> None:
    found = matrix(changed(exclude="[{method: rtn}, {method: gtpq}, {model: other}]"))
    assert labels(found) == ["gptq w4 g64"]
    assert found.notes == ("exclude[1] matches no cell", "exclude[2] matches no cell")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"exclude": "[{}]"}, "every cell is excluded"),
        ({"group_sizes": "[60]"}, "group size 60 does not divide the 256 inputs of q"),
        ({"bits": "[w16]"}, "w16 leaves everything at 16 bits; that is the baseline, which is added by itself"),
    ],
)
def test_a_matrix_without_a_cell_is_an_error(values: dict[str, str], reason: str) -> None:
    with pytest.raises(JobError, match=f"^jobs/example.yaml: the matrix is empty: {reason}$"):
        matrix(changed(**values))


def test_a_job_that_asks_for_no_method_has_its_baseline() -> None:
    assert [cell.label for cell in matrix(changed(methods=None, bits=None)).cells] == ["baseline w16"]


# -- combinations that cannot be --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "label", "rule"),
    [
        ({"group_sizes": "[96]"}, "rtn w4 g96", "group size 96 does not divide the 256 inputs of q"),
        # 256 divides the hidden size, not the MLP's 640.
        ({"group_sizes": "[256]"}, "gptq w4 g256", "group size 256 does not divide the 640 inputs of down"),
        ({"group_sizes": "[1024]"}, "rtn w4 g1024", "group size 1024 does not divide the 256 inputs of q"),
        ({"bits": "[w9]"}, "gptq w9 g64", "gptq quantizes weights to 2..8 bits, not 9"),
        ({"bits": "[w1]"}, "rtn w1 g64", "rtn quantizes weights to 2..8 bits, not 1"),
        ({"bits": "[w4/9]"}, "rtn w4/9 g64", "rtn quantizes weights to 2..8 bits, not 9"),
        ({"bits": "[w4kv9]"}, "gptq w4kv9 g64", "rtn quantizes kv_cache to 2..8 bits, not 9"),
        ({"bits": "[w8a1]"}, "gptq w8a1 g64", "rtn quantizes linear_in to 2..15 bits, not 1"),
        ({"bits": "[w8p1]"}, "rtn w8p1 g64", "rtn quantizes probs to 2..15 bits, not 1"),
        ({"bits": "[kv2]"}, "gptq kv2 g64", "gptq quantizes weight, which kv2 leaves at 16 bits"),
        (
            {"bits": "[w16]"},
            "rtn w16 g64",
            "w16 leaves everything at 16 bits; that is the baseline, which is added by itself",
        ),
        (
            {"methods": "[gptq: {group_aware: true}]", "group_sizes": "[-1]"},
            "gptq w4",
            "gptq: group_aware needs groups; without them use act_order",
        ),
        (
            {"methods": "[gptq: {static_groups: true}]", "group_sizes": "[-1]"},
            "gptq w4",
            "gptq: static_groups needs groups",
        ),
        (
            {"methods": "[gptq: {act_order: true, group_aware: true}]"},
            "gptq w4 g64",
            "gptq: act_order and group_aware are two orders; choose one",
        ),
        (
            {"methods": "[gptq: {sequential: true}]", "statistics": "independent"},
            "gptq w4 g64",
            "gptq: true-sequential sees quantized layers, which statistics: independent rules out",
        ),
    ],
)
def test_a_cell_that_cannot_be_is_listed_with_its_rule(values: dict[str, str], label: str, rule: str) -> None:
    # One cell that works beside it, so that the matrix is not empty.
    found = matrix(changed(**values, include="[{methods: [rtn], bits: [w5], group_sizes: [-1]}]"))
    assert (label, rule) in [(invalid.label, invalid.rule) for invalid in found.invalid]
    assert label not in labels(found) and "rtn w5" in labels(found)


def test_an_invalid_cell_is_listed_once() -> None:
    text = changed(methods="[gptq]", seeds="[0, 1]", bits="[w4, 4]", group_sizes="[96, -1]")
    found = matrix(text)
    assert [(invalid.model, invalid.label) for invalid in found.invalid] == [("org/model", "gptq w4 g96")]
    assert labels(found) == ["gptq w4", "gptq w4 seed 1"]


def test_an_excluded_combination_is_not_listed_as_invalid() -> None:
    found = matrix(changed(bits="[w4, w9]", exclude="[{bits: w9}]"))
    assert found.invalid == () and found.notes == ()


def test_statistics_rule_spares_what_is_not_true_sequential() -> None:
    assert matrix(changed(statistics="independent")).invalid == ()
    assert matrix(changed(methods="[gptq: {sequential: true}]")).invalid == ()


# -- identity ---------------------------------------------------------------------------------------------------------


def gptq_id(**values: str | None) -> str:
    found = [cell for cell in matrix(changed(**values)).cells if cell.recipe == "gptq"]
    assert len(found) == 1
    return found[0].cell_id


@pytest.mark.parametrize(
    "values",
    [
        {"methods": "[gptq: {damping: 0.02}]"},
        {"methods": "[gptq: {sequential: true}]"},
        {"methods": "[gptq: {on_worse: rtn}]"},
        {"bits": "[w3]"},
        {"bits": "[w4/8]"},
        {"group_sizes": "[32]"},
        {"group_sizes": "[-1]"},
        {"symmetric": "true"},
        {"scale_dtype": "float32"},
        {"dtype": "float32"},
        {"statistics": "independent"},
        {"seeds": "[1]"},
        {"calibration": "{text: python-docs, samples: 5, length: 32}"},
        {"calibration": "{text: python-docs, samples: 4, length: 33}"},
        {"calibration": "{text: c4, samples: 4, length: 32}"},
    ],
    ids=str,
)
def test_what_changes_the_result_changes_the_identity(values: dict[str, str]) -> None:
    assert gptq_id(**values) != gptq_id()


@pytest.mark.parametrize(
    "values",
    [
        {"name": "other"},
        {"models": "[another/name]"},
        {"retries": "7"},
        {"store": "elsewhere"},
        {"resources": "{gpus: 0, cpus: 2}"},
        {"evaluate": "[perplexity: {text: c4}]"},
        {"methods": "[rtn, gptq]", "exclude": "[{method: rtn}]"},
    ],
    ids=str,
)
def test_what_does_not_change_the_result_does_not(values: dict[str, str]) -> None:
    assert gptq_id(**values) == gptq_id()


def test_the_model_counts_by_what_it_is() -> None:
    assert set(ids()).isdisjoint(ids(fingerprint="another"))
    assert set(ids()).isdisjoint(ids(tokenizer="another"))
    assert ids(location="moved/elsewhere", revision="main") == ids()


def test_a_calibration_text_counts_by_its_content() -> None:
    def same(name: str) -> str:
        return "one hash for all"

    other = changed(calibration="{text: wikitext2, samples: 4, length: 32}")
    assert ids(other, hashes=same) == ids(JOB, hashes=same)
    assert ids(hashes=lambda name: "another")[:2] == ids()[:2]  # the baseline and RTN read no text
    assert ids(hashes=lambda name: "another")[2] != ids()[2]


def test_rtn_does_not_depend_on_seed_and_calibration() -> None:
    rtn = matrix(changed(methods="[rtn]")).cells[1]
    other = changed(methods="[rtn]", seeds="[9]", calibration="{samples: 9}", statistics="independent")
    assert matrix(other).cells[1] == rtn
    assert (rtn.seed, rtn.calibration, rtn.statistics) == (None, None, None)


def test_what_is_learned_before_weights_are_rounded_knows_no_mode() -> None:
    """Sequential and independent statistics are of the inputs by which weights are solved."""
    methods = "[smoothquant, {act: {granularity: tensor, mode: static}}, smoothquant+gptq]"
    one, other = (
        matrix(changed(methods=methods, bits="[w8a8]", statistics=mode)).cells for mode in ("sequential", "independent")
    )
    assert [cell.statistics for cell in other] == [None, None, None, "independent"]
    assert [a.cell_id == b.cell_id for a, b in zip(one, other, strict=True)] == [True, True, True, False]
    assert one[1].calibration is not None and one[1].seed == 0


def test_methods_that_do_not_read_the_jobs_symmetric_are_the_same_cells_either_way() -> None:
    methods = "[rtn, llm_int8, zeroquant, zeroquant: {symmetric: false}, gptq+qrazor, qrazor]"
    one, other = (
        matrix(changed(methods=methods, bits="[w8a8]", group_sizes="[-1]", symmetric=value)).cells[1:]
        for value in ("true", "false")
    )
    assert [cell.symmetric for cell in one] == [True, True, True, False, True, True]
    assert [a.cell_id == b.cell_id for a, b in zip(one, other, strict=True)] == [False, True, True, True, True, True]


def test_a_methods_version_enters_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    before = ids()
    monkeypatch.setattr(lookup("gptq"), "version", 99)
    after = ids()
    assert before[:2] == after[:2] and before[2] != after[2]


def test_a_cell_is_plain_data_from_which_its_recipe_can_be_built() -> None:
    cell = matrix(changed(methods="[gptq: {damping: 0.02}]")).cells[1]
    spec = dataclasses.asdict(cell)
    spec["methods"] = tuple(spec["methods"])
    assert Cell(**spec).cell_id == cell.cell_id
    solver = Recipe.from_specs(cell.methods).solver
    assert isinstance(solver, WeightSolver) and solver.options()["damping"] == 0.02
    assert cell.calibration == {"text": "python-docs", "samples": 4, "length": 32, "source": "hash of python-docs"}


def test_identities_are_hashes_of_canonical_json() -> None:
    expected = hashlib.sha256(b'{"a":"\\u00e9","b":[1,2.5,null,true]}').hexdigest()[:16]
    assert canonical_hash({"b": [1, 2.5, None, True], "a": "é"}) == expected
    assert canonical_hash({"a": "é", "b": (1, 2.5, None, True)}) == expected
    with pytest.raises(ValueError):
        canonical_hash(float("nan"))


def test_the_baselines_identity_stays_what_it_was() -> None:
    """A change of this number makes the results of every store unfindable; change it knowingly or not at all."""
    assert ids(changed(methods=None, bits=None)) == ["6f507c9bc54bc43f"]


# -- finding a cell ---------------------------------------------------------------------------------------------------


def test_find_cell_by_beginning_and_by_label() -> None:
    cells = matrix(changed(bits="[w4, w3]")).cells
    for cell in cells:
        assert find_cell(cells, cell.cell_id) is cell
        assert find_cell(cells, cell.cell_id[:10]) is cell
        assert find_cell(cells, cell.label) is cell
    assert find_cell(cells, "baseline").is_baseline


def test_find_cell_refuses_what_is_unknown_or_ambiguous() -> None:
    cells = matrix(changed(methods="[gptq, gptq: {damping: 0.5}]")).cells
    with pytest.raises(InvalidInput) as unknown:
        find_cell(cells, "gptq w4")
    assert str(unknown.value).startswith('"gptq w4" names no cell of this job, did you mean "gptq w4 g64"? cells: ')
    assert all(f'{cell.cell_id} ("{cell.label}")' in str(unknown.value) for cell in cells)
    assert find_cell(cells, "gptq w4 g64").variant == ""  # options in the label tell the two apart
    assert find_cell(cells, "gptq (damping=0.5) w4 g64").variant == "damping=0.5"
    with pytest.raises(InvalidInput) as several:
        find_cell(cells, "")
    assert str(several.value).startswith('"" names several cells; cells: ')


# -- plans ------------------------------------------------------------------------------------------------------------


def plan_offline(name: str) -> Plan:
    return make_plan(load_job(ROOT / "jobs" / name), None, None, allow_provisional=True)


@pytest.mark.usefixtures("offline")
def test_the_main_job_can_be_planned_without_a_network() -> None:
    plan = plan_offline("llama_matrix.yaml")
    assert plan.provisional and plan.invalid == ()
    assert [planned.cell.label for planned in plan.cells] == [
        *("baseline w16", "rtn w4", "rtn w4 g128", "rtn w3", "rtn w3 g128"),
        *("gptq w4", "gptq w4 g128", "gptq w3", "gptq w3 g128"),
        # Per channel, GPTQ orders columns by itself: two more cells, not four.
        *("gptq (act_order=true) w4 g128", "gptq (act_order=true) w3 g128"),
    ]
    assert len({planned.cell.cell_id for planned in plan.cells}) == 11
    assert [spec.label for spec in plan.cells[3].missing] == ["perplexity wikitext2 2048", "perplexity c4 2048"]
    assert all(planned.estimate.seconds > 0 and planned.estimate.source == "assumed rate" for planned in plan.cells)
    assert len(plan.notes) == 4 and plan.notes[0].startswith("meta-llama/Llama-3.1-8B-Instruct cannot be reached from")


@pytest.mark.usefixtures("offline")
def test_submitting_needs_what_a_plan_can_do_without() -> None:
    with pytest.raises(Unavailable, match=r"Llama-3\.1-8B-Instruct: the model is not in the local cache"):
        make_plan(load_job(ROOT / "jobs" / "llama_matrix.yaml"), None, None)


def test_an_evaluation_is_named_by_its_protocol(tiny: Path) -> None:
    def eval_ids(**options: Any) -> list[str]:
        entry = ", ".join(f"{key}: {value}" for key, value in ({"text": "python-docs", "length": 32} | options).items())
        text = changed(models=f"['{tiny}']", evaluate=f"[perplexity: {{{entry}}}]", resources="{gpus: 0}")
        plan = make_plan(parse_job(text, "x.yaml"), None, None)
        for planned in plan.cells:
            assert all(eval_id(spec.protocol) == spec.eval_id for spec in planned.missing)
        return [spec.eval_id for planned in plan.cells for spec in planned.missing]

    plain = eval_ids()
    assert len(plain) == 3 and len(set(plain)) == 1  # rows of all cells may be compared
    assert eval_ids(divergence="true") == plain
    assert eval_ids(length=33)[0] != plain[0] and eval_ids(windows=3)[0] != plain[0]


def test_shapes_of_the_example_are_those_of_its_configuration() -> None:
    assert FACTS.linear_shapes["down"] == (CONFIG["hidden_size"], CONFIG["intermediate_size"])
