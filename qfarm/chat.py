"""Chat: talk to a cell. Its model is loaded and quantized again in this process, as a worker would.

Prompts are the tokenizer's chat template, with exactly one beginning-of-sequence token where the tokenizer puts one.
Answers are greedy and end at the model's end tokens; the prompt is read in full precision and stored quantized, as
generation does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import torch

from qfarm.errors import InvalidInput
from qfarm.evaluate.generation import greedy_steps
from qfarm.matrix import Cell
from qfarm.models.load import LoadedModel
from qfarm.record import CellRow
from qfarm.report.find import find
from qfarm.report.rows import records
from qfarm.store import Store
from qfarm.worker import Progress, Session, quantize_cell

SYSTEM = "You are a helpful assistant."
Message = Mapping[str, str]  # role, content
_UNFINISHED = "�"  # what a decoder makes of the first bytes of a character


def stored_cell(store: Store, text: str) -> Cell:
    """The cell of a store with that label or beginning of an id. Raises InvalidInput."""
    cell_id = find(store, text)
    rows = records(store, "cells", CellRow, [cell_id])
    if not rows:
        raise InvalidInput(f'"{text}" never finished in this store; name it in its job: --job JOB')
    spec = json.loads(rows[0].spec)
    return Cell(**spec | {"methods": tuple(spec["methods"])})


def open_cell(cell: Cell, data: str | None, report: Progress) -> Session:
    """Load and quantize a cell. Raises InvalidInput for a tokenizer without a chat template."""
    session = Session(data)
    report("load", 0, 0)
    session.begin(cell)
    if not session.loaded.tokenizer.chat_template:
        raise InvalidInput(f"{cell.model} has no chat template")
    quantize_cell(session, lambda done, total: report("quantize", done, total))
    return session


def opening(tokenizer: Any) -> list[Message]:
    """What stands before the first question: a system message, or nothing where the template takes none (Mistral's)."""
    system = {"role": "system", "content": SYSTEM}
    try:
        prompt_ids(tokenizer, [system, {"role": "user", "content": "?"}])
    except jinja2.TemplateError:
        return []
    return [system]


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the answer begins.

    Templates usually write BOS themselves, and the tokenizer would add another one: here it stands once if either does.
    """
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    begin = tokenizer.bos_token_id
    if begin is None:
        return ids
    written = 0
    while written < len(ids) and ids[written] == begin:
        written += 1
    added = tokenizer.encode("")[:1] == [begin]
    return [begin] * (written > 0 or added) + ids[written:]


@torch.no_grad()
def answer(session: Session, messages: Sequence[Message], new_tokens: int) -> Iterator[str]:
    """The answer, piece by piece as it is made. Raises InvalidInput for a conversation that is too long."""
    loaded = session.loaded
    ids = prompt_ids(loaded.tokenizer, messages)
    most = getattr(loaded.model.config, "max_position_embeddings", None)
    if most is not None and len(ids) + new_tokens > most:
        raise InvalidInput(
            f"{len(ids)} tokens of conversation and {new_tokens} new ones: {session.cell.model} reads at most {most}"
        )
    made: list[int] = []
    shown = ""
    with loaded.reading_cache("full"):
        for step in greedy_steps(loaded, torch.tensor([ids])):
            if int(step) in end_tokens(loaded):
                break
            made.append(int(step))
            text = loaded.tokenizer.decode(made, skip_special_tokens=True)
            if not text.endswith(_UNFINISHED):
                yield text[len(shown) :]
                shown = text
            if len(made) == new_tokens:
                break


def end_tokens(loaded: LoadedModel) -> set[int]:
    """Tokens that end an answer: the checkpoint's, and the tokenizer's."""
    given = loaded.model.generation_config.eos_token_id
    ends = given if isinstance(given, list) else [given]
    return {end for end in [*ends, loaded.tokenizer.eos_token_id] if end is not None}
