"""Card: the README.md of an exported checkpoint. Every number in it comes from the store or from the export itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qfarm.errors import QfarmError
from qfarm.export.formats import Format
from qfarm.export.stored import StoredCell
from qfarm.models.reference import ModelFacts, resolve
from qfarm.record import MetricRow
from qfarm.report.figures import number, plain, size

# Of each evaluation, in this order; a task suite's own metrics follow under their names.
SHOWN = ("perplexity", "word_perplexity", "acc", "acc_norm", "exact_match", "kl", "top1_agreement")
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")


def model_card(stored: StoredCell, chosen: Format, facts: Mapping[str, Any], name: str) -> str:
    """Markdown with the YAML header that model hubs read."""
    licence = licence_of(stored.cell.model)
    header = {
        "base_model": stored.cell.model,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["quantized", facts["format"], "qfarm"],
    } | ({"license": licence} if licence else {})
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=True, allow_unicode=True)}---",
        f"# {plain(name)}\n\n{_line(stored, chosen, facts)}",
        "## What was quantized\n\n" + "\n".join(_quantized(stored, facts)),
        "## How to load it\n\n" + "\n".join(_loading(facts)),
        "## Measured\n\n" + "\n".join(_measured(stored)),
        "## Verified\n\n" + "\n".join(_verified(facts)),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(chosen, facts)),
        "## Licence\n\n" + _licence_text(stored.cell.model, licence),
        "## Made by\n\n" + "\n".join(_made_by(stored, facts)),
    ]
    return "\n\n".join(parts) + "\n"


def _line(stored: StoredCell, chosen: Format, facts: Mapping[str, Any]) -> str:
    row = stored.row
    return (
        f"`{plain(row.model)}` quantized by **{plain(stored.cell.label)}**: {number(row.linear_bits, 'bits')} stored "
        f"bits per weight of its linear layers, written as {facts['format']} ({chosen.summary})."
    )


def _quantized(stored: StoredCell, facts: Mapping[str, Any]) -> Iterator[str]:
    cell, row, sizes = stored.cell, stored.row, facts["sizes"]
    yield f"- base model: `{plain(cell.model)}`, fingerprint `{cell.fingerprint}`"
    yield f"- scheme `{cell.scheme}`, recipe `{cell.recipe}`"
    for method in cell.methods:
        yield f"- {method['name']} (version {method['version']}): `{json.dumps(method['options'], sort_keys=True)}`"
    group = "one scale per output channel" if cell.group_size == -1 else f"groups of {cell.group_size} input columns"
    grid = "symmetric" if cell.symmetric else "asymmetric"
    yield f"- {grid} grids, {group}, scales in {cell.scale_dtype}, everything else in {cell.dtype}"
    if cell.calibration:
        plan = cell.calibration
        yield (
            f"- calibrated on {plan['samples']} windows of {plan['length']} tokens of `{plain(plan['text'])}`, "
            f"seed {cell.seed}"
        )
    alone = facts["left_alone"]
    yield f"- {row.layers_quantized} linear layers quantized, {len(alone)} left alone; embeddings and head untouched"
    yield (
        f"- weight files {sizes['weight_files']:,} bytes ({size(sizes['weight_files'])}), the original "
        f"{sizes['original']:,}: {sizes['weight_files'] / sizes['original']:.1%}. As the report counts them, codes "
        f"and scales of the quantized layers are {sizes['linear']:,} bytes ({number(row.linear_bits, 'bits')} bits per "
        f"weight), everything else {sizes['rest']:,}"
    )


def _loading(facts: Mapping[str, Any]) -> Iterator[str]:
    reader = facts["reader"]
    packages = " ".join(["transformers", *reader["packages"]])
    stated = "" if reader["file"] else ", as `config.json` says"
    yield f"Needs `pip install {packages}`. Load it in **{reader['dtype']}**{stated}:\n"
    yield "```python"
    yield "import torch"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    yield 'folder = "."  # this folder'
    named = f', gguf_file="{reader["file"]}"' if reader["file"] else ""
    yield f"tokenizer = AutoTokenizer.from_pretrained(folder{named})"
    yield reader["snippet"]
    yield "```\n"
    yield (
        f"In {reader['dtype']} the weights are those that were measured, bit by bit. In another dtype the product of "
        "code and scale is rounded once more, and figures may differ from those below."
    )


def _measured(stored: StoredCell) -> Iterator[str]:
    if not stored.metrics:
        yield "The store holds no evaluation of this cell."
        return
    yield "| evaluation | metric | value | standard error | n | original model | change, 95 % interval |"
    yield "|---|---|---|---|---|---|---|"
    original = {(metric.eval_id, metric.metric): metric for metric in stored.baseline}
    for metric in _shown(stored.metrics):
        before = original.get((metric.eval_id, metric.metric))
        cells = (
            plain(metric.evaluation),
            plain(metric.metric),
            number(metric.value, metric.unit, metric.standard_error),
            number(metric.standard_error, metric.unit),
            f"{metric.n:,}",
            number(before.value, before.unit, before.standard_error) if before else "",
            stored.changes.get((metric.eval_id, metric.metric), ""),
        )
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""
    yield (
        f"Measured by qfarm with simulated quantization in {stored.cell.dtype} on {_machine(stored.provenance)}, not "
        "with this file. Differences are paired by document. Protocols, in full:\n"
    )
    for eval_id, protocol in {metric.eval_id: metric.protocol for metric in stored.metrics}.items():
        yield f"- `{eval_id}`: `{plain(protocol)}`"


def _shown(metrics: Sequence[MetricRow]) -> list[MetricRow]:
    rank = {name: index for index, name in enumerate(SHOWN)}
    known = [metric for metric in metrics if metric.metric.partition(",")[0].rpartition(" ")[2] in rank]
    return sorted(known, key=lambda one: (one.evaluation, one.eval_id, rank.get(one.metric, len(rank)), one.metric))


def _machine(provenance: Mapping[str, Any]) -> str:
    return plain(provenance.get("gpu") or provenance.get("cpu") or "an unknown machine")


def _verified(facts: Mapping[str, Any]) -> Iterator[str]:
    found = facts["verified"]
    same, cell = found["same_dtype"], found["cell"]
    tokens = len(facts["text"]["ids"])
    how = "unpacked by a reader of qfarm's own" if facts["reader"]["own"] else "loaded by plain transformers"
    yield (
        f"The export was {how} in a fresh process. Weights of all {len(facts['layers'])} "
        f"quantized layers are bit-equal to the cell's in {facts['reader']['dtype']}. Logits of {tokens} tokens of "
        f"a fixed text differ from the same weights in memory by at most {same['max_abs']:.2g} (bound "
        f"{same['bound']:.2g}; the largest logit is {same['largest_logit']:.3g})."
    )
    yield (
        f"\nAgainst the cell as it was measured, in {facts['quantization']['dtype']}"
        f"{' and without what is left out' if facts['left_out'] else ''}: at most {cell['max_abs']:.2g}, mean KL "
        f"{cell['mean_kl']:.2g} nats, the same first choice for {cell['agreement']:.1%} of the tokens."
    )
    yield (
        "\n`qfarm verify FOLDER` holds every tensor against its SHA-256 in `qfarm_export.json`, then loads the folder "
        "and compares the weights again."
    )


def _limits(chosen: Format, facts: Mapping[str, Any]) -> Iterator[str]:
    for site in facts["left_out"]:
        yield f"**Not included: {site}.** The cell quantizes it as the model runs: the scores hold it, this file not."
    yield from chosen.limits(facts["quantization"]["scheme"])
    for note in facts["notes"]:
        yield plain(note)


def licence_of(model: str) -> str | None:
    """The licence that the base model's own files name, or None."""
    try:
        facts = resolve(model)
    except QfarmError:
        return None  # it was loaded from here a moment ago: only a cache that was emptied meanwhile
    for folder in _folders(facts):
        card = folder / "README.md"
        if card.is_file():
            text = card.read_text(errors="replace")
            if text.startswith("---\n"):
                try:
                    header = yaml.safe_load(text[4:].partition("\n---")[0])
                except yaml.YAMLError:
                    continue
                if isinstance(header, dict) and isinstance(header.get("license"), str):
                    return str(header["license"])
    return None


def _folders(facts: ModelFacts) -> Iterator[Path]:
    if Path(facts.location).is_dir():
        yield Path(facts.location)
        return
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(facts.location, "README.md", revision=facts.revision)
    if isinstance(found, str):
        yield Path(found).parent


def _licence_text(model: str, licence: str | None) -> str:
    known = (
        f"The base model's card names the licence `{plain(licence)}`."
        if licence
        else "The base model's files here do not name a licence: look it up before you pass this on."
    )
    return (
        f"{known} Quantized weights are derived from `{plain(model)}`: its licence and any conditions of use (naming, "
        "attribution, acceptable use, a copy of the licence text) apply to them too. qfarm adds no licence of its own "
        "to weights, and checks none."
    )


def _made_by(stored: StoredCell, facts: Mapping[str, Any]) -> Iterator[str]:
    yield f"qfarm {facts['qfarm']}, commit `{facts['commit'] or 'unknown'}`, cell `{facts['cell_id']}`:\n"
    yield f"    {plain(facts['command'])}\n"
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    measured = ", ".join(f"{name} {version}" for name, version in stored.provenance.get("packages", {}).items())
    yield f"- exported with {packages}"
    yield f"- measured with {plain(measured) or 'unknown versions'}, on {_machine(stored.provenance)}"
