"""Charts: Vega-Lite specifications of the report's figures, made by Altair, from plain rows.

Colours are CSS custom properties of the page (`var(--s0)`), which Vega's SVG renderer hands on as they are: light, dark
and print are the page's business and nothing is drawn again. Meaning never rests on colour alone: classes also have a
shape, bars and rows carry their names, the heat map has one hue. Every mark has a description for screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import altair as alt

Point = Mapping[str, Any]
Spec = dict[str, Any]

CLASSES = ("front", "undecided", "dominated", "not ranked")
JUDGED = ("differs", "not shown to differ", "not tested")
COLOURS = ["var(--s0)", "var(--s1)", "var(--s2)", "var(--s3)"]
SHAPES = ["circle", "square", "triangle-down", "cross", "diamond"]  # not as many as colours: pairs repeat late
INK, MUTED = "var(--ink)", "var(--muted)"
HEIGHT = 320
NAMED_ROW, CELL = 34, 18  # pixels
_WIDE = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}


def size_against_quality(points: Sequence[Point], baseline: float | None, title: str, logarithmic: bool) -> Spec:
    """Points have x (bits, moved aside where several share them), y, low, high, class, label; shown: a name or "";
    right: whether it stands left of a point at the right."""
    chart = alt.Chart(alt.InlineData(values=list(points)))
    ends = _ends(points, "y")
    ends += [] if baseline is None else [baseline]
    x = alt.X(
        "x:Q",
        title="stored bits per weight of the quantized layers",
        scale=alt.Scale(type="log", base=2, nice=False, padding=24),
        axis=alt.Axis(values=[1, 1.5, 2, 3, 4, 5, 6, 8, 12, 16], format="~g", grid=False),
    )
    y = alt.Y("y:Q", title=title, scale=_scale(ends, logarithmic), axis=_log_axis(ends) if logarithmic else alt.Axis())
    chosen, shape = _classes("class", CLASSES, {point["class"] for point in points})
    layers: list[Any] = []
    if baseline is not None:
        line = alt.Chart(alt.InlineData(values=[{"y": baseline, "label": "full precision"}]))
        layers += [
            line.mark_rule(color=MUTED, strokeDash=[6, 4], aria=False).encode(y="y:Q"),
            line.mark_text(align="left", dx=4, dy=-6, color=MUTED, aria=False).encode(
                y="y:Q", x=alt.value(0), text="label:N"
            ),
        ]
    front = chart.transform_filter("datum.class == 'front'")
    if _have_ends(points):
        layers.append(chart.mark_rule(aria=False).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=chosen))
    layers.append(
        chart.mark_point(filled=True, size=70, opacity=1).encode(
            x=x, y=y, color=chosen, shape=shape, tooltip="label:N", description="label:N"
        )
    )
    if any(point["class"] == "front" for point in points):
        line = front.mark_line(interpolate="step-after", color="var(--s0)", strokeWidth=1, aria=False)
        # Names go to the side where there is room for them.
        side, away = alt.ExprRef("datum.right ? 'right' : 'left'"), alt.ExprRef("datum.right ? -6 : 6")
        names = front.mark_text(align=side, dx=away, dy=-8, color=INK, aria=False, limit=160)
        layers += [line.encode(x="x:Q", y="y:Q", order="x:Q"), names.encode(x="x:Q", y="y:Q", text="shown:N")]
    return _spec(alt.layer(*layers).properties(height=HEIGHT))


def changes(points: Sequence[Point], title: str, wide: bool) -> Spec:
    """One row per point, its name above it: id, name, value, low, high, judged, label. `wide`: ends orders apart."""
    chart = alt.Chart(alt.InlineData(values=list(points)))
    y = alt.Y("id:N", sort=None, axis=None)
    scale = alt.Scale(type="symlog", constant=1, nice=False) if wide else alt.Scale(nice=False, padding=8)
    axis = alt.Axis(values=_symlog_ticks(_ends(points, "value"))) if wide else alt.Axis(tickCount=5)
    x = alt.X("value:Q", title=title, scale=scale, axis=axis)
    colour, shape = _classes("judged", JUDGED, {point["judged"] for point in points})
    zero = alt.Chart(alt.InlineData(values=[{"x": 0}]))
    layers: list[Any] = [zero.mark_rule(color=INK, aria=False).encode(x="x:Q")]
    if _have_ends(points):
        error = chart.mark_rule(yOffset=6, color=INK, aria=False)
        layers.append(error.encode(x=alt.X("low:Q"), x2="high:Q", y=y))
    layers += [
        chart.mark_point(filled=True, yOffset=6, size=60, opacity=1).encode(
            x=x, y=y, color=colour, shape=shape, tooltip="label:N", description="label:N"
        ),
        chart.mark_text(
            align="left", baseline="bottom", dy=-1, color=INK, aria=False, limit=alt.ExprRef("width")
        ).encode(x=alt.value(0), y=y, text="name:N"),
    ]
    return _spec(alt.layer(*layers).properties(height=NAMED_ROW * len(points)))


def heat_map(points: Sequence[Point], cells: Sequence[str], roles: Sequence[str], title: str) -> Spec:
    """Layers x roles, one cell at a time: cell, layer, role, value (not negative), label. 18 pixels a square."""
    choose = alt.param(
        name="cell",
        value=cells[0],
        bind=alt.binding_select(options=list(cells), name="cell ") if len(cells) > 1 else alt.Undefined,
    )
    top = max((point["value"] for point in points), default=0.0) or 1.0
    layers = sorted({point["layer"] for point in points})
    chart = (
        alt.Chart(alt.InlineData(values=list(points)))
        .transform_filter("datum.cell == cell")
        .mark_rect(color="var(--s0)", stroke="var(--edge)", strokeWidth=0.5)
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("role:N", title=None, sort=list(roles)),
            opacity=alt.Opacity("value:Q", title=title, scale=alt.Scale(domain=[0, top], range=[0, 1])),
            tooltip="label:N",
            description="label:N",
        )
        .add_params(choose)
        .properties(width=CELL * len(layers), height=CELL * len(roles))
    )
    spec: Spec = chart.to_dict()
    return _bare(spec)


def bars(points: Sequence[Point], title: str) -> Spec:
    """Bars from 0 with their names above them: name, value, low, high, label."""
    chart = alt.Chart(alt.InlineData(values=list(points)))
    y = alt.Y("name:N", sort=None, axis=None)
    layers: list[Any] = [
        chart.mark_bar(color="var(--bar)", yOffset=7, height=12).encode(
            x=alt.X("value:Q", title=title, scale=alt.Scale(domainMin=0)), y=y, tooltip="label:N", description="label:N"
        )
    ]
    if _have_ends(points):
        error = chart.mark_rule(color=INK, yOffset=7, aria=False)
        layers.append(error.encode(x=alt.X("low:Q"), x2="high:Q", y=y))
    layers.append(_names_above(chart, y))
    return _spec(alt.layer(*layers).properties(height=NAMED_ROW * len(points)))


def curves(
    points: Sequence[Point],
    x_title: str,
    y_title: str,
    *,
    logarithmic: bool = False,
    wide: bool = False,
    joined: bool = True,
) -> Spec:
    """Series with error bars, told apart by colour, dash and shape: series, x, y, low, high, label."""
    chart = alt.Chart(alt.InlineData(values=list(points)))
    ends = _ends(points, "y")
    x = alt.X("x:Q", title=x_title, scale=alt.Scale(zero=False, nice=False, padding=16), axis=alt.Axis(tickCount=6))
    scale, axis = _scale(ends, logarithmic), _log_axis(ends) if logarithmic else alt.Axis()
    if wide:
        scale, axis = alt.Scale(type="symlog", constant=1, nice=False), alt.Axis(values=_symlog_ticks(ends))
    y = alt.Y("y:Q", title=y_title, scale=scale, axis=axis)
    names = sorted({point["series"] for point in points})
    series, shape = _classes("series", names, names)
    line = chart.mark_line(aria=False).encode(
        x=x, y=alt.Y("y:Q", aggregate="mean"), color=series, strokeDash=alt.StrokeDash("series:N", legend=None)
    )
    point = chart.mark_point(filled=True, size=55, opacity=1).encode(
        x=x,
        y=y,
        color=series,
        shape=shape,
        tooltip="label:N",
        description="label:N",
    )
    layers: list[Any] = [line, point] if joined else [point]
    if _have_ends(points):
        layers.append(chart.mark_rule(aria=False).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=series))
    return _spec(alt.layer(*layers).properties(height=HEIGHT))


def _names_above(chart: alt.Chart, y: alt.Y) -> alt.Chart:
    """Names on a line of their own: beside a chart they would take half of a phone's width."""
    text = chart.mark_text(align="left", baseline="bottom", dy=-1, color=INK, aria=False, limit=alt.ExprRef("width"))
    named: alt.Chart = text.encode(x=alt.value(0), y=y, text="name:N")
    return named


def _ends(points: Sequence[Point], name: str) -> list[float]:
    """All values that an axis has to hold."""
    return [value for point in points for value in (point[name], point["low"], point["high"]) if value is not None]


def _have_ends(points: Sequence[Point]) -> bool:
    return any(point["low"] is not None for point in points)


def _classes(field: str, names: Sequence[str], used: Collection[str]) -> tuple[alt.Color, alt.Shape]:
    """Colour and shape of a class, the same in all charts; the legend shows those that occur."""
    shown = [name for name in names if name in used]
    colours, shapes = ([kind[names.index(name) % len(kind)] for name in shown] for kind in (COLOURS, SHAPES))
    return (
        alt.Color(f"{field}:N", title=None, scale=alt.Scale(domain=shown, range=colours)),
        alt.Shape(f"{field}:N", title=None, scale=alt.Scale(domain=shown, range=shapes)),
    )


def _spec(chart: alt.LayerChart | alt.FacetChart) -> Spec:
    return _bare(chart.to_dict()) | _WIDE


def _bare(spec: Spec) -> Spec:
    """Without what the page says once for all charts."""
    return {key: value for key, value in spec.items() if key not in ("$schema", "config")}


def _scale(ends: Sequence[float], logarithmic: bool) -> alt.Scale:
    if not logarithmic:
        return alt.Scale(zero=False, nice=True)
    return alt.Scale(type="log", domain=[min(ends) * 0.99, max(ends) * 1.01], nice=False)


def _log_axis(ends: Sequence[float]) -> alt.Axis:
    """Round numbers of which a reader sees three to eight, never below the smallest value."""
    low, high = min(ends), max(ends)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(1 + i / 5 for i in range(45))):
        ticks = [round(step * 10.0**decade, 9) for decade in decades for step in steps]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 3:
            break
    thinned = inside[:: math.ceil(len(inside) / 8) or 1] or sorted({round(low, 3), round(high, 3)})
    return alt.Axis(values=thinned, format=",~g")


def _symlog_ticks(ends: Sequence[float]) -> list[float]:
    """0 and powers of ten on both sides, as far as the values go."""
    reach = [10.0**power for power in range(0, 9)]
    shown = [size for size in reach if size <= max(ends, default=0)]
    return [*(-size for size in reach if -size >= min(ends, default=0)), 0.0, *shown[:: math.ceil(len(shown) / 5) or 1]]
