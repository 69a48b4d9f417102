"""The kernels' benchmark: its arithmetic, what it multiplies, its rows in a store. All of it but the CUDA graph."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qfarm import cli, environment
from qfarm.bench import kernels as bench
from qfarm.bench.show_kernels import render_kernels
from qfarm.errors import InvalidInput, StoreError
from qfarm.kernels import bench as timing
from qfarm.kernels.bench import (
    CANDIDATES,
    Timing,
    candidates,
    copies_needed,
    deviation,
    drift,
    interleaved,
    product,
    quantiles,
    random_weight,
    time_products,
    timings,
    warm_up,
)
from qfarm.kernels.pack import BCQWeight
from qfarm.kernels.roofline import FORMATS, GPUS, SHAPES, predict, stored_bytes
from qfarm.query import query
from qfarm.store import Store
from tests.test_kernels_ops import OnGPU

CPU = torch.device("cpu")
Calls = Sequence[Callable[[], object]]

# -- samples ----------------------------------------------------------------------------------------------------------


def test_copies_leave_no_cache_warm() -> None:
    assert copies_needed(40 << 20, 1 << 20) == 120
    assert copies_needed(40 << 20, 100 << 20) == 2  # one copy alone would be read while it is still there


def test_samples_take_turns() -> None:
    order: list[str] = []

    def replay(name: str) -> Callable[[], float]:
        return lambda: order.append(name) or float(len(order))

    assert interleaved([replay("a"), replay("b")], 3) == [[1, 3, 5], [2, 4, 6]]
    assert order == ["a", "b"] * 3


def test_quantiles() -> None:
    assert quantiles([5.0, 1, 2, 3, 4, 6]) == pytest.approx((3.5, 2, 5))


def test_drift_is_of_medians_of_thirds() -> None:
    assert drift([10, 10, 99, 0, 0, 0, 11, 11, 0.0]) == pytest.approx(0.1)
    assert drift([4.0, 7, 2]) == -0.5
    assert drift([4.0, 5]) == 0.25
    assert drift([2.0]) == 0


def test_warming_up_goes_on_for_half_a_second() -> None:
    now, replays = [100.0], [0, 0]

    def replay(index: int) -> Callable[[], float]:
        def taken() -> float:
            replays[index] += 1
            now[0] += 0.11
            return 0.11

        return taken

    warm_up([replay(0), replay(1)], clock=lambda: now[0])
    assert replays == [3, 3]  # at 0.44 s another turn begins
    warm_up([])


# -- timings ----------------------------------------------------------------------------------------------------------


def test_times_are_quantiles_in_the_order_of_the_candidates() -> None:
    taken = {"w4": [1.0, 2, 3, 4, 5, 6], "fp16": [8.0, 8, 8, 8, 8, 8.2]}
    first, second, third = timings(1, 64, 128, taken, {"w8": "wrong: so and so"})
    assert first == Timing(form="fp16", m=1, n=64, k=128, median_s=8, p20_s=8, p80_s=8, samples=6)
    assert second == Timing(
        form="w8", m=1, n=64, k=128, median_s=None, p20_s=None, p80_s=None, samples=0, error="wrong: so and so"
    )
    assert (third.form, third.median_s, third.p20_s, third.p80_s) == ("w4", 3.5, 2, 5)


@pytest.mark.parametrize(("last", "kept"), [(1.029, True), (0.971, True), (1.031, False), (0.969, False)])
def test_a_run_whose_baseline_drifts_has_no_times(last: float, kept: bool) -> None:
    taken = {"fp16": [1.0] * 14 + [last] * 7, "w4": [0.5] * 21}
    found = timings(1, 64, 128, taken, {"w8": "wrong"})
    if kept:
        assert [row.median_s for row in found] == [1, None, 0.5]
    else:
        assert {row.median_s for row in found} == {row.p80_s for row in found} == {None}
        reason = f"rejected: the float16 product beside it drifted by {'+3.1' if last > 1 else '-3.1'}%"
        assert [row.error for row in found] == [reason, "wrong", reason]
        assert [row.samples for row in found] == [21, 0, 21]


def test_a_candidates_own_drift_does_not_matter() -> None:
    assert timings(1, 64, 128, {"fp16": [1.0, 1, 1], "w4": [1.0, 1, 9]}, {})[1].median_s == 1


def test_without_the_baseline_there_are_no_times() -> None:
    [_, row] = timings(1, 64, 128, {"w4": [1.0, 1, 1]}, {"fp16": "wrong"})
    assert row.median_s is None and row.error == "rejected: no float16 product was timed beside it"


# -- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.kind != "dense"])
@pytest.mark.parametrize("k", [1024, 1408])
def test_what_is_timed_has_the_bytes_that_are_counted(name: str, k: int) -> None:
    weight = random_weight(name, 64, k, torch.Generator().manual_seed(0))
    assert not isinstance(weight, Tensor) and weight.nbytes == stored_bytes(FORMATS[name], 64, k)
    assert weight.dequantize().shape == (64, k) and bool(weight.dequantize().isfinite().all())


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("name", CANDIDATES)
def test_each_product_is_what_it_should_be(name: str, m: int) -> None:
    generator = torch.Generator().manual_seed(0)
    call = product(name, torch.randn(m, 384, generator=generator).half(), 33, generator)
    found, expected = call()
    assert expected.dtype == torch.float64 and float(expected.abs().max()) > 0.05
    assert deviation(found, expected) is None
    assert found.dtype == (torch.bfloat16 if name == "bf16" else torch.float16)
    assert found.shape == ((33, 384) if name == "copy" else (m, 33))
    assert torch.equal(call(False)[0], found)


@pytest.mark.parametrize(
    ("name", "m", "kernel"),
    [
        *(("w4", 1, "gemm_small"), ("w4", 64, "gemm_small"), ("w4", 65, "linear")),
        *(("w3", 4, "gemv"), ("w3", 5, "linear"), ("w8", 1, "gemv"), ("bcq3", 2, "bcq bcq")),
    ],
)
def test_which_kernel_is_timed(name: str, m: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed: there is none for this platform")
    from qfarm.kernels import ops, tri_bcq, tri_weight

    ran: list[str] = []

    def instead(word: str) -> Callable[..., Tensor]:
        return lambda *_: ran.append(word) or torch.zeros(1)

    for module, function in ((tri_weight, "gemm_small"), (tri_weight, "gemv"), (ops, "linear")):
        monkeypatch.setattr(module, function, instead(function))
    monkeypatch.setattr(tri_bcq, "gemv", instead("bcq"))
    weight = random_weight(name, 8, 256, torch.Generator().manual_seed(0))
    timing.multiply(torch.zeros(m, 256).as_subclass(OnGPU), weight)
    assert " ".join(ran) == kernel


def test_what_is_out_of_tolerance_or_no_number_is_told() -> None:
    exact = torch.tensor([4.0, -8], dtype=torch.float64)
    assert deviation(exact.float() + 1.5e-4, exact) is None
    assert deviation(exact.float() + 1.7e-4, exact) == "wrong: error 0.00017 above 0.00016"
    assert deviation(exact.half() + 2.0**-7, exact) is None
    assert deviation(torch.tensor([4, float("nan")]), exact) == "wrong: error nan above 0.00016"


def test_a_call_for_each_copy_of_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 x 256: 32 KiB in float16; a cache of 64 KiB holds six copies three times over."""
    multiply = timing.multiply

    def spoiled(x: Tensor, weight: Any) -> Tensor:
        found = multiply(x, weight)
        return found + 1 if isinstance(weight, BCQWeight) and weight.planes.shape[1] == 3 else found

    monkeypatch.setattr(timing, "multiply", spoiled)
    generator = torch.Generator().manual_seed(0)
    calls, wrong = candidates(torch.ones(1, 256).half(), 64, 64 << 10, generator)
    assert {name: len(found) for name, found in calls.items()} == {
        name: copies_needed(64 << 10, stored_bytes(FORMATS.get(name, FORMATS["fp16"]), 64, 256))
        for name in CANDIDATES
        if name != "bcq3"
    }
    assert len(calls["fp16"]) == 6 and wrong.keys() == {"bcq3"} and wrong["bcq3"].startswith("wrong: error")
    outputs = [call()[0] for call in calls["w4"]]  # type: ignore[index]  # a call is any callable there
    assert not torch.equal(outputs[0], outputs[1])  # a weight of its own each


def test_a_whole_run_but_for_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each candidate's replay is handed all of its calls, and takes so many seconds as it has copies."""
    monkeypatch.setattr(timing, "WARM_UP_S", 0)
    handed: list[int] = []

    def replayed(calls: Calls) -> Callable[[], float]:
        handed.append(len([call() for call in calls]))
        return lambda: float(len(calls))

    found = time_products(3, 64, 192, CPU, 64 << 10, samples=4, replayed=replayed)
    assert [row.form for row in found] == list(CANDIDATES)
    refused = {row.form: row.error for row in found if row.error}
    assert refused == dict.fromkeys(("w4", "w3", "bcq4", "bcq3"), "groups of 128 do not divide 192 inputs")
    timed = {row.form: row.median_s for row in found if row.median_s is not None}
    assert timed == {"fp16": 8, "bf16": 8, "copy": 8, "w8": 16} and handed == [8, 8, 8, 16]
    assert {(row.m, row.n, row.k) for row in found} == {(3, 64, 192)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: everything but the CUDA graph was tested without")
def test_a_whole_run_on_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    cache_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
    calls, wrong = candidates(
        torch.randn(1, 4096, device=device).half(), 1024, cache_bytes, torch.Generator(device).manual_seed(0)
    )
    assert wrong == {} and calls.keys() == set(CANDIDATES)
    assert {name: timing.graph(found)() > 0 for name, found in calls.items()} == dict.fromkeys(CANDIDATES, True)


# -- rows -------------------------------------------------------------------------------------------------------------


def timed(form: str, seconds: float | None, error: str | None = None, k: int = 1024) -> Timing:
    low, high = (None, None) if seconds is None else (seconds * 0.9, seconds * 1.1)
    return Timing(form=form, m=2, n=512, k=k, median_s=seconds, p20_s=low, p80_s=high, samples=21, error=error)


def test_rows_of_what_was_measured() -> None:
    plain, copied, packed = bench.measured([timed("fp16", 8e-6), timed("copy", 4e-6), timed("w4", 2e-6)], "NVIDIA H200")
    assert (plain.kind, plain.gpu, plain.form, plain.m, plain.n, plain.k) == (
        *("measured", "NVIDIA H200", "fp16"),
        *(2, 512, 1024),
    )
    assert plain.moved_bytes == 2 * (512 * 1024 + 2 * 512 + 2 * 1024) and plain.ratio_fp16 == 1
    assert copied.moved_bytes == 2 * 2 * 512 * 1024 and copied.gb_per_s == pytest.approx(2097152 / 4e-6 / 1e9)
    assert copied.ratio_fp16 is None and copied.predicted_s is None
    assert packed.moved_bytes == 512 * 1024 * 17 // 32 + 2 * 2 * (512 + 1024) and packed.ratio_fp16 == 4
    assert packed.memory_s == packed.moved_bytes / 4800e9
    assert packed.efficiency == packed.memory_s / 2e-6 and packed.samples == 21
    assert packed.predicted_s == predict(GPUS["h200"], FORMATS["w4"], 2, 512, 1024).goal_s
    assert (packed.p20_s, packed.p80_s) == (2e-6 * 0.9, 2e-6 * 1.1) and packed.verdict is packed.error is None


def test_of_another_gpu_bandwidth_and_prediction_are_unknown() -> None:
    [row] = bench.measured([timed("w4", 2e-6)], "NVIDIA A100-SXM4-40GB")
    assert row.memory_s is row.efficiency is row.predicted_s is row.limit is None
    assert row.gb_per_s is not None and row.ratio_fp16 is None  # nothing to compare it with


def test_rows_without_times_say_why() -> None:
    reason = "groups of 128 do not divide 192 inputs"
    plain, packed = bench.measured([timed("fp16", None, "rejected"), timed("w4", None, reason, k=192)], "NVIDIA H200")
    assert (
        plain.error == "rejected" and plain.median_s is plain.gb_per_s is plain.efficiency is plain.ratio_fp16 is None
    )
    assert plain.moved_bytes is not None and plain.predicted_s is not None
    assert packed.error == reason and packed.moved_bytes is packed.memory_s is packed.predicted_s is None


def test_rows_of_what_is_predicted() -> None:
    rows = {row.form: row for row in bench.predicted("h100", 16, 4096, 576)}
    assert rows.keys() == FORMATS.keys() and {row.kind for row in rows.values()} == {"predicted"}
    found, plain = (predict(GPUS["h100"], FORMATS[name], 16, 4096, 576) for name in ("w8", "fp16"))
    assert (rows["w8"].predicted_s, rows["w8"].memory_s) == (found.goal_s, found.memory_s)
    assert rows["w8"].ratio_fp16 == plain.goal_s / found.goal_s and rows["w8"].median_s is None
    assert rows["w4"].error == "groups of 128 do not divide 576 inputs" and rows["w4"].predicted_s is None


def test_rows_of_what_was_compiled() -> None:
    facts = {"launch": "w4_gemv 128", "kernel": "t16_gemv", "target": "sm_80", "warps": 4, "loops": [10]}
    facts |= {"registers": 96, "spills": 0, "shared": 512, "names": {}, "per_element": 3.69, "breaches": []}
    row = bench.compiled_row(facts)
    assert (row.kind, row.gpu, row.form, row.verdict) == ("compiled", "sm_80", "w4_gemv 128", "kept")
    assert (row.registers, row.spills, row.shared_bytes, row.per_weight) == (96, 0, 512, 3.69)
    assert row.n is row.median_s is row.predicted_s is None
    del facts["per_element"]  # of what has no elements, or an AMD target
    broken = bench.compiled_row(facts | {"breaches": ["3 spills", "registers 99 > 96"]})
    assert broken.per_weight is None and broken.verdict == "3 spills; registers 99 > 96"


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A GPU as far as the command sees it; what it was asked to time."""
    asked: list[tuple[Any, ...]] = []
    heat = iter((40.0, 71.0))

    def time_products(*arguments: Any) -> list[Timing]:
        asked.append(arguments)
        m, n, k = arguments[:3]
        if n == 4096:
            raise torch.OutOfMemoryError
        return timings(m, n, k, {"fp16": [4e-6] * 3, "copy": [8e-6] * 3, "w4": [1e-6] * 3}, {"w8": "wrong: so"})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    properties = SimpleNamespace(uuid="12-34", L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    known = {"gpu": "NVIDIA H200", "packages": {"torch": "2"}}
    monkeypatch.setattr(environment, "provenance", lambda: known)
    monkeypatch.setattr(environment, "gpu_state", lambda uuid: {"uuid": uuid, "temperature_c": next(heat)})
    monkeypatch.setattr(bench, "time_products", time_products)
    return asked


def test_without_a_gpu_the_first_line_says_so(no_gpu: None) -> None:
    report = bench.run(bench.Settings(gpus=("a100",)))
    lines = render_kernels(report, 100).splitlines()
    assert lines[0].startswith("No CUDA or ROCm device found: no kernel was timed.")
    assert "predicted for a100, not measured: groups of 128" in lines
    [row] = [line.split() for line in lines if line.startswith("1  4096 x 16384") and " w4 " in line]
    assert row[4:] == ["w4", "35.7", "17.5", "23.9", "3.53", "memory"]
    assert {row.kind for row in report.rows} == {"predicted"}
    assert len(report.rows) == len(SHAPES) * len(FORMATS)


def test_on_a_gpu_every_shape_is_timed_for_every_number_of_rows(gpu: list[tuple[Any, ...]], tmp_path: Path) -> None:
    shapes = ((512, 1024), (4096, 1024))
    report = bench.run(bench.Settings(gpus=("h200",), shapes=shapes, rows=(1, 16), store=str(tmp_path)))
    device = torch.device("cuda", 1)
    assert gpu == [(m, n, k, device, 50 << 20) for n, k in shapes for m in (1, 16)]
    rows = Store.open(tmp_path).read("kernels").to_pylist()
    assert {row["run_id"] for row in rows} == {report.run_id} and len(rows) == len(report.rows)
    assert [row["form"] for row in rows if row["kind"] == "measured"][:4] == ["fp16", "copy", "w8", "w4"]
    known = json.loads(rows[0]["provenance"])
    assert known["gpu"] == "NVIDIA H200" and known["seed"] == 0
    assert known["gpu_before"] == {"uuid": "12-34", "temperature_c": 40}
    assert known["gpu_after"] == {"uuid": "12-34", "temperature_c": 71}
    assert "gpu_before" not in environment.provenance()  # which is the whole process's
    text = render_kernels(report, 140)
    assert text.startswith("measured: NVIDIA H200, torch 2; groups of 128\n")
    row, _ = [line.split() for line in text.splitlines() if line.startswith("16  512 x 1024") and " w4 " in line]
    assert row[4:9] == ["w4", "1.0", "1.0", "1.0", "3"] and row[11] == "4.00"
    assert "no figures: w8: m 1, 512 x 1024: wrong: so\n" in text
    assert f"no figures: {', '.join(CANDIDATES)}: m 16, 4096 x 1024: copies of the weight" in " ".join(text.split())


def test_each_run_is_a_publication_of_its_own(no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"launch": "cq_apply", "target": "sm_80", "registers": 32, "spills": 0, "shared": 0, "breaches": []}
    monkeypatch.setattr(bench, "compile_all", lambda *_: [facts])
    settings = bench.Settings(gpus=("a100", "h100"), targets=("sm_80",), rows=(1, 16), store=str(tmp_path))
    first, second = bench.run(settings), bench.run(settings)
    assert first.run_id != second.run_id
    store = Store.open(tmp_path)
    per_run = 2 * len(SHAPES) * 2 * len(FORMATS) + 1
    counted = "SELECT kind, count(*), count(DISTINCT run_id) FROM kernels GROUP BY kind ORDER BY kind"
    expected = (("compiled", 2, 2), ("predicted", 2 * (per_run - 1), 2))
    assert query(store, counted).rows == expected and store.check() == ([], [])
    found = store.compact()
    assert found is not None and found.publications == 2
    assert query(Store.open(tmp_path), counted).rows == expected
    everything = [dataclasses.asdict(row) for row in (*first.rows, *second.rows)]
    columns = list(everything[0])
    stored = Store.open(tmp_path).read("kernels", columns=columns).to_pylist()
    # Runs are ordered by their ids, and those of one second by chance.
    assert stored == everything or stored == everything[per_run:] + everything[:per_run]


def test_a_jobs_models_give_the_shapes(
    no_gpu: None, offline: None, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that cannot be reached is known by its shape; each shape comes once."""
    job = tmp_path / "job.yaml"
    job.write_text(
        "name: small\nmethods: [rtn]\nbits: [w4]\ngroup_sizes: [-1]\n"
        f"models: [meta-llama/Llama-3.1-8B, meta-llama/Meta-Llama-3-8B, '{tiny}']\n"
        "evaluate: [{perplexity: {text: python-docs, length: 32}}]\n"
    )
    large = {(1024, 4096), (4096, 4096), (4096, 14336), (14336, 4096)}
    small = {(32, 64), (64, 64), (128, 64), (64, 128)}
    assert bench.shapes_of(str(job)) == tuple(sorted(large | small))
    with pytest.raises(SystemExit) as done:
        cli.main(["bench", "kernels", "--gpus", "a10,a10", "--job", str(job), "--rows", "1, 16,1", "--format", "json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert done.value.code == 0 and {(row["n"], row["k"]) for row in rows} == large | small
    assert {row["m"] for row in rows} == {1, 16} and {row["gpu"] for row in rows} == {"a10"}
    assert len(rows) == 8 * 2 * len(FORMATS)  # nothing twice
    refused = {(row["form"], row["k"]) for row in rows if row["error"]}
    assert refused == {(form, 64) for form in ("w4", "w3", "bcq4", "bcq3")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "v100"], '--gpus: unknown "v100": expected some of a100, h100'),
        (["--rows", "0"], "--rows 0: expected numbers from 1, as in 1,16"),
        (["--rows", "1,x"], '--rows "1,x": whole numbers with commas between them, as in 1,16'),
        (["--job", "absent.yaml"], "absent.yaml"),
    ],
)
def test_bad_input_is_one_line_and_makes_no_store(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_gpu: None
) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["bench", "kernels", *arguments, "--store", str(tmp_path / "store")])
    told = capsys.readouterr()
    assert done.value.code == 2 and told.out == "" and message in told.err and told.err.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_a_folder_that_is_no_store_is_refused_before_anything_is_timed(
    gpu: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds other files and is no store"):
        bench.run(bench.Settings(store=str(tmp_path)))
    assert gpu == []


def test_unknown_targets_are_refused() -> None:
    pytest.importorskip("triton")
    with pytest.raises(InvalidInput, match='--compile: unknown "sm_70": expected some of sm_80'):
        bench.compile_all(("sm_70",))


@pytest.mark.parametrize(
    ("answer", "values"),
    [
        ("1980, 2619, 700.00, 34", (1980, 2619, 700, 34)),
        ("1980, [N/A], [Not Supported], 34\n", (1980, None, None, 34)),
        ("", (None,) * 4),  # there is no nvidia-smi
        ("No devices were found", (None,) * 4),
    ],
)
@pytest.mark.parametrize("uuid", ["12-34", "GPU-12-34"])
def test_the_state_of_a_gpu_is_what_nvidia_smi_tells(
    uuid: str, answer: str, values: tuple[float | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def output(command: list[str]) -> str:
        asked.append(command)
        return answer

    monkeypatch.setattr(environment, "_output", output)
    names = ("sm_clock_mhz", "memory_clock_mhz", "power_limit_w", "temperature_c")
    assert environment.gpu_state(uuid) == dict(zip(names, values, strict=True))
    assert asked == [
        ["nvidia-smi", "--id=GPU-12-34"]
        + ["--query-gpu=clocks.sm,clocks.mem,power.limit,temperature.gpu", "--format=csv,noheader,nounits"]
    ]
