"""Made: a stored cell quantized once more, in this process, by the code and the seed that it was measured with.

That it is the same one is shown, not assumed: every layer's stored bytes and errors are compared with the store's row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qfarm.calibrate import LayerResult
from qfarm.errors import NotVerified, Unsupported
from qfarm.export.stored import StoredCell
from qfarm.layers.install import install_sites
from qfarm.layers.sites import Observed
from qfarm.models.load import LoadedModel
from qfarm.quantized import QuantizedWeight, apart
from qfarm.recipe import Recipe
from qfarm.record import LayerRow
from qfarm.scheme import parse_scheme
from qfarm.worker import Session, quantize_linears

SAME = 1e-6  # relative: an error that differs by less may be another order of summing; one more code moves it further
TEXT = (
    "A quantized model is worth what it can be shown to be worth. The committee met on 14 March 1987, heard three "
    "witnesses and adjourned; for i in range(10): total += weights[i] * 0.5"
)
TOKENS = 48  # of the text that is read with both models

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """The cell in memory. Its model has the cell's transforms and weights; quantizers at other sites are installed on
    demand, since a checkpoint cannot hold most of them."""

    stored: StoredCell
    session: Session
    quantized: Mapping[str, QuantizedWeight]  # by module
    results: Mapping[str, LayerResult]  # by module, those left alone included
    observed: Observed
    notes: tuple[str, ...]

    @property
    def loaded(self) -> LoadedModel:
        return self.session.loaded

    @property
    def tokens(self) -> Tensor:
        """int64 [1, n]: the text that is read with the cell and with what was exported."""
        ids = self.loaded.tokenizer(TEXT, return_tensors="pt")["input_ids"]
        return ids[:, :TOKENS].to(self.loaded.device)  # type: ignore[no-any-return]

    @torch.no_grad()
    def logits(self) -> Tensor:
        """[n, vocabulary] float32 of the model as it stands."""
        return self.loaded.model(input_ids=self.tokens, use_cache=False).logits[0].float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def cell_logits(self) -> Tensor:
        """The same of the whole cell: with what it quantizes beside the weights."""
        recipe, scheme = Recipe.from_specs(self.stored.cell.methods), parse_scheme(self.stored.cell.scheme)
        with self.loaded.temporary():
            install_sites(self.loaded, recipe, scheme, self.observed)
            return self.logits()

    @contextmanager
    def reading_in(self, dtype: torch.dtype) -> Iterator[None]:
        """The model as a reader has it who loads the checkpoint in `dtype` and multiplies codes and scales in it."""
        if dtype == self.loaded.dtype:
            yield
            return
        parameters = [(parameter, parameter.data) for parameter in self.loaded.model.parameters()]
        try:
            # Not the module's `to`: buffers, such as the rotary frequencies, have dtypes of their own.
            for parameter, data in parameters:
                parameter.data = data.to(dtype)
            with self.loaded.temporary():
                for module, quantized in self.quantized.items():
                    self.loaded.replace_weight(self.loaded.model.get_submodule(module), quantized.dequantize())
                yield
        finally:
            for parameter, data in parameters:
                parameter.data = data


def make(stored: StoredCell, data: str | None, check: Callable[[str, QuantizedWeight], None], say: Say) -> Made:
    """Quantize the cell again. `check` sees each layer as it is made and may refuse it.

    Raises InvalidInput when model, tokenizer or text are not those that were measured, NotVerified when the layers are
    not, and Unsupported when something runs in the forward pass that no checkpoint holds.
    """
    session = Session(data)
    notes = list(stored.notes)
    threads = stored.provenance.get("threads")
    if isinstance(threads, int) and threads != torch.get_num_threads():
        torch.set_num_threads(threads)  # the order in which sums are taken depends on it
    if stored.on_gpu and session.device.type != "cuda":
        notes.append(f"measured on {stored.provenance['gpu']}, quantized again on a CPU")
    say(f"loading {stored.cell.model}")
    session.begin(stored.cell)
    quantized: dict[str, QuantizedWeight] = {}

    def keep(module: str, layer: QuantizedWeight) -> None:
        check(module, layer)
        quantized[module] = layer

    say(f"quantizing {stored.cell.label} again")
    results, observed = quantize_linears(session, lambda done, total: say(f"block {done} of {total}"), keep)
    _refuse_online(session.loaded, quantized)
    notes += _compare(stored.layers, {result.module: result for result in results})
    return Made(
        stored=stored,
        session=session,
        quantized=quantized,
        results={result.module: result for result in results},
        observed=observed,
        notes=tuple(notes),
    )


def _refuse_online(loaded: LoadedModel, quantized: Mapping[str, QuantizedWeight]) -> None:
    """Weights alone are not the model where something else changes its forward pass."""
    for module, layer in quantized.items():
        if apart(layer)[1] is not None:
            raise Unsupported(f"{module}: its low-rank branch reads unquantized inputs, which no checkpoint holds")
    for name, module in loaded.model.named_modules():
        if _runs_more(module):
            raise Unsupported(
                f"{name or 'the model'}: something of {type(module).__name__} is transformed while it runs (an online "
                "part of the recipe); no checkpoint format holds that, and its weights alone would be another model"
            )


def _runs_more(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module))


def _compare(stored: Mapping[str, LayerRow], made: Mapping[str, LayerResult]) -> list[str]:
    """Raises NotVerified when a layer is not the one that was measured."""
    if set(stored) != set(made):
        raise NotVerified(f"the store lists {len(stored)} layers of this cell, quantizing again made {len(made)}")
    largest = 0.0
    for module, row in stored.items():
        one = made[module]
        facts = [(getattr(row, name), getattr(one, name)) for name in ("solver", "bits", "group_size", "stored_bytes")]
        errors = [(getattr(row, name), getattr(one, name)) for name in ("weight_error", "output_error")]
        apart_by = max((_relative(*pair) for pair in errors), default=0.0)
        if any(then != now for then, now in facts) or apart_by > SAME:
            raise NotVerified(
                f"{module}: quantized again it is not what was measured: (stored, now) {facts[0]}, {facts[3]} bytes, "
                f"errors {errors}; another machine or number of threads? Submit the job again on this one"
            )
        largest = max(largest, apart_by)
    return [f"errors of layers differ from the store's by up to {largest:.1e} of their size"] if largest else []


def _relative(then: Any, now: Any) -> float:
    if then is None or now is None:
        return 0.0 if then is now else math.inf
    return abs(then - now) / max(abs(then), abs(now)) if then != now else 0.0
