"""Place: where the blocks of a model lie: on one device, spread over several, or in the host's memory until needed.

Embeddings, final norm and head stay on the first device. A block that lies elsewhere gets what it is called with moved
to its device; a streamed block comes from the host's memory when it is called or opened, and its memory on the device
is free again when it ends. Parameters keep their identity, only their values move, and nobody changes values in place:
what came from the host is not copied back. Numbers do not depend on the placement. Never run on a GPU so far; tests
count the bytes that are on a stand-in for one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

HOST = torch.device("cpu")


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. The only way in which this module moves weights, so that tests can count."""
    return tensor.to(device)


def spread(blocks: int, devices: Sequence[torch.device]) -> tuple[torch.device, ...]:
    """A device for each block: contiguous runs, as even as can be, longer ones last, for the first holds the tables."""
    return tuple(devices[index * len(devices) // blocks] for index in range(blocks))


class Placement:
    """The blocks of a model on their devices, until `remove`."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        final_norm: nn.Module,
        on_host: Callable[[nn.Parameter], Tensor],
        *,
        devices: Sequence[torch.device],
        streamed: bool,
    ) -> None:
        """`devices` by block; `on_host` gives a parameter's values in the host's memory."""
        assert len(devices) == len(blocks)
        self.devices, self.streamed = tuple(devices), streamed
        self._blocks, self._on_host = blocks, on_host
        self._open = [0] * len(blocks)  # how often each is open, one inside the other
        self._from_host: list[dict[int, tuple[nn.Parameter, Tensor]]] = [{} for _ in blocks]
        for block, device in zip(blocks, devices, strict=True):
            move(block.buffers(), device)
            if streamed:
                for parameter in block.parameters():
                    parameter.data = on_host(parameter)
            else:
                move(block.parameters(), device)
        self._handles = [final_norm.register_forward_pre_hook(_bring_to(devices[0]), with_kwargs=True)]
        for index, block in enumerate(blocks):
            self._handles.append(block.register_forward_pre_hook(self._before(index), with_kwargs=True))
            if streamed:  # even where the pass is ended by an exception, as calibration ends it
                self._handles.append(block.register_forward_hook(self._behind(index), always_call=True))

    @contextlib.contextmanager
    def open(self, index: int) -> Iterator[None]:
        """The block's parameters are on its device inside."""
        self._enter(index)
        try:
            yield
        finally:
            self._leave(index)

    def remove(self) -> None:
        """No trace of the placement, but that weights lie where they lie."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, index: int) -> None:
        self._open[index] += 1
        if not self.streamed or self._open[index] > 1:
            return
        for parameter in self._blocks[index].parameters():
            self._from_host[index][id(parameter)] = (parameter, parameter.data)
            parameter.data = put(parameter.data, self.devices[index])

    def _leave(self, index: int) -> None:
        self._open[index] -= 1
        if not self.streamed or self._open[index]:
            return
        came, self._from_host[index] = self._from_host[index], {}
        for parameter, values in came.values():  # those that were replaced meanwhile, too: they are put back later
            parameter.data = values
        for parameter in self._blocks[index].parameters():
            if id(parameter) not in came:  # made on the device
                parameter.data = self._on_host(parameter)

    def _before(self, index: int) -> Callable[..., Any]:
        bring = _bring_to(self.devices[index])

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if self.streamed:
                self._enter(index)
            return bring(module, args, kwargs)

        return enter

    def _behind(self, index: int) -> Callable[..., None]:
        return lambda *_: self._leave(index)


def move(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Have parameters and buffers lie on a device, one after the other."""
    for tensor in tensors:
        if tensor.device != device:
            tensor.data = put(tensor.data, device)


def _bring_to(device: torch.device) -> Callable[..., tuple[Any, Any]]:
    """A hook that moves what a module is called with; caches stay, for their layers lie where their blocks are."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return tuple(moved(part) for part in value) if isinstance(value, tuple) else value

    def bring(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return moved(args), {name: moved(value) for name, value in kwargs.items()}

    return bring
