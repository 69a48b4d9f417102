"""Model: a session's loaded model as a language model of lm-eval, and the one place where it is called.

Log-likelihoods differ from lm-eval's own wrapper in three ways: items share the pass over what their choices have in
common (see batches), the output head is applied to the scored positions only, and logits are upcast to float32 before
the log-softmax, where lm-eval stays in the model's dtype. Truncation and the splitting of context and continuation
into tokens are lm-eval's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, resolve_max_length
from torch import Tensor
from transformers import DynamicCache

from qfarm import divergence
from qfarm.errors import NonFinite
from qfarm.models.load import LoadedModel
from qfarm.models.past import cache_keyword
from qfarm.tasks.batches import Bundle, Request, batched, bundles, make_request
from qfarm.tasks.generate import Generated, Progress, Prompt, generate

# Elements of one chunk of logits; unlike those of perplexity, chunks lie in new memory each time.
LOGIT_BUDGET = {"cpu": 1 << 24, "cuda": 1 << 27}
GENERATION_FACTOR = 8  # times as many tokens in the cache as one pass reads: decoding reads one token a row


class SessionLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's interface to a loaded model.

    `whole`: every sequence is read whole, and only together with others of its length, as quantizers need it that look
    across tokens and caches that hand back less than was written. Otherwise common prefixes are read once, through a
    KV cache, and shorter sequences are padded.
    """

    def __init__(self, loaded: LoadedModel, batch_tokens: int, shrink: int = 0, whole: bool = False) -> None:
        super().__init__()
        self.loaded, self.tokenizer, self.whole = loaded, loaded.tokenizer, whole
        self.batch_tokens = max(1, batch_tokens >> shrink)
        vocabulary = loaded.head.weight.shape[0]
        self.logit_rows = max(16, (LOGIT_BUDGET[loaded.device.type] >> shrink) // vocabulary)
        self.max_length = resolve_max_length(loaded.model.config, self.tokenizer)

    # -- tokens --

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id  # type: ignore[no-any-return]

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            options = {"add_special_tokens": False}
        return self.tokenizer.encode(string, **options)  # type: ignore[no-any-return]

    def encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context and of what follows it; an empty context is the model's first token."""
        if context:
            return self._encode_pair(context, continuation)  # type: ignore[no-any-return]
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return (ids[:1], ids[1:]) if ids[:1] == [self.prefix_token_id] else ([self.prefix_token_id], ids)

    def windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """Disjoint (context, continuation) windows over a whole text."""
        rolling = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [utils.make_disjoint_window(window) for window in rolling]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(  # type: ignore[no-any-return]
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # -- lm-eval's three requests --

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._loglikelihood_tokens([(request.args, *self.encode(*request.args)) for request in requests])

    def _loglikelihood_tokens(self, requests: list[Any], **_: object) -> list[tuple[float, bool]]:
        """Requests with one context count as one item."""
        items: dict[Any, int] = {}
        made = [
            make_request(items.setdefault(tuple(context), len(items)), context, continuation, self.max_length)
            for _, context, continuation in requests
        ]
        return self.score(made, bundles(made, not self.whole))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows = [(index, window) for index, r in enumerate(requests) for window in self.windows(*r.args)]
        made = [make_request(index, *window, self.max_length) for index, window in windows]
        totals = [0.0] * len(requests)
        for request, (value, _) in zip(made, self.score(made, bundles(made, not self.whole)), strict=True):
            totals[request.item] += value
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        prompts = [(self.tok_encode(context), options) for context, options in (request.args for request in requests)]
        return [made.text for made in self.generate(prompts)]

    # -- the model --

    def _hidden(self, ids: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        """Final hidden states [rows, length, hidden]. Every log-likelihood passes here."""
        body = self.loaded.model.base_model
        output = body(input_ids=ids, attention_mask=mask, use_cache=cache is not None, **{cache_keyword(body): cache})
        return output.last_hidden_state  # type: ignore[no-any-return]

    @torch.no_grad()
    def score(
        self, requests: Sequence[Request], found: Sequence[Bundle], progress: Progress = lambda done, total: None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each request, and whether greedy decoding would give it.

        Raises NonFinite with the index of the first item whose log-likelihood is not finite.
        """
        total = np.zeros(len(requests))
        greedy = np.ones(len(requests), dtype=bool)
        left = np.bincount([request.item for request in requests])  # requests of each item still to be scored
        items, done = int((left > 0).sum()), 0
        for batch in batched(found, self.batch_tokens, pad=not self.whole):
            for owners, states, targets in self._states(requests, batch):
                for index, value, hit in self._score_positions(owners, states, targets):
                    np.add.at(total, index, value)
                    np.logical_and.at(greedy, index, hit)
            scored = [index for bundle in batch for index in bundle.requests]
            for index in scored:
                if not np.isfinite(total[index]):
                    raise NonFinite(f"the log-likelihood of item {requests[index].item} is not finite")
            np.subtract.at(left, [requests[index].item for index in scored], 1)
            done += sum(left[item] == 0 for item in {requests[index].item for index in scored})
            progress(int(done), items)
        return [(float(value), bool(hit)) for value, hit in zip(total, greedy, strict=True)]

    def _states(
        self, requests: Sequence[Request], batch: Sequence[Bundle]
    ) -> Iterator[tuple[list[int], Tensor, list[int]]]:
        """(request of each scored position, hidden states [positions, hidden], targets), for prefixes, then tails."""
        prefixes = [bundle.prefix for bundle in batch]
        tails = [(number, tail) for number, bundle in enumerate(batch) for tail in bundle.tails]
        cache = DynamicCache(config=self.loaded.model.config) if tails else None
        ids, mask = self._padded(prefixes)
        hidden = self._hidden(ids, mask, cache)
        yield from _scored(requests, hidden, _prefix_positions(requests, batch))
        if not tails:
            return
        assert cache is not None
        cache.reorder_cache(torch.tensor([number for number, _ in tails], device=hidden.device))
        ids, tail_mask = self._padded([tail for _, tail in tails])
        before = tail_mask.new_ones(len(tails), len(prefixes[0]))
        hidden = self._hidden(ids, torch.cat([before, tail_mask], dim=1), cache)
        yield from _scored(requests, hidden, _tail_positions(requests, batch))

    def _padded(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """ids and mask [rows, length], padded on the right."""
        length = max(map(len, sequences))
        ids = torch.zeros(len(sequences), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
            mask[row, : len(sequence)] = 1
        return ids.to(self.loaded.device), mask.to(self.loaded.device)

    def _score_positions(
        self, owners: Sequence[int], states: Tensor, targets: Sequence[int]
    ) -> Iterator[tuple[Any, Any, Any]]:
        """(request, log-probability, greedy) of positions, chunk by chunk, so that logits stay small."""
        index = np.asarray(owners)
        wanted = torch.tensor(targets, device=states.device)
        for start in range(0, len(owners), self.logit_rows):
            part = slice(start, start + self.logit_rows)
            found = divergence.score(self.loaded.head(states[part]), wanted[part], None)
            yield index[part], -found["loss"].double().cpu().numpy(), found["correct"].bool().cpu().numpy()

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], progress: Progress = lambda done, total: None) -> list[Generated]:
        """Greedy continuations of token ids under lm-eval's generation options. Raises InvalidInput."""
        rows = GENERATION_FACTOR * self.batch_tokens
        return generate(self.loaded, prompts, self.max_length, rows, progress, pad=not self.whole)


Position = tuple[int, int, int, int]  # request, row, column, target


def _prefix_positions(requests: Sequence[Request], batch: Sequence[Bundle]) -> list[Position]:
    return [
        (index, row, column, requests[index].targets[column - requests[index].first])
        for row, bundle in enumerate(batch)
        for index in bundle.requests
        for column in range(requests[index].first, min(len(bundle.prefix), len(requests[index].inputs)))
    ]


def _tail_positions(requests: Sequence[Request], batch: Sequence[Bundle]) -> list[Position]:
    found, offset = [], 0
    for bundle in batch:
        start = len(bundle.prefix)
        for index, tail in zip(bundle.requests, bundle.tail_of, strict=True):
            request = requests[index]
            if tail is not None:
                columns = range(max(request.first, start), len(request.inputs))
                found += [(index, offset + tail, c - start, request.targets[c - request.first]) for c in columns]
        offset += len(bundle.tails)
    return found


def _scored(
    requests: Sequence[Request], hidden: Tensor, positions: Sequence[Position]
) -> Iterator[tuple[list[int], Tensor, list[int]]]:
    if positions:
        owners, rows, columns, targets = zip(*positions, strict=True)
        place = torch.tensor([rows, columns], device=hidden.device)
        yield list(owners), hidden[place[0], place[1]], list(targets)
