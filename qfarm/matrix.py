"""Matrix: a job's axes expanded into cells, each with an identity, and the cells that cannot be, each with its rule."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qfarm.errors import InvalidInput, JobError, did_you_mean
from qfarm.job import Block, Calibration, Job, JobFile, Match
from qfarm.layers.sites import INPUT_FACTORS_VERSION, RTN_VERSIONS, RTN_WIDTHS
from qfarm.scheme import UNTOUCHED, Scheme, parse_scheme

if TYPE_CHECKING:
    from qfarm.models.reference import ModelFacts
    from qfarm.recipe import Recipe

ID_CHARACTERS = 16


def canonical_hash(value: object) -> str:
    """Identity of plain data: the first 64 bits of SHA-256 over its canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:ID_CHARACTERS]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One model x recipe x scheme x group size x seed with its calibration: the unit that is quantized.

    Plain data only, so that it travels to workers and into the store unchanged.
    """

    model: str  # the reference as the job gives it
    fingerprint: str  # of weights and configuration
    tokenizer: str  # hash of the tokenizer
    dtype: str
    recipe: str  # "smoothquant+gptq", "baseline"
    methods: tuple[Mapping[str, Any], ...]  # Recipe.specs()
    scheme: str
    group_size: int  # of weights; -1 = per channel
    symmetric: bool  # of weights
    scale_dtype: str
    statistics: str | None  # sequential | independent; None where no weights are solved by what their inputs are
    calibration: Mapping[str, Any] | None  # text, source hash, samples, length
    seed: int | None
    # Sites that no method claims and that are therefore rounded to nearest, with the version of the rule; also that of
    # the rule by which a weight solver's factors reach quantized inputs, where they do.
    rounded: Mapping[str, int] = dataclasses.field(default_factory=dict)
    variant: str = ""  # options that are not the defaults, for people: "act_order=true"

    @property
    def is_baseline(self) -> bool:
        return self.recipe == "baseline"

    @property
    def quantizes_kv(self) -> bool:
        return "kv_cache" in parse_scheme(self.scheme).sites

    @functools.cached_property
    def cell_id(self) -> str:
        # Not dataclasses.asdict: its deep copies would be most of what planning 100,000 cells takes.
        identity = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # The name under which a model or a text was found is not part of what it is.
        del identity["model"], identity["recipe"], identity["variant"]
        if not self.rounded:
            del identity["rounded"]  # so that cells of weights alone keep the identity that they had before the others
        if self.calibration:
            identity["calibration"] = {k: v for k, v in self.calibration.items() if k != "text"}
        return canonical_hash(identity)

    @property
    def label(self) -> str:
        group = "" if self.group_size == -1 else f" g{self.group_size}"
        seed = f" seed {self.seed}" if self.seed else ""
        # Like seed 0, the first version of a rule goes without saying.
        later = [f"{site} rtn v{version}" for site, version in self.rounded.items() if version > 1]
        words = ", ".join([*filter(None, [self.variant]), *later])
        options = f" ({words})" if words else ""
        return f"{self.recipe}{options} {self.scheme}{group}{seed}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Invalid:
    """A combination of the matrix that is not run, with the rule that it breaks."""

    model: str
    label: str
    rule: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matrix:
    cells: tuple[Cell, ...]  # baselines first, then in the job's order
    invalid: tuple[Invalid, ...]
    notes: tuple[str, ...]  # what the user should know: an exclude that matches nothing, ...


def expand(job: Job, facts: Callable[[str], ModelFacts], text_hash: Callable[[str], str]) -> Matrix:
    """All cells of a job, deterministically.

    `facts` describes a model by its reference, `text_hash` a calibration text by its name. Equal cells collapse;
    the full-precision baseline of each model is added. Raises JobError when no valid cell remains.
    """
    cells: dict[str, Cell] = {}
    invalid: dict[Invalid, None] = {}
    used: set[int] = set()
    models = dict.fromkeys(name for block in job.blocks for name in block.models)
    for name in models:
        cell = baseline_cell(facts(name), job.file.dtype)
        cells.setdefault(cell.cell_id, cell)
    for block in job.blocks:
        for axes in _product(block):
            name, recipe, scheme, group_size, seed = axes
            matched = [i for i, match in enumerate(job.exclude) if _matches(match, *axes)]
            used.update(matched)
            if matched:
                continue
            rule = broken_rule(job.file, facts(name), recipe, scheme, group_size)
            if rule:
                group = "" if group_size == -1 else f" g{group_size}"
                invalid[Invalid(model=name, label=f"{recipe.name} {scheme}{group}", rule=rule)] = None
                continue
            cell = _cell(job, facts(name), recipe, scheme, group_size, seed, text_hash)
            cells.setdefault(cell.cell_id, cell)
    if all(cell.is_baseline for cell in cells.values()) and any(block.recipes for block in job.blocks):
        reason = next(iter(invalid)).rule if invalid else "every cell is excluded"
        raise JobError(f"{job.path}: the matrix is empty: {reason}")
    notes = [f"exclude[{i}] matches no cell" for i in range(len(job.exclude)) if i not in used]
    ordered = sorted(cells.values(), key=lambda cell: not cell.is_baseline)
    return Matrix(cells=tuple(ordered), invalid=tuple(invalid), notes=tuple(notes))


def broken_rule(file: JobFile, facts: ModelFacts, recipe: Recipe, scheme: Scheme, group_size: int) -> str | None:
    """The first rule that this combination breaks, or None when it can run."""
    if not scheme.sites:
        return f"{scheme} leaves everything at 16 bits; that is the baseline, which is added by itself"
    required = (method.claims - method.optional for method in recipe.methods)
    idle = sorted(frozenset().union(*required) - scheme.sites)
    if idle:
        return f"{recipe.name} quantizes {', '.join(idle)}, which {scheme} leaves at 16 bits"
    for method in recipe.methods:
        refused = (
            method.refusal(group_size, bool(file.symmetric))
            or method.recipe_refusal(recipe)
            or method.model_refusal(facts.config)
        )
        if refused:
            return f"{method.name}: {refused}"
    solver = recipe.solver
    if solver and solver.true_sequential and file.statistics == "independent":
        return f"{solver.name}: true-sequential sees quantized layers, which statistics: independent rules out"
    return _broken_width(recipe, scheme) or _broken_weight_rule(file, facts, recipe, scheme, group_size)


def _broken_width(recipe: Recipe, scheme: Scheme) -> str | None:
    """A site other than the weights whose width its quantizer does not support."""
    for site in sorted(scheme.sites - {"weight"}):
        claimant = recipe.claimant(site)
        widths = claimant.site_widths.get(site, RTN_WIDTHS[site]) if claimant else RTN_WIDTHS[site]
        bits = getattr(scheme, site)
        if bits not in widths:
            name = claimant.name if claimant else "rtn"
            return f"{name} quantizes {site} to {_spelled(widths)} bits, not {bits}"
    return None


def _broken_weight_rule(
    file: JobFile, facts: ModelFacts, recipe: Recipe, scheme: Scheme, group_size: int
) -> str | None:
    solver = recipe.solver
    widths = solver.widths if solver else range(2, 9)
    for bits in scheme.weight_widths:
        if bits not in widths:
            name = solver.name if solver else "rtn"
            return f"{name} quantizes weights to {_spelled(widths)} bits, not {bits}"
    if "weight" not in scheme.sites:
        return None
    scale_bytes = 4 if file.scale_dtype == "float32" else 2
    for role, (rows, inputs) in (facts.linear_shapes or {}).items():
        if group_size != -1 and inputs % group_size:
            return f"group size {group_size} does not divide the {inputs} inputs of {role}"
        bits = scheme.weight_bits(role)
        refused = solver and bits != UNTOUCHED and solver.layer_refusal(rows, inputs, bits, group_size, scale_bytes)
        if solver and refused:
            return f"{solver.name}: {role}: {refused}"
    return None


def _spelled(widths: range) -> str:
    first, last = widths.start, widths.stop - 1
    return f"{first}..{last}" if first < last else str(first)


def _baseline_recipe() -> Recipe:
    from qfarm.recipe import Recipe

    return Recipe()


def _cell(
    job: Job,
    facts: ModelFacts,
    recipe: Recipe,
    scheme: Scheme,
    group_size: int,
    seed: int,
    text_hash: Callable[[str], str],
) -> Cell:
    from qfarm.recipe import Recipe

    weights = "weight" in scheme.sites
    if not weights:
        group_size = -1
    resolved = Recipe(tuple(method.resolve(group_size) for method in recipe.methods))
    calibration: Calibration = job.file.calibration
    return Cell(
        model=facts.reference,
        fingerprint=facts.fingerprint,
        tokenizer=facts.tokenizer,
        dtype=job.file.dtype,
        recipe=resolved.name,
        methods=tuple(resolved.specs()),
        scheme=str(scheme),
        group_size=group_size,
        symmetric=weights and _symmetric(job.file, resolved),
        scale_dtype=job.file.scale_dtype if weights else "float16",
        statistics=_statistics(job.file, resolved),
        calibration=(
            calibration.model_dump() | {"source": text_hash(calibration.text)} if resolved.needs_text else None
        ),
        seed=seed if resolved.needs_seed else None,
        rounded=_rounded(resolved, scheme),
        variant=_variant(recipe, group_size),
    )


def _symmetric(file: JobFile, recipe: Recipe) -> bool:
    from qfarm.recipe import WeightSolver

    solvers = [method for method in recipe.methods if isinstance(method, WeightSolver)]
    # A grid provider stands behind the solver, and has the last word.
    return functools.reduce(lambda asked, solver: solver.symmetric_weights(asked), solvers, bool(file.symmetric))


def _statistics(file: JobFile, recipe: Recipe) -> str | None:
    from qfarm.recipe import solves_blocks

    solver = recipe.solver
    if not recipe.input_statistics and not solves_blocks(solver):
        return None  # what transforms and quantizers of activations learn comes before any weight is rounded
    return "independent" if solver and solver.original_inputs else file.statistics


def _rounded(recipe: Recipe, scheme: Scheme) -> dict[str, int]:
    from qfarm.recipe import lookup

    found = {site: RTN_VERSIONS[site] for site in sorted(scheme.sites - recipe.claims - {"weight"})}
    if "weight" in scheme.sites and recipe.solver is None:
        found["weight"] = lookup("rtn").version
    if "linear_in" in scheme.sites and recipe.solver is not None and recipe.solver.divides_inputs:
        found["input_factors"] = INPUT_FACTORS_VERSION
    return found


def _variant(recipe: Recipe, group_size: int) -> str:
    """The options that were given and make a difference, for telling cells of one recipe apart."""
    found = []
    for method in recipe.methods:
        usual = type(method)()
        if method.resolve(group_size) == usual.resolve(group_size):
            continue
        prefix = f"{method.name}." if len(recipe.methods) > 1 else ""
        given = {name: value for name, value in method.options().items() if value != usual.options()[name]}
        found += [f"{prefix}{name}={json.dumps(value, default=str)}" for name, value in given.items()]
    return ", ".join(found)


Axes = tuple[str, "Recipe", Scheme, int, int]


def _product(block: Block) -> itertools.product[Any]:
    return itertools.product(block.models, block.recipes, block.schemes, block.group_sizes, block.seeds)


def _matches(match: Match, model: str, recipe: Recipe, scheme: Scheme, group_size: int, seed: int) -> bool:
    return (
        match.model in (None, model)
        and (match.method is None or _parts(match.method) == _parts(recipe.name))
        and (match.bits is None or parse_scheme(match.bits) == scheme)
        and match.group_size in (None, group_size)
        and match.seed in (None, seed)
    )


def _parts(chain: str) -> frozenset[str]:
    """The methods of a chain, which may be written in any order."""
    return frozenset(part.strip() for part in chain.split("+"))


def baseline_cell(facts: ModelFacts, dtype: str) -> Cell:
    """The full-precision cell of a model, as every job has it that loads the model in this dtype."""
    return Cell(
        model=facts.reference,
        fingerprint=facts.fingerprint,
        tokenizer=facts.tokenizer,
        dtype=dtype,
        recipe=_baseline_recipe().name,
        methods=(),
        scheme=str(Scheme()),
        group_size=-1,
        symmetric=False,
        scale_dtype="float16",
        statistics=None,
        calibration=None,
        seed=None,
    )


def find_cell(cells: tuple[Cell, ...], text: str) -> Cell:
    """The one cell whose id starts with `text` or whose label is `text` ("baseline" will do). Raises InvalidInput."""
    found = [cell for cell in cells if cell.cell_id.startswith(text) or text in _labels(cell)]
    if len(found) == 1:
        return found[0]
    labels = ", ".join(f'{cell.cell_id} ("{cell.label}")' for cell in (found or cells)[:20])
    nearest_label = did_you_mean(text, [cell.label for cell in cells])
    problem = "names several cells;" if found else f"names no cell of this job{nearest_label}"
    raise InvalidInput(f'"{text}" {problem} cells: {labels}')


def _labels(cell: Cell) -> tuple[str, ...]:
    return (cell.label, cell.recipe) if cell.is_baseline else (cell.label,)
