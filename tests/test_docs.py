"""The documents: commands that exist, examples that are valid, pages that are current."""

from __future__ import annotations

import importlib
import itertools
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

import qfarm
from qfarm import cli
from qfarm.job import parse_job
from qfarm.plan import make_plan
from qfarm.published import load as load_published
from qfarm.report.methods import method_pages, render_method, write_pages
from tests.job_example import changed
from tests.test_cli import Run, error
from tests.test_cli import run as run
from tests.test_layout import ROOT, documents

DOCUMENTS = [path for path in documents() if path.parts[:2] != ("docs", "methods")]


# -- commands ---------------------------------------------------------------------------------------------------------


def snippets(text: str) -> Iterator[str]:
    """What may be commands: indented lines, lines of fenced shell blocks, code spans (which may be wrapped)."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    for language, block in fenced:
        if language in ("", "bash", "sh", "shell", "console"):
            yield from block.splitlines()
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (line.strip() for line in rest.splitlines() if line.startswith("    "))
    prose = "\n".join(line for line in rest.splitlines() if not line.startswith("    "))
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))


def commands(text: str) -> Iterator[list[str]]:
    """Arguments of each `qfarm ...` in a document."""
    for line in snippets(text):
        for part in re.split(r"&&|\||;", re.sub(r"(^|\s)#.*", "", line)):
            words = part.strip().removeprefix("$ ").strip()
            while match := re.match(r"[A-Z_]+=\S+ +", words):  # VARIABLE=value before a command
                words = words[match.end() :]
            if words == "qfarm" or words.startswith("qfarm "):
                try:
                    yield shlex.split(words)[1:]
                except ValueError:  # a quotation that goes on in the next line
                    yield words.split()[1:]


def problem(arguments: list[str]) -> str | None:
    """What `--help` would not confirm."""
    command: click.Command = cli.group
    rest = list(arguments)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name in ("COMMAND", "..."):
            return None
        found = command.commands.get(name)
        if found is None:
            return f'no command "{name}"'
        command = found
    options = {name: param for param in command.params for name in param.opts if name.startswith("-")}
    for position, word in enumerate(rest):
        if not word.startswith("-") or word in ("-h", "--help", "--version"):
            continue
        name, _, given = word.partition("=")
        param = options.get(name)
        if param is None:
            return f"{command.name} has no option {name}"
        values = [given] if given else rest[position + 1 : position + 2]
        kind = param.type
        if isinstance(kind, click.Choice) and values and not values[0].isupper() and values[0] not in kind.choices:
            return f"{command.name} {name}: {values[0]} is no choice"
    return None


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_commands_in_documents_exist(document: Path) -> None:
    found = {shlex.join(arguments): problem(arguments) for arguments in commands((ROOT / document).read_text())}
    assert {command: fault for command, fault in found.items() if fault} == {}


def test_the_check_of_commands_sees_what_it_should() -> None:
    text = (
        "Run `qfarm sbmit x` or\n\n    X=1 qfarm plan a.yaml --dta b  # qfarm no\n\n"
        "```bash\nqfarm report --format pdf\n```\n"
    )
    assert [problem(arguments) for arguments in commands(text)] == [
        "report --format: pdf is no choice",
        "plan has no option --dta",
        'no command "sbmit"',
    ]
    seen = {
        arguments[0] for document in DOCUMENTS for arguments in commands((ROOT / document).read_text()) if arguments
    }
    assert {"plan", "submit", "report", "show", "compare", "methods", "export", "verify", "doctor", "bench"} <= seen


def test_every_command_is_in_the_readme_or_a_page_that_it_links() -> None:
    text = "".join((ROOT / document).read_text() for document in DOCUMENTS)
    missing = [name for name in cli.group.commands if f"qfarm {name}" not in text]
    assert missing == []


@pytest.mark.parametrize("width", [60, 80, 150])
def test_a_methods_paragraphs_fill_the_terminal(width: int) -> None:
    """A line that ends early was followed by a word too long for it, or ends its paragraph."""
    text = render_method("gptq", width).partition("\nsource:")[0]
    for paragraph in text.strip().split("\n\n"):
        lines = paragraph.split("\n")
        if "    " not in paragraph:
            for line, following in itertools.pairwise(lines):
                assert len(line) + 1 + len(following.split()[0]) > width, line
    assert "\n    H = second moment" in text


# -- examples ---------------------------------------------------------------------------------------------------------


def blocks(language: str) -> list[Any]:
    found = []
    for document in DOCUMENTS:
        matches = re.findall(
            rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL
        )
        found += [pytest.param(text, id=f"{document}-{number}") for number, text in enumerate(matches)]
    return found


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_in_documents_is_valid(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole jobs are planned, parts of jobs checked within a whole one, published figures and indexes read."""
    content = yaml.safe_load(text)
    if "datasets" in content:
        from qfarm.sources import pack_sets

        (tmp_path / "pack.yaml").write_text(text)
        assert pack_sets(str(tmp_path))
    elif "tables" in content:
        (tmp_path / "table.yaml").write_text(text)
        if "..." not in text:
            load_published(str(tmp_path / "table.yaml"))
    elif {"models", "evaluate"} <= set(content):
        job = parse_job(text, "job.yaml")
        assert job.blocks
        if all(str(model).startswith("meta-llama/") for model in job.file.models):
            assert make_plan(job, None, None, allow_provisional=True).cells
    else:
        parts = {key: yaml.safe_dump(value, default_flow_style=True, width=1000) for key, value in content.items()}
        assert parse_job(changed(**parts), "job.yaml").blocks


@pytest.mark.parametrize("text", blocks("python"))
def test_python_in_documents_compiles_and_names_what_exists(text: str) -> None:
    compile(text, "document", "exec")
    assert all(hasattr(qfarm, name) for name in re.findall(r"(?<![\w.])qfarm\.(\w+)\(", text))


def test_the_tutorials_method_runs(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qfarm.methods

    tutorial = (ROOT / "docs" / "add_a_method.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", tutorial, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "shrunk.py").write_text(code)
    monkeypatch.setattr(qfarm.methods, "__path__", [*qfarm.methods.__path__, str(tmp_path)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    job = {
        "models": [str(tiny)],
        "methods": ["rtn", {"shrunk": {"factor": 1.0}}, "shrunk"],
        "bits": ["w3"],
        "group_sizes": [16],
        "evaluate": [{"perplexity": {"text": "python-docs", "length": 32, "windows": 8}}],
        "resources": {"gpus": 0},
        "store": str(tmp_path / "store"),
    }
    try:
        results = qfarm.run(job).report()
    finally:
        sys.modules.pop("qfarm.methods.shrunk", None)
        importlib.invalidate_caches()
    perplexity = {(row.recipe, row.variant): row.perplexity for row in results.fillna({"variant": ""}).itertuples()}
    assert perplexity["shrunk", "factor=1.0"] == perplexity["rtn", ""] != perplexity["shrunk", ""]


# -- a page per method ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return method_pages()


def test_the_methods_pages_are_current(pages: dict[str, str]) -> None:
    folder = ROOT / "docs" / "methods"
    here = {path.name: path.read_text() for path in folder.iterdir()}
    assert here == pages, "run `qfarm methods --write docs/methods`"


def test_pages_are_written_and_stale_ones_removed(
    run: Run, tmp_path: Path, pages: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qfarm.report.methods.method_pages", lambda: pages)
    assert run("methods", "--write", "pages").out == f"pages: {len(pages)} pages\n"
    (tmp_path / "pages" / "gone.md").write_text((tmp_path / "pages" / "gptq.md").read_text())
    (tmp_path / "pages" / "gptq.md").unlink()
    write_pages(tmp_path / "pages")
    assert {path.name for path in (tmp_path / "pages").iterdir()} == set(pages)
    (tmp_path / "pages" / "notes.md").write_text("mine")
    assert "pages: holds other files (notes.md)" in error(run("methods", "--write", "pages"))
    assert error(run("methods", "gptq", "--write", "pages")) == "methods: NAME and --write exclude each other"


def test_pages_hold_what_a_reader_must_see(pages: dict[str, str]) -> None:
    page = pages["gptq.md"]
    assert "| act_order | bool | automatic |" in page and "    H = second moment of the layer's inputs" in page
    assert (
        textwrap.dedent("""\
        ```yaml
        methods: [gptq]
        ```""")
        in page
    )
