"""Packed run: linear layers that multiply from packed codes, put in and out of a quantized model.

Everything else stays: hooks and online rotations, low-rank branches, quantizers of keys and values. The KV cache holds
packed codes in either run; where there are kernels for them, attention of one new token reads them as they are
(`qfarm.layers.packed_attention`), else dequantized. A layer in a packed run has no floating-point weight, so that
nothing can use it by mistake; it comes back with the simulation.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from qfarm.errors import InvalidInput
from qfarm.layers import packed_attention
from qfarm.layers.linear import Branch, Multiplier, QuantLinear, as_given
from qfarm.layers.packed_attention import PackedAttention
from qfarm.layers.products import Product, Sharing, product_of, refuse_device
from qfarm.models.load import LoadedModel
from qfarm.quantized import QuantizedWeight


class PackedLinear(nn.Linear):
    """y = product(x) + b, plus a branch of x where there is one. x [..., in] with any leading shape."""

    product: Product
    branch: Branch | None

    @staticmethod
    def around(linear: nn.Linear, product: Product) -> PackedLinear:
        """A layer with the hooks and the bias of `linear`, and without its weight."""
        made = PackedLinear.__new__(PackedLinear)
        made.__dict__.update(linear.__dict__)
        nothing = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
        made.__dict__["_parameters"] = dict(linear._parameters) | {"weight": nothing}
        made.__dict__.update(product=product, branch=getattr(linear, "branch", None))
        return made

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        if self.bias is not None:
            y = y + self.bias
        return y if self.branch is None else y + self.branch(x)

    def nbytes(self) -> int:
        """Bytes that it holds, the bias left out."""
        branch = () if self.branch is None else (self.branch.left, self.branch.right)
        return self.product.nbytes() + sum(tensor.numel() * tensor.element_size() for tensor in branch)


class PackedModel:
    """A quantized model's packed layers, made once; `running` puts them in."""

    def __init__(self, loaded: LoadedModel, weights: Mapping[str, QuantizedWeight]) -> None:
        """`weights` by module, as they were handed to `keep` of `quantize_weights`. Raises InvalidInput."""
        refuse_device(loaded.device)
        self.loaded, self._packed = loaded, False
        sharing = Sharing()
        self._simulated: dict[str, nn.Module] = {}
        self.layers: dict[str, PackedLinear] = {}
        for name, weight in weights.items():
            linear = loaded.model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            quantize = linear.quantize if isinstance(linear, QuantLinear) else None
            if isinstance(quantize, Multiplier):
                raise InvalidInput(f"run: packed: {name}: its quantizer multiplies in an arithmetic of its own")
            quantize = None if quantize is as_given else quantize
            product = product_of(weight, quantize, loaded.dtype, sharing, loaded.device)
            self._simulated[name], self.layers[name] = linear, PackedLinear.around(linear, product)
        self._why_dense = packed_attention.refusal(loaded) if loaded.cache_layers else None
        reads = bool(loaded.cache_layers) and self._why_dense is None
        self.attention = PackedAttention(loaded) if reads else None

    @contextlib.contextmanager
    def running(self, packed: bool) -> Iterator[None]:
        """Inside, linear layers are the packed ones, or those of the simulation."""
        before = self._packed
        self._put(packed)
        try:
            yield
        finally:
            self._put(before)

    def _put(self, packed: bool) -> None:
        for name, module in (self.layers if packed else self._simulated).items():
            self.loaded.model.set_submodule(name, module)
        if self.attention is not None:
            self.attention.put(packed)
        self._packed = packed

    def nbytes(self) -> int:
        """Bytes of the quantized layers as they are held here, biases left out."""
        return sum(layer.nbytes() for layer in self.layers.values())

    def notes(self) -> list[str]:
        """Which path how many layers took, and which roles of layer: 'packed: int4 (...): 28 layers (q k v o)'."""
        found: dict[str, list[str]] = collections.defaultdict(list)
        roles = {
            self.loaded.module_name(block, role): role
            for block in range(len(self.loaded.blocks))
            for role in self.loaded.architecture.roles
        }
        for name, layer in self.layers.items():
            found[layer.product.path].append(roles[name])
        notes = [
            f"packed: {path}: {len(names)} of {len(self.layers)} layers ({' '.join(dict.fromkeys(names))})"
            for path, names in found.items()
        ]
        if self.attention is not None:
            notes.append("packed: KV cache: qfarm.kernels read it for one new token, dequantized for several")
        elif self._why_dense is not None:
            notes.append(f"packed: KV cache: read dequantized: {self._why_dense}")
        return notes


def weight_bytes(loaded: LoadedModel, packed: PackedModel | None) -> int:
    """Bytes of all parameters as a packed run holds them; biases, tables, norms and head in the model's dtype."""
    held = packed.nbytes() if packed else 0
    replaced = set(packed.layers) if packed else set()
    kept = {
        id(parameter): parameter.numel() * parameter.element_size()
        for name, parameter in loaded.model.named_parameters()
        if name.removesuffix(".weight") not in replaced
    }
    total: int = held + sum(kept.values())
    return total
