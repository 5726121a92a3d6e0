"""What this repository promises about itself: checked here, so that nobody has to remember it."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("search_space", "kernels", "trainer", "dashboards", "orchestration")
SOURCES = sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
CONSTRAINTS = (ROOT / "constraints.txt").read_text().splitlines()

FORBIDDEN = {
    "unpickling runs code": r"\bpickle\.loads?\(",
    "torch's loader may unpickle": r"weights_only\s*=\s*False",
    "numpy's loader may unpickle": r"allow_pickle\s*=\s*True",
    "YAML tags may build objects": r"\byaml\.(unsafe_|full_)?load\(",
    "evaluated text runs code": r"(?<![\w.])(eval|exec)\(",
    "a model hub's code would run": r"trust_remote_code",
}


@pytest.mark.parametrize(("why", "pattern"), FORBIDDEN.items(), ids=FORBIDDEN.keys())
def test_nothing_that_a_user_hands_us_can_run_code(why, pattern):
    found = [str(path.relative_to(ROOT)) for path in SOURCES if re.search(pattern, path.read_text())]
    assert found == [], why


def test_every_module_says_what_it_is_for():
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in SOURCES}
    assert [name for name, text in texts.items() if text.strip() and ast.get_docstring(ast.parse(text)) is None] == []


def test_an_ignored_finding_carries_its_code():
    bare = re.compile(r"#\s*(type:\s*ignore(?!\[)|noqa(?!:))")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (*SOURCES, *TESTS)
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if bare.search(line) and path != Path(__file__)
    ]
    assert found == []


def test_constraints_name_one_public_version_of_each_package_and_no_index():
    pins = [line for line in CONSTRAINTS if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin)] == []
    names = [_normalised(pin) for pin in pins]
    assert len(names) == len(set(names))


def test_constraints_pin_every_package_that_the_project_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = [
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["postgres"],
        *(entry for group in project["dependency-groups"].values() for entry in group if isinstance(entry, str)),
    ]
    pinned = {_normalised(line) for line in CONSTRAINTS}
    assert {_normalised(requirement) for requirement in named} - pinned == set()


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert text.lstrip().startswith("Apache License\n                           Version 2.0, January 2004")
    assert "END OF TERMS AND CONDITIONS" in text


def _normalised(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", name.group()).lower() if name else ""
