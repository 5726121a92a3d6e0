"""Study files: what users read when something is wrong, and what a hostile file cannot do."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hqlt_search_space.errors import StudyFileError
from hqlt_search_space.study import Name
from hqlt_search_space.study_file import load_study, read_study, study_schema
from hqlt_search_space.yaml_nodes import MAX_BYTES, MAX_INTEGER, Unrepresentable, resolve_plain
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

STUDIES = Path(__file__).parents[2] / "search_space" / "studies"

GOOD = """\
# yaml-language-server: $schema=study.schema.json
schema_version: 1
name: parity-blends
task: {kind: parity, train_length: {low: 3, high: 40}}
model: {d_model: 64, n_heads: 2}
search:
  sampler: {kind: random}
  space:
    ratio: [3:1, 1:0]
    window: [4, null]
    learning_rate: {low: 1e-3, high: 1.0E-2, scale: log}
objectives: {validation_accuracy: maximize}
constraints: {parameters: {max: 500_000}}
budget: {trials: 4}
"""


def refusal(text: str | bytes) -> StudyFileError:
    raw = text.encode() if isinstance(text, str) else text
    with pytest.raises(StudyFileError) as caught:
        read_study(raw, "mine.yaml")
    return caught.value


def test_a_good_file_is_read_with_numbers_as_numbers_and_ratios_as_words() -> None:
    study = read_study(GOOD.encode(), "good.yaml")
    assert study.model_dump(mode="json", exclude_unset=True)["search"]["space"] == {
        "ratio": ["3:1", "1:0"],
        "window": [4, None],
        "learning_rate": {"low": 0.001, "high": 0.01, "scale": "log"},
    }
    assert study.constraints["parameters"].max == 500_000


def test_the_sample_of_the_design_reads_as_promised() -> None:
    text = """\
schema_version: 1
name: parity-blends
task: {kind: parity}
search:
  space:
    window: [4]
    rule: [delta, gated_delt]

    windows: [4]
objectives: {validation_accuracy: maximize}
constraints:
  parameters: {max: lots}
budget: {trials: 4}
"""
    assert str(refusal(text)) == (
        "mine.yaml: 3 problems\n"
        "  7:19  search.space.rule[1]: no rule 'gated_delt'; did you mean 'gated_delta'?\n"
        "  9:5  search.space.windows: unknown key; did you mean 'window'?\n"
        "  12:21  constraints.parameters.max: 'lots' is not a number"
    )


def test_every_kind_of_mistake_is_told_where_and_what_would_be_right() -> None:
    text = """\
schema_version: 2
name: ../x
task: {kind: paritty}
model: {d_model: wide, n_heads: 2.5, branch_norm: yes, second: softmax, depth: 3}
search:
  sampler: {kind: nsga2, population: 1}
  seeds: []
  space:
    ratio: [3-1, 0:0]
    window: [0, true]
    beta_range: [3]
    mixing: sum
    fw_chunk: [windo]
    learning_rate: {low: 0, high: 1, scal: log}
objectives: {validation_accuracy: maximise}
constraints: {paramters: {max: 1}, state_bytes: 3}
early_stopping: {eta: 1}
budget: {trials: 0}
resources: {gpu: many}
"""
    assert refusal(text).problems == (
        "1:17  schema_version: 2 is not 1",
        "2:7  name: '../x' is not a name: "
        "letters, digits, '.', '_' and '-', at most 128, the first a letter or a digit",
        "3:7  task: no task 'paritty'; did you mean 'parity'?",
        "4:18  model.d_model: 'wide' is not a whole number",
        "4:33  model.n_heads: 2.5 is not a whole number",
        "4:51  model.branch_norm: 'yes' is not true or false",
        "4:64  model.second: no second 'softmax'; there is attention, fast_weight, hybrid",
        "4:73  model.depth: unknown key; there is first, second, ratio, placement, blend, mixing, branch_norm, window, "
        "attention_window, rule, feature_map, normaliser and 13 more",
        "6:38  search.sampler.population: 1 is below the least allowed, 2",
        "7:10  search.seeds: needs at least one entry",
        "9:13  search.space.ratio[0]: '3-1' is not a ratio such as 3:1, 1:0 or 0:1",
        "9:18  search.space.ratio[1]: '0:0' is not a ratio such as 3:1, 1:0 or 0:1",
        "10:14  search.space.window[0]: 0 is below the least allowed, 1",
        "10:17  search.space.window[1]: true is not a whole number",
        "11:18  search.space.beta_range[0]: 3 is not 1 or 2",
        "12:13  search.space.mixing: 'sum' is not a list; write ['sum']",
        "13:16  search.space.fw_chunk[0]: 'windo' is not window or a number; did you mean 'window'?",
        "14:38  search.space.learning_rate.scal: unknown key; did you mean 'scale'?",
        "15:35  objectives.validation_accuracy: 'maximise' is not minimize or maximize; did you mean 'maximize'?",
        "16:15  constraints.paramters: no cost of that name; did you mean 'parameters'?",
        "16:49  constraints.state_bytes: 3 is not a mapping of keys to values",
        "17:17  early_stopping: required key 'rungs' is missing",
        "17:23  early_stopping.eta: 1 is not above 1",
        "18:18  budget.trials: 0 is below the least allowed, 1",
        "19:18  resources.gpu: 'many' is not auto or a number",
    )


def test_problems_between_keys_are_told_at_their_place() -> None:
    text = GOOD.replace("trials: 4", "parallel: 2").replace("model: {", "model: {normaliser: time, ")
    assert refusal(text).problems == (
        "5:21  model.normaliser: normaliser has no meaning for any model of this study (rule is not additive)",
        "14:9  budget: a search needs budget.trials, the number of trials to run",
    )


def test_a_missing_block_is_told_at_the_top() -> None:
    text = GOOD.replace("budget: {trials: 4}\n", "").replace("name: parity-blends\n", "")
    assert refusal(text).problems == ("2:1  study: required key 'name' is missing",)


def test_a_misspelt_key_is_not_also_missing() -> None:
    assert refusal(GOOD.replace("objectives:", "objectivs:")).problems == (
        "12:1  objectivs: unknown key; did you mean 'objectives'?",
    )


def test_a_number_for_a_ratio_is_told_what_a_ratio_is() -> None:
    (problem,) = refusal(GOOD.replace("ratio: [", "ratio: [3, ")).problems
    assert problem.endswith("search.space.ratio[0]: 3 is not a ratio such as 3:1, 1:0 or 0:1")


def test_a_space_that_nothing_satisfies_is_refused_with_the_constraint() -> None:
    problem = refusal(GOOD.replace("500_000", "500")).problems[0]
    assert problem.startswith("13:14  constraints: no config of this space satisfies parameters max 500 (the nearest")


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    problem = refusal(GOOD.replace("n_heads: 2", "n_heads: 3")).problems[0]
    assert problem == "13:14  constraints: no config of this space can be built: n_heads 3 does not divide d_model 64"


def test_a_cell_that_cannot_be_matched_is_refused() -> None:
    text = """\
schema_version: 1
name: x
task: {kind: parity}
ablation: {vary: {first: [fast_weight]}, match: state}
objectives: {validation_accuracy: maximize}
"""
    assert "4:11  ablation: ablation cell first=fast_weight: no model of this kind has state_bytes" in str(
        refusal(text)
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "1:1  the file is empty"),
        ("# only a comment\n", "1:1  the file is empty"),
        ("null\n", "1:1  the file is empty; a study is a mapping of keys to values"),
        ("- 1\n", "1:1  the file is a list; a study is a mapping of keys to values"),
        ("study\n", "1:1  the file is a single value; a study is a mapping of keys to values"),
        (
            "a: [1, 2\nb: 3\n",
            "2:2  not YAML: expected ',' or ']', but got ':' (while parsing a flow sequence that begins",
        ),
        ("a:\n\tb: 1\n", "2:1  not YAML: a tab; indent with spaces"),
        ("a: 1\n  b: 2\n", "2:4  not YAML: mapping values are not allowed here"),
        ("a: 1\na: 2\n", "2:1  key 'a' is given twice; first in line 1"),
        ("a: &x 1\n", "1:4  anchor &x: anchors are not read; write the value out"),
        ("a: *x\n", "1:4  alias *x: aliases are not read; write the value out"),
        ("a: {<<: {b: 1}}\n", "1:5  merge keys (<<) are not read; write the keys out"),
        ("a: !!python/object/apply:os.system [ls]\n", "1:4  tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("a: !!str 3\n", "1:4  tag tag:yaml.org,2002:str: tags are not read"),
        ("a: 1\n---\nb: 2\n", "2:1  a second document starts here; a study file holds one"),
        ("? [a]\n: 1\n", "1:3  a key must be a word, not a list or a mapping"),
        ("a: .inf\n", "1:4  .inf is not a finite number"),
        ("a: 1e999\n", "1:4  1e999 is too large for a number"),
        ("a: 9007199254740993\n", "1:4  9007199254740993 is too large: whole numbers go up to 9,007,199,254,740,992"),
        ('a: "\\ud800"\n', "1:4  half of a surrogate pair is not a character"),
        ("a: \x00\n", "1:1  not YAML: unacceptable character #x0000"),
    ],
    ids=lambda text: repr(text)[:24],
)
def test_what_is_not_plain_yaml_is_refused_at_its_place(text: str, problem: str) -> None:
    assert refusal(text).problems[0].startswith(problem)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"schema_version: 1\nname: \xff\n", "2:7  byte 0xff is not UTF-8; save the file in that encoding"),
        ("a: 1".encode("utf-16"), "1:1  byte 0xff is not UTF-8; save the file in that encoding"),
        (b"#" * (MAX_BYTES + 1), "the file is larger than 256 KiB"),
    ],
    ids=["byte", "utf16", "large"],
)
def test_bytes_that_are_no_text_are_refused(raw: bytes, problem: str) -> None:
    assert refusal(raw).problems == (problem,)


def test_a_byte_order_mark_is_not_part_of_the_study() -> None:
    assert read_study(b"\xef\xbb\xbf" + GOOD.encode(), "x").name == "parity-blends"


HOSTILE = {
    "billion laughs": "a: &a [x, x]\n" + "".join(f"a{i}: &a{i} [{'*a, ' * 9}*a]\n" for i in range(50)),
    "merge bomb": "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60)),
    "itself": "&a [*a]",
    "tags": "a: !!python/object/apply:os.system [touch canary]\n",
    "5000 digits": "a: " + "9" * 5000,
    "hexadecimal": "a: 0x" + "f" * 200_000,
    "underscores": "a: 1" + "_1" * 100_000,
    "sexagesimal": "a: " + "1:59" * 50_000,
    "exponent": "a: 1e" + "9" * 200_000,
    "flow nesting": "[" * 5000,
    "mapping nesting": "{a: " * 5000,
    "block nesting": "\n".join(" " * i + "a:" for i in range(600)),
    "dashes": "- " * 100_000,
    "many values": "[" + "1," * 100_000 + "]",
    "many keys": "\n".join(f"k{i}: 1" for i in range(20_000)),
    "long key": "k" * 200_000 + ": 1",
    "long word": "name: " + "x" * 200_000,
    "comments": "# x\n" * 60_000,
    "empty lines": "\n" * 200_000,
    "block text": "a: |\n" + " x\n" * 60_000,
    "folded text": "a: x" + "\n\n" * 100_000 + " b",
    "escapes": 'a: "' + "\\x41" * 60_000 + '"',
    "bad escape": 'a: "\\UFFFFFFFF"',
    "quotes": "'" * 200_001,
    "questions": "? " * 100_000,
    "exclamation": "!" * 200_000,
    "anchors": "[" + "&a 1, " * 9000 + "]",
    "aliases": "[" + "*a, " * 9000 + "]",
    "terminal": 'name: "\\x1b[2J"\n"\\x1b[31m": 3',
    "ten megabytes": "x" * 10_000_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_within_a_second_in_few_words(name: str) -> None:
    raw = HOSTILE[name].encode()
    cpu_s = []
    while (
        len(cpu_s) < 3 and min(cpu_s, default=9.9) >= 1.0
    ):  # a busy machine, or a collection of garbage, may spoil one
        before = time.process_time()
        message = str(refusal(raw))
        cpu_s.append(time.process_time() - before)
    assert min(cpu_s) < 1.0
    assert len(message) < 20_000
    assert all(line.isprintable() for line in message.splitlines())


def test_hostile_files_need_little_memory() -> None:
    """In a process of its own: the peak of this one is that of all tests before."""
    code = (
        "import json, sys\n"
        "from hqlt_search_space.study_file import read_study\n"
        "from hqlt_search_space.errors import StudyFileError\n"
        "for text in json.load(sys.stdin):\n"
        "    try:\n"
        "        read_study(text.encode(), 'x')\n"
        "    except StudyFileError:\n"
        "        pass\n"
        # Not ru_maxrss: a child process begins with its parent's.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    texts = json.dumps([HOSTILE[name] for name in HOSTILE if name != "ten megabytes"])
    ran = subprocess.run([sys.executable, "-c", code], input=texts, capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 200 * 1024  # KiB


def test_a_deep_but_allowed_file_is_read_to_its_schema_errors() -> None:
    text = "a: " + "[" * 30 + "]" * 30
    assert "a: unknown key" in str(refusal(text))
    assert "nested deeper than 32 levels" in str(refusal("a: " + "[" * 33 + "]" * 33))


@given(st.text(max_size=200))
def test_any_text_is_a_study_or_a_sentence(text: str) -> None:
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        return
    assert refusal(raw).problems


NAME: TypeAdapter[str] = TypeAdapter(Name)


@given(st.text(max_size=140) | st.from_regex(r"[A-Za-z0-9._/\\%-]{1,140}", fullmatch=True))
def test_no_accepted_name_leaves_its_folder(name: str) -> None:
    try:
        NAME.validate_python(name)
    except ValidationError:
        return
    path = (Path("/data/studies") / name).resolve()
    assert path.parent == Path("/data/studies")
    assert len(name) <= 128
    assert name.isascii()
    assert name.isprintable()


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/etc", "a/b", "a\\b", "%2e%2e/x", "-rf", ".hidden", "a\n", "a\x00", "é", "a" * 129, "a b"],
    ids=repr,
)
def test_a_name_that_is_no_plain_file_name_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        NAME.validate_python(name)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0", 0),
        ("+12", 12),
        ("012", 12),
        ("0o17", 15),
        ("0x1F", 31),
        ("500_000", 500_000),
        ("-1_000", -1000),
        ("1__0", "1__0"),
        ("_1", "_1"),
        ("1_", "1_"),
        ("3:1", "3:1"),
        ("1:59:59", "1:59:59"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("True", True),
        ("false", False),
        ("~", None),
        ("", None),
        ("NULL", None),
        ("none", "none"),
        ("2024-01-01", "2024-01-01"),
        (str(MAX_INTEGER), MAX_INTEGER),
        ("0" * 5000 + "7", 7),
        ("0x" + "0" * 5000 + "7", 7),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_plain_words_are_read_by_yaml_1_2(text: str, value: object) -> None:
    found = resolve_plain(text)
    assert found == value
    assert type(found) is type(value)


@given(st.integers() | st.integers(-(2**54), 2**54))
def test_a_whole_number_is_read_exactly_or_refused(number: int) -> None:
    found = resolve_plain(str(number))
    assert found == number if abs(number) <= MAX_INTEGER else isinstance(found, Unrepresentable)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_read_exactly(number: float) -> None:
    assert resolve_plain(repr(number)) == number


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda folder: folder / "missing.yaml", "there is no such file"),
        (lambda folder: folder, "this is a folder; give the study's YAML file"),
        (lambda folder: folder / ("x" * 5000), "the file cannot be read: File name too long"),
        (lambda folder: f"{folder}/a\x00b", "the file cannot be read: "),
        (lambda folder: os.mkfifo(folder / "pipe") or folder / "pipe", "this is no file but a pipe"),
        (lambda folder: "/dev/zero", "this is no file but a pipe, a socket or a device"),
    ],
    ids=["missing", "folder", "long", "nul", "pipe", "endless device"],
)
def test_a_path_that_cannot_be_read_gets_a_sentence(tmp_path: Path, make, problem: str) -> None:
    with pytest.raises(StudyFileError) as caught:
        load_study(make(tmp_path))
    assert caught.value.problems[0].startswith(problem)


def test_the_committed_schema_is_fresh() -> None:
    """Renew it with: hqlt schema > search_space/studies/study.schema.json"""
    assert json.loads((STUDIES / "study.schema.json").read_text()) == study_schema()


def test_the_schema_describes_every_key() -> None:
    def undescribed(node: object, path: str) -> list[str]:
        if isinstance(node, list):
            return [found for i, part in enumerate(node) for found in undescribed(part, f"{path}[{i}]")]
        if not isinstance(node, dict):
            return []
        own = [
            f"{path}.{key}"
            for key, value in node.get("properties", {}).items()
            if not {"description", "$ref", "const"} & value.keys()
        ]
        return own + [found for key, part in node.items() for found in undescribed(part, f"{path}.{key}")]

    assert undescribed(study_schema(), "") == []


def test_every_example_study_is_one_and_an_editor_can_complete_it() -> None:
    for path in STUDIES.glob("*.yaml"):
        assert load_study(path).name == path.stem
        assert "# yaml-language-server: $schema=study.schema.json" in path.read_text()
