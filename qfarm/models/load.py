"""Load a model and give access to it by roles. All use of transformers' module layout stays in qfarm.models."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from qfarm.errors import Failure, ModelError, NonFinite, classify
from qfarm.layers.sites import Prefill
from qfarm.layers.turn import Turn
from qfarm.models.architecture import Architecture, absorbs_scale, architecture_of
from qfarm.models.mapped import in_dtype
from qfarm.models.past import cache_keyword, returned_cache
from qfarm.models.place import HOST, Placement, move, put, spread
from qfarm.models.reference import ModelFacts, first_line, unreachable

if TYPE_CHECKING:
    from qfarm.layers.cache import QuantizedLayer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class LoadedModel:
    """A causal language model in evaluation mode, whose parts can be replaced and put back."""

    def __init__(self, model: Any, tokenizer: Any, architecture: Architecture) -> None:
        self.model, self.tokenizer, self.architecture = model, tokenizer, architecture
        self.blocks: list[nn.Module] = list(model.get_submodule(architecture.blocks))
        self.prefill: Prefill = "quantized"
        self.chunk: int | None = None
        # Factors folded into the norms before groups of layers, by block and group, for methods that go on from there.
        self.divided: dict[tuple[int, tuple[str, ...]], Tensor] = {}
        # What makes the layers of a quantized KV cache, by block, and whether they store words that kernels read.
        self.cache_layers: tuple[Callable[[], QuantizedLayer], ...] = ()
        self.cache_in_words = False
        # How keys are turned where they are quantized, by block: a rotation that the weights cannot carry.
        self.turns: dict[int, Turn] = {}
        # What a transform decided for the inputs of groups of layers, for its own quantizers.
        self.decided: dict[tuple[int, tuple[str, ...]], str] = {}
        # What inputs of linear layers are multiplied by before they are quantized, by block and role; the weights are
        # made for inputs as they are.
        self.input_factors: dict[tuple[int, str], Tensor] = {}
        self.stored_beside = 0  # bytes that a transform needs beside the parameters
        self.offload = False  # originals of replaced linear weights leave the device
        self.not_shared: str | None = None  # why other workers of this machine cannot share these weights in memory
        self.placement: Placement | None = None  # None: everything lies on one device
        self._first = HOST  # that device, or the one of embeddings and head
        # Parameters as they were loaded, into the host's memory, with their values there.
        self._on_host = {id(p): (p, p.data) for p in model.parameters()}
        self._parameters: int = sum(p.numel() for p in model.parameters())
        self._undo: list[Callable[[], object]] = []
        self._replaced: set[tuple[nn.Module, str]] = set()  # parameters whose originals are kept

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype  # type: ignore[no-any-return]

    def linears(self, block: int) -> dict[str, nn.Linear]:
        """The block's linear layers by role. Raises ModelError when one is not a plain nn.Linear."""
        found = {}
        for role, path in self.architecture.roles.items():
            module = self.blocks[block].get_submodule(path)
            if not isinstance(module, nn.Linear):
                raise ModelError(f"{self.module_name(block, role)} is a {type(module).__name__}, not a linear layer")
            found[role] = module
        return found

    def module_name(self, block: int, role: str) -> str:
        return f"{self.architecture.blocks}.{block}.{self.architecture.roles[role]}"

    @property
    def decoder(self) -> nn.Module:
        """The module that owns the blocks: every way of calling the model passes through its forward."""
        return self.model.get_submodule(self.architecture.blocks.rpartition(".")[0])  # type: ignore[no-any-return]

    def attention(self, block: int) -> nn.Module:
        return self.blocks[block].get_submodule(self.architecture.attention)

    @property
    def head_dim(self) -> int:
        return self.attention(0).head_dim  # type: ignore[return-value]

    def norm(self, block: int, group: tuple[str, ...]) -> nn.Module | None:
        """The norm that makes the input of these layers, or None where something else does."""
        path = self.architecture.norms.get(group)
        return None if path is None else self.blocks[block].get_submodule(path)

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the head."""
        return self.model.get_submodule(self.architecture.final_norm)  # type: ignore[no-any-return]

    @property
    def embeddings(self) -> list[nn.Module]:
        """The tables whose rows add up to the first hidden state."""
        return [self.model.get_submodule(path) for path in self.architecture.embeddings]

    def absorbs_scale(self, block: int, group: tuple[str, ...]) -> bool:
        """Whether the operator before these layers can absorb a factor per input column, the model unchanged."""
        online = bool(self.linears(block)[group[0]]._forward_pre_hooks)  # a rotation between the two mixes columns
        return not online and absorbs_scale(self.model.config.to_dict(), group)

    def key_maker(self, block: int) -> nn.Module:
        """The module whose output are the keys before the rotary embedding."""
        return self.blocks[block].get_submodule(self.architecture.key_norm or self.architecture.roles["k"])

    def body(self, ids: Tensor) -> Tensor:
        """Final hidden states [batch, length, hidden] of token ids [batch, length]; the head is not applied."""
        if self.chunk is None:
            return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]
        states, past, keyword = [], None, cache_keyword(self.model.base_model)
        for part in torch.split(ids, self.chunk, dim=1):
            out = self.model.base_model(input_ids=part, use_cache=True, **{keyword: past})
            past = returned_cache(out)
            states.append(out.last_hidden_state)
        return torch.cat(states, dim=1)

    @property
    def head(self) -> nn.Linear:
        return self.model.get_output_embeddings()  # type: ignore[no-any-return]

    def replace_weight(self, linear: nn.Linear, values: Tensor) -> None:
        """Give a layer new weights in the model's dtype; the original parameter is kept for `restore`."""
        self.replace_parameter(linear, "weight", values)

    def replace_parameter(self, module: nn.Module, name: str, values: Tensor) -> None:
        """The same for any parameter. What a transform made is not kept when a solver replaces it in turn."""
        original = getattr(module, name)
        assert isinstance(original, nn.Parameter)
        if (module, name) not in self._replaced:
            streamed = self.placement is not None and self.placement.streamed  # which keeps originals on the host
            if self.offload and not streamed and isinstance(module, nn.Linear) and module is not self.head:
                self.on_restore(functools.partial(self._bring_back, module, name, original, self._home(original)))
                original.data = self.on_host(original)
            else:
                self.on_restore(functools.partial(setattr, module, name, original))
            self._replaced.add((module, name))
        setattr(module, name, nn.Parameter(values.to(original.dtype), requires_grad=False))

    def _bring_back(self, module: nn.Module, name: str, original: nn.Parameter, device: torch.device) -> None:
        original.data = put(original.data, device)
        setattr(module, name, original)

    def _home(self, parameter: nn.Parameter) -> torch.device:
        """The device to which the parameter belongs."""
        found = (index for index, block in enumerate(self.blocks) if any(p is parameter for p in block.parameters()))
        index = next(found, None)
        return self._first if index is None else self.block_device(index)

    def on_host(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's values in the host's memory: the files' own pages, where it is as it was loaded."""
        known = self._on_host.get(id(parameter))
        return known[1] if known is not None and known[0] is parameter else put(parameter.data, HOST)

    def place(self, devices: Sequence[torch.device], *, streamed: bool = False) -> None:
        """Move the original model: to one device, its blocks over several, or streamed from the host's memory.

        One tensor at a time, from the host's memory. Nothing may be replaced at the time.
        """
        assert not self._undo, "the model is restored before it is moved"
        if self.placement is not None:
            self.placement.remove()
        self.placement, self._first = None, devices[0]
        inside = {id(tensor) for block in self.blocks for tensor in (*block.parameters(), *block.buffers())}
        everything = [*self.model.parameters(), *self.model.buffers()]
        move((tensor for tensor in everything if id(tensor) not in inside), devices[0])
        if len(devices) > 1 or streamed:
            homes = spread(len(self.blocks), devices)
            self.placement = Placement(self.blocks, self.final_norm, self.on_host, devices=homes, streamed=streamed)
        else:
            move((tensor for tensor in everything if id(tensor) in inside), devices[0])

    def block_device(self, index: int) -> torch.device:
        """Where the block computes."""
        return self._first if self.placement is None else self.placement.devices[index]

    def opened(self, index: int) -> contextlib.AbstractContextManager[None]:
        """The block's weights are on its device inside, wherever the model keeps them."""
        return contextlib.nullcontext() if self.placement is None else self.placement.open(index)

    def on_restore(self, undo: Callable[[], object]) -> None:
        """Have something undone by `restore`, the latest first. Called right before or after a change is made."""
        self._undo.append(undo)

    def restore(self) -> None:
        """Undo everything that was replaced or installed."""
        self._undo_to(0)
        self._replaced.clear()

    @contextlib.contextmanager
    def temporary(self) -> Iterator[None]:
        """Undo on leaving what was replaced or installed inside."""
        depth, outer = len(self._undo), self._replaced
        self._replaced = set()
        try:
            yield
        finally:
            self._undo_to(depth)
            self._replaced = outer

    def _undo_to(self, depth: int) -> None:
        while len(self._undo) > depth:
            self._undo.pop()()

    @contextlib.contextmanager
    def reading_cache(self, prefill: Prefill, chunk: int | None = None) -> Iterator[None]:
        """How a quantized KV cache is read inside: what calls with several tokens see (`qfarm.layers.cache`).

        With `chunk`, `body` feeds that many tokens at a time and keeps a cache in between, quantized or not.
        """
        before, self.prefill, self.chunk = (self.prefill, self.chunk), prefill, chunk
        try:
            yield
        finally:
            self.prefill, self.chunk = before

    def other_bytes(self) -> int:
        """Bytes of everything but the decoder linears' weights, shared tensors counted once."""
        skip = {id(linear.weight) for i in range(len(self.blocks)) for linear in self.linears(i).values()}
        kept = (p.numel() * p.element_size() for p in self.model.parameters() if id(p) not in skip)
        total: int = sum(kept)
        return self.stored_beside + total

    def store_beside(self, size: int) -> None:
        """Count bytes that a transform needs beside the parameters, until the model is restored."""
        self.on_restore(functools.partial(setattr, self, "stored_beside", self.stored_beside))
        self.stored_beside += size

    def parameter_count(self) -> int:
        """Parameters of the model as it was loaded; a head that was given weights of its own counts once."""
        return self._parameters


def load(facts: ModelFacts, dtype: str, device: torch.device) -> LoadedModel:
    """Load weights and tokenizer. Raises ModelError, Unavailable, or NonFinite for a broken checkpoint.

    Weights are pages of files that all workers of a machine share (`qfarm.models.mapped`); to another device they go
    from there tensor by tensor, without a copy in the host's memory.
    """
    architecture = architecture_of(facts.config, facts.reference)
    try:
        tokenizer = load_tokenizer(facts)
        location, revision, note = in_dtype(facts, DTYPES[dtype])
        model = AutoModelForCausalLM.from_pretrained(
            location, revision=revision, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:  # safetensors, tokenizers and torch raise kinds of their own for broken files
        failure = _load_error(facts, error)
        if failure is None:
            raise
        raise failure from error
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NonFinite(f"{facts.reference}: {name} holds NaN or Inf")
    loaded = LoadedModel(model, tokenizer, architecture)
    loaded.not_shared = note
    loaded.place([device])
    return loaded


def _load_error(facts: ModelFacts, error: Exception) -> Exception | None:
    """Whose fault it is that transformers could not load: memory, the folder or the hub; None when nobody can tell."""
    for cause in (error, error.__cause__, error.__context__):
        # A file that cannot be mapped shows only in the text.
        if cause and (classify(cause) is Failure.OOM or "Cannot allocate memory" in str(cause)):
            return MemoryError(f"{facts.reference}: out of memory while loading: {first_line(error)}")
    if Path(facts.location).is_dir():
        return ModelError(f"{facts.reference}: cannot be loaded: {first_line(error)}")
    return unreachable(facts.reference, error) if isinstance(error, (OSError, ValueError)) else None


def load_tokenizer(facts: ModelFacts) -> Any:
    return AutoTokenizer.from_pretrained(facts.location, revision=facts.revision, trust_remote_code=False)


def convert_gguf(path: str, folder: str) -> None:
    """Unpack a GGUF file into a transformers checkpoint (safetensors, float32, so that no bit is lost)."""
    import os

    from transformers import GgufConfig

    where, name = os.path.split(path)
    options = {"gguf_file": name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(where, **options)
    model = AutoModelForCausalLM.from_pretrained(
        where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **options
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
