"""Kernel: the share of the elements at linear inputs that their quantizers make zero, layer by layer.

The diagnosis of CrossQuant (arXiv 2410.07505): its authors find that activation quantization costs accuracy where this
share is large. Beside the cell's own quantizers two plain ones are applied to the same inputs, those of the model as it
stands (smoothed, rotated, with quantized weights), at `bits`, by default the width of the cell's linear inputs:

    installed     what the cell quantizes its inputs with; a cell that leaves inputs alone has only zeros
    per_token     round to nearest with one symmetric grid per token
    per_tensor    one symmetric grid per sequence

Per quantizer: `kernel*`, zero afterwards, of all elements, and `kernel_nonzero*`, of the elements that were not zero
before: by definition those belong to the kernel, and ReLU makes many. Every linear layer counts its own input, q, k and
v each the same one. Metrics are totals over layers, weighted by elements; the ledger has a row per layer and quantizer
(`cluster` the layer's module, `task` the quantizer), so that other averages can be taken. The paper's own averaging and
text are not confirmed. Nothing says how far the share would move on other text: it has no standard error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from qfarm.errors import NonFinite
from qfarm.evaluate import Result, TextEvaluator
from qfarm.layers.kernel import Kernel as Counts
from qfarm.layers.kernel import PerTensor, kernel
from qfarm.layers.linear import by_sequence
from qfarm.layers.rtn import Quantizer, Symmetric
from qfarm.models.load import LoadedModel
from qfarm.recipe import STRICT
from qfarm.record import Document, Metric
from qfarm.scheme import UNTOUCHED, parse_scheme
from qfarm.text import public_name, reference

if TYPE_CHECKING:
    from qfarm.worker import Session

BATCH_TOKENS = 2048  # per forward pass; quantizers see one sequence at a time, so it changes no count by itself
USUAL_WINDOWS = 150  # for estimates, where a length is not known yet
USUAL_BITS = 8  # of the plain quantizers, in cells that leave linear inputs alone
QUANTIZERS = {"installed": "", "per_token": "_per_token", "per_tensor": "_per_tensor"}  # endings of their metrics

Found = dict[str, dict[str, Counts]]  # by module, by quantizer


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Kernel(TextEvaluator):
    runs = ("fake",)  # it looks at quantizers of inputs, not at products

    text: Annotated[str, BeforeValidator(reference)] = Field(description="as of perplexity")
    length: int = Field(2048, ge=2, description="tokens per window")
    windows: int | None = Field(None, ge=1, description="the first so many windows; default: all")
    bits: int | None = Field(None, ge=2, le=15, description="of the plain quantizers; default: the cell's, 8 at 16")

    @property
    def label(self) -> str:
        words = ["kernel", public_name(self.text), str(self.length)]
        words += [f"x{self.windows}"] if self.windows else []
        return " ".join(words + ([f"{self.bits} bits"] if self.bits else []))

    def tokens(self) -> int:
        return self.length * (self.windows or USUAL_WINDOWS)

    def run(self, session: Session, progress: Callable[[int, int], None]) -> Result:
        ids = session.windows(self.text, self.length, self.windows).ids
        found: Found = {}
        with session.loaded.temporary():
            count_inputs(session.loaded, self._bits(session), found)
            done = 0
            for batch in torch.split(ids, session.batch(BATCH_TOKENS, self.length)):
                states = session.loaded.body(batch.to(session.loaded.device))
                if not bool(torch.isfinite(states).all()):
                    raise NonFinite(f"{self.label}: a hidden state of windows {done} and on is not finite")
                done += len(batch)
                progress(done, len(ids))
        documents = tuple(_document(*key) for key in _rows(found))
        return Result(metrics=tuple(_metrics(found, len(ids))), documents=documents)

    def _bits(self, session: Session) -> int:
        if self.bits is not None:
            return self.bits
        own = parse_scheme(session.cell.scheme).linear_in
        return USUAL_BITS if own == UNTOUCHED else own


EVALUATOR = Kernel


def count_inputs(loaded: LoadedModel, bits: int, found: Found) -> None:
    """Have the kernels at all linear inputs added up in `found`, until the model is restored."""
    for block in range(len(loaded.blocks)):
        per_tensor = by_sequence(loaded, block, PerTensor(bits=bits))
        for role, linear in loaded.linears(block).items():
            quantizers = {
                "installed": getattr(linear, "quantize", None),
                "per_token": Symmetric(bits=bits),
                "per_tensor": per_tensor,
            }
            counts = found[loaded.module_name(block, role)] = dict.fromkeys(quantizers, Counts())
            # Pre-hooks run in order, so transforms of the input come first: this is what the quantizer will see.
            hook = functools.partial(_count, quantizers, counts)
            loaded.on_restore(linear.register_forward_pre_hook(hook).remove)


def _count(
    quantizers: Mapping[str, Quantizer | None], counts: dict[str, Counts], module: nn.Module, args: tuple[Tensor, ...]
) -> None:
    for name, quantize in quantizers.items():
        counts[name] += kernel(args[0], quantize)


def _rows(found: Found) -> Iterator[tuple[str, str, Counts]]:
    for module, counts in found.items():
        for name, count in counts.items():
            yield module, name, count


def _document(module: str, quantizer: str, count: Counts) -> Document:
    return Document(
        document=f"{module} {quantizer}",
        cluster=module,
        task=quantizer,
        tokens=0,
        elements=count.elements,
        zeroed=count.zeroed,
        zeros=count.zeros,
    )


def _metrics(found: Found, windows: int) -> Iterator[Metric]:
    totals = {name: sum((counts[name] for counts in found.values()), Counts()) for name in QUANTIZERS}
    for name, ending in QUANTIZERS.items():
        for metric, value in (("kernel", totals[name].share), ("kernel_nonzero", totals[name].share_of_nonzero)):
            yield Metric(metric=metric + ending, value=value, unit="fraction of elements", better="lower", n=windows)
