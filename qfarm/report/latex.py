r"""LaTeX: the tables of a report for a paper, with booktabs; their captions state protocol and n.

A table needs `\usepackage{booktabs}` and no other package. Columns are those that a reader of a paper wants; ids and
times are in the other formats. Foreign text cannot run a command: every character that LaTeX acts on is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from qfarm.report.captions import caption, failures, row_notes, title
from qfarm.report.columns import Column, columns_of
from qfarm.report.rows import Results, Row, Table

LEFT_OUT = frozenset(
    {"with seed noise", "right", "flips", "lost", "gained", "KL back", "KL median", "KL p99", "model bits", "causal"}
    | {"Pareto", "time", "cell"}
)
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "·": r"\textperiodcentered{}",
    "…": r"\ldots{}",
} | {character: f"\\{character}" for character in "&%$#_"}


def to_latex(results: Results) -> str:
    """One `table` environment per model and evaluation; failed cells as comments."""
    lines = ["% needs \\usepackage{booktabs}"]
    for index, table in enumerate(results.tables):
        lines += [*_table(table, index), ""]
    if not results.tables:
        lines.append("% no finished evaluations")
    lines += [f"% {line.strip()}" for line in failures(results.failed)]
    return "\n".join(lines).rstrip() + "\n"


def _table(table: Table, index: int) -> Iterator[str]:
    columns = [column for column in columns_of(table) if column.heading not in LEFT_OUT]
    yield "\\begin{table}"
    yield "\\centering"
    yield f"\\caption{{{_escaped(_caption(table))}}}"
    yield f"\\label{{tab:qfarm-{index + 1}}}"
    yield f"\\begin{{tabular}}{{{''.join('r' if column.numeric else 'l' for column in columns)}}}"
    yield "\\toprule"
    yield _line([_escaped(column.heading.strip()) for column in columns])
    yield "\\midrule"
    before: Row | None = None
    for row in table.rows:
        if before is not None and before.cell.scheme != row.cell.scheme:
            yield "\\addlinespace"
        yield _line([_cell(column, row) for column in columns])
        before = row
    yield "\\bottomrule"
    yield "\\end{tabular}"
    yield "\\end{table}"


def _cell(column: Column, row: Row) -> str:
    text = column.text(row).strip()
    # What is not shown worse than the best has a mark of its own; no single winner is set in bold in a tie.
    if column.heading == "best" and text == "|":
        return "$\\bullet$"
    return re.sub(r"(?<![\w.])([+-])(?=\d)", lambda sign: f"${sign[1]}$", _escaped(text))


def _caption(table: Table) -> str:
    """Title, protocol, n and what the marks mean; a reader of one page has to do without the rest."""
    lines = [line.rstrip(".").replace("(|)", "(bullet)") for line in caption(table, brief=True)]
    stopped = [row for row in table.rows if row.stopped is not None]
    return ". ".join([title(table), *lines, *row_notes(stopped)]) + "."


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text)
