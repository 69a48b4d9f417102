"""Evaluation: how near a cell's perplexity comes to the machine's rate of matrix products, and where the rest goes.

A cell (rtn w4, with the baseline's logits beside its own, as every cell has them) is evaluated in this process. What
must be done are products: those of the decoder's linear layers, attention for the half of the pairs that the mask
leaves, the output head twice. Their operations, two per multiplication, over all seconds of the evaluation are held
against the rate at which this machine multiplies matrices of the model's shapes in its dtype (`qfarm.bench.matrix`).

    products     linear layers of the decoder
    attention    scaled_dot_product_attention, softmax included
    decoder      the rest of it: norms, rotary embedding, activations, residuals
    head         logits of the cell and of the baseline
    scoring      losses, divergences, flips of those
    evaluation   the rest: windows, the baseline's hidden states, means and intervals

Each has its own operations and share of the rate, where it has any. On a GPU every part waits for the device, so that
launches count which otherwise overlap: there the shares of the time say more than the rate.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from qfarm import environment
from qfarm.bench.matrix import decoder_operations, measured_rate
from qfarm.bench.stopwatch import Place, Stopwatch, now, timed
from qfarm.errors import QfarmError
from qfarm.evaluate.perplexity import Perplexity
from qfarm.job import parse_job
from qfarm.models.load import LoadedModel
from qfarm.models.reference import ModelFacts, resolve
from qfarm.plan import Task, make_plan
from qfarm.predictions import Scorer
from qfarm.store import Store
from qfarm.worker import Session, run_cell

PARTS = ("products", "attention", "decoder", "head", "scoring", "evaluation")
PLACES: Mapping[Place, str] = {
    (Perplexity, "run"): "evaluation",
    (LoadedModel, "body"): "decoder",
    (nn.Linear, "forward"): "products",
    (nn.functional, "scaled_dot_product_attention"): "attention",
    (Scorer, "_logits"): "head",
    (Scorer, "score"): "scoring",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    model: str
    text: str = "python-docs"
    windows: int = 16  # of `length` tokens
    length: int = 2048
    dtype: str = "bfloat16"
    data: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    seconds: float
    operations: float  # floating-point operations that must be done in it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    settings: Settings
    machine: dict[str, Any]
    tokens: int  # read by the decoder
    rate: float  # floating-point operations per second of this machine, measured
    parts: tuple[Part, ...]
    seconds: float  # of all of them
    share: float  # of the rate, that what must be done comes to


def run(settings: Settings, say: Callable[[str], None] = lambda _: None) -> Report:
    """Raises InvalidInput for a model or text that cannot be had, QfarmError when a cell fails."""
    job = parse_job(_job_text(settings), "bench-evaluation")
    facts = resolve(settings.model)
    with tempfile.TemporaryDirectory(prefix="qfarm-bench-") as folder:
        store = Store.open(Path(folder) / "store", create=True)
        session = Session(settings.data)
        for planned in make_plan(job, store, settings.data).cells:
            say(f"{planned.cell.label} ...")
            task = Task(
                job="bench",
                cell=planned.cell,
                evaluations=planned.missing,
                store=store.location,
                attempt_id=f"bench-{planned.cell.cell_id}",
                number=1,
                data=settings.data,
            )
            watch = Stopwatch(now, PARTS)  # the last cell's is reported: the baseline's warms up
            with timed(watch, PLACES):
                outcome = run_cell(task, session, _silent)
            watch.stop()
            if outcome.failure is not None:
                raise QfarmError(f"{planned.cell.label}: {outcome.failure}: {outcome.error}")
        windows = len(session.windows(settings.text, settings.length, settings.windows).ids)
    say("rate of matrix products ...")
    rate = measured_rate(facts, settings.dtype, torch.get_num_threads())
    operations = least_operations(facts, windows * settings.length, settings.length)
    parts = [Part(name=name, seconds=watch.seconds[name], operations=operations.get(name, 0.0)) for name in PARTS]
    seconds = sum(part.seconds for part in parts)
    return Report(
        settings=settings,
        machine=environment.provenance(),
        tokens=windows * settings.length,
        rate=rate,
        parts=tuple(parts),
        seconds=seconds,
        share=sum(part.operations for part in parts) / seconds / rate,
    )


def _silent(stage: str, done: int = 0, total: int = 0) -> None:
    """Nobody asks for progress."""


def least_operations(facts: ModelFacts, tokens: int, length: int) -> dict[str, float]:
    """Floating-point operations of the parts, two per multiplication, for tokens read in windows of `length`."""
    head = facts.config["vocab_size"] * facts.config["hidden_size"]
    products, attention = decoder_operations(facts, tokens, length)
    return {
        "products": products,
        "attention": attention,
        "head": 2 * 2.0 * (tokens - tokens // length) * head,  # a window's last token predicts nothing
    }


def _job_text(settings: Settings) -> str:
    return yaml.safe_dump(
        {
            "models": [settings.model],
            "methods": ["rtn"],
            "bits": ["w4"],
            "group_sizes": [-1],
            "dtype": settings.dtype,
            "evaluate": [
                {"perplexity": {"text": settings.text, "length": settings.length, "windows": settings.windows}}
            ],
            "resources": {"gpus": int(torch.cuda.is_available())},
        }
    )
