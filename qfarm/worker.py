"""Worker: run one cell. A plain function, so that any cell can be rerun in one process under a debugger."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from qfarm import environment
from qfarm.calibrate import Keep, LayerResult, quantize_weights
from qfarm.errors import Disagreement, Failure, InvalidInput, StoreFull, Unavailable, classify
from qfarm.evaluate import build_evaluator
from qfarm.inputs import Statistic
from qfarm.kernel_bytes import of_layers
from qfarm.layers.install import Installed, install_sites
from qfarm.layers.observe import observe
from qfarm.layers.packed_run import PackedModel
from qfarm.layers.products import refuse_device
from qfarm.layers.sites import Observed
from qfarm.layers.twin import twin_blocks
from qfarm.matrix import Cell, canonical_hash
from qfarm.memory import OFFLOADED, SHRUNK, Arrangement, arrange, needs
from qfarm.models.ahead import Ahead
from qfarm.models.load import DTYPES, LoadedModel, load
from qfarm.models.place import HOST
from qfarm.models.reference import ModelFacts, resolve
from qfarm.plan import EvaluationSpec, Outcome, Task, statistics_key
from qfarm.quantized import QuantizedWeight
from qfarm.quantizer import Grid
from qfarm.recipe import Method, Recipe, WeightSolver, build_method
from qfarm.record import AnalysisRow, AttemptRow, CellRow, DocumentRow, LayerRow, MetricRow, utc_now
from qfarm.runs import ON, one_device_evaluation, one_device_rule, run_of
from qfarm.scheme import UNTOUCHED, Scheme, parse_scheme
from qfarm.shared import KeptObservations, SharedStatistics, fits, needed_bytes, spare_bytes
from qfarm.store import Store
from qfarm.text import Part, load_pages, load_text, public_name, text_hash
from qfarm.walk import BATCH_TOKENS
from qfarm.windows import Rolling, Windows, calibration_windows, evaluation_windows, rolling_windows

Progress = Callable[[str, int, int], None]  # stage, done, total (0 = unknown)
# Of a perplexity, between two runs of one cell: the most that another dtype moved one (bfloat16, ln PPL per window).
RERUN_FLOOR = 0.003
OFFLOAD_AFTER = 2  # attempts that ran out of memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Demands:
    """What a cell's evaluations ask of where its model lies; see `Session.begin`."""

    window: int
    packed: bool
    one_device: bool


class Session:
    """What one worker process keeps between cells: the loaded model, texts, tokenized windows."""

    def __init__(self, data: str | None) -> None:
        self.data = data
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.cell: Cell
        self.shrink = 0  # how often batches are halved, after attempts that ran out of memory
        self.notes: list[str] = []
        self.baseline_states: dict[str, Any] = {}  # open files of baselines' hidden states, by evaluation
        self.keep_twins = False  # an evaluation compares with the model as it is before it is quantized
        self.twins: list[nn.Module] = []  # its blocks, transformed but not quantized
        self.causal = True  # False: the cell's quantizers look across tokens, so that padding would matter
        self.packed: PackedModel | None = None  # the cell's packed layers, where an evaluation runs packed
        self.evaluation = ""  # eval_id of what is being run: it fixes the order in which windows are visited
        self._peak = self._gpu_peak = 0  # of this attempt's memory before it was measured anew
        self._key: tuple[str, str, str] | None = None  # fingerprint, tokenizer and dtype of the loaded model
        self._loaded: LoadedModel | None = None
        self._arranged: Arrangement | None = None  # where the loaded model lies; None: nowhere in particular
        self._facts: dict[str, ModelFacts] = {}
        self._model: ModelFacts | None = None  # of the loaded model
        self._windows: dict[tuple[Any, ...], Any] = {}
        self._shared: dict[str, SharedStatistics] = {}  # by what they depend on; the latest used stands last
        self._observed = KeptObservations()
        self.ahead = Ahead()
        self._hashes: dict[tuple[str, Part], str] = {}

    @property
    def loaded(self) -> LoadedModel:
        assert self._loaded is not None
        return self._loaded

    def note(self, text: str) -> None:
        """Record something that this attempt did differently."""
        self.notes.append(text)

    def start_peak(self) -> None:
        """Have `peak_bytes` speak of what comes from here on; the attempt's own peak is kept."""
        self._peak, self._gpu_peak = self.attempt_peak() or 0, self.attempt_gpu_peak() or 0
        self._reset_peaks()

    def start_attempt(self) -> None:
        """What earlier attempts took is no matter from here on."""
        self._peak = self._gpu_peak = 0
        self._reset_peaks()

    def _reset_peaks(self) -> None:
        environment.reset_peak_host_bytes()
        for index in self._gpus():
            torch.cuda.reset_peak_memory_stats(index)

    def _gpus(self) -> range:
        return range(torch.cuda.device_count() if self.device.type == "cuda" else 0)

    def peak_bytes(self) -> int | None:
        """The largest memory since `start_peak`: allocated on a GPU, else resident; None where it is not known."""
        on_gpu = self.device.type == "cuda"
        return torch.cuda.max_memory_allocated() if on_gpu else environment.peak_host_bytes()

    def attempt_peak(self) -> int | None:
        """The largest resident memory of this attempt; None where it is not known."""
        latest = environment.peak_host_bytes()
        return None if latest is None else max(latest, self._peak)

    def attempt_gpu_peak(self) -> int | None:
        """The most that this attempt had allocated on all GPUs of the worker together; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return max(self._gpu_peak, sum(torch.cuda.max_memory_allocated(index) for index in self._gpus()))

    def batch(self, tokens: int, length: int) -> int:
        """Sequences of `length` tokens per forward pass, from the usual tokens per pass."""
        return max(1, (tokens >> self.shrink) // length)

    def begin(
        self,
        cell: Cell,
        shrink: int = 0,
        share: Sequence[str] = (),
        *,
        window: int = 0,
        packed: bool = False,
        one_device: bool = False,
    ) -> None:
        """Make the cell's original model ready; `share` names statistics to keep for cells that follow.

        `window`: the most tokens that its evaluations read at once; `packed`: some run it packed; `one_device`: they
        need the model on one device as a whole. Raises InvalidInput when the model is no longer what was planned.
        """
        self.cell, self.shrink, self.notes, self.baseline_states = cell, shrink, [], {}
        self.causal, self.packed = True, None
        self.share = frozenset(Statistic(name) for name in share)
        self.keep_twins, self.twins = False, []
        demands = _Demands(window=window, packed=packed, one_device=one_device)
        if shrink:
            self.note(f"{SHRUNK} up to {shrink} times after running out of memory; last bits may differ")
        key = (cell.fingerprint, cell.tokenizer, cell.dtype)
        if self._key == key:
            self.loaded.restore()
            self._arrange(demands)
            return
        self._key, self._loaded, self._windows, self._shared = None, None, {}, {}
        self._observed = KeptObservations()
        if cell.model not in self._facts:
            self._facts[cell.model] = resolve(cell.model)
        facts = self._facts[cell.model]
        _require_same(f"model {cell.model}", facts.fingerprint, cell.fingerprint)
        _require_same(f"tokenizer of {cell.model}", facts.tokenizer, cell.tokenizer)
        self._loaded, self._model, self._arranged = load(facts, cell.dtype, HOST), facts, None
        if self._loaded.not_shared:
            self.note(self._loaded.not_shared)
        self._key = key
        self._arrange(demands)
        # Methods may replace the head's weight, but what compares with the baseline needs the original.
        self._head = (self._loaded.head.weight, self._loaded.head.bias)

    def _arrange(self, demands: _Demands) -> None:
        """Put the original model where this cell takes it: on the device, over several, or streamed block by block.

        Where smaller batches were not enough, what only the next cell needs leaves the device.
        """
        short = self.shrink >= OFFLOAD_AFTER and self.device.type != "cpu"
        self.loaded.offload = short
        if short:
            self._shared, self._observed = {}, KeptObservations()
        rooms = self.rooms()
        arranged = Arrangement(gpus=1, streamed=False)
        if rooms:
            rule = one_device_rule(Recipe.from_specs(self.cell.methods), parse_scheme(self.cell.scheme))
            assert self._model is not None
            needed = needs(
                self._model, self.cell, window=demands.window, device=self.device.type, packed=demands.packed
            )
            movable = rule is None and not demands.one_device
            arranged = arrange(needed, len(rooms), min(rooms.values()), movable=movable, short=short)
        if arranged != self._arranged:
            self._arranged = None
            self.loaded.place(list(rooms or [self.device])[: arranged.gpus], streamed=arranged.streamed)
            self._arranged = arranged
        if arranged.note:
            self.note(arranged.note)
        if short and not arranged.streamed:  # streaming keeps everything there
            self.note(f"{OFFLOADED} in the host's memory after running out of the device's")

    def rooms(self) -> dict[torch.device, int]:
        """The worker's GPUs with the bytes that it can have of each; none on a CPU."""
        if self.device.type != "cuda":
            return {}
        found = {}
        for index in range(torch.cuda.device_count()):
            free, _ = torch.cuda.mem_get_info(index)
            found[torch.device("cuda", index)] = free + torch.cuda.memory_reserved(index)
        return found

    @property
    def baseline_head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [vocabulary, hidden] of the original model's output head, and its bias."""
        return self._head

    def keep(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What is made once for the loaded model, such as a text in tokens."""
        if key not in self._windows:
            self._windows[key] = make()
        return self._windows[key]

    def require_text(self, name: str, part: Part, planned: str) -> None:
        """Refuse a text that is not the one that the job was planned with: another pack, another Python."""
        if (name, part) not in self._hashes:
            self._hashes[name, part] = text_hash(name, part, self.data)
        _require_same(f"text {name} ({part})", self._hashes[name, part], planned)

    def windows(self, text: str, length: int, limit: int | None) -> Windows:
        """Evaluation windows, tokenized once per model."""

        def make() -> Windows:
            corpus = load_text(text, "evaluation", self.data)
            return evaluation_windows(corpus, self.loaded.tokenizer, length, limit)

        found: Windows = self.keep((text, length, limit), make)
        return found

    def rolling(self, text: str, reach: int, limit: int | None) -> Rolling:
        """Rolling windows over the first `limit` documents, tokenized once per model."""

        def make() -> Rolling:
            return rolling_windows(load_pages(text, self.data), self.loaded.tokenizer, reach, limit)

        found: Rolling = self.keep(("rolling", text, reach, limit), make)
        return found

    def calibration(self) -> Tensor:
        """The cell's calibration windows, int64 [samples, length]."""
        plan, seed = self.cell.calibration, self.cell.seed
        assert plan is not None and seed is not None
        self.require_text(plan["text"], "calibration", plan["source"])

        def make() -> Tensor:
            corpus = load_text(plan["text"], "calibration", self.data)
            return calibration_windows(corpus, self.loaded.tokenizer, plan["samples"], plan["length"], seed)

        found: Tensor = self.keep(("calibration", plan["source"], plan["samples"], plan["length"], seed), make)
        return found

    def shared_statistics(self) -> SharedStatistics | None:
        """Statistics of the cell's inputs that other cells use too; None where nothing is or can be shared."""
        if not self.share:
            return None
        key = f"{statistics_key(self.cell)} {BATCH_TOKENS >> self.shrink}"
        found = self._shared.pop(key, None)
        if found is None or not self.share <= found.wanted:
            found = None  # gone before free memory is counted
            needed = needed_bytes(self.loaded, self.share)
            while self._shared and not fits(needed):
                self._shared.pop(next(iter(self._shared)))
            if not fits(needed):
                self.note(f"statistics not kept for other cells: {needed} bytes needed, {spare_bytes()} to spare")
                return None
            found = SharedStatistics(self.loaded, self.calibration(), BATCH_TOKENS >> self.shrink, self.share)
        self._shared[key] = found
        return found

    def observed(
        self, wanted: frozenset[Statistic], sites: Set[str], behind: Sequence[Method], prepared: str = ""
    ) -> Observed:
        """Statistics of the cell's calibration text at sites, behind transforms that stand in the model already.

        `prepared` names what else was done to the model that is observed.

        Kept for cells that ask for the same: of the original model, whatever they make of it.
        """
        if not wanted:
            return {}
        assert self.cell.calibration is not None, "statistics need calibration text"
        batch_tokens = BATCH_TOKENS >> self.shrink
        transforms = Recipe(tuple(behind)).specs()
        # A transform may look at what is to be quantized.
        scheme = self.cell.scheme if transforms else None
        asked = [sorted(wanted), sorted(sites), batch_tokens, transforms, scheme, prepared]
        calibration = {k: v for k, v in self.cell.calibration.items() if k != "text"}
        return self._observed.get(
            canonical_hash([asked, calibration, self.cell.seed]),
            lambda: observe(self.loaded, self.calibration(), wanted, sites=sites, batch_tokens=batch_tokens),
        )


def _require_same(what: str, here: str, planned: str) -> None:
    if here != planned:
        raise InvalidInput(f"{what}: this machine has {here}, the job was planned with {planned}")


class _Clock:
    """Stages of an attempt: the current one, and the seconds each took."""

    def __init__(self, report: Progress) -> None:
        self.report, self.stage = report, "start"
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[Callable[[int, int], None]]:
        self.stage = stage
        self.report(stage, 0, 0)
        started = time.perf_counter()
        try:
            yield lambda done, total: self.report(stage, done, total)
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


def run_cell(task: Task, session: Session, report: Progress) -> Outcome:
    """Quantize and evaluate one cell; results and the attempt itself go to the store.

    Never raises for what goes wrong inside the cell: the outcome and the attempt's row say what it was. Raises
    StoreFull when results cannot be written, which is no fault of the cell.
    """
    store = Store.open(task.store)
    clock = _Clock(report)
    started, began = utc_now(), time.perf_counter()
    session.start_attempt()
    failure: Failure | None = None
    error: BaseException | None = None
    figures: list[tuple[str, float]] = []
    bits = float(UNTOUCHED)
    try:
        bits = _run(task, session, store, clock, figures)
    except StoreFull:
        raise
    except Exception as raised:  # whatever a method, a model or a library does wrong ends this attempt only
        failure, error = classify(raised), raised
    seconds = time.perf_counter() - began
    line = _one_line(error) if error else None
    store.publish_attempt(
        AttemptRow(
            attempt_id=task.attempt_id,
            cell_id=task.cell.cell_id,
            model=task.cell.model,
            label=task.cell.label,
            job=task.job,
            number=task.number,
            evaluations=json.dumps([spec.eval_id for spec in task.evaluations]),
            outcome=failure or "ok",
            stage=clock.stage,
            error=line,
            traceback="".join(traceback.format_exception(error)) if error else None,
            worker=f"pid {os.getpid()}",
            node=socket.gethostname(),
            started=started,
            wall_s=seconds,
            stages=json.dumps(clock.seconds),
            peak_host_bytes=session.attempt_peak(),
            peak_gpu_bytes=session.attempt_gpu_peak(),
            expected_s=task.expected_s,
            expected_from=task.expected_from,
            notes=json.dumps(session.notes),
            # A Ray worker's own command line says nothing, and may carry secrets of the cluster.
            provenance=json.dumps(
                environment.provenance()
                | {"command": task.command}
                | ({"margin": dict(task.margin)} if task.margin else {})
            ),
        )
    )
    return Outcome(
        attempt_id=task.attempt_id,
        cell_id=task.cell.cell_id,
        failure=failure,
        error=line,
        seconds=seconds,
        figures=tuple(figures),
        linear_bits=bits,
    )


def _run(task: Task, session: Session, store: Store, clock: _Clock, figures: list[tuple[str, float]]) -> float:
    cell = task.cell
    packed = [spec.protocol for spec in task.evaluations if run_of(spec.protocol) == "packed"]
    packs = bool(packed)
    for protocol in packed:
        refuse_device(session.device, protocol.get(ON, "cpu"))
    evaluators = [(spec, build_evaluator(spec.name, spec.options)) for spec in task.evaluations]
    packs_layers = packs and not cell.is_baseline
    alone = one_device_evaluation([evaluator for _, evaluator in evaluators], packs_layers)
    with clock("load"):
        session.begin(
            cell,
            task.shrink,
            task.share,
            window=max((evaluator.window or 0 for _, evaluator in evaluators), default=0),
            packed=packs_layers,
            one_device=alone is not None,
        )
    if (failed := session.ahead.failure()) is not None:
        session.note(failed)
    if any(evaluator.timed for _, evaluator in evaluators):
        session.ahead.wait()  # nothing runs beside what is timed
    elif task.ahead is not None:
        session.ahead.start(*task.ahead)
    with clock("prepare"):
        for spec, evaluator in evaluators:
            for name, part in evaluator.texts():
                session.require_text(name, part, spec.protocol["texts"][f"{public_name(name)}/{part}"])
            with _reading_cache(session, spec):
                evaluator.prepare(session)
    weights: dict[str, QuantizedWeight] = {}
    with clock("quantize" if cell.calibration is None else "calibrate + quantize") as progress:
        layers, installed = quantize_cell(session, progress, weights.__setitem__ if packs else None)
    row = cell_row(task, session, layers, installed)
    store.publish_cell(row, [_layer_row(cell.cell_id, layer) for layer in layers])
    if packs:
        with clock("pack"):
            session.packed = PackedModel(session.loaded, weights)
            weights.clear()
        for note in session.packed.notes():
            session.note(note)
    for number, (spec, evaluator) in enumerate(evaluators, 1):
        with clock(f"evaluate {spec.label}") as progress, torch.no_grad():
            session.evaluation = spec.eval_id
            with _reading_cache(session, spec), _running(session, spec):
                result = evaluator.run(session, progress)
        protocol = dict(spec.protocol) | ({"machine": environment.machine(session.device)} if evaluator.timed else {})
        metrics = [_metric_row(task, spec, metric, protocol) for metric in result.metrics]
        documents = [
            DocumentRow(**dataclasses.asdict(document), cell_id=cell.cell_id, eval_id=spec.eval_id)
            for document in result.documents
        ]
        analysis = [
            AnalysisRow(**dataclasses.asdict(figure), cell_id=cell.cell_id, eval_id=spec.eval_id)
            for figure in result.analysis
        ]
        published = store.publish_evaluation(cell.cell_id, spec.eval_id, task.attempt_id, metrics, documents, analysis)
        if not published and not evaluator.timed:
            _check_against_stored(session, store, spec, metrics[0])
        figures.append((spec.label, result.metrics[0].value))
        seen, left = result.metrics[0].stopped_early, [later.label for later, _ in evaluators[number:]]
        if seen is not None and left:
            session.note(f"{spec.label}: stopped on {seen} windows, which ended the cell; not run: {', '.join(left)}")
            break
    for report in installed.reports:
        for note in report():
            session.note(note)
    return row.linear_bits


def _check_against_stored(session: Session, store: Store, spec: EvaluationSpec, own: MetricRow) -> None:
    """Another attempt's result was there first: the same, or a word about it. Raises Disagreement beyond rounding."""
    rows = store.read("metrics", columns=["eval_id", "metric", "value"], cell_ids=[own.cell_id]).to_pylist()
    stored = [row["value"] for row in rows if (row["eval_id"], row["metric"]) == (spec.eval_id, own.metric)]
    if not stored or stored[0] == own.value or (math.isnan(stored[0]) and math.isnan(own.value)):
        return
    said = f"{spec.label}: {own.metric} {own.value:.6g} here, {stored[0]:.6g} in another attempt, whose results stand"
    session.note(said)
    slack = RERUN_FLOOR * abs(stored[0])
    if own.unit != "perplexity":  # answers are whole: a few may flip
        slack = max(slack, own.standard_error or 0.0, 2 / own.n)
    if not abs(own.value - stored[0]) <= slack:
        raise Disagreement(f"{said}: two runs of one cell differ by more than rounding")


def _reading_cache(session: Session, spec: EvaluationSpec) -> AbstractContextManager[None]:
    """How the evaluation reads a quantized KV cache; the baseline of such cells reads its own alike."""
    return session.loaded.reading_cache(**spec.protocol.get("kv", {"prefill": "quantized"}))


def _running(session: Session, spec: EvaluationSpec) -> AbstractContextManager[None]:
    """The model as the evaluation runs it: simulated, or from packed codes."""
    if session.packed is None:
        return nullcontext()
    return session.packed.running(run_of(spec.protocol) == "packed")


def quantize_cell(
    session: Session, progress: Callable[[int, int], None], keep: Keep | None = None
) -> tuple[list[LayerResult], Installed]:
    """Apply the session's cell to its loaded model: transforms, weights, then the other sites.

    What happened to each linear layer, and what was installed beside the weights. `keep` is handed each layer's codes.
    """
    layers, observed = quantize_linears(session, progress, keep)
    recipe, scheme = Recipe.from_specs(session.cell.methods), parse_scheme(session.cell.scheme)
    windows = session.calibration() if session.cell.calibration else None
    installed = install_sites(session.loaded, recipe, scheme, observed, windows)
    session.causal = installed.causal is not False
    for note in installed.notes:
        session.note(note)
    return [_with_table(layer, installed) for layer in layers], installed


def quantize_linears(
    session: Session, progress: Callable[[int, int], None], keep: Keep | None = None
) -> tuple[list[LayerResult], Observed]:
    """The first half of `quantize_cell`: transforms and weights, nothing installed at other sites yet.

    What happened to each linear layer, and what was observed for those sites. `keep` is handed each layer's codes.
    """
    cell = session.cell
    recipe, scheme = Recipe.from_specs(cell.methods), parse_scheme(cell.scheme)
    solver = recipe.solver or build_method("rtn", {})
    assert isinstance(solver, WeightSolver)

    def grid_of(role: str) -> Grid | None:
        bits = scheme.weight_bits(role)
        if bits == UNTOUCHED:
            return None
        usual = Grid(
            bits=bits, group_size=cell.group_size, symmetric=cell.symmetric, scale_dtype=DTYPES[cell.scale_dtype]
        )
        return recipe.grid(usual, role, session.loaded.head_dim)

    windows = session.calibration() if cell.calibration else None
    _transform(session, recipe, windows, scheme)
    if session.keep_twins:
        session.twins = twin_blocks(session.loaded)
    asking = [method for method in recipe.site_methods if method.site_statistics()]
    wanted = frozenset().union(*(method.site_statistics() for method in asking))
    sites = frozenset().union(*(method.observes for method in asking))
    observed = session.observed(wanted, sites, recipe.transforms)
    # The baseline and schemes that leave weights alone pass here too: every layer is listed with its reason.
    layers = quantize_weights(
        session.loaded,
        solver,
        grid_of,
        windows,
        sequential=cell.statistics == "sequential",
        report=progress,
        wrappers=recipe.wrappers,
        batch_tokens=BATCH_TOKENS >> session.shrink,
        seed=cell.seed or 0,
        shared=session.shared_statistics(),
        input_bits=scheme.linear_in,
        keep=keep,
    )
    for note in substitutes(solver.name, layers):
        session.note(note)
    return layers, observed


def _with_table(layer: LayerResult, installed: Installed) -> LayerResult:
    """The layer's result with what calibration fixed for the cache that it writes to."""
    table = installed.tables.get((layer.layer, layer.role))
    return dataclasses.replace(layer, notes=layer.notes | {"kv_cache": table}) if table else layer


def substitutes(name: str, layers: Sequence[LayerResult]) -> Iterator[str]:
    """One line for each reason why layers were made by another solver than the cell's own."""
    done = [layer for layer in layers if layer.solver is not None]
    found: Counter[tuple[str, str]] = Counter()
    for layer in done:
        assert layer.solver is not None
        own = layer.solver.partition("+")[0].partition(" ")[0]  # "gptq retry+qera" is gptq's
        if own != name:
            # What follows a colon are figures of the one layer.
            found[own, str(layer.notes.get("reason", "as its options say")).partition(":")[0]] += 1
    for (other, reason), count in found.items():
        yield f"{count} of {len(done)} layers by {other}, not {name}: {reason}"


def _transform(session: Session, recipe: Recipe, windows: Tensor | None, scheme: Scheme) -> None:
    """Run the recipe's transforms, each on the model that the one before it left."""
    for position, method in enumerate(recipe.transforms):
        with session.loaded.temporary():
            method.prepare(session.loaded)
            before = recipe.transforms[:position]
            wanted = method.transform_statistics()
            observed = session.observed(wanted, method.learns_from, before, method.prepared)
        for note in method.learn(session.loaded, observed, session.cell.seed or 0, windows, scheme):
            session.note(f"{method.name}: {note}")


def cell_row(task: Task, session: Session, layers: list[LayerResult], installed: Installed) -> CellRow:
    """The cell's row: axes, exact stored sizes, coverage."""
    cell, loaded = task.cell, session.loaded
    done = [layer for layer in layers if layer.solver is not None]
    linear_bytes = sum(layer.stored_bytes for layer in done)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in done)
    model_bytes = loaded.other_bytes() + sum(layer.stored_bytes for layer in layers) + installed.activation_bytes
    payload = sum((layer.payload_bits or 0) * layer.shape[0] * layer.shape[1] for layer in done)
    parameters = loaded.parameter_count()
    element = next(loaded.model.parameters()).element_size()
    kernel = of_layers({layer.module: layer.kernel for layer in done if layer.kernel is not None})
    return CellRow(
        cell_id=cell.cell_id,
        attempt_id=task.attempt_id,
        job=task.job,
        model=cell.model,
        fingerprint=cell.fingerprint,
        recipe=cell.recipe,
        scheme=cell.scheme,
        group_size=cell.group_size,
        seed=cell.seed,
        symmetric=cell.symmetric,
        scale_dtype=cell.scale_dtype,
        dtype=cell.dtype,
        statistics=cell.statistics,
        spec=json.dumps(dataclasses.asdict(cell)),
        linear_bits=8 * linear_bytes / weights if weights else 8.0 * element,
        model_bits=8 * model_bytes / parameters,
        linear_bytes=linear_bytes,
        model_bytes=model_bytes,
        layers_quantized=len(done),
        layers_skipped=len(layers) - len(done),
        kv_bits=installed.kv_bits,
        payload_bits=payload / weights if weights else None,
        activation_bits=installed.activation_bits,
        activation_bytes=installed.activation_bytes,
        kernel_bytes=None if isinstance(kernel, str) else kernel.total,
        kernel_causes=json.dumps({"no_layout": kernel} if isinstance(kernel, str) else dict(kernel.causes)),
        kept_share=1 - weights / parameters,
        causal=installed.causal,
        created=utc_now(),
    )


def _layer_row(cell_id: str, layer: LayerResult) -> LayerRow:
    return LayerRow(
        cell_id=cell_id,
        layer=layer.layer,
        role=layer.role,
        module=layer.module,
        rows=layer.shape[0],
        columns=layer.shape[1],
        solver=layer.solver,
        reason=layer.reason,
        bits=layer.bits,
        group_size=layer.group_size,
        stored_bytes=layer.stored_bytes,
        weight_error=layer.weight_error,
        output_error=layer.output_error,
        notes=json.dumps(layer.notes),
    )


def _metric_row(task: Task, spec: EvaluationSpec, metric: Any, protocol: Mapping[str, Any]) -> MetricRow:
    return MetricRow(
        **dataclasses.asdict(metric),
        cell_id=task.cell.cell_id,
        eval_id=spec.eval_id,
        attempt_id=task.attempt_id,
        evaluation=spec.label,
        protocol=json.dumps(protocol),
        created=utc_now(),
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    known = isinstance(error, (InvalidInput, Unavailable))
    return (text if known and text else f"{type(error).__name__}: {text}")[:500]
