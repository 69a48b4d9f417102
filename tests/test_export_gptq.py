"""GPTQ's layout: word by word by hand, and read back by the other code."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from qfarm.errors import Unsupported
from qfarm.export import reload
from qfarm.export.formats import asked
from qfarm.export.gptq import Gptq, packed
from qfarm.export.stored import stored_cell
from qfarm.export.verify import codes_hash
from qfarm.quantized import UniformWeight
from qfarm.store import Store
from tests.export_example import export_store as export_store
from tests.test_export import Write
from tests.test_export import same_process as same_process
from tests.test_export import write as write


def random_layer(bits: int, asymmetric: bool, permuted: bool) -> UniformWeight:
    """16 outputs, 48 inputs, groups of 16; asymmetric zeros reach both ends."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (16, 48), generator=generator).to(torch.uint8)
    zero = torch.randint(0, 2**bits, (16, 3), generator=generator).to(torch.uint8)
    zero[0], zero[1] = 0, 2**bits - 1
    return UniformWeight(
        codes=codes,
        scale=torch.rand(16, 3, generator=generator).half(),
        zero=zero if asymmetric else None,
        bits=bits,
        group_size=16,
        g_idx=(torch.randperm(48, generator=generator) // 16).int() if permuted else None,
    )


def test_words_by_hand() -> None:
    codes = torch.arange(8).repeat(8, 1).to(torch.uint8)  # every output has the codes 0 .. 7
    codes[1] = 15
    layer = UniformWeight(codes=codes, scale=torch.full((8, 1), 0.5).half(), zero=None, bits=4, group_size=8)
    parts = packed(layer)
    assert parts["qweight"].shape == (1, 8) and parts["qweight"][0, 0] == 0x76543210 and parts["qweight"][0, 1] == -1
    assert parts["qzeros"].tolist() == [[0x77777777]]  # v1 holds the zero of 8 less one
    assert parts["scales"].shape == (1, 8) and parts["g_idx"].tolist() == [0] * 8
    zero = torch.arange(8).reshape(8, 1).to(torch.uint8)
    assert packed(dataclasses.replace(layer, zero=zero))["qzeros"].tolist() == [[0x76543210]]  # v2 the zero itself


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_what_is_packed_is_read_back(bits: int, asymmetric: bool, permuted: bool) -> None:
    layer = random_layer(bits, asymmetric, permuted)
    found = reload.unpacked(**packed(layer), bits=bits, format="gptq_v2" if asymmetric else "gptq")
    assert torch.equal(found, layer.dequantize().half())


def test_a_zero_of_zero_would_not_survive_the_first_version() -> None:
    """Why asymmetric grids go out as v2: less one, a zero of 0 becomes the largest code."""
    layer = random_layer(4, asymmetric=True, permuted=False)
    parts = packed(layer)
    assert not torch.equal(reload.unpacked(**parts, bits=4, format="gptq"), layer.dequantize().half())


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    ("label", "format", "permuted"),
    [("gptq (act_order=true) w4 g16", "gptq", True), ("rtn w4", "gptq_v2", False)],
)
def test_a_whole_model(write: Write, label: str, format: str, permuted: bool) -> None:
    done = write(label, "gptq")
    settings = json.loads((done.folder / "config.json").read_text())["quantization_config"]
    assert (settings["checkpoint_format"], settings["desc_act"]) == (format, permuted)
    assert json.loads((done.folder / "quantize_config.json").read_text()) == settings
    assert done.manifest["verified"]["same_dtype"]["max_abs"] == 0.0
    assert "unpacked by a reader of qfarm's own" in (done.folder / "README.md").read_text()


def test_the_hash_of_codes_sees_one_bit() -> None:
    layer = random_layer(4, asymmetric=True, permuted=True)
    other = dataclasses.replace(layer, codes=layer.codes.clone())
    assert codes_hash(layer) == codes_hash(other)
    other.codes[3, 3] ^= 1
    assert codes_hash(layer) != codes_hash(other)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("rtn w8a8", "gptq: the format has no quantizer of linear inputs"),
        ("gptq w4/8 g16", "gptq: the format has one width for all layers; what can hold it: --format compressed"),
    ],
)
def test_refusals(export_store: Store, label: str, message: str) -> None:
    cell = stored_cell(export_store, label).cell
    with pytest.raises(Unsupported, match=message):
        asked("gptq", cell)
    wider = dataclasses.replace(stored_cell(export_store, "gptq w4 g16").cell, scale_dtype="bfloat16")
    assert Gptq().refusal(wider) == "the format has float16 scales, and this cell bfloat16 ones"


def test_codes_that_fill_no_words_are_refused() -> None:
    layer = random_layer(4, asymmetric=False, permuted=False)
    assert Gptq().layer_refusal(layer) is None
    assert "do not fill whole words" in str(Gptq().layer_refusal(layer.row_range(0, 15)))
