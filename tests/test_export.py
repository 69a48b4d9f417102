"""Export: what reads back, what is refused and why, damage found to the nibble, sizes to the byte."""

from __future__ import annotations

import dataclasses
import json
import shutil
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qfarm import cli
from qfarm.errors import InvalidInput, NotVerified, Unsupported
from qfarm.export import compressed, manifest, reload
from qfarm.export.card import licence_of
from qfarm.export.formats import asked
from qfarm.export.made import _refuse_online
from qfarm.export.run import Exported, export
from qfarm.export.stored import stored_cell
from qfarm.export.verify import Reading, verify
from qfarm.quantized import LowRank, UniformWeight, pack_bits
from qfarm.record import CellRow
from qfarm.report.best import best
from qfarm.report.tables import load
from qfarm.store import Store
from tests.export_example import export_store as export_store
from tests.export_example import say
from tests.test_cli import Run, error
from tests.test_cli import run as run

Write = Callable[..., Exported]


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The script that a fresh process runs, run here: starting one takes seconds."""

    def read(folder: Path, ids: Sequence[int], modules: Sequence[str], text: str, device: str) -> Reading:
        request, result = tmp_path / "request.json", tmp_path / "result.safetensors"
        threads = torch.get_num_threads()
        request.write_text(
            json.dumps({"ids": ids, "modules": modules, "text": text, "device": device, "threads": threads})
        )
        try:
            reload.main(str(folder), str(request), str(result))
        except Exception as error:  # whatever a loader raises ends the fresh process
            raise NotVerified(f"a fresh process cannot load it: {error}") from error
        with safe_open(result, framework="pt") as file:
            found = json.loads(file.metadata()["found"])
            return Reading(logits=file.get_tensor("logits"), **found)

    monkeypatch.setattr("qfarm.export.run.read_afresh", read)
    monkeypatch.setattr("qfarm.export.verify.read_afresh", read)


@pytest.fixture
def write(export_store: Store, tmp_path: Path) -> Write:
    def write(label: str, format: str = "auto", folder: str = "out") -> Exported:
        return export(stored_cell(export_store, label), str(tmp_path / folder), format, None, "qfarm export", say)

    return write


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


# -- what reads back --------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_packed_export_in_a_fresh_process(write: Write, export_store: Store) -> None:
    """The one test with a process of its own: it knows nothing of qfarm and loads what it finds."""
    done = write("gptq w4 g16")
    assert done.format == "compressed-tensors" and done.manifest["reader"]["dtype"] == "float32"
    config = json.loads((done.folder / "config.json").read_text())
    assert config["dtype"] == "float32" and config["quantization_config"]["ignore"] == ["lm_head"]
    checked = done.manifest["verified"]
    assert checked["same_dtype"]["max_abs"] == 0.0 < checked["cell"]["max_abs"]
    assert len(done.manifest["layers"]) == 14
    assert not list(done.folder.parent.glob("*.part"))
    row = stored_cell(export_store, "gptq w4 g16").row
    _is_as_large_as_the_stored_bits_say(done, row)
    card = (done.folder / "README.md").read_text()
    assert f"{row.linear_bits:.3f} bits per weight" in card and "Load it in **float32**" in card


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    ("label", "form", "bits"),
    [("rtn w8a8", "int-quantized", [8]), ("gptq w4/8 g16", "pack-quantized", [4, 8])],
)
def test_other_layouts_of_compressed_tensors(
    write: Write, export_store: Store, label: str, form: str, bits: list[int]
) -> None:
    done = write(label)
    config = json.loads((done.folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == form
    assert sorted(group["weights"]["num_bits"] for group in config["config_groups"].values()) == bits
    assert done.manifest["verified"]["same_dtype"]["max_abs"] == 0.0 < done.manifest["verified"]["cell"]["max_abs"]
    assert ("max|x| / 127.5" in (done.folder / "README.md").read_text()) == (label == "rtn w8a8")
    _is_as_large_as_the_stored_bits_say(done, stored_cell(export_store, label).row)


@pytest.mark.usefixtures("same_process")
def test_what_is_no_uniform_grid_goes_out_in_floating_point(write: Write) -> None:
    done = write("gptq+qera w4 g16")
    assert done.format == "safetensors"
    assert any("not written as compressed-tensors: " in note for note in done.notes)
    assert done.manifest["verified"]["same_dtype"]["max_abs"] == done.manifest["verified"]["cell"]["max_abs"] == 0.0
    assert "same size and speed as the original" in (done.folder / "README.md").read_text()
    config = json.loads((done.folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config


@pytest.mark.usefixtures("same_process")
def test_what_runs_beside_the_weights_is_left_out_only_when_asked(write: Write) -> None:
    with pytest.raises(Unsupported, match=r"no quantizer of the KV cache \(4 bits\).*--format safetensors .*without"):
        write("rtn w4kv4 g16")
    done = write("rtn w4kv4 g16", "safetensors")
    assert done.manifest["left_out"] == ["the KV cache (4 bits)"]
    assert "**Not included: the KV cache (4 bits).**" in (done.folder / "README.md").read_text()
    assert "not included: the KV cache (4 bits)" in done.notes


# -- sizes ------------------------------------------------------------------------------------------------------------


def _is_as_large_as_the_stored_bits_say(done: Exported, row: CellRow) -> None:
    """Codes and scales as counted, the untouched rest, 16 bytes per packed layer for its shape, and a header."""
    path = done.folder / "model.safetensors"
    shapes = 0 if row.scheme == "w8a8" else 16 * row.layers_quantized
    rest = row.model_bytes - row.linear_bytes
    assert path.stat().st_size == header_bytes(path) + row.linear_bytes + shapes + rest
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert row.linear_bytes == row.linear_bits * weights / 8
    assert done.manifest["sizes"]["weight_files"] == path.stat().st_size


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_librarys_packer_and_ours_agree(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(0, 2**bits, (5, 63), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_to_int32(signed, bits), pack_bits(codes, bits))


# -- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path, name: str) -> None:
    """One bit of one code."""
    content = dict(load_file(path))
    content[name].view(torch.uint8)[3, 1] ^= 1
    save_file(content, path, metadata={"format": "pt"})


@pytest.mark.usefixtures("same_process")
def test_damage_is_found_to_the_nibble(write: Write) -> None:
    done = write("gptq w4 g16")
    assert verify(done.folder).faults == ()
    damaged = "model.layers.1.mlp.up_proj.weight_packed"
    flip(done.folder / "model.safetensors", damaged)
    found = verify(done.folder)
    assert found.faults == (f"tensor {damaged}: altered",) and "not loaded: it is damaged" in found.steps
    # Even with a manifest that was made anew, the weights are not those of the cell.
    told = manifest.read(done.folder)
    told |= manifest.hashes(done.folder)
    manifest.write(done.folder, told)
    (fault,) = verify(done.folder).faults
    flip(done.folder / "model.safetensors", damaged)
    told |= manifest.hashes(done.folder)
    manifest.write(done.folder, told)
    assert fault == "1 of 14 layers read back with other weights: model.layers.1.mlp.up_proj"

    # A copy cut into other shards is the same export.
    whole = dict(load_file(done.folder / "model.safetensors"))
    (done.folder / "model.safetensors").unlink()
    save_torch_state_dict(whole, done.folder, max_shard_size=60_000, metadata={"format": "pt"})
    assert len(list(done.folder.glob("*.safetensors"))) > 1
    assert verify(done.folder).faults == ()

    # The other files are guarded too, but for the card, which is its owner's.
    (done.folder / "README.md").write_text("edited")
    (done.folder / "config.json").write_text("{}")
    (done.folder / "tokenizer.json").unlink()
    assert set(verify(done.folder).faults) == {"file config.json: altered", "file tokenizer.json: missing"}
    with pytest.raises(InvalidInput, match="not a folder that `qfarm export` wrote"):
        verify(done.folder.parent)


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("damage", ["nibble", "ignore"])
def test_what_does_not_read_back_is_not_kept(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    usual = compressed._packed

    def packed(layer: Any) -> dict[str, Tensor]:
        parts = {name: part.clone() for name, part in usual(layer).items()}
        if damage == "nibble":
            parts["weight_packed"].view(torch.uint8)[0, 0] ^= 16
        return parts

    monkeypatch.setattr(compressed, "_packed", packed)
    if damage == "ignore":  # the tied head would be looked for in packed form
        monkeypatch.setattr(compressed, "other_linears", lambda *_: [])
    with pytest.raises(NotVerified, match="a fresh process cannot load" if damage == "ignore" else "other weights"):
        write("gptq w4 g16")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "format", "message"),
    [
        ("rtn w4kv4 g16", "compressed-tensors", "compressed-tensors: the format has no quantizer of the KV cache"),
        ("gptq w4 g16", "ggml", 'unknown format "ggml"'),
        ("gptq (act_order=true) w4 g16", "compressed-tensors", "q_proj: columns are grouped out of order"),
        ("baseline w16", "auto", "is the baseline of .*: nothing in it is quantized"),
        ("nonesuch", "auto", '"nonesuch" names no cell of this store'),
    ],
)
def test_refusals_name_the_reason_and_leave_nothing(
    write: Write, tmp_path: Path, label: str, format: str, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        write(label, format)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_layers_that_are_no_integer_grid_are_refused() -> None:
    codes, scale = torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 2, dtype=torch.float16)
    layer = UniformWeight(codes=codes, scale=scale, zero=torch.full((4, 2), 7.5), bits=4, group_size=16, solver="hqq")
    ours = compressed.CompressedTensors()
    assert ours.layer_refusal(layer) == "the zeros of hqq are no integers"
    whole = dataclasses.replace(layer, scale=scale[:1, :1], zero=None)
    assert ours.layer_refusal(whole) == "hqq has one scale for the whole matrix"
    assert ours.layer_refusal(dataclasses.replace(layer, zero=None)) is None


def test_asymmetric_weights_are_refused_before_anything_is_loaded(export_store: Store) -> None:
    stored = stored_cell(export_store, "rtn w4")
    with pytest.raises(Unsupported, match="transformers cannot load asymmetric packed weights; what can hold it: "):
        asked("compressed-tensors", stored.cell)
    found, refused = asked("auto", stored.cell)
    assert [one.name for one in found] == ["safetensors"]
    assert refused == {"compressed-tensors": "transformers cannot load asymmetric packed weights"}
    assert [one.name for one in asked("gptq", stored.cell)[0]] == ["gptq"]


def test_a_library_that_is_missing_is_named_before_anything_is_loaded(
    export_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And `auto` does not turn to a larger file because of it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for format in ("auto", "compressed-tensors"):
        with pytest.raises(Unsupported, match=r"compressed_tensors is not installed: pip install 'qfarm\[export\]'"):
            asked(format, stored_cell(export_store, "gptq w4 g16").cell)


def test_a_folder_that_is_there_is_not_touched(write: Write, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InvalidInput, match="is there already; name a new folder"):
        write("gptq w4 g16")
    assert list((tmp_path / "out").iterdir()) == []


class Altered:
    """A store some of whose columns say something else."""

    def __init__(self, store: Store, table: str, **values: Any) -> None:
        self.store, self.table, self.values = store, table, values

    def read(self, table: str, **options: Any) -> Any:
        import pyarrow as pa

        found = self.store.read(table, **options)
        for name, value in self.values.items() if table == self.table else ():
            if name in found.column_names:
                column = pa.array([value(old) if callable(value) else value for old in found[name].to_pylist()])
                found = found.set_column(found.column_names.index(name), name, column.cast(found[name].type))
        return found


@pytest.mark.parametrize(
    ("table", "values", "message"),
    [
        ("attempts", {"provenance": '{"qfarm": "0.0.1"}'}, "was measured by qfarm 0.0.1, this is "),
        ("cells", {"spec": lambda old: old.replace('"version": 1', '"version": 7')}, "gptq: version 1 here, 7 in the"),
        (
            "cells",
            {"spec": lambda old: old.replace('"group_size"', '"groups"')},
            "its row is of another version of qfarm",
        ),
        ("cells", {"spec": lambda old: old.replace("sha256:", "sha256:0", 1)}, "its row describes cell .*was altered"),
    ],
    ids=["version", "method", "fields", "fingerprint"],
)
def test_a_cell_that_this_code_would_not_make_again(
    export_store: Store, table: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        stored_cell(Altered(export_store, table, **values), "gptq w4 g16")


def test_a_model_or_text_that_changed_is_refused(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("qfarm.worker.text_hash", lambda *_: "sha256:other")
        with pytest.raises(InvalidInput, match="text python-docs .*the job was planned with"):
            write("gptq w4 g16")
    monkeypatch.setattr("qfarm.models.reference._file_hash", lambda *_: "other")
    with pytest.raises(InvalidInput, match="this machine has sha256:"):
        write("gptq w4 g16")
    assert list(tmp_path.iterdir()) == []


def test_layers_that_come_out_differently_are_refused(export_store: Store, tmp_path: Path) -> None:
    altered = Altered(export_store, "layers", weight_error=lambda old: old * (1 + 1e-5))
    with pytest.raises(NotVerified, match="q_proj: quantized again it is not what was measured"):
        export(stored_cell(altered, "gptq w4 g16"), str(tmp_path / "out"), "auto", None, "", say)
    assert list(tmp_path.iterdir()) == []


def test_what_runs_in_the_forward_pass_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """An online rotation, as a transform would install it."""
    from qfarm.export import made
    from qfarm.worker import quantize_linears

    def rotated(session: Any, *rest: Any) -> Any:
        down = session.loaded.blocks[1].mlp.down_proj
        session.loaded.on_restore(down.register_forward_pre_hook(lambda _, inputs: (-inputs[0],)).remove)
        return quantize_linears(session, *rest)

    monkeypatch.setattr(made, "quantize_linears", rotated)
    with pytest.raises(Unsupported, match=r"model\.layers\.1\.mlp\.down_proj: something of Linear is transformed"):
        write("gptq w4 g16", "safetensors")


def test_a_low_rank_branch_is_refused() -> None:
    codes, scale = torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 1, dtype=torch.float16)
    base = UniformWeight(codes=codes, scale=scale, zero=None, bits=4, group_size=-1)
    term = LowRank(base=base, solver="x", left=torch.ones(4, 1), right=torch.ones(1, 32), branch=True)
    plain = types.SimpleNamespace(model=torch.nn.Linear(1, 1))
    with pytest.raises(Unsupported, match="up: its low-rank branch reads unquantized inputs"):
        _refuse_online(plain, {"up": term})  # type: ignore[arg-type]
    _refuse_online(plain, {"up": dataclasses.replace(term, branch=False)})  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_made(write: Write, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="absent: no folder can be made here: No such file or directory"):
        write("gptq w4 g16", folder="absent/out")
    assert list(tmp_path.iterdir()) == []


def test_asymmetric_packed_weights_still_do_not_load(tmp_path: Path, tiny: Path) -> None:
    """Watches the libraries: once this loads, the format need not refuse asymmetric weights any more."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from transformers import AutoModelForCausalLM

    from qfarm.quantizer import Grid

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    grid = Grid(bits=4, group_size=16)
    parts = dict(model.state_dict())
    parts.pop("lm_head.weight")
    kinds = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            layer = grid.quantize(module.weight.detach())
            assert layer.zero is not None
            parts.pop(f"{name}.weight")
            parts |= {f"{name}.{part}": value for part, value in compressed._packed(layer).items()}
            zero = (layer.zero.to(torch.int16) - 8).to(torch.int8)
            parts[f"{name}.weight_zero_point"] = pack_to_int32(zero, 4, packed_dim=0)
            kinds[name] = (4, 16)
    config = json.loads((tiny / "config.json").read_text())
    config["quantization_config"] = compressed.configuration(kinds, ["lm_head"], "pack-quantized")
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous().clone() for k, v in parts.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("same_process")
def test_the_command_and_its_exit_codes(run: Run, export_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ("--store", export_store.location)
    monkeypatch.setenv("NO_COLOR", "1")
    by = stored_cell(export_store, "gptq w4 g16").metrics[0].eval_id
    arguments = ("export", "--best", "--max-bits", "5.3", "--model", "*", "--by", by, "packed", *store)
    monkeypatch.setattr("sys.argv", ["/bin/qfarm", *arguments])
    ran = run(*arguments)
    assert ran.code == 0 and ran.out.endswith(" bytes of weights, verified; see its README.md\n")
    picked = best(load(export_store), "*", 5.3, by)
    assert f"best: {picked.label}, " in ran.err and "too few documents for any test" in ran.err
    assert "\x1b" not in ran.out + ran.err
    assert "qfarm export --best --max-bits 5.3" in Path("packed/README.md").read_text()
    ran = run("verify", "packed")
    assert ran.code == 0 and ran.out.endswith("the export is sound\n")
    flip(Path("packed/model.safetensors"), "model.embed_tokens.weight")
    ran = run("verify", "packed")
    assert ran.code == 1 and ran.out.startswith("tensor model.embed_tokens.weight: altered\n")
    monkeypatch.setattr("qfarm.export.run.compare_weights", lambda *_: ["1 of 14 layers read back wrong"])
    ran = run("export", "gptq w4 g16", "other", *store)
    assert ran.code == 1 and ran.err.endswith(
        "error: compressed-tensors: 1 of 14 layers read back wrong; nothing was kept\n"
    )
    assert not Path("other").exists()


def test_the_shell_can_complete_commands_and_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_QFARM_COMPLETE", "bash_complete")
    for words, expected in (("qfarm exp", "plain,export"), ("qfarm export --be", "plain,--best")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        with pytest.raises(SystemExit):
            cli.main([])
        assert capsys.readouterr().out.split() == [expected]


def test_a_licence_is_copied_from_the_base_models_card(tiny: Path) -> None:
    copy = Path(shutil.copytree(tiny, tiny.parent / "licensed", dirs_exist_ok=True))
    assert licence_of(str(copy)) is None
    (copy / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    assert licence_of(str(copy)) == "apache-2.0"
    for broken in ("---\nlicense: [\n---\n", "no header", "---\nlicense: [a, b]\n---\n"):
        (copy / "README.md").write_text(broken)
        assert licence_of(str(copy)) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("export", "export takes CELL OUT, or --best --max-bits BITS --model NAME OUT"),
        ("export abc", "export takes CELL OUT, or --best"),
        ("export a b --best --max-bits 4 --model m", "export takes CELL OUT, or --best"),
        ("export out --best --model m", "--best needs --max-bits and --model"),
        ("export a b --max-bits 4", "--max-bits, --model and --by choose a cell: they go with --best"),
        ("export a b", "no store named and none remembered"),
        ("verify absent", "absent: no qfarm_export.json (No such file or directory): not a folder"),
    ],
)
def test_bad_input_is_one_line(run: Run, arguments: str, message: str) -> None:
    assert message in error(run(*arguments.split()))
