"""Jobs: text in, a checked job out; a fault is one line with the file, the line, the key and what is valid."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qfarm.errors import JobError
from qfarm.job import MAX_JOB_BYTES, Calibration, Resources, load_job, parse_job
from qfarm.recipe import method_names
from qfarm.scheme import parse_scheme
from tests.job_example import JOB, PATH, changed, ids

EVERYTHING = """\
name: everything
models: [org/model, ./folder]
methods:
  - rtn
  - gptq:
  - gptq: {act_order: true, damping: 0.05, on_worse: retry}
bits: [w4, 3, w4/8]
group_sizes: [-1, 128]
symmetric: true
scale_dtype: bfloat16
dtype: float16
statistics: independent
calibration: {text: wikitext2, samples: 8, length: 64}
seeds: [0, 1]
evaluate:
  - perplexity: {text: wikitext2, length: 64, windows: 3}
  - perplexity: {text: c4}
include:
  - {methods: [rtn], bits: [w8], group_sizes: [-1]}
exclude:
  - {model: org/model, method: gptq, bits: 3, group_size: -1, seed: 1}
resources: {gpus: 0.5, cpus: 2, workers: 3}
retries: 0
store: results/everything
"""


def error_of(text: str, path: str = PATH) -> str:
    with pytest.raises(JobError) as caught:
        parse_job(text, path)
    return str(caught.value)


def method(entry: str) -> str:
    return changed(methods=f"\n  - rtn\n  - {entry}")


# -- what works -------------------------------------------------------------------------------------------------------


def test_a_job_with_every_key() -> None:
    job = parse_job(EVERYTHING, "x.yaml")
    main, extra = job.blocks
    assert main.models == ("org/model", "./folder")
    assert [recipe.name for recipe in main.recipes] == ["rtn", "gptq", "gptq"]
    assert main.recipes[2].solver is not None
    assert main.recipes[2].solver.options() | {"act_order": True, "damping": 0.05} == main.recipes[2].solver.options()
    assert main.schemes == (parse_scheme("w4"), parse_scheme("w3"), parse_scheme("w4/8"))
    assert (main.group_sizes, main.seeds) == ((-1, 128), (0, 1))
    assert [recipe.name for recipe in extra.recipes] == ["rtn"] and extra.group_sizes == (-1,)
    assert (extra.models, extra.seeds) == (main.models, main.seeds)  # what is not said is the matrix's
    assert [evaluator.label for evaluator in job.evaluations] == ["perplexity wikitext2 64 x3", "perplexity c4 2048"]
    assert job.exclude[0].seed == 1
    assert job.file.calibration == Calibration(text="wikitext2", samples=8, length=64)
    assert job.file.resources == Resources(gpus=0.5, cpus=2, workers=3)
    assert (job.file.symmetric, job.file.statistics, job.file.retries) == (True, "independent", 0)


def test_defaults_are_those_of_the_papers() -> None:
    file = parse_job("models: [m]\nevaluate: [perplexity: {text: c4}]\n", "some/folder/short.yaml").file
    assert file.name == "short"  # the file's own
    assert file.calibration == Calibration(text="c4", samples=128, length=2048)
    assert (file.dtype, file.scale_dtype, file.statistics) == ("bfloat16", "float16", "sequential")
    assert (file.group_sizes, file.seeds, file.resources.gpus, file.store) == ([-1], [0], 1, "results")


def test_comments_order_and_quotes_change_no_identity() -> None:
    data = yaml.safe_load(JOB)
    turned = yaml.safe_dump({key: data[key] for key in reversed(list(data))}, default_flow_style=False)
    assert turned.index("evaluate") < turned.index("models")
    assert ids(turned) == ids(JOB)
    assert ids("# a comment\n" + JOB.replace("[w4]", "['w4']  # four bits")) == ids(JOB)
    assert ids(changed(name="other", retries="5", store="elsewhere")) == ids(JOB)


def test_the_same_evaluation_is_measured_once() -> None:
    twice = JOB + "  - perplexity: {length: 32, text: python-docs, divergence: true}\n"
    assert len(parse_job(twice, PATH).evaluations) == 1
    assert len(parse_job(JOB + "  - perplexity: {length: 33, text: python-docs}\n", PATH).evaluations) == 2


@pytest.mark.parametrize("gpus", [0, 0.25, 1, 8])
def test_a_worker_takes_a_part_of_a_gpu_or_several(gpus: float) -> None:
    assert parse_job(JOB + f"resources: {{gpus: {gpus}}}\n", PATH).file.resources.gpus == gpus


def test_a_job_of_the_baseline_alone() -> None:
    assert parse_job(changed(methods=None, bits=None), PATH).blocks[0].recipes == ()


# -- what does not ----------------------------------------------------------------------------------------------------

METHODS = ", ".join(method_names())
FAULTS = {
    # name: (job, line, the rest of the message)
    "unknown key": (
        JOB + "metods: [rtn]\n",
        9,
        'metods: unknown key "metods", did you mean "methods"? known: bits, calibration, ',
    ),
    "misspelt key that is needed": (
        JOB.replace("models", "modls"),
        2,
        'modls: unknown key "modls", did you mean "models"? known: bits, calibration, ',
    ),
    "unknown key, nothing near": (JOB + "zzz: 1\n", 9, 'zzz: unknown key "zzz"; known: bits, '),
    "unknown key in calibration": (
        changed(calibration="\n  samples: 3\n  lenght: 4"),
        8,
        'calibration.lenght: unknown key "lenght", did you mean "length"? known: length, samples, text',
    ),
    "unknown key in resources": (
        JOB + "resources: {gpu: 1}\n",
        9,
        'resources.gpu: unknown key "gpu", did you mean "gpus"? known: cpus, gpu_memory, gpus, price, workers',
    ),
    "unknown key in include": (
        JOB + "include:\n  - methods: [rtn]\n    bit: [w4]\n",
        11,
        'include[0].bit: unknown key "bit", did you mean "bits"? known: bits, group_sizes, methods, models, seeds',
    ),
    "unknown key in exclude": (
        JOB + "exclude:\n  - {bits: w4}\n  - {methods: rtn}\n",
        11,
        'exclude[1].methods: unknown key "methods", did you mean "method"? known: bits, group_size, method, ',
    ),
    "a scalar for a list": (changed(group_sizes="64"), 5, "group_sizes: input should be a valid list, got 64"),
    "text for a number": (
        changed(group_sizes="[64, b]"),
        5,
        "group_sizes[1]: input should be a valid integer, got 'b'",
    ),
    "a list for a mapping": (
        changed(calibration="[c4]"),
        6,
        "calibration: a mapping with the keys text, samples, length is needed, got ['c4']",
    ),
    "nothing for text": (JOB + "store:\n", 9, "store: input should be a valid string, got None"),
    "empty text": (JOB + "store: ''\n", 9, "store: string should have at least 1 character, got ''"),
    "empty model": (changed(models="['']"), 2, "models[0]: string should have at least 1 character, got ''"),
    "no model": (changed(models="[]"), 2, "models: list should have at least 1 item after validation, not 0, got []"),
    "a date": (JOB + "store: 2020-01-02\n", 9, "store: input should be a valid string, got datetime.date(2020, 1, 2)"),
    "bad name": (changed(name="a b"), 1, "name: string should match pattern '^[A-Za-z0-9]"),
    "unknown dtype": (
        JOB + "dtype: fp16\n",
        9,
        "dtype: input should be 'bfloat16', 'float16' or 'float32', got 'fp16'",
    ),
    "unknown statistics": (
        JOB + "statistics: both\n",
        9,
        "statistics: input should be 'sequential' or 'independent', got 'both'",
    ),
    "true as group size": (
        changed(group_sizes="[true]"),
        5,
        "group_sizes[0]: input should be a valid integer, got True",
    ),
    "true as width": (changed(bits="[true]"), 4, "bits[0]: input should be a valid string or input should be a valid"),
    "true as seed": (JOB + "seeds: [0, true]\n", 9, "seeds[1]: input should be a valid integer, got True"),
    "true as retries": (JOB + "retries: true\n", 9, "retries: input should be a valid integer, got True"),
    "true as gpus": (JOB + "resources: {gpus: yes}\n", 9, "resources.gpus: input should be a valid number, got True"),
    "true as samples": (
        changed(calibration="{samples: on}"),
        6,
        "calibration.samples: input should be a valid integer, got True",
    ),
    "1 as switch": (JOB + "symmetric: 1\n", 9, "symmetric: input should be a valid boolean, got 1"),
    "fractional samples": (
        changed(calibration="{samples: 1.5}"),
        6,
        "calibration.samples: input should be a valid integer, got 1.5",
    ),
    "no samples": (
        changed(calibration="{samples: 0}"),
        6,
        "calibration.samples: input should be greater than or equal to 1, got 0",
    ),
    "one and a half gpus": (
        JOB + "resources: {gpus: 1.5}\n",
        9,
        "resources.gpus: input should be a part of one GPU or a whole number of them, got 1.5",
    ),
    "infinite gpus": (JOB + "resources: {gpus: .inf}\n", 9, "resources.gpus: input should be a finite number, got inf"),
    "negative seed": (JOB + "seeds: [-1]\n", 9, "seeds[0]: input should be greater than or equal to 0, got -1"),
    "seed of 33 bits": (JOB + "seeds: [4294967296]\n", 9, "seeds[0]: input should be less than 4294967296, got"),
    "too many retries": (JOB + "retries: 21\n", 9, "retries: input should be less than or equal to 20, got 21"),
    "unknown method": (method("gtpq"), 5, 'methods[1]: unknown method "gtpq", did you mean "gptq"? known: ' + METHODS),
    "method in capitals": (
        method("GPTQ"),
        5,
        'methods[1]: unknown method "GPTQ", did you mean "gptq"? known: ' + METHODS,
    ),
    "method without a name": (method("5"), 5, "methods[1]: expected a method name or {name: options}, got 5"),
    "two methods in one": (
        method("{rtn: , gptq: }"),
        5,
        "methods[1]: expected a method name or {name: options}, got {",
    ),
    "unknown option": (
        method("gptq: {act_oder: true}"),
        5,
        'methods[1]: gptq: unknown option "act_oder", did you mean "act_order"? known: act_order, convention, ',
    ),
    "option out of range": (
        method("gptq: {damping: 2}"),
        5,
        "methods[1]: gptq: damping: input should be less than 1, got 2",
    ),
    "option of another type": (
        method("gptq: {act_order: 1}"),
        5,
        "methods[1]: gptq: act_order: input should be a valid boolean, got 1",
    ),
    "option not in the list": (
        method("gptq: {on_worse: ignore}"),
        5,
        "methods[1]: gptq: on_worse: input should be 'report', 'retry' or 'rtn', got 'ignore'",
    ),
    "options that are a number": (method("gptq: 5"), 5, "methods[1]: gptq: options are a mapping, got 5"),
    "options that are false": (method("gptq: no"), 5, "methods[1]: gptq: options are a mapping, got False"),
    "options that are a list": (method("gptq: []"), 5, "methods[1]: gptq: options are a mapping, got []"),
    "stray options in a chain": (
        method("rtn+gptq: {damping: 0.1}"),
        5,
        'methods[1]: rtn+gptq: options of a chain stand under its methods\' names, got "damping"',
    ),
    "a chain's options that are a number": (
        method("rtn+gptq: {gptq: 3}"),
        5,
        "methods[1]: rtn+gptq: gptq: options are a mapping, got 3",
    ),
    "two solvers": (
        method("rtn+gptq"),
        5,
        "methods[1]: rtn+gptq: rtn and gptq both quantize weights; a recipe has one weight solver",
    ),
    "a method twice": (method("gptq + gptq"), 5, "methods[1]: gptq + gptq: a method stands twice"),
    "a chain that ends early": (method("gptq+"), 5, 'methods[1]: unknown method ""; known: ' + METHODS),
    "unknown scheme": (changed(bits="[w4, x4]"), 4, 'bits[1]: scheme "x4" is not understood; examples: w4, w4a16, '),
    "a width of 17": (changed(bits="[w17]"), 4, 'bits[0]: scheme "w17": widths are 1 to 16 bits'),
    "a group of one": (
        changed(group_sizes="[1]"),
        5,
        "group_sizes[0]: group size 1: use -1 (per channel) or at least 2",
    ),
    "a group of none": (
        changed(group_sizes="[0]"),
        5,
        "group_sizes[0]: group size 0: use -1 (per channel) or at least",
    ),
    "unknown evaluation": (
        JOB + "  - perplexty: {text: c4}\n",
        9,
        'evaluate[1]: unknown evaluation "perplexty", did you mean "perplexity"? known: ',
    ),
    "unknown option of an evaluation": (
        JOB + "  - perplexity: {text: c4, window: 3}\n",
        9,
        'evaluate[1]: perplexity: unknown option "window", did you mean "windows"? known: convention, ',
    ),
    "an evaluation without its text": (
        JOB + "  - perplexity\n",
        9,
        'evaluate[1]: perplexity: the option "text" is missing',
    ),
    "an evaluation's option out of range": (
        JOB + "  - perplexity: {text: c4, length: 1}\n",
        9,
        "evaluate[1]: perplexity: length: input should be greater than or equal to 2, got 1",
    ),
    "an evaluation that is a number": (
        JOB + "  - 5\n",
        9,
        "evaluate[1]: expected an evaluation's name or {name: options}, got 5",
    ),
    "unknown text of an evaluation": (
        JOB + "  - perplexity: {text: wikitxt2}\n",
        9,
        'evaluate[1]: unknown text "wikitxt2", did you mean "wikitext2"? known: c4, c4-new, python-docs, ',
    ),
    "unknown text of the calibration": (
        changed(calibration="\n  samples: 3\n  text: foo"),
        8,
        'calibration.text: unknown text "foo"; known: c4, c4-new, python-docs, ',
    ),
    "unknown method in include": (
        JOB + "include:\n  - {bits: [w8]}\n  - {methods: [gtpq]}\n",
        11,
        'include[1].methods[0]: unknown method "gtpq", did you mean "gptq"?',
    ),
    "unknown scheme in exclude": (JOB + "exclude: [{bits: x3}]\n", 9, 'exclude[0].bits: scheme "x3" is not understood'),
    "a key twice": (JOB + "name: y\n", 1, "name: the key stands twice (again in line 9)"),
    "an option twice": (
        method("gptq:\n      damping: 0.1\n      damping: 0.2"),
        6,
        "methods[1].gptq.damping: the key stands twice (again in line 7)",
    ),
    "a number as key": (JOB + "5: x\n", 9, "a key must be text, got 5 (quote it if it is)"),
    "a number as option": (method("gptq: {1: 2}"), 5, "a key must be text, got 1 (quote it if it is)"),
    "a list as key": (JOB + "? [a]\n: x\n", 9, "a key must be text, got a list or a mapping"),
    "a merge": (JOB + "<<: {retries: 1}\n", 9, "a key must be text, got <<"),
    "an alias": (JOB + "seeds: &a [0]\nretries: *a\n", 10, "YAML aliases (*a) are not supported in job files"),
    "an alias of itself": (JOB + "include: &a [*a]\n", 9, "YAML aliases (*a) are not supported in job files"),
    "YAML that ends early": (
        JOB + "bits: [w4\n",
        10,
        "not valid YAML: while parsing a flow sequence: expected ',' or ']'",
    ),
    "a tab": (JOB + "\tretries: 1\n", 9, "not valid YAML: while scanning for the next token: found character '\\t'"),
    "a control character": (JOB + "store: a\x07\n", 9, "not valid YAML: the character '\\x07' is not allowed"),
    "a foreign object": (JOB + "store: !!python/object:os.system x\n", 9, "not valid YAML: could not determine a"),
    "two jobs": (JOB + "---\n" + JOB, 9, "not valid YAML: expected a single document in the stream"),
    "endless depth": (JOB + "include: " + 5000 * "[" + 5000 * "]", 9, "nested more than 20 levels deep"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_that_says_where_and_what(name: str) -> None:
    text, line, rest = FAULTS[name]
    message = error_of(text)
    assert message.startswith(f"{PATH}: line {line}: {rest}")
    assert "\n" not in message and len(message) < 400


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        (changed(models=None), 'the key "models" is missing'),
        (changed(evaluate=None), 'the key "evaluate" is missing'),
        (changed(bits=None), "bits: is empty although methods is not; nothing would be quantized"),
        (changed(methods="[]"), "methods: is empty although bits is not; nothing would be quantized"),
        ("", "a job is a mapping with the keys name, models, "),
        ("# nothing yet\n", "a job is a mapping with the keys name, models, "),
        ("- rtn\n", "a job is a mapping with the keys name, models, "),
        ("rtn\n", "a job is a mapping with the keys name, models, "),
        (JOB + "retries: " + 5000 * "9", "not valid YAML: Exceeds the limit (4300 digits)"),
        (JOB + "store: 2020-13-01", "not valid YAML: month must be in 1..12"),
    ],
)
def test_faults_that_have_no_line(text: str, rest: str) -> None:
    message = error_of(text)
    assert message.startswith(f"{PATH}: {rest}") and "\n" not in message


def test_an_include_that_would_quantize_nothing() -> None:
    text = changed(methods=None, bits=None, include="\n  - {methods: [rtn]}")
    line = text[: text.index("  - {methods")].count("\n") + 1
    assert error_of(text) == (
        f"{PATH}: line {line}: include[0]: bits: is empty although methods is not; nothing would be quantized"
    )


def test_what_was_given_is_quoted_in_short() -> None:
    assert len(error_of(changed(group_sizes="[" + 10_000 * "x" + "]"))) < 200
    assert len(error_of(changed(group_sizes="{" + ", ".join(f"k{i}: 1" for i in range(1000)) + "}"))) < 200


# -- files ------------------------------------------------------------------------------------------------------------


def test_load_job_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("\ufeff" + JOB, encoding="utf-8")  # editors on Windows put a byte order mark
    assert load_job(path).file.name == "example"
    assert load_job(path).path == str(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(JobError) as caught:
            load_job(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"{path}: ")

    assert message(tmp_path / "absent.yaml") == "cannot read the job file: No such file or directory"
    assert message(tmp_path) == "cannot read the job file: Is a directory"
    latin, huge = tmp_path / "latin.yaml", tmp_path / "huge.yaml"
    latin.write_bytes(b"name: caf\xe9\n")
    assert message(latin).startswith("cannot read the job file: 'utf-8' codec can't decode byte 0xe9 in position 9")
    huge.write_text("#" * (MAX_JOB_BYTES + 1))
    assert message(huge) == f"larger than {MAX_JOB_BYTES} bytes, which no job file is"


JOBS = sorted((Path(__file__).parents[1] / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_the_jobs_of_this_repository_are_valid_and_say_what_they_are_for(path: Path) -> None:
    load_job(path)
    assert path.read_text().startswith("# ")


def test_the_main_jobs_are_there() -> None:
    assert {"quickstart.yaml", "llama_matrix.yaml"} <= {path.name for path in JOBS}
