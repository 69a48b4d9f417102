"""One cell shown whole."""

from __future__ import annotations

import re

import pytest

from qfarm.errors import InvalidInput
from qfarm.record import LayerRow
from qfarm.report.show import show
from tests.report_example import (
    FAILED,
    GPTQ,
    MODEL,
    RTN,
    Example,
    FakeStore,
    attempt_row,
    cell_row,
    example,
    hostile_store,
)


@pytest.fixture
def small() -> Example:
    return example()


def with_layers(small) -> FakeStore:
    small.store.rows["layers"] = [
        LayerRow(
            **{"cell_id": GPTQ, "layer": i, "role": "q", "module": f"layers.{i}.q", "rows": 8, "columns": 8},
            **{"solver": "gptq", "bits": 4, "group_size": 64, "stored_bytes": 40},
            **{"weight_error": 0.01, "output_error": i / 100},
        )
        for i in range(12)
    ]
    small.store.rows["layers"].append(
        LayerRow(
            **{"cell_id": GPTQ, "layer": -1, "role": "head", "module": "lm_head", "rows": 8, "columns": 8},
            **{"solver": None, "reason": "output head", "stored_bytes": 128},
        )
    )
    return small.store


def test_show_tells_all(small):
    store = with_layers(small)
    text = render_lines(show(store, "11", width=80))
    said = " ".join(" ".join(text).split())
    for expected in (
        f"gptq w4 g64 · {MODEL}",
        "4.250 bits per weight, 66 MB",
        "12 layers: gptq, 4 bits, group 64",
        "1 layer left alone, output head: lm_head",
        "layers.11.q gptq 0.110 0.0100 layers.10.q",
        "layers.7.q",
        "options.length=2048",
        "kl 0.0316 nats per token 30 30",
        "ok, accepted: quantized and evaluated",
        "load 1.5s, evaluate 1m 39s",
        "qfarm.commit abc",
    ):
        assert expected in said, expected
    assert "layers.6.q" not in said


def render_lines(text):
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    return lines


def test_show_tells_who_quantized_from_who_evaluated():
    store = FakeStore()
    cell = cell_row(RTN, "rtn", "w4", attempt_id="first", variant="scales=2")
    store.rows["cells"].append(cell)
    store.rows["attempts"] += [
        attempt_row(RTN, attempt_id=name, outcome=outcome, number=i, provenance=f'{{"commit": "of-{name}"}}')
        for i, (name, outcome) in enumerate((("first", "oom"), ("second", "ok"), ("third", "ok")), 1)
    ]
    store.add(cell, [1.0], [1], attempt_id="second")
    lines = [" ".join(line.split()) for line in render_lines(show(store, RTN, width=80))]
    assert lines[0] == f"rtn (scales=2) w4 g64 · {MODEL}"
    outcomes = [line for line in lines if line.startswith("outcome")]
    assert outcomes == ["outcome oom, accepted: quantized", "outcome ok, accepted: evaluated", "outcome ok"]
    assert [line for line in lines if line.startswith(("provenance", "commit"))] == [
        *("provenance of attempt first", "commit of-first"),
        *("provenance of attempt second", "commit of-second"),
    ]


def test_show_a_cell_that_never_finished(small):
    lines = render_lines(show(small.store, "dead", width=80))
    assert f"cell {FAILED}" in lines and "  no attempt has stored a result" in lines
    assert "    Traceback" in lines and "      line 1" in lines
    assert any(line.split() == ["error", "CUDA", "out", "of", "memory"] for line in lines)


def test_show_refuses_what_names_no_cell_or_several(small):
    with pytest.raises(InvalidInput) as unknown:
        show(small.store, "zz\n[red]")
    assert str(unknown.value).startswith(
        '"zz [red]" names no cell of this store; cells: 1111111111111111 (gptq w4 g64 of '
    )
    assert f"{FAILED} (never finished)" in str(unknown.value)
    with pytest.raises(InvalidInput, match=r'^"" names 4 cells; cells: ') as ambiguous:
        show(small.store, "")
    assert "\n" not in str(unknown.value) + str(ambiguous.value)


def test_the_baseline_is_found_by_its_name_alone():
    store = FakeStore()
    store.rows["cells"] = [cell_row("aaaa" * 4, "baseline", "w16"), cell_row("bbbb" * 4, "rtn", "w4")]
    assert show(store, "baseline") == show(store, "aaaa")


def test_show_tells_of_the_cache_and_of_causality():
    store = FakeStore()
    store.rows["cells"] = [
        cell_row("aaaa" * 4, "rtn", "w4kv4", kv_bits=4.1875, causal=True),
        cell_row("bbbb" * 4, "crossquant", "w8a8", causal=False),
        cell_row("cccc" * 4, "rtn", "w4"),
    ]
    cached, across, weights = (" ".join(show(store, cell_id, width=80).split()) for cell_id in "abc")
    assert "KV cache 4.188 stored bits per cached number causal yes" in cached
    assert "causal no: a quantizer looks across tokens" in across and "KV cache" not in across
    assert "causal" not in weights and "KV cache" not in weights


def test_show_tells_widths_and_what_is_left_alone():
    store = FakeStore()
    figures = {"payload_bits": 4.375, "activation_bits": 4.5, "activation_bytes": 2048, "kept_share": 0.21}
    store.rows["cells"] = [cell_row("aaaa" * 4, "qrazor", "w4a4", **figures), cell_row("bbbb" * 4, "rtn", "w4")]
    text, old = (" ".join(show(store, cell_id, width=120).split()) for cell_id in "ab")
    assert "bits per weight, 4.375 without scales and zeros, " in text
    assert "bits per parameter, 21 % of them as loaded, " in text
    assert "linear inputs 4.500 bits per number, 2.05 kB of calibrated grids" in text
    assert "linear inputs" not in old and "without" not in old and "as loaded" not in old  # a store of before


def test_show_is_harmless():
    store = hostile_store()
    for cell_id in (RTN, FAILED):
        text = "\n".join(render_lines(show(store, cell_id, width=80)))
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
        assert "[red]x[/red]" in text
