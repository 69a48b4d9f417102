"""Distil: train the parameters of a quantized block until it computes what the original block did.

Layer-by-layer distillation as in ZeroQuant (arXiv 2206.01861, section 4.3). The student is the block with rounded
weights, and rounded inputs of linear layers where the scheme has them; the teacher is the block as it was. Both get
the same inputs, masks and positions. Rounding passes gradients unchanged. Trained are float32 copies; the block runs
in its own dtype.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qfarm import depot
from qfarm.errors import NonFinite
from qfarm.layers.rtn import Quantizer
from qfarm.walk import BlockProblem

CACHE = "distilled"  # kind of cache entries: trained parameters and loss curve of one block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """How a block is trained."""

    weight: Callable[[str, Tensor], Tensor]  # role, weight [out, in] float32 -> its rounded values, float32
    inputs: Quantizer | None  # of every linear layer of the problem; None: not rounded
    steps: int
    learning_rate: float  # of AdamW, constant
    weight_decay: float  # of AdamW, on matrices only: biases and norms are not decayed
    batch: int  # windows per step: consecutive ones, round and round
    normalise: bool = False  # divide the loss by the teacher's mean square
    key: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # plain data that decides what `weight` does


class StraightThrough(torch.autograd.Function):
    """Forward: rounded values. Backward: the gradient of the values that were rounded, unchanged."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(values: Tensor, rounded: Tensor) -> Tensor:
    result: Tensor = StraightThrough.apply(values, rounded.detach())  # type: ignore[no-untyped-call]
    return result


def distil(problem: BlockProblem, options: Distillation) -> tuple[dict[str, Tensor], list[float]]:
    """Weights by role, float32, for the caller to round, and the loss before each step and after the last.

    Learned norms and biases go to `problem.learned`. A block that was trained before is taken from the cache. Raises
    NonFinite when the loss is.
    """
    roles = _weight_names(problem)
    name = f"{_key(problem, options)}.safetensors"
    found = depot.find(CACHE, name)
    if found is None:
        found = depot.publish(CACHE, name, lambda part: _train_into(part, problem, options, roles))
    stored = load_file(found)
    curve = [float(loss) for loss in stored.pop("loss_curve")]
    device = problem.inputs.device
    problem.learned = {key: value.to(device) for key, value in stored.items() if key not in roles}
    return {role: stored[key].to(device) for key, role in roles.items()}, curve


def _train_into(part: Path, problem: BlockProblem, options: Distillation, roles: Mapping[str, str]) -> None:
    parameters, curve = train(problem, options, roles)
    tensors = {key: value.detach().cpu().contiguous() for key, value in parameters.items()}
    save_file(tensors | {"loss_curve": torch.tensor(curve, dtype=torch.float64)}, part)


def train(
    problem: BlockProblem, options: Distillation, roles: Mapping[str, str]
) -> tuple[dict[str, Tensor], list[float]]:
    """Parameters by their names in the block, float32, and the loss curve."""
    parameters = _masters(problem, roles)
    decayed = [p for p in parameters.values() if p.dim() > 1]
    others = [p for p in parameters.values() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate)
    starts = itertools.cycle(range(0, len(problem.inputs), options.batch))
    curve = []
    with torch.enable_grad():
        for start in itertools.islice(starts, options.steps):
            value = loss(problem, options, roles, parameters, slice(start, start + options.batch))
            curve.append(_finite(value))
            optimizer.zero_grad()
            _backward(value, problem.inputs[start : start + options.batch].numel(), parameters.values())
            optimizer.step()
        first = slice(0, options.batch)
        with torch.no_grad():
            curve.append(_finite(loss(problem, options, roles, parameters, first)))
    return parameters, curve


def _backward(value: Tensor, elements: int, parameters: Iterable[Tensor]) -> None:
    """Gradients of a mean over that many elements. On their way they are as large as those of the sum, so that float16
    does not lose them; the factor is a power of two, which changes no bit in float32 and bfloat16."""
    scale = 2.0 ** (elements.bit_length() - 1)
    (value * scale).backward()  # type: ignore[no-untyped-call]
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= scale


def loss(
    problem: BlockProblem,
    options: Distillation,
    roles: Mapping[str, str],
    parameters: Mapping[str, Tensor],
    batch: slice,
) -> Tensor:
    """Mean squared difference between student and teacher on some windows, float32."""
    hidden = problem.inputs[batch]
    with torch.no_grad():
        target = problem.call(hidden, {}).float()
    swapped = {}
    for name, master in parameters.items():
        value = master
        if name in roles:
            value = straight_through(master, options.weight(roles[name], master.detach()))
        swapped[name] = value.to(problem.inputs.dtype)
    with _rounded_inputs(problem.block, options.inputs):
        error = (problem.call(hidden, swapped).float() - target).square().mean()
    return error / target.square().mean() if options.normalise else error


def _finite(value: Tensor) -> float:
    number = value.item()
    if not number < float("inf"):
        raise NonFinite("the block's distillation loss is NaN or Inf")
    return number


def _weight_names(problem: BlockProblem) -> dict[str, str]:
    """Parameter name in the block -> role, of the weights that are rounded."""
    modules = {id(module): name for name, module in problem.block.named_modules()}
    return {f"{modules[id(linear)]}.weight": role for role, linear in problem.linears.items()}


def _masters(problem: BlockProblem, roles: Mapping[str, str]) -> dict[str, Tensor]:
    """Float32 copies of what is trained: rounded weights, norms and biases; not the weights left at 16 bits."""
    left = {
        f"{name}.weight"
        for name, module in problem.block.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" not in roles
    }
    found = {name: p for name, p in problem.block.named_parameters() if name not in left}
    return {name: p.detach().float().clone().requires_grad_() for name, p in found.items()}


@contextlib.contextmanager
def _rounded_inputs(block: nn.Module, quantize: Quantizer | None) -> Iterator[None]:
    """Have the inputs of the block's linear layers rounded."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        assert quantize is not None
        return straight_through(args[0], quantize(args[0].detach()))

    with contextlib.ExitStack() as stack:
        for module in block.modules():
            if isinstance(module, nn.Linear) and quantize is not None:
                stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


def _key(problem: BlockProblem, options: Distillation) -> str:
    """Hash of all that decides the result."""
    plain = dataclasses.asdict(dataclasses.replace(options, weight=None, inputs=None))  # type: ignore[arg-type]
    grids = {role: repr(grid) for role, grid in problem.grids.items()}
    digest = hashlib.sha256(json.dumps([plain, grids, problem.input_bits, torch.__version__]).encode())
    for name, tensor in [*problem.block.named_parameters(), ("inputs", problem.inputs)]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
