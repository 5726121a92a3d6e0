"""Names, links and databases that mean harm: nothing is written outside the data folder, and no code of theirs runs."""

import json
import os
import pickle
import random
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hqlt_orchestration.cli import main
from hqlt_orchestration.commands.studies import Machine, run, with_data
from hqlt_orchestration.records.database import masked
from hqlt_orchestration.records.store import Store
from hqlt_orchestration.tracking.mirror import Mirror
from hqlt_search_space.errors import HqltError, StoreError
from hqlt_search_space.study import Name, Study
from hqlt_search_space.study_file import load_study
from pydantic import TypeAdapter, ValidationError

NAME: TypeAdapter[str] = TypeAdapter(Name)
PARTS = [
    "..",
    ".",
    "/",
    "\\",
    "%2e",
    "%2f",
    "~",
    "\0",
    "\n",
    "\r",
    " ",
    "-",
    "a",
    "A",
    "0",
    "_",
    "\u00e9",
    "\u2024",
    "\uff0f",
    "con",
]


def test_of_ten_thousand_names_none_leads_out_of_the_data_folder() -> None:
    """The schema lets through what the store does; both refuse the rest."""
    store = Store(Path("/nowhere/data"))
    generator = random.Random(0)
    n_accepted = 0
    for _ in range(10_000):
        parts = PARTS if generator.random() < 0.5 else ["a", "b.", "..", "-", "_", "9"]
        name = "".join(generator.choices(parts, k=generator.choice([1, 2, 3, 5, 8, 60])))
        try:
            NAME.validate_python(name)
        except ValidationError:
            with pytest.raises(StoreError, match="is no name of a study"):
                store.study_folder(name)
            continue
        n_accepted += 1
        for path in (store.study_folder(name), store.trial_folder(name, 3), store.spool_folder(name)):
            assert Path(os.path.normpath(path)) == path
            assert path.is_relative_to(f"/nowhere/data/studies/{name}")
            assert path != Path("/nowhere/data/studies")
    assert 100 < n_accepted < 9_000


@pytest.fixture
def stored(
    tmp_path: Path, make_study: Callable[..., Study], capsys: pytest.CaptureFixture[str], shared: Path
) -> Iterator[Store]:
    """A copy of a store with the complete study `small`, in a folder `data` beside a file that nobody may touch."""
    if not shared.exists():
        file = tmp_path / "small.json"
        file.write_text(make_study("random", trials=3, recipe={"steps": 3}).model_dump_json())
        assert run(file, Store(shared), Machine("inline")) == 0
    shutil.copytree(shared, tmp_path / "data")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    yield Store(tmp_path / "data")
    assert (tmp_path / "precious" / "file").read_text() == "mine"
    assert len(list((tmp_path / "precious").iterdir())) == 1
    assert not (tmp_path / "canary").exists()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared") / "data"


def hqlt(monkeypatch: pytest.MonkeyPatch, store: Store, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["hqlt", *arguments, "--data", str(store.data)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def execute(store: Store, *statements: str) -> None:
    with sqlite3.connect(store.data / "hqlt.db") as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


@pytest.mark.parametrize("command", [["resume"], ["delete", "--yes"], ["gc"]], ids=lambda command: command[0])
@pytest.mark.parametrize(
    "place", ["studies/small", "studies/small/trials", "studies/small/trials/0000/seed-0"], ids=lambda place: place[8:]
)
def test_no_command_writes_or_removes_through_a_link(
    place: str, command: list[str], stored: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    execute(stored, "UPDATE hqlt_studies SET state = 'open', budget = 4")
    link = stored.data / place
    shutil.rmtree(link, ignore_errors=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(stored.data.parent / "precious")
    executor = ["--executor", "inline"] if command == ["resume"] else []
    code = hqlt(monkeypatch, stored, "study", command[0], "small", *command[1:], *executor)
    assert (code, "is a link; hqlt follows none" in capsys.readouterr().err) == (2, True)


def renamed(store: Store, name: str) -> None:
    with sqlite3.connect(store.data / "hqlt.db") as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("UPDATE hqlt_studies SET name = ?", [name])
        for table in ("trials", "replicas", "attempts"):
            connection.execute(f"UPDATE hqlt_{table} SET study = ?", [name])
    connection.close()


@pytest.mark.parametrize("name", ["../../precious", "..", "/etc", "a/../../../precious", "small\n"], ids=repr)
def test_a_name_that_somebody_wrote_into_the_ledger_is_refused(
    name: str, stored: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    renamed(stored, name)
    for command in (["study", "delete", name, "--yes"], ["study", "gc", name]):
        assert hqlt(monkeypatch, stored, *command) == 2
        assert "is no name of a study" in capsys.readouterr().err
    assert stored.open().study(name).name == name  # nothing was removed first


FOREIGN: dict[str, tuple[list[str], str]] = {
    "trigger": (
        ["CREATE TRIGGER t AFTER UPDATE ON hqlt_studies BEGIN DELETE FROM hqlt_trials; END"],
        "has a trigger 't' that hqlt did not make",
    ),
    "endless view": (
        [
            "ALTER TABLE hqlt_studies RENAME TO x",
            "CREATE VIEW hqlt_studies AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
            " SELECT x.* FROM x, n",
        ],
        "has a view 'hqlt_studies' that hqlt did not make",
    ),
    "later version": (["UPDATE hqlt_schema SET version = 999"], "has ledger version 999, this hqlt reads version"),
    "no version": (["DELETE FROM hqlt_schema"], "has ledger version None"),
    "missing table": (["DROP TABLE hqlt_trials"], "lacks a table of hqlt's"),
    "missing column": (["ALTER TABLE hqlt_studies DROP COLUMN note"], "lacks a column of hqlt's"),
    "pickled study": (
        [f"UPDATE hqlt_studies SET study = CAST(X'{pickle.dumps(print).hex()}' AS TEXT)"],
        "has bytes where hqlt writes text",
    ),
    "pickled study in base 16": (
        [f"UPDATE hqlt_studies SET study = '{pickle.dumps(print).hex()}'"],
        "the store holds a Study that this hqlt cannot read",
    ),
    "deep study": (
        ["UPDATE hqlt_studies SET study = replace(hex(zeroblob(50000)), '00', '[')"],
        "the store holds a Study that this hqlt cannot read",
    ),
    "other result": (
        ['UPDATE hqlt_replicas SET result = \'{"replicas": [{"checkpoint": "/etc"}]}\''],
        "the store holds a TrialResult that this hqlt cannot read",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_database_that_is_not_ours_gets_a_sentence(
    case: str, stored: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    statements, sentence = FOREIGN[case]
    execute(stored, *statements)
    assert hqlt(monkeypatch, stored, "study", "status", "small") == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"not a database " * 100, b"SQLite format 3\x00" + b"\xff" * 4096], ids=len)
def test_a_file_that_is_no_database_gets_a_sentence(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    (tmp_path / "hqlt.db").write_bytes(content)
    assert hqlt(monkeypatch, store, "study", "status", "small") == 2
    said = capsys.readouterr().err
    assert any(part in said for part in ("is not a database", "is damaged", "no study 'small'")), said


class _Harm:
    """Makes a file as soon as it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self._canary,)


def test_pickles_in_a_database_are_not_unpickled_by_any_command(
    stored: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Optuna's CMA-ES would unpickle from a trial's attributes, and Optuna's file of a journal's snapshot."""
    harm = pickle.dumps(_Harm(tmp_path / "canary"))
    value = json.dumps(harm.hex())
    execute(
        stored,
        *(
            "INSERT INTO trial_system_attributes (trial_id, key, value_json)"
            f" SELECT trial_id, '{key}', '{value}' FROM trials"
            for key in ("cma:optimizer:0", "cma:optimizer", "sepcma:optimizer:0")
        ),
        "INSERT INTO study_system_attributes (study_id, key, value_json)"
        f" SELECT study_id, 'cma', '{value}' FROM studies",
        "UPDATE hqlt_studies SET state = 'open', budget = 4",
    )
    for path in (stored.data / "studies/small").rglob("step-*"):
        (path / ".metadata").write_bytes(harm)
    artifacts = stored.artifacts / "small" / "model"
    artifacts.mkdir(parents=True)
    (artifacts / "python_model.pkl").write_bytes(harm)
    (artifacts / "MLmodel").write_text("flavors: {python_function: {loader_module: canary, python_model: model.pkl}}")
    assert hqlt(monkeypatch, stored, "study", "resume", "small", "--executor", "inline") == 0
    assert hqlt(monkeypatch, stored, "study", "status", "small") == 0
    assert hqlt(monkeypatch, stored, "pareto", "small", "--out", str(tmp_path / "front.html")) == 0
    assert hqlt(monkeypatch, stored, "doctor", "--study", "small") in (0, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_database_of_mlflow_does_not_say_where_artifacts_are_written(stored: Store, tmp_path: Path) -> None:
    with sqlite3.connect(stored.data / "mlflow.db") as connection:
        connection.execute("UPDATE experiments SET artifact_location = ?", [str(tmp_path / "precious")])
    connection.close()
    mirror = Mirror(stored.mlflow_uri, stored.artifacts, "small")
    run = mirror._runs["search", 0]
    mirror._keep_text(run, "{}", "trial.json")
    mirror._keep(run, [str(tmp_path / "data" / "hqlt.db")])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("run", ["../../../precious", "linked"], ids=["id of a run", "link"])
def test_an_artifact_that_would_lead_elsewhere_is_refused(run: str, stored: Store, tmp_path: Path) -> None:
    with sqlite3.connect(stored.data / "mlflow.db") as connection:  # it was copied from elsewhere
        place = str(stored.artifacts.resolve() / "small")
        connection.execute("UPDATE experiments SET artifact_location = ?", [place])
    connection.close()
    mirror = Mirror(stored.mlflow_uri, stored.artifacts, "small")
    (stored.artifacts / "small").mkdir(parents=True, exist_ok=True)
    (stored.artifacts / "small" / "linked").symlink_to(tmp_path / "precious")
    with pytest.raises(HqltError, match="leads out of"):
        mirror._keep_text(run, "{}", "trial.json")


@pytest.mark.parametrize(
    "text",
    [
        "postgresql+psycopg://anna:hidden@db/hqlt",
        "http://anna:hidden@host:5000/api: 500",
        "sqlite:///a.db and postgresql://anna:hidden@db/x?sslmode=off",
        "postgresql://db/hqlt?user=anna&password=hidden",
        "two: http://a:hidden@b and https://:hidden@c",
    ],
)
def test_no_password_of_a_url_is_shown(text: str) -> None:
    assert "hidden" not in masked(text)
    assert masked("http://host:5000/a@b") == "http://host:5000/a@b"


def test_the_writer_is_given_no_url_that_others_can_read(tmp_path: Path) -> None:
    from hqlt_orchestration.tracking.spool import Spool

    spool = Spool(Store(tmp_path, "postgresql://anna:hidden@127.0.0.1:9/x", "http://anna:hidden@127.0.0.1:9"), "small")
    command = Path(f"/proc/{spool._writer.pid}/cmdline").read_bytes()
    spool.close(20)
    said = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert (b"hidden" in command, b"hidden" in said) == (False, False)


def test_a_relative_corpus_is_beside_its_study_file_from_wherever_it_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "text.txt").write_text("a line of text\n" * 200)
    study = {
        "schema_version": 1,
        "name": "text",
        "task": {"kind": "language_modelling", "corpus": "text.txt", "context": 8, "n_validation_bytes": 64},
        "model": {"d_model": 8, "n_layers": 1, "n_heads": 1, "mlp_ratio": 1},
        "recipe": {"steps": 2, "batch": 2},
        "search": {"sampler": {"kind": "random"}, "space": {"first": ["attention"], "window": [4]}},
        "objectives": {"validation_bits_per_byte": "minimize"},
        "budget": {"trials": 1},
        "resources": {"gpu": 0},
    }
    (folder / "study.yaml").write_text(json.dumps(study))
    store = Store(tmp_path / "data")
    monkeypatch.chdir(elsewhere)
    assert run(Path("../folder/study.yaml"), store, Machine("inline")) == 0
    assert f'"corpus":"{folder}/text.txt"' in store.open().study("text").study
    monkeypatch.chdir(folder)
    assert with_data(load_study("study.yaml"), Path()) == with_data(load_study(folder / "study.yaml"), folder)
