"""The repository's layout: who imports what, the links to methods and kernels, and lists that must agree."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from qfarm.evaluate import evaluator_names
from qfarm.recipe import WeightSolver, lookup

ROOT = Path(__file__).parents[1]
METHODS = sorted(path.stem for path in (ROOT / "methods").glob("*.py") if path.stem != "__init__")

# Files, and what they must not import: anywhere in them, or through the parts of qfarm that they import.
RULES = [
    ("kernels/*.py", {"transformers", "ray", "qfarm"}),
    ("methods/*.py", {"ray", "rich", "pyarrow", "lm_eval", "qfarm.methods"}),
    ("qfarm/evaluate/*.py", {"ray", "qfarm.methods"}),
    ("qfarm/worker.py", {"ray", "rich"}),
    ("qfarm/driver.py", {"rich"}),
    ("qfarm/console.py", {"ray", "torch"}),
]
# What these import when they are imported must not be torch: planning and reporting start in a moment.
LIGHT = [
    *(f"qfarm/{name}.py" for name in ("job", "matrix", "record", "store", "console", "plan")),
    "qfarm/cli/*.py",
    "qfarm/report/*.py",
]


@functools.cache
def imports(path: Path, top_level: bool = False) -> frozenset[str]:
    """Absolute names that a file imports: everywhere, or only when it is imported itself."""
    tree = ast.parse(path.read_text())
    package = list(path.relative_to(ROOT).parent.parts)
    found = set()
    for node in _statements(tree) if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return frozenset(found)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """What runs on import: not the bodies of functions, not what is for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _statements(child)


def file_of(module: str) -> Path | None:
    """The file of one of our modules."""
    for path in (ROOT / f"{module.replace('.', '/')}.py", ROOT / module.replace(".", "/") / "__init__.py"):
        if module.split(".")[0] == "qfarm" and path.is_file():
            return path
    return None


def reached(start: Path) -> dict[str, str]:
    """Everything that is imported when a file is, with the file of ours that does it."""
    found: dict[str, str] = {}
    queue, seen = [start], {start}
    while queue:
        path = queue.pop()
        for name in imports(path, top_level=True):
            found.setdefault(name, str(path.relative_to(ROOT)))
            parts = name.split(".")
            for i in range(1, len(parts) + 1):  # importing a.b imports a
                target = file_of(".".join(parts[:i]))
                if target and target not in seen:
                    seen.add(target)
                    queue.append(target)
    return found


def breaches(names: dict[str, str], forbidden: set[str], own: set[str]) -> list[str]:
    return [
        f"{name} by {by}"
        for name, by in sorted(names.items())
        for word in forbidden
        if (name == word or name.startswith(f"{word}.")) and not any(name == o or name.startswith(f"{o}.") for o in own)
    ]


@pytest.mark.parametrize(("pattern", "forbidden"), RULES, ids=[pattern for pattern, _ in RULES])
def test_who_imports_what(pattern: str, forbidden: set[str]) -> None:
    paths = sorted(ROOT.glob(pattern))
    assert paths or pattern.startswith("kernels")
    for path in paths:
        own = {"qfarm.kernels"} if pattern.startswith("kernels") else {f"qfarm.methods.{path.stem}"}
        named = dict.fromkeys(imports(path), path.name)
        assert breaches(named, forbidden, own) == []
        assert breaches(reached(path), forbidden - {"qfarm"}, own) == []


@pytest.mark.parametrize("pattern", LIGHT)
def test_what_must_not_import_torch(pattern: str) -> None:
    paths = sorted(ROOT.glob(pattern))
    assert paths
    for path in paths:
        assert breaches(reached(path), {"torch", "transformers", "ray", "datasets"}, set()) == []


def test_the_check_itself_sees_what_it_should() -> None:
    seen = imports(ROOT / "qfarm" / "worker.py")
    assert {"torch", "torch.nn", "qfarm.store", "qfarm.store.Store", "qfarm.environment"} <= seen
    assert "torch" in reached(ROOT / "qfarm" / "worker.py")
    # Through qfarm.calibrate, only inside functions, or only for type checkers.
    assert "transformers.AutoTokenizer" in reached(ROOT / "qfarm" / "calibrate.py")
    assert "torch" in imports(ROOT / "qfarm" / "estimate.py") - imports(ROOT / "qfarm" / "estimate.py", top_level=True)
    assert "torch" in imports(ROOT / "qfarm" / "recipe.py") - imports(ROOT / "qfarm" / "recipe.py", top_level=True)
    assert breaches({"ray.data": "x", "rayleigh": "x"}, {"ray"}, set()) == ["ray.data by x"]


# -- folders and links ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["methods", "kernels"])
def test_methods_and_kernels_are_links_and_committed_as_links(name: str) -> None:
    link = ROOT / "qfarm" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-s", f"qfarm/{name}"], cwd=ROOT, capture_output=True, text=True)
    assert listed.stdout.startswith("120000 ") and listed.stdout.endswith(f"\tqfarm/{name}\n")


def test_kernels_is_no_regular_package() -> None:
    assert (ROOT / "kernels").is_dir() and not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()  # pytest would put its parent on the path


def python(code: str, path: Path | None = None) -> str:
    """What Python says, started in the repository's root, which is then first on its path."""
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_our_kernels_folder_does_not_hide_an_installed_package(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("LOADED = 'from site-packages'\n")
    assert python("import kernels; print(kernels.LOADED)", tmp_path) == "from site-packages\n"


def test_transformers_works_with_our_kernels_folder_on_the_path() -> None:
    code = "import kernels, transformers.models.llama.modeling_llama as llama; print(llama.LlamaForCausalLM.__name__)"
    assert python(code) == "LlamaForCausalLM\n"


def test_every_package_is_in_the_build() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in (ROOT / "qfarm").glob("**/*.py")} | {
        ROOT / "qfarm/methods",
        ROOT / "qfarm/kernels",
    }
    assert sorted(listed) == sorted(str(folder.relative_to(ROOT)).replace("/", ".") for folder in folders)


# -- lists that must agree --------------------------------------------------------------------------------------------


def table_rows() -> dict[str, list[str]]:
    """Rows of the table of methods: cells by name."""
    found = {}
    for line in (ROOT / "methods" / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        name = re.fullmatch(r"\[(\w+)\]\((\w+)\.py\)", cells[0])
        if name:
            assert name[1] == name[2] and len(cells) == 4 and all(cells)
            found[name[1]] = cells
    return found


def test_every_method_has_a_test_file_and_a_row() -> None:
    tested = {path.stem.removeprefix("test_method_") for path in (ROOT / "tests").glob("test_method_*.py")}
    assert sorted(tested) == METHODS
    assert list(table_rows()) == METHODS  # in order, none twice, none that is gone


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_what_its_row_says(name: str) -> None:
    kind, row = lookup(name), table_rows().get(name)
    assert row, f"methods/README.md has no row for {name}"
    _, _, bits, source = row
    if issubclass(kind, WeightSolver):  # what is no solver says in words what it works with
        first, last = kind.widths.start, kind.widths.stop - 1
        assert bits == (f"{first}..{last}" if first < last else str(first))
    for paper in re.findall(r"\d{4}\.\d{5}", source):
        assert paper in kind.source


def test_every_evaluator_has_a_test_file() -> None:
    missing = [name for name in evaluator_names() if not (ROOT / "tests" / f"test_{name}.py").is_file()]
    assert missing == []


# -- documents --------------------------------------------------------------------------------------------------------


def documents() -> list[Path]:
    """Every Markdown file of the repository."""
    hidden = {"build", "dist", "results", "node_modules"}
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*.md"))
    return sorted(path for path in found if not any(part.startswith(".") or part in hidden for part in path.parts))


def anchors(path: Path) -> set[str]:
    """Anchors of a document's headings, as the forges make them."""
    headings = re.findall(r"^#+ +(.*?) *$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", documents(), ids=str)
def test_links_resolve(document: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / document).read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = ROOT / document.parent / name if name else ROOT / document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []
