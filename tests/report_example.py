"""A small store for the tests of the report: a baseline, two quantized cells and one that failed."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow.compute as pc

from qfarm import record
from qfarm.record import AttemptRow, CellRow, DocumentRow, MetricRow

MODEL = "example/Tiny-135M"
LABEL = "perplexity wikitext2 2048"
PROTOCOL = {
    "evaluator": "perplexity",
    "version": 1,
    "options": {"text": "wikitext2", "length": 2048, "windows": None, "divergence": True},
    "dtype": "bfloat16",
    "run": "fake",
}
HOSTILE = "[red]x[/red]\x1b[31m\x1b]0;title\x07</script>\n| a \u202e*b*"


class FakeStore:
    """What a report reads, from lists in memory."""

    def __init__(self) -> None:
        self.rows: dict[str, list] = {name: [] for name in record.TABLES}

    def read(self, table, *, columns=None, cell_ids=None):
        found = record.to_table(table, self.rows[table])
        if cell_ids is not None:
            found = found.filter(pc.is_in(found["cell_id"], pc.cast(list(cell_ids), "string")))
        return found if columns is None else found.select(list(columns))

    def add(
        self,
        cell,
        losses,
        tokens,
        *,
        eval_id="e" * 16,
        protocol=PROTOCOL,
        label=LABEL,
        metrics=None,
        pieces=None,
        attempt_id=None,
        stopped_early=None,
    ):
        """One evaluation: losses [piece], one window and one cluster each unless `pieces` says otherwise."""
        pieces = pieces or [(f"document {i}", i, f"article {i}") for i in range(len(losses))]
        self.rows["documents"] += [
            DocumentRow(
                cell_id=cell.cell_id, eval_id=eval_id, document=d, window=w, cluster=c, tokens=int(t), loss=float(loss)
            )
            for (d, w, c), loss, t in zip(pieces, losses, tokens, strict=True)
        ]
        values = {"perplexity": float(np.exp(np.sum(losses) / np.sum(tokens)))} if len(losses) else {}
        values |= metrics or {}
        units = {"perplexity": "perplexity", "kl": "nats per token", "kl_reverse": "nats per token"}
        self.rows["metrics"] += [
            MetricRow(
                **{"metric": name, "value": value, "unit": units.get(name, "fraction of tokens"), "better": "lower"},
                **{"n": len(losses), "clusters": len({c for _, _, c in pieces}), "cell_id": cell.cell_id},
                **{"eval_id": eval_id, "attempt_id": attempt_id or cell.attempt_id, "evaluation": label},
                **{"protocol": json.dumps(protocol), "created": "2026-11-21T00:00:00Z"},
                stopped_early=stopped_early,
            )
            for name, value in values.items()
        ]

    def add_items(self, cell, right, *, tasks=None, clusters=None, accuracy=None, eval_id="a" * 16, protocol=None):
        """One evaluation of right or wrong items [item], of one task and each on its own unless said otherwise."""
        right = np.asarray(right)
        self.rows["documents"] += [
            DocumentRow(
                cell_id=cell.cell_id,
                eval_id=eval_id,
                document=f"item {i}",
                cluster=f"item {i}" if clusters is None else str(clusters[i]),
                task=None if tasks is None else str(tasks[i]),
                tokens=1,
                correct=int(one),
            )
            for i, one in enumerate(right)
        ]
        value = float(right.mean()) if accuracy is None else accuracy
        self.rows["metrics"].append(
            MetricRow(
                **{"metric": "acc", "value": value, "unit": "fraction of items", "better": "higher", "n": right.size},
                **{
                    "cell_id": cell.cell_id,
                    "eval_id": eval_id,
                    "attempt_id": cell.attempt_id,
                    "evaluation": "arc_easy",
                },
                protocol=json.dumps(protocol or {"evaluator": "tasks", "options": {"tasks": ["arc_easy"]}}),
                created="2026-11-21T00:00:00Z",
            )
        )


def cell_row(cell_id, recipe, scheme, **changes) -> CellRow:
    bits = 16.0 if scheme == "w16" else 4.25
    options, variant = changes.pop("options", {}), changes.pop("variant", "")
    row = CellRow(
        cell_id=cell_id,
        attempt_id=f"attempt-of-{cell_id}",
        job="tiny",
        model=MODEL,
        fingerprint="f" * 16,
        recipe=recipe,
        scheme=scheme,
        group_size=-1 if scheme == "w16" else 64,
        seed=0 if recipe == "gptq" else None,
        symmetric=False,
        scale_dtype="float16",
        dtype="bfloat16",
        statistics="sequential" if recipe == "gptq" else None,
        spec=json.dumps({"methods": [{"name": recipe, "version": 1, "options": options}], "variant": variant}),
        linear_bits=bits,
        model_bits=bits + 1,
        linear_bytes=66_000_000,
        model_bytes=123_000_000,
        layers_quantized=0 if scheme == "w16" else 210,
        layers_skipped=0,
        created="2026-11-21T00:00:00Z",
    )
    return dataclasses.replace(row, **changes)


def attempt_row(cell_id, **changes) -> AttemptRow:
    row = AttemptRow(
        model="org/model",
        label="gptq w4 g128",
        evaluations="[]",
        attempt_id=f"attempt-of-{cell_id}",
        cell_id=cell_id,
        job="tiny",
        number=1,
        outcome="ok",
        stage="done",
        worker="worker-0",
        node="node-0",
        started="2026-11-21T00:00:00Z",
        wall_s=125.0,
        stages='{"load": 1.5, "evaluate": 99}',
        provenance='{"qfarm": {"version": "0.1", "commit": "abc"}}',
    )
    return dataclasses.replace(row, **changes)


BASELINE, RTN, GPTQ, FAILED = "ba5e" * 4, "2222" * 4, "1111" * 4, "dead" * 4


@dataclasses.dataclass
class Example:
    store: FakeStore
    base: np.ndarray
    rtn: np.ndarray
    gptq: np.ndarray
    tokens: np.ndarray


def example(documents=30) -> Example:
    rng = np.random.default_rng(7)
    tokens = rng.integers(500, 2000, size=documents)
    base = tokens * rng.normal(2.9, 0.3, size=documents)
    rtn = base + tokens * rng.normal(0.08, 0.05, size=documents)
    gptq = base + tokens * rng.normal(0.02, 0.04, size=documents)
    store = FakeStore()
    cells = [cell_row(BASELINE, "baseline", "w16"), cell_row(RTN, "rtn", "w4"), cell_row(GPTQ, "gptq", "w4")]
    store.rows["cells"] += cells
    store.rows["attempts"] += [attempt_row(cell.cell_id) for cell in cells]
    store.rows["attempts"].append(
        attempt_row(
            FAILED, outcome="oom", stage="quantize", error="CUDA out of memory", traceback="Traceback\n  line 1"
        )
    )
    figures_of = {"kl": 0.0316, "kl_reverse": 0.04, "top1_agreement": 0.903}
    figures_of |= {"flips": 0.03, "lost": 0.02, "gained": 0.01}
    store.add(cells[0], base, tokens, metrics={"top1_accuracy": 0.45})
    store.add(cells[1], rtn, tokens, metrics={"top1_accuracy": 0.43, **figures_of})
    store.add(cells[2], gptq, tokens, metrics={"top1_accuracy": 0.44, **figures_of})
    return Example(store, base, rtn, gptq, tokens)


@dataclasses.dataclass
class Planted:
    """Windows of 2,047 tokens, one document each, under a baseline and cells whose true differences are known."""

    windows: int = 141
    seed: int = 20261121
    store: FakeStore = dataclasses.field(default_factory=FakeStore)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.tokens = np.full(self.windows, 2047)
        self.base = self.tokens * self.rng.normal(2.9, 0.3, size=self.windows)
        self.baseline = cell_row(BASELINE, "baseline", "w16")
        self._place(self.baseline, self.base)

    def noise(self, sigma: float) -> np.ndarray:
        """Nats per token [window] whose mean is exactly zero."""
        drawn = self.rng.normal(0, sigma, size=self.windows)
        return drawn - drawn.mean()

    def cell(self, cell_id: str, recipe: str, difference, scheme="w4", **axes) -> CellRow:
        """A cell whose loss is the baseline's plus `difference` nats per token, a number or [window]."""
        cell = cell_row(cell_id * (16 // len(cell_id)), recipe, scheme, **axes)
        cell = dataclasses.replace(cell, spec=json.dumps(json.loads(cell.spec) | {"seed": cell.seed}))
        self._place(cell, self.base + self.tokens * difference)
        return cell

    def _place(self, cell: CellRow, losses: np.ndarray) -> None:
        self.store.rows["cells"].append(cell)
        self.store.rows["attempts"].append(attempt_row(cell.cell_id))
        self.store.add(cell, losses, self.tokens)

    def replicates(self, recipe: str, shift: float, spread: float, *, start: int, sigma=0.02, **axes) -> None:
        """Three seeds around `shift` whose means have exactly the standard deviation `spread`."""
        shared = self.noise(sigma)
        for seed, away in enumerate((-spread, 0.0, spread)):
            self.cell(f"{start + seed:02}", recipe, shift + away + shared + self.noise(sigma / 4), seed=seed, **axes)


def hostile_store() -> FakeStore:
    small = example()
    small.store.rows["cells"] = [
        dataclasses.replace(cell, model=HOSTILE, recipe=cell.recipe if cell.recipe != "rtn" else HOSTILE)
        for cell in small.store.rows["cells"]
    ]
    small.store.rows["attempts"][1] = attempt_row(RTN, notes=json.dumps([HOSTILE]))
    small.store.rows["attempts"][3] = attempt_row(
        FAILED, outcome="bug", error=f"=cmd {HOSTILE}", traceback=HOSTILE, stage=HOSTILE
    )
    return small.store


def row_of(results, cell_id, table=0):
    return next(row for row in results.tables[table].rows if row.cell.cell_id == cell_id)
