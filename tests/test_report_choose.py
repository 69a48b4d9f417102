"""Filters, conditions, order, and the LaTeX tables: what is shown, while marks keep the family of the whole table."""

from __future__ import annotations

import re

import pytest

from qfarm.errors import InvalidInput
from qfarm.report.choose import chosen
from qfarm.report.columns import columns_of
from qfarm.report.render import render
from qfarm.report.rows import Results
from qfarm.report.tables import load
from tests.report_example import HOSTILE, Planted, hostile_store, row_of
from tests.test_report_html import planted


@pytest.fixture(scope="module")
def results() -> Results:
    return load(planted().store)


def names(found: Results) -> list[str]:
    return [row.name for table in found.tables for row in table.rows]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("stored>=8", ["gptq"]),
        ("stored > 4.25 and stored < 8", ["rtn"]),
        ("change<3", ["gptq", "gptq"]),
        ("significant=no", ["gptq"]),
        ("recipe~smooth*", ["smooth alpha=0.3", "smooth alpha=0.5", "smooth alpha=0.7"]),
        ("recipe=rtn", ["rtn"]),
        ("recipe=rtn and pareto=front", []),
        ("recipe!=rtn and Pareto=dominated and change<3", []),
        ("Pareto=front and best=no", None),
        ("group=64 and seed=2", ["spqr"]),
    ],
)
def test_conditions(results: Results, where: str, expected: list[str] | None) -> None:
    table = results.tables[0]
    if expected is None:  # told from the rows themselves
        expected = [row.name for row in table.rows if row.front == "front" and not row.best]
    if not expected:
        with pytest.raises(InvalidInput, match="no row matches"):
            chosen(results, where=where)
        return
    assert names(chosen(results, where=where)) == ["baseline", *expected]


def test_a_condition_changes_no_mark(results: Results) -> None:
    before = row_of(results, "11" * 8)
    (table,) = chosen(results, where="recipe=gptq").tables
    (after,) = [row for row in table.rows if row.cell.cell_id == "11" * 8]
    assert (after.adjusted_p, after.best, after.front) == (before.adjusted_p, before.best, before.front)


def test_order(results: Results) -> None:
    (table,) = chosen(results, sort="change").tables
    values = [row.difference.delta for row in table.rows[1:]]
    assert table.rows[0].is_baseline and values == sorted(values)
    (falling,) = chosen(results, sort="-change").tables
    assert [row.difference.delta for row in falling.rows[1:]] == sorted(values, reverse=True)
    (by_name,) = chosen(results, sort="recipe").tables
    assert [row.name for row in by_name.rows[1:]] == sorted(row.name for row in by_name.rows[1:])


def test_rows_without_a_number_come_last_in_both_directions() -> None:
    made = Planted()
    made.cell("11", "gptq", made.noise(0.01) + 0.02)
    made.cell("22", "rtn", made.noise(0.01) + 0.3)
    made.store.rows["metrics"] = [row for row in made.store.rows["metrics"] if row.cell_id != "22" * 8]
    made.store.add(made.store.rows["cells"][2], [], [], metrics={"kl": 0.1})
    for sort in ("PPL", "-PPL"):
        (table,) = chosen(load(made.store), sort=sort).tables
        assert [row.name for row in table.rows] == ["baseline", "gptq", "rtn"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "stord<4"}, 'no column "stord", did you mean "stored"'),
        ({"where": "stored"}, "expected NAME OPERATOR VALUE"),
        ({"where": "stored<four"}, '"stored" is a number'),
        ({"where": "best=maybe"}, '"best" is yes or no'),
        ({"where": "best<yes"}, '"best" is yes or no'),
        ({"sort": "-chnge"}, '--sort -chnge: no column "chnge", did you mean "change"'),
        ({"recipe": "gtpq"}, 'no recipe matches "gtpq", did you mean "gptq"'),
    ],
)
def test_what_names_nothing_is_refused(results: Results, options: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        chosen(results, **options)


def test_nothing_can_be_chosen_where_nothing_is_finished() -> None:
    with pytest.raises(InvalidInput, match="^--sort ppl: there is no finished evaluation yet"):
        chosen(Results(tables=(), failed=()), sort="ppl")


def test_shares_are_compared_as_they_are_shown() -> None:
    made = Planted()
    made.cell("11", "gptq", made.noise(0.01) + 0.02)
    made.store.rows["metrics"] = [row for row in made.store.rows["metrics"] if row.cell_id != "11" * 8]
    made.store.add(made.store.rows["cells"][1], made.base, made.tokens, metrics={"top1_agreement": 0.903})
    results = load(made.store)
    assert names(chosen(results, where="agree>90")) == ["baseline", "gptq"]
    with pytest.raises(InvalidInput, match="no row matches"):
        chosen(results, where="agree>91")


# -- LaTeX ------------------------------------------------------------------------------------------------------------


def lines_of(text: str) -> list[list[str]]:
    return [re.split(r"(?<!\\)&", line) for line in text.splitlines() if line.endswith(r"\\")]


def test_a_table_for_a_paper(results: Results) -> None:
    text = render(results, "latex")
    for word in ("begin{table}", "toprule", "midrule", "bottomrule", "end{tabular}", "caption{", "label{tab:qfarm-1}"):
        assert text.count(f"\\{word}") == 1
    (columns,) = re.findall(r"begin\{tabular\}\{([lr]+)\}", text)
    heading, *rows = lines_of(text)
    assert len(rows) == len(results.tables[0].rows) and {len(row) for row in (heading, *rows)} == {len(columns)}
    (caption,) = re.findall(r"\\caption\{(.*)\}", text)
    assert "141 windows, 141 clusters" in caption and "length 2048" in caption and "Holm-adjusted" in caption
    assert "$+$2.0" in text and r"\%" in text and "noise floor" not in caption
    best = [row for row in results.tables[0].rows if row.best]
    assert text.count(r"$\bullet$") == len(best)


def test_the_numbers_are_those_of_the_terminal(results: Results) -> None:
    change = next(column for column in columns_of(results.tables[0]) if column.heading.strip() == "change")
    for row in results.tables[0].rows:
        shown = change.text(row).strip().replace("%", r"\%").replace("+", "$+$").replace("-", "$-$")
        assert shown in render(results, "latex")


def test_foreign_text_runs_no_command() -> None:
    store = hostile_store()
    text = render(load(store), "latex")
    assert "\\input" not in text and "\x1b" not in text
    assert r"\textless{}/script\textgreater{} \textbar{} a *b*" in text
    assert {len(row) for row in lines_of(text)} == {len(lines_of(text)[0])}
    assert HOSTILE not in text


def test_every_special_character_is_escaped() -> None:
    from qfarm.report.latex import _escaped

    assert _escaped("\\{}~^<>|&%$#_") == (
        r"\textbackslash{}\{\}\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}\textbar{}\&\%\$\#\_"
    )
