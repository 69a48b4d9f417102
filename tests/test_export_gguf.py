"""GGUF: blocks byte by byte by hand, whole files read back by transformers, sizes to the byte, damage, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qfarm.errors import NotVerified, Unsupported
from qfarm.export import blocks as block_layout
from qfarm.export import gguf as gguf_format
from qfarm.export import manifest
from qfarm.export.blocks import block_type, blocks, interleaved
from qfarm.export.formats import asked
from qfarm.export.gguf import Gguf, _config_refusal
from qfarm.export.stored import stored_cell
from qfarm.export.verify import verify
from qfarm.export.vocabulary import cut, tokenizer_refusal, write_tokenizer
from qfarm.quantized import UniformWeight
from qfarm.store import Store
from tests.conftest import save_tiny
from tests.export_example import filled_store
from tests.test_export import Write
from tests.test_export import same_process as same_process
from tests.test_export import write as write

JOB = """
models: [{model}]
methods: [rtn]
bits: [w4, w8, w4/8]
group_sizes: [32]
symmetric: true
calibration: {{text: python-docs, samples: 2, length: 32}}
evaluate: [perplexity: {{text: python-docs, length: 32, windows: 2, divergence: false}}]
include:
  - {{methods: [gptq], bits: [w3], group_sizes: [64]}}
  - {{methods: [rtn], bits: [w4kv4], group_sizes: [32]}}
resources: {{gpus: 0}}
"""
ASYMMETRIC = (
    JOB[: JOB.index("include:")]
    .replace("symmetric: true\n", "")
    .replace("[w4, w8, w4/8]", "[w3, w4, w8]")
    .replace("[32]", "[64]")
    + "resources: {{gpus: 0}}"
)
WEIGHTS = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128  # of a block's linear layers
ATTENTION = 64 * 64 * 2 + 32 * 64 * 2


def with_a_merge(folder: Path) -> Path:
    """The same checkpoint with one merge, for the library writes no empty list."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["or"], content["model"]["merges"] = 258, [["o", "r"]]
    path.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Cells of a tiny Llama with a tied head in bfloat16; its embedding has one row more than there are tokens."""
    model = with_a_merge(save_tiny(tmp_path_factory.mktemp("model"), "llama"))
    return filled_store(tmp_path_factory.mktemp("store") / "store", model, JOB, ASYMMETRIC)


@pytest.fixture
def export_store(store: Store) -> Store:
    """What `write` exports from."""
    return store


def random_layer(bits: int, asymmetric: bool, rows: int = 8, group: int = 32) -> UniformWeight:
    """128 inputs; every code and both ends of the zeros occur."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, 128), generator=generator).to(torch.uint8)
    codes[:2] = torch.arange(128) % 2**bits
    zero = torch.randint(0, 2**bits, (rows, 128 // group), generator=generator).to(torch.uint8)
    zero[0], zero[1] = 0, 2**bits - 1
    return UniformWeight(
        codes=codes,
        scale=torch.rand(rows, 128 // group, generator=generator).half(),
        zero=zero if asymmetric else None,
        bits=bits,
        group_size=group,
    )


# -- blocks -----------------------------------------------------------------------------------------------------------


def one_block(bits: int, zero: int | None) -> list[int]:
    up = torch.arange(16)
    codes = (torch.cat([up, up.flip(0)]) if bits == 4 else torch.arange(32))[None].to(torch.uint8)
    zeros = None if zero is None else torch.full((1, 1), zero, dtype=torch.uint8)
    layer = UniformWeight(codes=codes, scale=torch.tensor([[0.5]]).half(), zero=zeros, bits=bits, group_size=32)
    return blocks(layer)[0].tolist()


def test_bytes_by_hand() -> None:
    half = [0x00, 0x38]  # 0.5 in float16, low byte first
    # Codes 0 .. 15 and back: byte j holds j, and 15 - j of column j + 16 above it.
    assert one_block(4, None) == half + [j + 16 * (15 - j) for j in range(16)]
    # Less a zero of 3, plus 16: n = 13 .. 28 and back. Bit 4 is clear in the first three columns and in the last three.
    low = [13, 14, 15, *range(13)]
    assert one_block(4, 3) == half + [0xF8, 0xFF, 0xFF, 0x1F] + [
        j + 16 * k for j, k in zip(low, low[::-1], strict=True)
    ]
    # Codes 0 .. 31 less 128, as int8.
    assert one_block(8, None) == half + [0x80 + j for j in range(32)]


@pytest.mark.parametrize(
    ("bits", "asymmetric", "name"),
    [
        (2, False, "Q4_0"),
        (3, False, "Q4_0"),
        (4, False, "Q4_0"),
        (5, False, "Q5_0"),
        (6, False, "Q8_0"),
        (8, False, "Q8_0"),
        (2, True, "Q4_0"),
        (3, True, "Q4_0"),
        (4, True, "Q5_0"),
        (5, True, "Q8_0"),
        (7, True, "Q8_0"),
    ],
)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_library_unpacks_the_same_weight(bits: int, asymmetric: bool, name: str, group: int) -> None:
    layer = random_layer(bits, asymmetric, group=group)
    kind = block_type(bits, not asymmetric)
    assert kind is not None and kind.name == name
    packed, library = blocks(layer), gguf.GGMLQuantizationType[name]
    assert packed.shape == (8, 4 * gguf.GGML_QUANT_SIZES[library][1])
    assert np.array_equal(gguf.dequantize(packed.numpy(), library), layer.dequantize().numpy())


def test_no_block_holds_eight_bits_asymmetric() -> None:
    assert block_type(8, symmetric=False) is None
    assert "asymmetric codes of 8 bits" in str(Gguf().layer_refusal(random_layer(8, asymmetric=True)))


def test_rows_of_a_head_by_hand() -> None:
    """Two heads of four rows: first and second halves become pairs."""
    assert interleaved(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


# -- whole files ------------------------------------------------------------------------------------------------------


def types_in(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.slow
def test_an_export_in_a_fresh_process(write: Write) -> None:
    """The one test with a process of its own."""
    done = write("rtn w4 g32", "gguf")
    assert sorted(path.name for path in done.folder.iterdir()) == ["README.md", "model.gguf", "qfarm_export.json"]
    checked = done.manifest["verified"]
    assert checked["same_dtype"]["max_abs"] == 0.0 < checked["cell"]["max_abs"]
    card = (done.folder / "README.md").read_text()
    assert 'from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)' in card
    assert 'AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")' in card
    assert "Load it in **float32**:" in card and "llama.cpp has not been run on this file" in card


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    ("label", "attention", "mlp"),
    [
        ("rtn w8 g32", "Q8_0", "Q8_0"),
        ("rtn w4/8 g32", "Q8_0", "Q4_0"),
        ("gptq w3 g64", "Q4_0", "Q4_0"),
        ("rtn w4 g64", "Q5_0", "Q5_0"),
        ("rtn w3 g64", "Q4_0", "Q4_0"),
    ],
)
def test_other_schemes_and_the_size_to_the_byte(write: Write, label: str, attention: str, mlp: str) -> None:
    done = write(label, "gguf")
    path = done.folder / "model.gguf"
    types = types_in(path)
    assert {types[f"blk.{block}.attn_{part}.weight"] for block in (0, 1) for part in "qkv"} == {attention}
    assert {types[f"blk.{block}.ffn_{part}.weight"] for block in (0, 1) for part in ("gate", "up", "down")} == {mlp}
    assert (
        types["token_embd.weight"] == "BF16" and types["output_norm.weight"] == "F32" and "output.weight" not in types
    )
    assert done.manifest["verified"]["same_dtype"]["max_abs"] == 0.0
    per_block = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34}  # bytes for 32 weights
    linear = 2 * (ATTENTION // 32 * per_block[attention] + (WEIGHTS - ATTENTION) // 32 * per_block[mlp])
    # Embedding in bfloat16, five norms of 64 in float32; every size is a multiple of the file's alignment of 32.
    assert path.stat().st_size == gguf.GGUFReader(path).data_offset + linear + 2 * 260 * 64 + 4 * 5 * 64
    assert done.manifest["sizes"]["weight_files"] == path.stat().st_size


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_families_with_a_head_of_their_own(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """A wrong order of query and key rows loads without an error: the comparison finds it."""
    model = with_a_merge(save_tiny(tmp_path / "model", family, tie_word_embeddings=False, sliding_window=None))
    other = filled_store(tmp_path / "store", model, ASYMMETRIC.replace("w3, w4, w8", "w4"))
    monkeypatch.setattr("tests.test_export.stored_cell", lambda _, label: stored_cell(other, label))
    done = write("rtn w4 g64", "gguf")
    assert types_in(done.folder / "model.gguf")["output.weight"] == "BF16"
    assert done.manifest["verified"]["same_dtype"]["max_abs"] == 0.0
    for turned in (lambda rows, heads: torch.arange(rows), lambda rows, heads: interleaved(rows, 1)):
        monkeypatch.setattr(gguf_format, "interleaved", turned)
        with pytest.raises(NotVerified, match=r"4 of 14 layers read back with other weights: .*q_proj, .*k_proj"):
            write("rtn w4 g64", "gguf", "wrong")
    assert not (tmp_path / "wrong").exists()


# -- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path, name: str, byte: int) -> None:
    """One bit of one tensor."""
    (tensor,) = (one for one in gguf.GGUFReader(path).tensors if one.name == name)
    content = bytearray(path.read_bytes())
    content[tensor.data_offset + byte] ^= 1
    path.write_bytes(content)


@pytest.mark.usefixtures("same_process")
def test_damage_is_found_to_the_nibble(write: Write) -> None:
    done = write("rtn w4 g32", "gguf")
    path, damaged = done.folder / "model.gguf", "blk.1.ffn_up.weight"
    found = verify(done.folder)
    assert found.faults == () and found.steps[0] == "hashes of 20 tensors and 1 other files"
    flip(path, damaged, 18 * 7 + 5)
    assert verify(done.folder).faults == (f"tensor {damaged}: altered", "file model.gguf: altered")
    # Even with a manifest that was made anew, the weights are not those of the cell.
    manifest.write(done.folder, manifest.read(done.folder) | manifest.hashes(done.folder))
    assert verify(done.folder).faults == ("1 of 14 layers read back with other weights: model.layers.1.mlp.up_proj",)
    for size in (path.stat().st_size // 2, 4, 0):  # the library raises another error for each
        path.write_bytes(path.read_bytes()[:size])
        (fault,) = verify(done.folder).faults
        assert "cannot be read" in fault


@pytest.mark.usefixtures("same_process")
def test_what_does_not_read_back_is_not_kept(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(layer: UniformWeight) -> torch.Tensor:
        found = block_layout.blocks(layer)
        found[0, 5] ^= 16
        return found

    monkeypatch.setattr(gguf_format, "blocks", damaged)
    with pytest.raises(NotVerified, match="14 of 14 layers read back with other weights"):
        write("rtn w4 g32", "gguf")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "changes", "message"),
    [
        ("rtn w4kv4 g32", {}, r"no quantizer of the KV cache \(4 bits\); .*--format safetensors"),
        ("rtn w8 g64", {}, "no block holds asymmetric codes of 8 bits less their zeros; .*--format gptq"),
        ("rtn w4 g32", {"group_size": 16}, "a scale for 32 columns, which groups of 16 do not fill; .*--format comp"),
        ("rtn w4 g32", {"scale_dtype": "bfloat16"}, "float16 scales, and this cell bfloat16 ones; .*--format comp"),
        ("rtn w4 g32", {"model": "/nowhere"}, "gguf: /nowhere: no such folder"),
    ],
)
def test_refusals_name_the_reason_and_what_can_hold_it(
    store: Store, label: str, changes: dict[str, Any], message: str
) -> None:
    cell = dataclasses.replace(stored_cell(store, label).cell, **changes)
    with pytest.raises(Unsupported, match=message):
        asked("gguf", cell)


def test_a_tokenizer_that_cannot_be_loaded(store: Store, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    (model / "tokenizer.json").write_text("{}")
    cell = dataclasses.replace(stored_cell(store, "rtn w4 g32").cell, model=str(model))
    assert f"the tokenizer of {model} cannot be loaded: " in str(Gguf().refusal(cell))


def test_auto_never_chooses_it_and_others_name_it(store: Store) -> None:
    cell = stored_cell(store, "rtn w4 g64").cell
    assert [one.name for one in asked("auto", cell)[0]] == ["safetensors"]
    assert [one.name for one in asked("gguf", cell)[0]] == ["gguf"]
    with pytest.raises(Unsupported, match=r"what can hold it: .*--format gguf \(one file of packed codes"):
        asked("compressed-tensors", cell)


def test_layers_that_no_block_holds() -> None:
    layer, ours = random_layer(4, asymmetric=False), Gguf()
    assert ours.layer_refusal(layer) is None
    narrow = dataclasses.replace(layer, scale=torch.ones(8, 8).half())
    assert ours.layer_refusal(narrow) == "its 128 columns in 8 groups are no blocks of 32"
    order = torch.zeros(128, dtype=torch.int32)
    assert "out of order" in str(ours.layer_refusal(dataclasses.replace(layer, g_idx=order)))
    wide = dataclasses.replace(layer, scale=layer.scale.float(), solver="x")
    assert ours.layer_refusal(wide) == "the format has float16 scales, and x float32 ones"
    floating = dataclasses.replace(layer, zero=torch.full((8, 4), 7.5), solver="hqq")
    assert ours.layer_refusal(floating) == "the zeros of hqq are no integers"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "written for llama and mistral models, and this is qwen2"),
        ({"model_type": "opt"}, "this is opt"),
        ({"model_type": "mistral", "sliding_window": 16}, "no sliding window"),
        ({"model_type": "mistral"}, "no sliding window"),  # transformers' default is 4096
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no scaled rotary positions"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "no scaled rotary positions"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "no scaled rotary positions"),
        ({"attention_bias": True}, "no biases"),
        ({"mlp_bias": True}, "no biases"),
        ({"hidden_act": "gelu"}, "the format has the activation silu, and this model gelu"),
    ],
)
def test_models_that_the_keys_cannot_describe(changes: dict[str, Any], message: str) -> None:
    plain = {"model_type": "llama", "max_position_embeddings": 256, "rope_parameters": {"rope_type": "default"}}
    assert _config_refusal(plain) is None
    assert _config_refusal(plain | {"model_type": "mistral", "sliding_window": None}) is None
    assert message in str(_config_refusal(plain | changes))


# -- tokenizers -------------------------------------------------------------------------------------------------------


def byte_level(**changes: Any) -> PreTrainedTokenizerFast:
    """Bytes and one merge; special token <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate([*alphabet, "ab"])}
    words = Tokenizer(models.BPE(**{"vocab": vocabulary, "merges": [("a", "b")], **changes.get("model", {})}))
    words.pre_tokenizer = changes.get("cut", pre_tokenizers.ByteLevel(add_prefix_space=False))
    words.normalizer = changes.get("normalizer")
    words.post_processor = changes.get("around")
    words.add_special_tokens(["<s>"])
    if "added" in changes:
        words.add_tokens([changes["added"]])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")


def digits_apart() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def read_by_transformers(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Any:
    writer = gguf.GGUFWriter(folder / "t.gguf", "llama")
    write_tokenizer(writer, tokenizer, 260)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AutoTokenizer.from_pretrained(folder, gguf_file="t.gguf")


def test_a_tokenizer_is_written_and_read_back(tmp_path: Path) -> None:
    from tokenizers import processors

    around = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    ours = byte_level(around=around, cut=digits_apart(), added="<think>")
    ours.chat_template = "{{ messages[0]['content'] }}"
    assert tokenizer_refusal(ours, 260) is None
    assert cut(json.loads(ours.backend_tokenizer.to_str())["pre_tokenizer"]) == "smollm"
    theirs = read_by_transformers(ours, tmp_path)
    fields = gguf.GGUFReader(tmp_path / "t.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert fields["tokenizer.ggml.tokens"].contents()[256:] == ["ab", "<s>", "<think>", "[PAD259]"]
    assert fields["tokenizer.ggml.token_type"].contents()[255:] == [1, 1, 3, 4, 5]
    text = "<s>cabs <think> 7é\n"
    assert theirs(text)["input_ids"] == ours(text)["input_ids"] and ours("ab")["input_ids"] == [257, 256]
    assert theirs.chat_template == ours.chat_template and theirs.bos_token == "<s>" and theirs.eos_token is None


def test_transformers_still_does_not_cut_digits_apart(tmp_path: Path) -> None:
    """Watches the library: once it does, the model card need not warn any more."""
    vocabulary = byte_level().get_vocab()
    vocabulary["ĠĠ"] = vocabulary.pop("ab")
    ours = byte_level(cut=digits_apart(), model={"vocab": vocabulary, "merges": [("Ġ", "Ġ")]})
    theirs = read_by_transformers(ours, tmp_path)
    assert ours.tokenize("x  y  7") == ["x", "Ġ", "Ġ", "y", "ĠĠ", "7"]
    assert theirs.tokenize("x  y  7") == ["x", "Ġ", "Ġ", "y", "Ġ", "Ġ", "7"]


def test_tokenizers_that_the_keys_cannot_describe() -> None:
    from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

    whole = pre_tokenizers.ByteLevel(add_prefix_space=True)
    around = processors.TemplateProcessing(single="$A <s>", special_tokens=[("<s>", 257)])
    assert tokenizer_refusal(byte_level(), 258) is None
    for changes, message in (
        ({"cut": whole}, "cuts text in a way that is neither that of gpt-2 nor of smollm"),
        ({"cut": None}, "cuts text in a way"),
        ({"normalizer": normalizers.NFC()}, "no plain byte-level BPE"),
        ({"model": {"ignore_merges": True}}, "no plain byte-level BPE"),
        ({"model": {"byte_fallback": True}}, "no plain byte-level BPE"),
        ({"model": {"merges": []}}, "no merges"),
        ({"added": "a b"}, "cannot describe the added token 'a b'"),
        ({"added": AddedToken("<x>", lstrip=True)}, "cannot describe the added token '<x>'"),
        ({"around": around}, "puts other tokens around a text"),
    ):
        assert message in str(tokenizer_refusal(byte_level(**changes), 300))
    several = byte_level()
    several.chat_template = {"default": "{{ a }}", "tools": "{{ b }}"}  # type: ignore[assignment]
    assert "several chat templates" in str(tokenizer_refusal(several, 258))
    assert tokenizer_refusal(byte_level(), 257) == "the tokenizer has a token 257, the model 257 tokens"
