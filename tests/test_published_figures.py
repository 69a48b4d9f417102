"""Published figures: the shipped data, what a broken file says, and measured rows beside them."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest

from qfarm import cli, published
from qfarm.errors import InvalidInput
from qfarm.published import Figure, Measure, load, names, parse_measure
from qfarm.recipe import build_method, method_names, parse_recipe
from qfarm.report.against import base_name, compare
from qfarm.report.against_text import render_against
from qfarm.report.tables import load as load_results
from qfarm.store import Store
from tests.report_example import BASELINE, PROTOCOL, FakeStore, attempt_row, cell_row

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
EXPECTED = ["awq", "crossquant", "gptq", "kivi", "kvquant", "qllm-infer", "resq", "smoothquant", "spqr"]


def figures(name: str, **axes: object) -> list[Figure]:
    return [f for f in load(name).figures if all(getattr(f, axis) == value for axis, value in axes.items())]


# -- the data ---------------------------------------------------------------------------------------------------------


def test_the_sources_that_are_shipped() -> None:
    assert names() == EXPECTED
    assert all(load(name).name == name and load(name).figures for name in names())


# Numbers from the tables themselves: (source, model, recipe, scheme, group, measure, value).
@pytest.mark.parametrize(
    ("name", "model", "recipe", "scheme", "group", "measure", "value"),
    [
        ("qllm-infer", "facebook/opt-125m", "rtn", "w4", -1, "perplexity c4 2048", 31.62),
        ("qllm-infer", LLAMA, "rtn", "w3", 128, "perplexity wikitext2 2048", 12.30),
        ("qllm-infer", LLAMA, "gptq", "w3", 128, "perplexity c4 2048", 12.86),
        ("qllm-infer", LLAMA, "spqr", "w2", 32, "perplexity c4 2048", 15.33),
        ("qllm-infer", LLAMA, "lut_gemm", "w4", -1, "perplexity c4 2048", 166.30),
        ("qllm-infer", LLAMA, "qrazor", "w4a4kv4", 16, "perplexity wikitext2 2048", 9.59),
        ("qllm-infer", LLAMA, "kvquant", "kv2", -1, "exact_match,strict-match gsm8k", 56.63),
        ("qllm-infer", LLAMA, "zeroquant", "w4/8a8", -1, "acc mmlu", 61.89),
        ("smoothquant", "meta-llama/Meta-Llama-3-70B", "smoothquant", "w8a8", -1, "perplexity wikitext2 2048", 2.982),
        ("gptq", "huggyllama/llama-30b", "gptq", "w3", 128, "perplexity wikitext2 2048", 4.80),
        ("awq", "meta-llama/Llama-2-70b-hf", "awq", "w3", 128, "perplexity wikitext2 2048", 3.74),
        ("spqr", "huggyllama/llama-7b", "spqr", "w3", 16, "perplexity wikitext2 2048", 5.87),
        ("kivi", "mistralai/Mistral-7B-Instruct-v0.2", "kivi", "kv2", -1, "score LongBench", 42.43),
        ("kvquant", "huggyllama/llama-7b", "kvquant", "kv2", -1, "perplexity wikitext2 2048", 6.01),
        ("resq", "Qwen/Qwen2.5-7B", "quarot", "w4a4kv4", -1, "perplexity wikitext2 2048", 4035.9),
        ("crossquant", "OPT", "crossquant", "a8", -1, "share linear_in", 16),
    ],
)
def test_figures_are_read_as_printed(name, model, recipe, scheme, group, measure, value) -> None:
    found = figures(name, model=model, recipe=recipe, scheme=scheme, group_size=group, measure=parse_measure(measure))
    assert value in [figure.value for figure in found]


def test_a_mean_of_six_tasks_is_the_mean_of_its_row() -> None:
    """The first six columns of a zero-shot table against its seventh; printed with two decimals."""
    tasks = ("boolq", "arc_challenge", "arc_easy", "hellaswag", "piqa", "winogrande")
    sections: dict[tuple[object, ...], dict[str, float]] = {}
    for figure in figures("qllm-infer", model=LLAMA):
        key = (figure.table, figure.recipe, str(figure.options), figure.scheme, figure.group_size)
        sections.setdefault(key, {})[figure.measure.of] = figure.value
    rows = [row for row in sections.values() if {*tasks, "csqa"} <= set(row)]
    assert len(rows) >= 10
    for row in rows:
        assert sum(row[task] for task in tasks) / 6 == pytest.approx(row["csqa"], abs=0.0151)


def test_what_cannot_be_trusted_says_so() -> None:
    """Figures at second hand are marked, and contradictions between a caption and its table stand in the data."""
    assert all(not figure.confirmed for figure in load("resq").figures)
    recalled = figures("spqr", value=5.73)
    assert [figure.confirmed for figure in recalled] == [False] and "recalled" in recalled[0].notes[0]
    (spqr,) = figures("qllm-infer", recipe="spqr", value=11.77)
    assert any("11.49" in note for note in spqr.notes)
    (razor,) = figures("qllm-infer", recipe="qrazor", value=8.34)
    assert any("8.37" in note for note in razor.notes)
    opt = figures("qllm-infer", model="facebook/opt-6.7b", value=11.74)
    assert any("OPT-2.7B" in note for note in opt[0].notes)


@pytest.mark.parametrize("name", EXPECTED)
def test_named_options_are_options(name: str) -> None:
    """Of every method that there is, as qfarm spells them; a method that there is not has only `settings`."""
    known = {*method_names(), "baseline"}
    for recipe in {figure.recipe for figure in load(name).figures} - {"baseline"}:
        if set(recipe.split("+")) <= known:
            parse_recipe(recipe)
    given = {json.dumps(figure.options) for figure in load(name).figures}
    for method, options in (pair for text in given for pair in json.loads(text).items()):
        assert method in known, (method, options)
        read = build_method(method, options).options()
        assert {option: read[option] for option in options} == options


@pytest.mark.parametrize("name", EXPECTED)
def test_no_number_stands_twice_for_the_same_thing(name: str) -> None:
    """Within one table; tables of one source may contradict each other."""
    seen: dict[str, float] = {}
    for f in load(name).figures:
        key = str((f.table, f.model, f.recipe, f.options, f.settings, f.scheme, f.group_size, f.measure))
        assert key not in seen, key
        seen[key] = f.value


# -- a file of one's own ----------------------------------------------------------------------------------------------

OWN = """
title: A paper
address: https://example.org
tables:
  - section: Table 1
    model: example/Tiny-135M
    columns: [perplexity wikitext2 2048, acc boolq]
    calibration: {text: c4, samples: 128, length: 2048}
    rows:
      - {recipe: baseline, values: [20.0, 60.0]}
      - {recipe: rtn, scheme: w4a16, group: 64, values: [25.0, null]}
      - recipe: gptq
        options: {act_order: true}
        scheme: w4
        group: 64
        values: [22.0, 55.0]
        confirmed: false
        note: a note
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    return path


def test_a_table_becomes_figures(own: Path) -> None:
    source = load(str(own))
    assert (source.name, len(source.figures)) == ("own", 5)  # null is no figure
    base, _, rtn, gptq, _ = source.figures
    assert (base.scheme, base.calibration, base.is_baseline) == ("w16", {}, True)
    assert (rtn.scheme, rtn.group_size, rtn.value) == ("w4", 64, 25.0)
    assert gptq.options == {"gptq": {"act_order": True}}
    assert gptq.calibration == {"text": "c4", "samples": 128, "length": 2048}
    assert (gptq.confirmed, gptq.notes, gptq.section) == (False, ("a note",), "Table 1")
    assert gptq.measure == Measure(metric="perplexity", of="wikitext2", length=2048)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("values: [25.0, null]", "values: [25.0]", "1 values for 2 columns"),
        ("acc boolq]", "ack boolq]", 'unknown metric "ack"'),
        ("perplexity wikitext2 2048", "perplexity wikitext2", 'expected "perplexity TEXT LENGTH"'),
        ("scheme: w4a16, ", "", "a baseline has no scheme, and every other row needs one"),
        ("scheme: w4a16", "scheme: w4b16", 'scheme "w4b16" is not understood'),
        ("confirmed: false", "confirmd: false", "tables.0.rows.2.confirmd: Extra inputs are not permitted"),
        ("model: example/Tiny-135M", "note: none", "neither the row nor its table names a model"),
        ("[22.0, 55.0]", "[.nan, 55.0]", "finite number"),
        ("title: A paper", "title: [", "not valid YAML"),
        ("recipe: gptq", "recipe: smoothquant+gptq", "under its methods' names"),
    ],
)
def test_broken_files_say_where(own: Path, before: str, after: str, message: str) -> None:
    assert before in OWN
    own.write_text(OWN.replace(before, after, 1))
    with pytest.raises(InvalidInput) as error:
        load(str(own))
    assert message in str(error.value) and str(own) in str(error.value) and "\n" not in str(error.value)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InvalidInput, match='no published figures called "qlm-infer", did you mean "qllm-infer"'):
        load("qlm-infer")
    with pytest.raises(InvalidInput, match=r"nowhere\.yaml: cannot be read: No such file"):
        load("nowhere.yaml")


# -- beside measured rows ---------------------------------------------------------------------------------------------

TASKS = {"evaluator": "tasks", "options": {"task": "csqa", "limit": None}}
CALIBRATION = {"text": "c4", "samples": 128, "length": 2048}


def gptq_spec(calibration: dict[str, object] = CALIBRATION, **options: object) -> str:
    """As a job on groups of 64 writes it: every option, resolved for the group size."""
    method = build_method("gptq", options).resolve(64)
    spec = {"methods": [{"name": "gptq", "version": method.version, "options": method.identity()}]}
    return json.dumps(spec | {"calibration": calibration, "variant": "act_order=true"})


def measured(*cells: object, protocol: dict[str, object] | None = None, model: str | None = None) -> FakeStore:
    """A baseline of perplexity 20 and cells of 26, 23.5 and so on, in windows of one token each."""
    store = FakeStore()
    every = [cell_row(BASELINE, "baseline", "w16"), *cells]
    for cell, value in zip(every, (20.0, 26.0, 23.5, 23.5), strict=False):
        store.rows["cells"].append(cell)
        store.rows["attempts"].append(attempt_row(cell.cell_id))
        store.add(cell, [math.log(value)] * 3, [1] * 3, protocol=protocol or PROTOCOL)
    return store


RTN_CELL = cell_row("2" * 16, "rtn", "w4")
GPTQ_CELL = cell_row("1" * 16, "gptq", "w4", spec=gptq_spec(act_order=True))


def found(store: FakeStore, own: Path, **filters: str):
    return compare(load_results(store), load(str(own)), **filters)


def test_ours_theirs_and_the_difference(own: Path) -> None:
    result = found(measured(RTN_CELL, GPTQ_CELL), own)
    base, gptq, rtn = sorted(result.pairs, key=lambda pair: pair.cell.recipe)
    assert [pair.cell.recipe for pair in (base, gptq, rtn)] == ["baseline", "gptq", "rtn"]
    assert (rtn.ours, rtn.figure.value, rtn.difference) == pytest.approx((26.0, 25.0, 1.0))
    assert rtn.percent == pytest.approx(4.0)
    assert (rtn.ours_change, rtn.theirs_change) == pytest.approx((30.0, 25.0))  # 26 / 20 and 25 / 20
    assert (base.ours_change, base.theirs_change, base.difference) == (None, None, pytest.approx(0.0))
    assert gptq.remarks == ()
    assert (result.cells, result.cells_without) == (3, 0)
    assert result.figures_without == 2  # both of boolq


def test_accuracies_are_compared_in_points(own: Path) -> None:
    store = FakeStore()
    for cell, right in ((cell_row(BASELINE, "baseline", "w16"), [1, 1, 1, 0]), (GPTQ_CELL, [1, 1, 0, 0])):
        store.rows["cells"].append(cell)
        store.rows["attempts"].append(attempt_row(cell.cell_id))
        store.add_items(cell, right, protocol={**TASKS, "options": {"task": "boolq", "limit": None}})
    base, gptq = found(store, own).pairs
    assert (base.ours, gptq.ours, gptq.figure.value) == (75.0, 50.0, 55.0)
    assert (gptq.difference, gptq.ours_change, gptq.theirs_change) == (-5.0, -25.0, -5.0)


@pytest.mark.parametrize(
    ("cell", "protocol"),
    [
        (cell_row("2" * 16, "rtn", "w3"), PROTOCOL),
        (cell_row("2" * 16, "rtn", "w4", group_size=128), PROTOCOL),
        (cell_row("2" * 16, "rtn", "w4", model="example/Tiny-360M"), PROTOCOL),
        (cell_row("2" * 16, "hqq", "w4"), PROTOCOL),
        (cell_row("2" * 16, "rtn", "w4"), {**PROTOCOL, "options": {**PROTOCOL["options"], "windows": 24}}),
        (cell_row("2" * 16, "rtn", "w4"), {**PROTOCOL, "options": {**PROTOCOL["options"], "length": 512}}),
        (cell_row("2" * 16, "rtn", "w4"), {**PROTOCOL, "options": {**PROTOCOL["options"], "text": "c4"}}),
        (cell_row("2" * 16, "rtn", "w4"), {**PROTOCOL, "options": {**PROTOCOL["options"], "convention": "word"}}),
        (cell_row("2" * 16, "gptq", "w4", spec=gptq_spec(act_order=False, group_aware=False)), PROTOCOL),
    ],
    ids=["width", "group", "model", "recipe", "windows", "length", "text", "convention", "option"],
)
def test_what_differs_has_no_counterpart(own: Path, cell, protocol) -> None:
    result = found(measured(cell, protocol=protocol), own)
    assert [pair for pair in result.pairs if not pair.cell.recipe == "baseline"] == []
    assert result.cells_without == result.cells - len({pair.cell.cell_id for pair in result.pairs})


def test_what_is_not_named_is_said_and_shuts_nothing_out(own: Path) -> None:
    spec = gptq_spec({"text": "wikitext2", "samples": 16, "length": 2048}, act_order=True, search=True)
    cell = cell_row("1" * 16, "gptq", "w4", spec=spec, model="/models/Tiny-135M")
    (pair,) = (pair for pair in found(measured(cell), own).pairs if pair.cell.recipe == "gptq")
    assert pair.remarks == (
        "model by its name: /models/Tiny-135M here, example/Tiny-135M there",
        "calibration text: wikitext2 here, c4 there",
        "calibration samples: 16 here, 128 there",
        "gptq.search=true here, not named there",
    )


def test_a_baseline_that_was_measured_twice_is_one_pair(own: Path) -> None:
    """Cells with a quantized cache have a protocol of their own, and their baseline is measured under it too."""
    store = measured()
    cached = {**PROTOCOL, "kv": {"prefill": "quantized", "chunk": None}}
    store.add(store.rows["cells"][0], [3.0] * 3, [1] * 3, eval_id="c" * 16, protocol=cached)
    assert len(found(store, own).pairs) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "/models/Meta-Llama-3.1-8B-Instruct/"),
        ("meta-llama/Llama-2-7b-hf", "NousResearch/Llama-2-7b-hf@main"),
        ("facebook/opt-125m", "opt-125m"),
    ],
)
def test_models_by_their_base_name(one: str, other: str) -> None:
    assert base_name(one) == base_name(other)
    assert base_name(one) != base_name("meta-llama/Llama-2-7b-chat-hf")


def test_filters(own: Path) -> None:
    store = measured(RTN_CELL, GPTQ_CELL)
    assert {pair.cell.recipe for pair in found(store, own, recipe="g*").pairs} == {"baseline", "gptq"}
    with pytest.raises(InvalidInput, match='no measured row matches recipe "awq"'):
        found(store, own, recipe="awq")


# -- as text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120, 200])
def test_terminal(own: Path, width: int) -> None:
    text = render_against(found(measured(RTN_CELL, GPTQ_CELL), own), "terminal", width=width)
    assert max(map(len, text.splitlines())) <= width
    (line,) = (line for line in text.splitlines() if line.startswith("rtn"))
    assert [word in line.split() for word in ("26.00", "25.00", "+1.00")] == [True] * 3
    assert "1: not confirmed" in text and "2: a note" in text
    assert "0 of 3 measured cells have no counterpart" in " ".join(text.split())


def test_markdown_csv_and_json_hold_the_same_pairs(own: Path) -> None:
    result = found(measured(RTN_CELL, GPTQ_CELL), own)
    data = json.loads(render_against(result, "json", width=80))
    rows = list(csv.DictReader(io.StringIO(render_against(result, "csv", width=80))))
    assert [pair["cell_id"] for pair in data["pairs"]] == [row["cell_id"] for row in rows]
    assert [pair["theirs"] for pair in data["pairs"]] == [float(row["theirs"]) for row in rows]
    assert rows[-1]["theirs_options"] in ("gptq={'act_order': True}", "")
    markdown = render_against(result, "markdown", width=80)
    lines = [line for line in markdown.splitlines() if line.startswith("|")]  # no number stands there twice
    assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1


def test_nothing_to_compare(own: Path) -> None:
    result = found(FakeStore(), own)
    assert (result.pairs, result.cells, result.figures_without) == ((), 0, 5)
    assert "0 pairs" in render_against(result, "terminal", width=80)
    assert render_against(result, "csv", width=80) == "published,cell_id\n"


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> str:
    """A store on disk: LLaMA-3.1-8B-Instruct's baseline at 7.25, RTN in groups of 128 at 7.80."""
    fake = FakeStore()
    for cell, value in (
        (cell_row(BASELINE, "baseline", "w16", model=LLAMA), 7.25),
        (cell_row("2" * 16, "rtn", "w4", model=LLAMA, group_size=128), 7.80),
        (cell_row("3" * 16, "hqq", "w4", model=LLAMA, group_size=128), 7.70),
    ):
        fake.rows["cells"].append(cell)
        fake.add(cell, [math.log(value)] * 3, [1] * 3)
    store = Store.open(str(tmp_path / "results"), create=True)
    for cell in fake.rows["cells"]:
        metrics = [row for row in fake.rows["metrics"] if row.cell_id == cell.cell_id]
        documents = [row for row in fake.rows["documents"] if row.cell_id == cell.cell_id]
        store.publish_cell(cell, [])
        store.publish_evaluation(cell.cell_id, metrics[0].eval_id, cell.attempt_id, metrics, documents)
        store.publish_attempt(attempt_row(cell.cell_id))
    return store.location


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        cli.main(arguments)
    captured = capsys.readouterr()
    return int(done.value.code or 0), captured.out, captured.err


def test_report_against(results: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(capsys, "report", results, "--against", "qllm-infer")
    assert (code, err) == (0, "")
    (line,) = (line for line in out.splitlines() if line.startswith("rtn"))  # one number, in two tables of the source
    assert [word for word in line.split() if "." in word] == ["7.80", "7.75", "+0.05"]
    assert "1 of 3 measured cells have no counterpart" in " ".join(out.split())
    code, out, _ = run(capsys, "report", results, "--against", "qllm-infer", "--format", "json", "--bits", "w4")
    pairs = json.loads(out)["pairs"]
    assert {pair["section"] for pair in pairs if pair["recipe"] == "rtn"} == {"RTN", "LUT-GEMM"}
    assert all(
        pair["theirs_change"] == pytest.approx(100 * (7.75 / 7.22 - 1)) for pair in pairs if pair["theirs"] == 7.75
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--against", "kv"), 'error: no published figures called "kv"'),
        (("--against", "kivi", "--margin", "perplexity=1%"), "error: --margin judges or places what was measured"),
        (("--against", "kivi", "--method", "nothing"), 'error: no measured row matches recipe "nothing"'),
    ],
)
def test_what_the_command_refuses(results, capsys, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(capsys, "report", results, *arguments)
    assert (code, out) == (2, "") and err.startswith(message) and err.count("\n") == 1


def test_shipped_files_are_in_the_package() -> None:
    import tomllib

    root = Path(published.__file__).parents[2]
    built = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert built["qfarm.published"] == ["*.yaml"]
