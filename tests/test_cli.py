"""The command line: exit codes, errors on one line, what plan prints, and what is imported to say so."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

import qfarm
from qfarm import cli, driver, remote
from qfarm.cli import running, shared
from qfarm.job import load_job
from qfarm.matrix import Cell
from qfarm.plan import EvaluationSpec, make_plan
from qfarm.store import Store
from tests.job_example import changed
from tests.test_store import cell_row, document_row, layer_row, metric_row

ROOT = Path(__file__).parents[1]
COMMANDS = ", ".join(sorted(cli.group.commands))


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`qfarm ARGUMENTS` in this process, in an empty folder, on a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    # What the command line sets for its own process must not outlive the test.
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))

    def run(*arguments: str) -> Ran:
        with pytest.raises(SystemExit) as done:
            cli.main(arguments)
        captured = capsys.readouterr()
        assert isinstance(done.value.code, int)
        return Ran(done.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def job(tmp_path: Path, tiny: Path) -> Path:
    """A small job on the tiny model; one of its combinations cannot be."""
    path = tmp_path / "small.yaml"
    path.write_text(
        changed(models=f"['{tiny}']", bits="[w4, w9]", group_sizes="[-1, 32]", resources="{gpus: 0}", store="out")
    )
    return path


def error(ran: Ran) -> str:
    """The one line that a refused command says."""
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ") and ran.err.endswith("\n") and ran.err.count("\n") == 1
    return ran.err.removeprefix("error: ").rstrip("\n")


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("frobnicate", f'unknown command "frobnicate"; known: {COMMANDS}'),
        ("pln", f'unknown command "pln", did you mean "plan"? known: {COMMANDS}'),
        ("store repair", 'unknown command "repair"; known: check, compact, merge'),
        ("plan", "Missing argument 'JOB'."),
        ("show", "Missing argument 'CELL'."),
        ("plan a.yaml b.yaml", "Got unexpected extra argument (b.yaml)"),
        ("plan a.yaml --dta x", "No such option '--dta'. Did you mean '--data'?"),
        ("report --watch --format csv", "no store named and none remembered"),
        ("report absent --html x.html --format csv", "--html and --format csv exclude each other"),
        ("report --against gptq --where ppl<9", "--where judges or places what was measured"),
        ("query select --store absent", "/absent: no such store"),
        ("status absent", "/absent: no such store"),
        ("diff absent absent", "/absent: no such store"),
        ("pack absent out.qfarm", "/absent: no such store"),
        ("store merge new absent", "/absent: no such store"),
        ("report --format pdf", "Invalid value for '--format': 'pdf' is not one of"),
        ("plan absent.yaml", "absent.yaml: cannot read the job file: No such file or directory"),
        ("submit absent.yaml --local", "absent.yaml: cannot read the job file: No such file or directory"),
        ("plan bad.yaml", 'bad.yaml: line 2: modls: unknown key "modls", did you mean "models"? known: '),
        ("submit bad.yaml", 'bad.yaml: line 2: modls: unknown key "modls", did you mean "models"? known: '),
        ("report", "no store named and none remembered: give its folder, e.g. qfarm report results/quickstart"),
        ("show abc", "no store named and none remembered: give its folder, e.g. qfarm report results/quickstart"),
        ("store check", "no store named and none remembered: give its folder, e.g. qfarm report results/quickstart"),
        ("report absent", "/absent: no such store; give a folder that `qfarm submit` has written"),
        ("show abc --store absent", "/absent: no such store; give a folder that `qfarm submit` has written"),
        ("store check absent", "/absent: no such store; give a folder that `qfarm submit` has written"),
        ("report folder", "/folder: has no qfarm-store.json, so it is no store; give a folder that"),
        ("report bad.yaml", "/bad.yaml: a file, neither a whole pack nor the folder of a store"),
        ("report ftp://bucket/x", "ftp://bucket/x: no object store that is known; give s3:// or gs://"),
        ("submit small.yaml --local --address head:6379", "--local and --address exclude each other"),
        ("submit small.yaml --local --detach", "--detach needs an http address or a cluster.yaml"),
        ("submit small.yaml --address ray://head:10001", "--address ray://head:10001: Ray Client addresses are not"),
        ("submit small.yaml --local --only nonesuch", '"nonesuch" names no cell of this job; cells: '),
        ("submit small.yaml --address head:6379", 'store: "out" is relative, and the job does not run on this machine'),
        ("plan small.yaml --data absent", ""),  # its text is built in: no pack is looked for
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run: Run, job: Path, arguments: str, message: str) -> None:
    Path("bad.yaml").write_text("name: bad\nmodls: [m]\n")
    Path("folder").mkdir()
    ran = run(*arguments.split())
    if message:
        assert message in error(ran)
    else:
        assert ran.code == 0
    assert not Path("out").exists()  # a command that was refused leaves nothing behind


def test_jobs_that_cannot_run(run: Run, job: Path, tiny: Path) -> None:
    job.write_text(changed(models=f"['{tiny}']", bits="[w9]", resources="{gpus: 0}"))
    for command in (("plan",), ("submit", "--local")):
        assert error(run(*command, "small.yaml")) == (
            "small.yaml: the matrix is empty: rtn quantizes weights to 2..8 bits, not 9"
        )
    job.write_text(changed(models="['.']"))
    assert error(run("plan", "small.yaml")) == ".: config.json is missing"
    job.write_text(changed(models="['no such']"))
    assert error(run("plan", "small.yaml")).startswith("no such: no such folder, and not a hub id (org/name), ")


@pytest.mark.usefixtures("offline")
def test_a_model_that_cannot_be_had_stops_a_submission_before_it_leaves_a_trace(run: Run, job: Path) -> None:
    job.write_text(changed(models="[org/unknown]", resources="{gpus: 0}", store="out"))
    for command in (("plan",), ("submit", "--local")):
        assert error(run(command[0], str(job), *command[1:])).startswith("org/unknown: the model is not in the local")
    assert not Path("out").exists()


def test_a_folder_of_other_things_does_not_become_a_store(run: Run, job: Path) -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("x")
    ran = run("submit", str(job), "--local")
    assert error(ran).endswith("/out: holds other files and is no store; give an empty or a new folder")
    assert [path.name for path in Path("out").iterdir()] == ["thesis.tex"]


def test_foreign_text_reaches_the_terminal_plain(run: Run) -> None:
    Path("evil.yaml").write_text('models: [m]\nevaluate: []\n"\\e]0;title\\a\\n[red]x": 1\n')
    message = error(run("plan", "evil.yaml"))
    assert "\x1b" not in message and "[red]x" in message


def test_an_error_of_our_own_is_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(running, "read_job", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["plan", "x.yaml"])


def test_an_interrupt_is_exit_code_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "read_job", interrupted)
    assert run("plan", "x.yaml").code == 130


# -- help -------------------------------------------------------------------------------------------------------------


def commands(command: click.Command, *path: str) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from commands(child, *path, name)


@pytest.mark.parametrize("path", list(commands(cli.group)), ids=lambda path: " ".join(path) or "qfarm")
def test_every_help_has_an_example_and_fits(run: Run, path: tuple[str, ...]) -> None:
    ran = run(*path, "--help")
    assert (ran.code, ran.err) == (0, "")
    examples = [line for line in ran.out.splitlines() if line.strip().startswith(" ".join(("qfarm", *path)))]
    assert examples, f"no example of `qfarm {' '.join(path)}`"
    assert max(map(len, ran.out.splitlines())) <= 80
    assert run(*path, "-h").out == ran.out


def test_jobs_named_in_the_help_exist(run: Run) -> None:
    words = " ".join(run(*path, "--help").out for path in commands(cli.group)).split()
    jobs = {word for word in words if word.startswith("jobs/")}
    assert jobs and all((ROOT / job).is_file() for job in jobs)


@pytest.mark.parametrize("path", [(), ("store",)])
def test_a_group_without_a_command_shows_its_help(run: Run, path: tuple[str, ...]) -> None:
    ran = run(*path)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == run(*path, "--help").out


@pytest.mark.parametrize("path", [(), ("store",), ("bench",)])
def test_a_group_lists_its_commands_with_whole_sentences(run: Run, path: tuple[str, ...]) -> None:
    listed = run(*path, "--help").out.partition("Commands:\n")[2]
    assert listed.count(".\n") == len({line[:12] for line in listed.splitlines() if line[2] != " "})
    assert "..." not in listed


def test_version(run: Run) -> None:
    assert run("--version").out == f"qfarm, version {qfarm.__version__}\n"


# -- plan -------------------------------------------------------------------------------------------------------------


def lines_of(ran: Ran) -> list[str]:
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert max(map(len, lines)) <= 80
    return lines


def rows(lines: list[str]) -> dict[str, str]:
    """State by cell id."""
    found = (re.match(r"([0-9a-f]{12}) .*? (done|(?:\d+ of \d+ )?to run) ", line) for line in lines)
    return {match[1]: match[2].strip() for match in found if match}


def test_a_plan_shows_cells_and_what_cannot_be(run: Run, job: Path) -> None:
    ran = run("plan", "small.yaml")
    lines = lines_of(ran)
    assert lines[0] == "small.yaml: 5 cells, 0 done, 5 to run"
    cells = [planned.cell for planned in make_plan(load_job(job), None, None).cells]
    assert [line.split()[:5] for line in lines[2:7]] == [
        [
            cell.cell_id[:12],
            cell.recipe,
            cell.scheme,
            "-" if cell.group_size == -1 else "32",
            "0" if cell.recipe == "gptq" else "-",
        ]
        for cell in cells
    ]
    assert set(rows(lines).values()) == {"to run"}
    assert "not run, with the rule that it breaks (4):" in lines
    for label in ("rtn w9", "rtn w9 g32", "gptq w9", "gptq w9 g32"):
        assert f"  {label}: {label[:4].strip()} quantizes weights to 2..8 bits, not 9" in lines
    assert not Path("out").exists() and "\x1b" not in ran.out


def test_a_plan_tells_apart_cells_that_differ_in_an_option(run: Run, job: Path) -> None:
    methods = "[{smoothquant: {alpha: 0.4}}, {smoothquant: {alpha: 0.6}}, smoothquant]"
    job.write_text(re.sub(r"methods: .*", f"methods: {methods}", job.read_text()))
    recipes = {" ".join(line.split()[1:3]) for line in lines_of(run("plan", "small.yaml")) if "smoothquant" in line}
    assert {"smoothquant alpha=0.4", "smoothquant alpha=0.6"} < recipes


def test_a_plan_notes_what_an_exclude_does_not_match(run: Run, job: Path) -> None:
    job.write_text(job.read_text() + "exclude: [{bits: w2}]\n")
    assert "note: exclude[0] matches no cell" in lines_of(run("plan", "small.yaml"))


def test_a_plan_of_several_models_names_them(run: Run, job: Path, tiny_models: dict[str, Path]) -> None:
    named = ", ".join(f"'{tiny_models[family]}'" for family in ("llama", "opt"))
    job.write_text(changed(models=f"[{named}]", group_sizes="[48, -1]", resources="{gpus: 0}"))
    lines = lines_of(run("plan", "small.yaml"))
    assert lines[0] == "small.yaml: 6 cells, 0 done, 6 to run" and lines[1].split()[:2] == ["cell", "model"]
    text = " ".join(" ".join(lines).split())
    for family in ("llama", "opt"):
        assert f"{tiny_models[family]} gptq w4 g48: group size 48 does not divide the 64 inputs of q" in text


def publish(store: Store, cell: Cell, specs: tuple[EvaluationSpec, ...]) -> None:
    """Results of a cell, as a worker would leave them."""
    store.publish_cell(cell_row(cell.cell_id), [layer_row(cell.cell_id)])
    for spec in specs:
        ids = (cell.cell_id, spec.eval_id)
        store.publish_evaluation(*ids, "a1", [metric_row(*ids)], [document_row(*ids)])


def test_a_plan_shows_what_the_store_has(run: Run, job: Path) -> None:
    job.write_text(job.read_text().replace("evaluate:", "evaluate:\n  - perplexity: {text: python-docs, length: 16}"))
    planned = make_plan(load_job(job), None, None).cells
    store = Store.open("out", create=True)
    publish(store, planned[0].cell, planned[0].missing)
    publish(store, planned[1].cell, planned[1].missing[:1])
    lines = lines_of(run("plan", "small.yaml"))
    assert lines[0] == "small.yaml: 5 cells, 1 done, 4 to run"
    states = rows(lines)
    assert [states[item.cell.cell_id[:12]] for item in planned] == [
        *("done", "1 of 2 to run", "to run", "to run", "to run")
    ]
    for spec in planned[2].missing:  # measured, but what was measured is not there: its writer was interrupted
        ids = (planned[2].cell.cell_id, spec.eval_id)
        store.publish_evaluation(*ids, "a1", [metric_row(*ids)], [document_row(*ids)])
    assert lines_of(run("plan", "small.yaml"))[0] == "small.yaml: 5 cells, 1 done, 4 to run"
    for item in planned[1:]:
        publish(store, item.cell, item.missing)
    lines = lines_of(run("plan", "small.yaml"))
    assert lines[0] == "small.yaml: 5 cells, 5 done, 0 to run"
    assert "nothing to run: every result is in the store" in lines and set(rows(lines).values()) == {"done"}


def test_results_of_another_protocol_do_not_count(run: Run, job: Path) -> None:
    planned = make_plan(load_job(job), None, None).cells
    store = Store.open("out", create=True)
    for item in planned:
        publish(store, item.cell, item.missing)
    job.write_text(job.read_text().replace("python-docs, length: 32}", "python-docs, length: 33}"))
    assert lines_of(run("plan", "small.yaml"))[0] == "small.yaml: 5 cells, 0 done, 5 to run"


def test_a_plan_reads_the_pack_that_it_is_given(run: Run, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job.write_text(job.read_text().replace("perplexity: {text: python-docs", "perplexity: {text: c4"))
    Path("pack").mkdir()
    message = error(run("plan", "small.yaml", "--data", "pack"))
    assert message.endswith("/pack: no data pack (pack.yaml is missing)")
    monkeypatch.setenv("QFARM_DATA", "pack")
    assert error(run("plan", "small.yaml")) == message
    entry = "{path: allenai/c4, name: en, splits: {validation: v.jsonl}}"
    Path("pack/pack.yaml").write_text(f"datasets: [{entry}]\n")
    Path("pack/v.jsonl").write_text('{"text": "a document"}\n')
    assert run("plan", "small.yaml").code == 0


@pytest.mark.usefixtures("offline")
def test_the_main_job_can_be_planned_without_a_network(run: Run) -> None:
    lines = lines_of(run("plan", str(ROOT / "jobs" / "llama_matrix.yaml")))
    text = " ".join(" ".join(lines).split())
    assert "llama_matrix.yaml: 11 cells, 0 done, 11 to run" in text
    assert "note: meta-llama/Llama-3.1-8B-Instruct cannot be reached from here: shapes from the table of known" in text
    assert "GPU-hours (estimated from: assumed rate), memory of the largest cell: " in text


def test_three_seeds_are_replicates_with_a_spread_and_a_floor(run: Run, tiny: Path) -> None:
    """Planted stores tell whether the statistics are right; this one is run, with three calibration samples."""
    Path("seeds.yaml").write_text(
        changed(
            **{
                "models": f"['{tiny}']",
                "methods": "[gptq]",
                "bits": "[w3]",
                "group_sizes": "[16]",
                "seeds": "[0, 1, 2]",
            },
            **{"resources": "{gpus: 0}", "store": "out"},
            evaluate="[perplexity: {text: python-docs, length: 64, windows: 40}]",
        )
    )
    assert run("submit", "seeds.yaml", "--local").code == 0
    (table,) = json.loads(run("report", "out", "--format", "json").out)["tables"]
    gptq = [row for row in table["rows"] if row["recipe"] == "gptq"]
    assert [row["seed"] for row in gptq] == [0, 1, 2] and len({row["log_ratio"] for row in gptq}) == 3
    (group,) = table["over_seeds"]
    deltas = [row["log_ratio"] for row in gptq]
    assert group["cell_ids"] == [row["cell_id"] for row in gptq] and group["spread"] > 0
    (noise,) = table["noise"]["seeds"]
    assert noise["sigma"] == pytest.approx(statistics.stdev(deltas)) and noise["df"] == 2
    assert all(row["noise_floor"] == pytest.approx(2 * noise["sigma"]) for row in gptq)
    said = " ".join(run("report", "out").out.split())
    assert "over seeds: means" in said and "noise floor" in said and "(2 sqrt 2 sigma; sigma" in said


# -- the remembered store ---------------------------------------------------------------------------------------------


def test_the_last_store_is_remembered(run: Run, job: Path) -> None:
    store = Store.open("out", create=True)
    shared.remember(store.location)
    ran = run("store", "check")
    assert (ran.code, ran.out) == (0, "the store is sound\n")
    (Path("out") / "parts" / "cells" / "orphan.parquet").write_text("x")
    ran = run("store", "check")
    assert ran.code == 0 and ran.out.endswith(
        "orphan.parquet: no manifest names it; its writer died or is still at work\n"
        "the store is sound; 1 leftover file: harmless\n"
    )
    (Path("out") / "manifests" / "cell" / "torn.json").write_text("{")
    ran = run("store", "check")
    assert ran.code == 1 and ran.out.endswith("\n1 fault; 1 leftover file: harmless\n")
    Path("out").rename("gone")
    assert error(run("report")).startswith(f"{store.location}: no such store")


@pytest.mark.parametrize("command", [("report",), ("show", "abc"), ("store", "check")])
def test_a_cache_that_cannot_be_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch, command: tuple[str]) -> None:
    monkeypatch.setenv("QFARM_CACHE", "/dev/null/x")
    assert error(run(*command)).startswith("no store named and none remembered")


def test_a_store_that_cannot_be_remembered_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QFARM_CACHE", "/dev/null/x")
    shared.remember("/store")
    assert [record.getMessage() for record in caplog.records] == [
        "/dev/null/x: this store cannot be remembered: Not a directory"
    ]


def test_a_limit_of_the_cache_that_is_no_number(run: Run, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QFARM_CACHE_LIMIT", "64G")
    assert error(run("submit", "small.yaml", "--local")).startswith('QFARM_CACHE_LIMIT: "64G" is no number of bytes')


# -- submit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [(), ("--local",), ("--address", "h:6379")])
def test_with_nothing_to_run_nothing_is_started(
    run: Run, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: tuple[str, ...]
) -> None:
    job.write_text(job.read_text().replace("store: out", f"store: {tmp_path}/out").replace("gpus: 0", "gpus: 1"))
    store = Store.open("out", create=True)
    for item in make_plan(load_job(job), None, None).cells:
        publish(store, item.cell, item.missing)
    for name in ("run", "run_local"):
        monkeypatch.setattr(driver, name, pytest.fail)
    monkeypatch.setattr(running, "print_report", lambda *_: click.echo("the report"))
    ran = run("submit", "small.yaml", *how)
    assert ran.code == 0 and ran.out.endswith("the report\n")
    assert "nothing to run: every result is in the store" in ran.out + ran.err


def test_a_remote_submission_sends_relative_paths_and_says_where(
    run: Run, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.write_text(job.read_text().replace("store: out", "store: /shared/out"))
    sent: list[Any] = []

    def submit(address: str, arguments: list[str], folder: Path, **_: object) -> int:
        sent.append((address, arguments, folder))
        return 0

    monkeypatch.setattr(remote, "submit", submit)
    ran = run("submit", str(job), "--address", "http://h:8265", "--data", str(tmp_path / "pack"))
    assert (ran.code, ran.out) == (0, "cluster at http://h:8265\n")
    assert sent == [("http://h:8265", ["submit", "small.yaml", "--data", "pack"], tmp_path)]
    message = error(run("submit", str(job), "--address", "http://h:8265", "--data", "/data"))
    assert message.startswith("/data: outside the current folder")
    assert message.endswith("; put the data on the cluster and set QFARM_DATA there")
    assert shared.last_submission() is None
    job.write_text(job.read_text().replace("/shared/out", "ftp://bucket/out"))
    assert "no object store that is known" in error(run("submit", str(job), "--address", "http://h:8265"))
    assert len(sent) == 1


def test_one_variable_puts_relative_stores_where_a_cluster_can_reach_them(
    run: Run, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, Any]] = []

    def submit(address: str, arguments: list[str], folder: Path, **more: Any) -> int:
        sent.append(more)
        more["accepted"](more["submission_id"])
        return 0

    monkeypatch.setattr(remote, "submit", submit)
    submitting = ("submit", "small.yaml", "--address", "http://h:8265")
    assert "set QFARM_STORE to s3://BUCKET or to the absolute path" in error(run(*submitting))
    monkeypatch.setenv("QFARM_STORE", "shared")
    assert error(run(*submitting)) == "QFARM_STORE: shared: give s3://BUCKET, gs://BUCKET or an absolute path"
    monkeypatch.setenv("QFARM_STORE", str(tmp_path / "shared"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    ran = run(*submitting)
    assert ran.code == 0 and "HF_TOKEN stays here" in ran.out
    assert sent[0]["environment"] == {"QFARM_STORE": str(tmp_path / "shared")} and "secret" not in repr(sent)
    assert run(*submitting, "--only", "w4").code == 0
    assert len({more["submission_id"] for more in sent}) == 2  # another job
    known = shared.last_submission()
    assert known is not None and known.address == "http://h:8265" and known.store == f"{tmp_path}/shared/out"
    # The store that a plain `qfarm report` reads, and what a plain `qfarm status` and `cancel` ask.
    assert shared.last_store() == known.store
    Store.open(known.store, create=True)

    def jobs(address: str, name: str | None = None) -> list[remote.Submitted]:
        asked = remote.Submitted(
            name=str(name), status="running", at_work=True, started=None, ended=None, said="3 of 9 done"
        )
        return [asked]

    monkeypatch.setattr(remote, "jobs", jobs)
    monkeypatch.setattr(remote, "cancel", lambda address, name: jobs(address, name)[0])
    ran = run("status")
    # Of the store's line only the characters count: its path may be wider than the terminal.
    assert "".join(ran.out.split()).startswith(f"{known.name}:running3of9done{known.store}:0cells")
    assert run("status", "--address", "http://h:8265").out.startswith("None: running")
    assert run("cancel").out.startswith(f"{known.name}: running")
    assert "no job server; give http://HOST:8265" in error(run("status", "--address", "h:6379"))


def test_nothing_to_cancel(run: Run) -> None:
    assert error(run("cancel")) == "no job was handed to a cluster from here: give its name and --address"


# -- imports ----------------------------------------------------------------------------------------------------------

LIGHT = ("qfarm.cli", "qfarm.job", "qfarm.matrix", "qfarm.record", "qfarm.store", "qfarm.text", "qfarm.plan")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = f"""
import importlib, sys
for name in {LIGHT}:
    importlib.import_module(name)
    heavy = {{"torch", "transformers", "ray", "datasets"}} & set(sys.modules)
    assert not heavy, (name, heavy)
"""
    assert python(code).stderr == ""


def test_python_m_qfarm_help_imports_no_torch() -> None:
    code = """
import runpy, sys
sys.argv = ["qfarm", "--help"]
try:
    runpy.run_module("qfarm", run_name="__main__")
except SystemExit as done:
    assert not done.code
assert not {"torch", "transformers", "ray"} & set(sys.modules)
"""
    ran = python(code)
    assert ran.stderr == "" and ran.stdout.startswith("Usage: ")
