"""Plan: what a submission would run. Cells, the evaluations that each still lacks, and what they will cost."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from qfarm.errors import Failure, JobError, Unavailable
from qfarm.estimate import (
    Estimate,
    History,
    estimate,
    gpu_share,
    history,
    machine_rate,
    streaming_share,
    with_slack,
)
from qfarm.evaluate import Evaluator, eval_id
from qfarm.job import Job, Resources
from qfarm.matrix import Cell, Invalid, canonical_hash, expand
from qfarm.models.reference import PROVISIONAL, ModelFacts, resolve
from qfarm.recipe import Recipe, Stage, build_method, solves_blocks
from qfarm.runs import GPU_PRODUCTS_VERSION, ON, Run, one_device_evaluation, one_device_rule, packed_refusal, run_of
from qfarm.scheme import parse_scheme
from qfarm.store import Store
from qfarm.text import Part, text_hash


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSpec:
    """Plain data from which a worker rebuilds an evaluator."""

    eval_id: str
    name: str
    label: str
    options: Mapping[str, Any]
    protocol: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One attempt of one cell, as handed to a worker."""

    job: str
    cell: Cell
    evaluations: tuple[EvaluationSpec, ...]  # those that the store lacks, in the order in which they run
    store: str  # absolute path or URL
    attempt_id: str
    number: int  # 1 is the first try of this submission
    data: str | None  # folder of the data pack
    command: str = ""  # the command line of the submission
    shrink: int = 0  # earlier attempts that ran out of memory: batches are halved so often
    margin: Mapping[str, str] = dataclasses.field(default_factory=dict)  # the job's, by measure, for the record
    share: tuple[str, ...] = ()  # statistics to collect at once, for this cell and others of the same calibration
    expected_s: float | None = None  # what the plan expects it to take, for the record
    expected_from: str | None = None  # qfarm.estimate.Estimate.source
    ahead: tuple[str, str] | None = None  # reference and dtype of the model that the worker will likely load next


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended. Results are in the store already; this is what the driver needs to go on."""

    attempt_id: str
    cell_id: str
    failure: Failure | None  # None: done
    error: str | None  # one line
    seconds: float
    figures: tuple[tuple[str, float], ...] = ()  # headline value of each evaluation, by label
    linear_bits: float = 16.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedCell:
    cell: Cell
    missing: tuple[EvaluationSpec, ...]  # evaluations still to run
    finished: tuple[EvaluationSpec, ...]  # evaluations that the store has
    estimate: Estimate
    gpus: float  # of the worker that takes it
    skipped: tuple[EvaluationSpec, ...] = ()  # evaluations not to be run, since another one ended the cell early

    @property
    def done(self) -> bool:
        return not self.missing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    job: Job
    cells: tuple[PlannedCell, ...]
    invalid: tuple[Invalid, ...]
    notes: tuple[str, ...]

    @property
    def provisional(self) -> bool:
        """True when a model or a text could not be reached: ids are not final and nothing can be run from here."""
        return any(PROVISIONAL in str(planned.cell) or _unreached(planned) for planned in self.cells)


def _unreached(planned: PlannedCell) -> bool:
    return any(PROVISIONAL in str(spec.protocol) for spec in (*planned.missing, *planned.finished))


def make_plan(job: Job, store: Store | None, data: str | None, *, allow_provisional: bool = False) -> Plan:
    """Expand a job and compare it with what the store holds (None: nothing yet).

    With `allow_provisional`, models and texts that cannot be reached now get provisional identities and a note;
    otherwise they raise Unavailable.
    """
    notes: dict[str, None] = {}

    @functools.cache
    def facts(reference: str) -> ModelFacts:
        found = resolve(reference, allow_provisional=allow_provisional)
        if found.provisional:
            notes[f"{reference} cannot be reached from here: shapes from the table of known models, ids not final"] = (
                None
            )
        return found

    @functools.cache
    def hash_of(name: str, part: Part) -> str:
        try:
            return text_hash(name, part, data)
        except Unavailable as error:
            if not allow_provisional:
                raise
            notes[str(error)] = None
            return f"{PROVISIONAL}{name}/{part}"

    matrix = expand(job, facts, lambda name: hash_of(name, "calibration"))
    for cell in matrix.cells:
        _refuse_long_windows(job, cell, facts(cell.model))
    finished = store.finished_evaluations() if store else frozenset()
    quantized = store.finished_cells() if store else frozenset()
    resources = job.file.resources
    past, rate = history(store, gpu=resources.gpus > 0), machine_rate(resources.gpus)
    planned: list[PlannedCell] = []
    too_large: list[Invalid] = []
    ended = _ended_early(job, store, [cell.cell_id for cell in matrix.cells])
    notes |= dict.fromkeys(_false_stops(job, matrix.cells))
    with_kv = {cell.fingerprint for cell in matrix.cells if cell.quantizes_kv}
    not_packed = _not_packed(job, matrix.cells)

    @functools.cache
    def asked(
        tokenizer: str, dtype: str, kinds: tuple[bool, ...], runs: tuple[Run, ...]
    ) -> dict[str, tuple[EvaluationSpec, Evaluator]]:
        return {
            spec.eval_id: (spec, evaluator)
            for run in runs
            for kv in kinds
            for evaluator in _cheapest_first(job.evaluations)
            if run in evaluator.runs
            for spec in [_spec(evaluator, tokenizer, dtype, hash_of, kv=kv, run=run, resources=resources)]
        }

    for cell in matrix.cells:
        runs = tuple(run for run in job.runs if run != "packed" or cell.cell_id not in not_packed)
        if not runs:
            continue
        wanted = asked(cell.tokenizer, cell.dtype, _cache_kinds(cell, with_kv), runs)
        specs = [spec for spec, _ in wanted.values()]
        done = [cell.cell_id in quantized and (cell.cell_id, spec.eval_id) in finished for spec in specs]
        lacking = tuple(spec for spec, known in zip(specs, done, strict=True) if not known)
        finished_specs = tuple(spec for spec, known in zip(specs, done, strict=True) if known)
        hopeless = any((cell.cell_id, spec.eval_id) in ended for spec in finished_specs)
        to_run = () if hopeless else lacking
        place = _place(job, cell, facts(cell.model), _evaluators(to_run, wanted), past, rate)
        simulated = tuple(spec for spec in to_run if run_of(spec.protocol) != "packed")
        if place.refusal and simulated and len(simulated) < len(to_run):  # it can still be run as `fake`
            too_large.append(Invalid(model=cell.model, label=f"{cell.label} packed", rule=place.refusal))
            to_run, place = simulated, _place(job, cell, facts(cell.model), _evaluators(simulated, wanted), past, rate)
        if place.refusal:
            too_large.append(Invalid(model=cell.model, label=cell.label, rule=place.refusal))
            continue
        if place.note:
            notes[f"{cell.label} of {cell.model} {place.note}"] = None
        planned.append(
            PlannedCell(
                cell=cell,
                missing=to_run,
                finished=finished_specs,
                estimate=place.estimate,
                gpus=place.gpus,
                skipped=lacking if hopeless else (),
            )
        )
    invalid = (*matrix.invalid, *dict.fromkeys(not_packed.values()), *too_large)
    return Plan(job=job, cells=tuple(planned), invalid=invalid, notes=(*matrix.notes, *notes))


Specs = Mapping[str, tuple[EvaluationSpec, Evaluator]]  # by eval_id


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    """What a cell takes, and where it is put."""

    estimate: Estimate
    gpus: float
    refusal: str | None = None  # why it is put nowhere
    note: str | None = None


def _evaluators(specs: Iterable[EvaluationSpec], wanted: Specs) -> Specs:
    return {spec.eval_id: wanted[spec.eval_id] for spec in specs}


def _place(job: Job, cell: Cell, facts: ModelFacts, specs: Specs, past: History, rate: tuple[float, str]) -> _Place:
    """GPUs of a worker for a cell with these evaluations to run."""
    resources = job.file.resources
    evaluators = {name: evaluator for name, (_, evaluator) in specs.items()}
    packed = not cell.is_baseline and any(run_of(spec.protocol) == "packed" for spec, _ in specs.values())
    expected = estimate(job, cell, facts, evaluators, past, rate, packed)
    alone = one_device_evaluation(evaluators.values(), packed) or one_device_rule(
        Recipe.from_specs(cell.methods), parse_scheme(cell.scheme)
    )
    gpus, memory = resources.gpus, resources.gpu_memory
    share = gpu_share(expected, gpus, memory, spreads=alone is None)
    if share is not None or not specs or memory is None:
        return _Place(estimate=expected, gpus=gpus if share is None else share)
    least = min(gpus, 1) if alone else gpus
    size = f"{with_slack(expected.device_bytes) / 1e9:.0f} GB, slack included"
    needs = f"needs about {size}, more than {least:g} GPU(s) of {memory:g} GB"
    if alone:
        return _Place(estimate=expected, gpus=gpus, refusal=f"{needs}, and {alone}")
    share = streaming_share(expected, gpus, memory)
    if share is None:
        return _Place(estimate=expected, gpus=gpus, refusal=f"{needs}, even if its blocks are streamed")
    return _Place(estimate=expected, gpus=share, note=f"{needs}: its blocks will be streamed from the host's memory")


def _not_packed(job: Job, cells: Iterable[Cell]) -> dict[str, Invalid]:
    """By cell_id: those that a job wants to run packed and that cannot be. Raises JobError where nothing remains."""
    found: dict[str, Invalid] = {}
    others = [cell for cell in cells if not cell.is_baseline]
    for cell in others if "packed" in job.runs else ():
        rule = packed_refusal(Recipe.from_specs(cell.methods), parse_scheme(cell.scheme))
        if rule:
            found[cell.cell_id] = Invalid(model=cell.model, label=f"{cell.label} packed", rule=rule)
    if found and job.runs == ("packed",) and len(found) == len(others):
        raise JobError(f"{job.path}: the matrix is empty: run: packed: {next(iter(found.values())).rule}")
    return found


def shares(cells: Iterable[Cell]) -> dict[str, tuple[str, ...]]:
    """By cell: the statistics that it and other cells of the same model, transform and calibration ask for together.

    Cells that share nothing are left out: those in sequential mode, of block solvers, and any that stands alone.
    """
    groups: dict[str, list[tuple[str, frozenset[str]]]] = {}
    for cell in cells:
        if cell.statistics != "independent":
            continue
        recipe = Recipe.from_specs(cell.methods)
        wanted = frozenset(map(str, recipe.input_statistics))
        if wanted and not solves_blocks(recipe.solver):
            groups.setdefault(statistics_key(cell), []).append((cell.cell_id, wanted))
    together = {key: sorted(frozenset().union(*(w for _, w in found))) for key, found in groups.items()}
    return {cell_id: tuple(together[key]) for key, found in groups.items() if len(found) > 1 for cell_id, _ in found}


def statistics_key(cell: Cell) -> str:
    """Cells with the same key calibrate on the same inputs, in independent mode."""
    transforms = [spec for spec in cell.methods if build_method(spec["name"], spec["options"]).stage is Stage.TRANSFORM]
    # A transform may look at what is to be quantized.
    scheme = cell.scheme if transforms else None
    return canonical_hash([cell.fingerprint, cell.dtype, cell.calibration, cell.seed, transforms, scheme])


def _cheapest_first(evaluations: Iterable[Evaluator]) -> list[Evaluator]:
    """In the order in which they run: gates, what can end a cell early, then by tokens."""
    return sorted(evaluations, key=lambda one: (not one.gate, one.stop_alpha is None, one.tokens()))


def _ended_early(job: Job, store: Store | None, cell_ids: Collection[str]) -> frozenset[tuple[str, str]]:
    """(cell_id, eval_id) of the store's evaluations that the hopeless stop ended."""
    if store is None or all(one.stop_alpha is None for one in job.evaluations):
        return frozenset()
    rows = store.read("metrics", columns=["cell_id", "eval_id", "stopped_early"], cell_ids=cell_ids).to_pylist()
    return frozenset((row["cell_id"], row["eval_id"]) for row in rows if row["stopped_early"] is not None)


def _false_stops(job: Job, cells: Iterable[Cell]) -> Iterator[str]:
    """All cells share one order of windows, so that their false stops come together: what alpha means for all."""
    count = sum(not cell.is_baseline for cell in cells)
    for one in job.evaluations:
        if one.stop_alpha is not None and count > 1:
            yield (
                f"{one.label}: alpha {one.stop_alpha:g} is that of one cell; a chance of up to "
                f"{min(1.0, count * one.stop_alpha):.2g} that any of {count} cells at the limit is stopped "
                f"(alpha: {one.stop_alpha / count:.2g} would make it {one.stop_alpha:g})"
            )


def _cache_kinds(cell: Cell, with_kv: Collection[str]) -> tuple[bool, ...]:
    """Whether to measure as with a quantized KV cache. A baseline is measured as each of its model's cells is."""
    if cell.is_baseline:
        return (False, True) if cell.fingerprint in with_kv else (False,)
    return (cell.quantizes_kv,)


def _refuse_long_windows(job: Job, cell: Cell, facts: ModelFacts) -> None:
    """Beyond its positions a model gives numbers that mean nothing, or fails."""
    limit = facts.config.get("max_position_embeddings")
    if limit is None:  # not in the table of known models
        return
    asked = [(evaluator.label, evaluator.window or 0) for evaluator in job.evaluations]
    if cell.calibration:
        asked.append(("calibration", cell.calibration["length"]))
    for what, length in asked:
        if length > limit:
            raise JobError(f"{job.path}: {what}: {length} tokens at once, but {cell.model} reads at most {limit}")


def _spec(
    evaluator: Evaluator, tokenizer: str, dtype: str, hash_of: Any, *, kv: bool, run: Run, resources: Resources
) -> EvaluationSpec:
    protocol = evaluator.protocol(tokenizer, dtype, hash_of, kv=kv, run=run)
    if run == "packed" and resources.gpus:  # other operators multiply there
        protocol |= {ON: "gpu", "products": GPU_PRODUCTS_VERSION}
    if evaluator.timed:  # so that a store can hold several; what the machine turns out to be stands in the row
        protocol["worker"] = {"gpus": resources.gpus, "cpus": resources.cpus}
    told = run == "packed" and len(evaluator.runs) > 1  # where the name alone does not say it
    return EvaluationSpec(
        eval_id=eval_id(protocol),
        name=evaluator.name,
        label=f"{evaluator.label} packed" if told else evaluator.label,
        options=evaluator.options(),
        protocol=protocol,
    )
