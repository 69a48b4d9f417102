"""Plain: the evaluated weights in the ordinary layout and the model's dtype. Exact for any method, and no smaller."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from qfarm.export.checkpoint import write_checkpoint
from qfarm.export.formats import Reader, dtype_name, running_sites
from qfarm.export.made import Made
from qfarm.matrix import Cell
from qfarm.models.load import DTYPES
from qfarm.quantized import QuantizedWeight


class Plain:
    """Simulated (fake) quantization: every weight has the value that was evaluated, in 16 bits as before."""

    name = "safetensors"
    writes_with: tuple[str, ...] = ()
    summary = "weights in floating point, as large and as fast as the original"

    def refusal(self, cell: Cell) -> str | None:
        return None

    def layer_refusal(self, quantized: QuantizedWeight) -> str | None:
        return None

    def left_out(self, cell: Cell) -> list[str]:
        return running_sites(cell)

    def reader(self, cell: Cell) -> Reader:
        dtype = DTYPES[cell.dtype]
        snippet = f"model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.{dtype_name(dtype)})"
        return Reader(dtype=dtype, snippet=snippet, packages=())

    def running(self, made: Made) -> AbstractContextManager[None]:
        return nullcontext()

    def limits(self, scheme: str) -> list[str]:
        return ["Simulated (fake) quantization: same size and speed as the original, for studies of accuracy."]

    def write(self, made: Made, folder: Path) -> None:
        write_checkpoint(made.loaded, {}, folder, DTYPES[made.stored.cell.dtype], None)
