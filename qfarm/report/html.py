"""HTML: a report as one file that opens without a network, on a phone and on paper, light or dark.

Jinja2 places the words with autoescape on; the charts are drawn in the browser by Vega-Lite, whose bundle comes with
vl-convert and stands in the file once. A content security policy forbids every request. Foreign text (model names,
errors, tracebacks) reaches the page as escaped text, or inside JSON that cannot end its script element.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from qfarm.report.page import page_of
from qfarm.report.pairs import Readable
from qfarm.report.rows import Results

TEMPLATE = "report.html"


def to_html(results: Results, store: Readable, *, written: str) -> str:
    """The page. `written` (UTC, ISO 8601) is the only thing in it that the store does not decide."""
    page = page_of(results, store)
    specs = {drawn.anchor: drawn.spec for drawn in page.figures()}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_file(TEMPLATE)).render(
        page=page,
        written=written[:16].replace("T", " "),
        style=Markup(_file("report.css")),
        script=Markup(_file("report.js")),
        library=Markup(bundle() if specs else ""),
        specs=Markup(island(specs)),
    )


def island(value: Any) -> str:
    """JSON that no text in it can break out of, for a script element of another type."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@functools.cache
def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed, for one script element."""
    text: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stubs know no default
    assert "</script" not in text.lower()
    return text


def _file(name: str) -> str:
    return (importlib.resources.files("qfarm.report") / "template" / name).read_text(encoding="utf-8")
