"""Generate: greedy continuations until a stop string.

Greedy, and nothing else of the checkpoint's generation settings but its end tokens: no penalties, no sampling. Prompts
are padded on the left and masked, as transformers' `generate` expects; stop strings, limits and truncation on the left
are lm-eval's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from qfarm.errors import InvalidInput
from qfarm.models.load import LoadedModel

Progress = Callable[[int, int], None]  # items done, items in all
Prompt = tuple[Sequence[int], Mapping[str, Any]]  # token ids, lm-eval's generation options

MAX_GENERATED = 256  # tokens, where a task does not say; lm-eval's default
GREEDY = {"do_sample", "temperature", "top_p", "top_k", "num_beams"}  # without sampling these say nothing


@dataclasses.dataclass(frozen=True)
class Generated:
    text: str  # up to the first stop string
    tokens: int  # of that text, encoded again


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    most: int  # generated tokens
    stops: tuple[str, ...]


def generate(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    max_length: int,
    budget: int,
    progress: Progress,
    pad: bool = True,
) -> list[Generated]:
    """One continuation per prompt; `budget` tokens of prompts and answers at a time, at least one prompt.

    Without `pad` only prompts of one length are continued together. Raises InvalidInput for options that ask for
    anything but greedy decoding.
    """
    made: dict[int, Generated] = {}
    groups: dict[str, list[int]] = {}
    for index, (_, options) in enumerate(prompts):
        groups.setdefault(repr(sorted(options.items())), []).append(index)
    for members in groups.values():
        rules = read_rules(prompts[members[0]][1], loaded.tokenizer, max_length)
        cut = {index: list(prompts[index][0])[-(max_length - rules.most) :] for index in members}
        order = sorted(members, key=lambda index: -len(cut[index]))
        while order:
            rows = max(1, budget // (len(cut[order[0]]) + rules.most))
            if not pad:
                rows = min(rows, sum(len(cut[index]) == len(cut[order[0]]) for index in order))
            batch, order = order[:rows], order[rows:]
            made |= zip(batch, _generate_batch(loaded, [cut[index] for index in batch], rules), strict=True)
            progress(len(made), len(prompts))
    return [made[index] for index in range(len(prompts))]


def read_rules(options: Mapping[str, Any], tokenizer: Any, max_length: int) -> Rules:
    """lm-eval's generation options. Raises InvalidInput for what is not greedy or does not fit the model."""
    given = dict(normalize_gen_kwargs(dict(options), MAX_GENERATED))
    if given["do_sample"] or int(given.get("num_beams") or 1) > 1:
        raise InvalidInput(f"the task asks for sampling or beams ({dict(options)}); only greedy decoding is supported")
    most = int(given.pop("max_gen_toks"))
    stops = handle_stop_sequences(
        given.pop("until"), eos=tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=False)
    )
    if unknown := sorted(set(given) - GREEDY):
        raise InvalidInput(f"generation options that are not supported: {', '.join(unknown)}")
    if most >= max_length:
        raise InvalidInput(f"the task generates {most} tokens, but the model reads at most {max_length}")
    return Rules(most=most, stops=tuple(stop for stop in stops if stop))


def _generate_batch(loaded: LoadedModel, prompts: Sequence[list[int]], rules: Rules) -> list[Generated]:
    tokenizer, length = loaded.tokenizer, max(map(len, prompts))
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.full((len(prompts), length), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    ends = loaded.model.generation_config.eos_token_id
    output = loaded.model.generate(
        input_ids=ids.to(loaded.device),
        attention_mask=mask.to(loaded.device),
        generation_config=GenerationConfig(
            max_new_tokens=rules.most,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=tokenizer.eos_token_id if ends is None else ends,
            pad_token_id=padding,
        ),
        stopping_criteria=StoppingCriteriaList([StopStrings(tokenizer, rules.stops, length)]),
    )
    texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
    cut = [postprocess_generated_text(text, list(rules.stops), None) for text in texts]
    return [Generated(text, len(tokenizer.encode(text, add_special_tokens=False))) for text in cut]


class StopStrings(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """A row is done as soon as what it generated holds a stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], start: int) -> None:
        self.tokenizer, self.stops, self.start = tokenizer, stops, start
        self.tail = max(map(len, stops), default=0) + 2  # tokens: a token may hold a single character
        self.done: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        if self.done is None:
            self.done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        recent = self.tokenizer.batch_decode(input_ids[:, self.start :][:, -self.tail :])
        found = [any(stop in text for stop in self.stops) for text in recent]
        self.done |= torch.tensor(found, device=input_ids.device)
        return self.done
