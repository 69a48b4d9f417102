"""SpinQuant: QuaRot's rotations of hidden states and values, learned so that the quantized model predicts text well.

    R1 [d, d]   hidden states, one for the model; fused        R2 [h, h]   values, one per layer, all its heads; fused
    input of down times a Hadamard matrix, online              queries and keys likewise, after the rotary embedding

R1 and R2 start as random Hadamard matrices. Each step reads `batch` windows of calibration text with the rotations
fused on the fly and everything that the scheme names rounded, except weights unless `round_weights`; the loss is the
next-token cross-entropy, gradients pass rounding unchanged (straight-through), and R moves along the orthogonal group:

    W = skew part of -G^T R,  a = min(rate, 1 / ||W||_1),  R <- Cayley transform of a W times R    (qfarm.cayley)

rate falls from `rate` to zero along a cosine. Learn with weights as they are where GPTQ follows (`spinquant+gptq`),
with rounded ones for `spinquant` alone, which rounds to nearest (arXiv 2405.16406, section 3 and appendix).

    linear inputs   asymmetric through zero, per token; the input of o per head, its range not forced through zero
    keys, values    asymmetric per token and head

Stored: as QuaRot. Learning holds the whole model's forward and backward pass: models that fit the machine only.

Published W4A4KV4, WikiText-2, Llama-2 7B / 13B / 70B, Llama-3 8B / 70B: 5.9 / 5.3 / 3.8 / 7.3 / 5.5; reruns in
FlatQuant's README 5.96 / 5.24 / 3.70 / 7.39 / 6.21, from the released code up to 6.5 and 8.0. 100 steps of 8 windows of
2048 tokens of WikiText-2.

Differences from facebookresearch/SpinQuant: embeddings are not centred where norms are RMS norms; the bias of v is
rotated; the Cayley transform is solved exactly and rotations are made orthogonal once more before the fuse; while
learning weights are fused in float32, and rounded ones are symmetric per row without a searched range, whatever grid
the job has; one cache grid per head; the text is the job's, its windows in turn, again from the first where the steps
need more. The variant without online rotations is not offered.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from qfarm.cayley import nearest_orthogonal, step, straight_through
from qfarm.errors import NonFinite, QfarmError
from qfarm.fuse import Bases, Fusion
from qfarm.hadamard import Hadamard, random_hadamard
from qfarm.layers.attention import add_to_sites
from qfarm.layers.clipped import ClippedAsymmetric
from qfarm.layers.linear import head_rows, quantize_input
from qfarm.layers.rtn import Symmetric
from qfarm.layers.sites import Observed, Place
from qfarm.models.load import LoadedModel
from qfarm.recipe import STRICT
from qfarm.rotation import Rotation, hadamard_turn, online_notes, turn_keys_by_hadamard
from qfarm.scheme import UNTOUCHED, Scheme


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SpinQuant(Rotation):
    source = "Liu et al., ICLR 2025, arXiv 2405.16406; github.com/facebookresearch/SpinQuant"

    steps: int = Field(100, ge=0, description="of descent; 0: random Hadamard matrices as they are drawn")
    batch: int = Field(8, ge=1, description="calibration windows per step")
    rate: float = Field(1.5, gt=0, description="longest step, where 1 / ||W||_1 is not shorter still")
    round_weights: bool = Field(False, description="round weights while learning, for rounding to nearest")

    @property
    def needs_text(self) -> bool:
        return self.steps > 0

    def transform(self, loaded: LoadedModel, observed: Observed, seed: int) -> list[str]:
        return self.learn(loaded, observed, seed, None, Scheme())

    def learn(
        self, loaded: LoadedModel, observed: Observed, seed: int, windows: Tensor | None, scheme: Scheme
    ) -> list[str]:
        linears, width, blocks = loaded.linears(0), loaded.head_dim, len(loaded.blocks)
        draw = torch.Generator().manual_seed(seed)
        hidden = linears["q"].in_features
        stream = random_hadamard(hidden, draw)
        values = torch.stack([random_hadamard(width, draw) for _ in range(blocks)])
        heads, down = linears["v"].out_features // width, Hadamard(linears["down"].in_features)
        made = Bases(stream=stream, down=down)
        notes = [f"hidden states start at: {Hadamard(hidden).how}", *online_notes(loaded, made)]
        fusion = Fusion(loaded)
        if self.steps:
            if windows is None:
                raise QfarmError("spinquant learns from calibration text, and got none")
            descent = Descent(self, fusion, scheme, down, stream, values)
            losses = descent.run(windows)
            stream, values = nearest_orthogonal(descent.stream), nearest_orthogonal(descent.values)
            notes.append(f"loss of the quantized model over {self.steps} steps: {losses[0]:.4g} .. {losses[-1]:.4g}")
        fusion.install(dataclasses.replace(made, stream=stream, values=[v.expand(heads, -1, -1) for v in values]))
        return [*notes, turn_keys_by_hadamard(loaded)]


METHOD = SpinQuant


class Descent:
    """Cayley SGD on the rotations of an open model."""

    def __init__(
        self, method: SpinQuant, fusion: Fusion, scheme: Scheme, down: Hadamard, stream: Tensor, values: Tensor
    ) -> None:
        self.method, self.fusion, self.loaded, self.scheme, self.down = method, fusion, fusion.loaded, scheme, down
        device = self.loaded.device
        self.stream = stream.float().to(device)  # [d, d]
        self.values = values.float().to(device)  # [blocks, h, h]
        names = {id(module): name for name, module in self.loaded.model.named_modules()}
        self.names = {id(module): names[id(module)] for module, _, _ in fusion.parameters(Bases())}
        roles = {id(layer.module): layer.role for layer in fusion.layers if layer.block >= 0}
        widths = {module: scheme.weight_bits(role) for module, role in roles.items()}
        rounded = {module: bits for module, bits in widths.items() if method.round_weights and bits != UNTOUCHED}
        self.rounding = {module: straight_through(Symmetric(bits=bits)) for module, bits in rounded.items()}

    def run(self, windows: Tensor) -> list[float]:
        """Losses, step by step. Raises NonFinite."""
        losses = []
        with self.loaded.temporary():
            self.install()
            for index, ids in enumerate(self._batches(windows)):
                rate = self.method.rate * (1 + math.cos(math.pi * index / self.method.steps)) / 2
                losses.append(self.descend(ids, rate))
        return losses

    def _batches(self, windows: Tensor) -> Iterator[Tensor]:
        """Windows of each step, in turn."""
        for index in range(self.method.steps):
            chosen = torch.arange(index * self.method.batch, (index + 1) * self.method.batch) % len(windows)
            yield windows[chosen]

    def install(self) -> None:
        """The online rotation, and what the scheme names rounded, with gradients that pass."""
        loaded, width = self.loaded, self.loaded.head_dim
        self.fusion.install_online(Bases(down=self.down))
        for block in range(len(loaded.blocks)):
            if self.scheme.linear_in != UNTOUCHED:
                for role in loaded.architecture.roles:
                    quantize = self.method.quantizer(Place("linear_in", block, role), self.scheme.linear_in, {})
                    rows = head_rows(quantize, width) if role == "o" else quantize
                    quantize_input(loaded, block, role, straight_through(rows))
            if self.scheme.kv_cache != UNTOUCHED:
                grid = ClippedAsymmetric(bits=self.scheme.kv_cache, through_zero=False)
                turned = hadamard_turn(loaded).around(grid)
                add_to_sites(loaded, block, k=straight_through(turned), v=straight_through(grid))

    def descend(self, ids: Tensor, rate: float) -> float:
        """One step on windows [batch, length]; returns their loss before it."""
        stream, values = (tensor.detach().requires_grad_() for tensor in (self.stream, self.values))
        total = 0.0
        for window in ids:
            loss = self.loss(window[None].to(self.loaded.device), stream, values) / len(ids)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if not math.isfinite(total):
            raise NonFinite("the loss of the quantized model is not finite")
        assert stream.grad is not None and values.grad is not None
        self.stream, self.values = step(self.stream, stream.grad, rate), step(self.values, values.grad, rate)
        return total

    def loss(self, ids: Tensor, stream: Tensor, values: Tensor) -> Tensor:
        """Next-token cross-entropy of token ids [1, length] under rotations, differentiable in both."""
        logits = self.logits(ids, stream, values)[0, :-1].float()
        return nn.functional.cross_entropy(logits, ids[0, 1:])

    def logits(self, ids: Tensor, stream: Tensor, values: Tensor) -> Tensor:
        """[batch, length, vocabulary], of the model with rotations fused on the fly."""
        loaded, width = self.loaded, self.loaded.head_dim
        heads = loaded.linears(0)["v"].out_features // width
        bases = Bases(stream=stream, values=[v.expand(heads, -1, -1) for v in values], down=self.down)
        parameters = {}
        for module, name, value in self.fusion.parameters(bases, torch.float32):
            rounding = self.rounding.get(id(module)) if name == "weight" else None
            parameters[f"{self.names[id(module)]}.{name}"] = (rounding(value) if rounding else value).to(loaded.dtype)
        keywords: dict[str, Any] = {"use_cache": False}
        out = torch.func.functional_call(loaded.model, parameters, (ids,), keywords, tie_weights=False)
        found: Tensor = out.logits
        return found
