"""The `hqlt` command as a user meets it: one study from its file to its removal, and every wrong request."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hqlt_orchestration.cli import main

HQLT = Path(sys.executable).parent / "hqlt"
STUDY = """\
schema_version: 1
name: tiny
task: {kind: parity, train_length: {low: 3, high: 8}, test_length: {low: 8, high: 12}, n_validation: 64, n_test: 64}
model: {d_model: 16, n_layers: 1, n_heads: 2, mlp_ratio: 2}
recipe: {steps: 300, batch: 8}
search:
  sampler: {kind: random}
  space:
    first: [hybrid, fast_weight, attention]
    window: [2, 4]
    rule: [additive, delta]
objectives: {validation_loss_nats: minimize, state_bytes: minimize}
budget: {trials: 3, parallel: 2}
resources: {gpu: 0}
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hqlt(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a command in this process; exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hqlt", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_help_imports_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom hqlt_orchestration.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print(sorted({'torch', 'ray', 'mlflow', 'optuna', 'sqlalchemy', 'numpy', 'pydantic'} & sys.modules.keys()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_study_is_interrupted_resumed_looked_at_run_again_and_removed(hqlt: Run, tmp_path: Path, ray: None) -> None:
    (tmp_path / "tiny.yaml").write_text(STUDY)
    interrupted = subprocess.Popen(
        [HQLT, "study", "run", "tiny.yaml", "--executor", "inline"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("hqlt-data/studies/tiny/trials/*/seed-0/log.txt")):
        assert interrupted.poll() is None, interrupted.communicate()
        time.sleep(0.05)
    interrupted.send_signal(signal.SIGINT)
    _, said = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 1
    assert "hqlt study resume tiny" in said

    code, out, err = hqlt("study", "resume", "tiny")
    assert (code, "Traceback" in err) == (0, False), err
    assert "loss nats" in out
    assert max(map(len, out.splitlines())) <= 80

    code, out, _ = hqlt("study", "status", "tiny", "--json")
    status = json.loads(out)
    assert list(status) == ["name", "budget", "trials", "front", "hypervolume"]
    assert status["trials"] == {
        "complete": 3,
        "stopped": 0,
        "failed": 0,
        "running": 0,
        "waiting": 0,
        "paused": 0,
        "quarantined": 0,
    }
    assert hqlt("study", "run", "tiny.yaml", "--executor", "inline")[0] == 0  # nothing left to do
    assert "3 of 3" in hqlt("study", "status")[1]

    for suffix in ("json", "csv", "html", "parquet", "png"):
        assert hqlt("pareto", "tiny", "--out", f"front.{suffix}")[0] == 0
        assert (tmp_path / f"front.{suffix}").stat().st_size > 100
    (best, *_) = json.loads((tmp_path / "front.json").read_text())
    assert {"trial_id", "number", "arch", "recipe", "objectives", "replicas"} <= set(best)
    assert status["front"][0] == best["trial_id"]

    code, out, _ = hqlt("rerun", best["trial_id"][:8], "--json")
    again = json.loads(out)
    assert (code, again["trial_id"], again["identical"]) == (0, best["trial_id"], True), out
    assert again["stored"] == again["measured"]

    code, out, _ = hqlt("rerun", "tiny/0", "--steps", "5", "--set", "recipe.learning_rate=1e-4", "--seed", "9")
    assert code == 0
    assert "with steps=5, learning_rate=0.0001, seed=9: complete at step 5" in out

    assert "train_loss_nats" in hqlt("logs", "tiny/0")[1]
    code, out, _ = hqlt("doctor", "--json", "--study", "tiny")
    assert (code, json.loads(out)["study"]["problems"]) == (0, [])
    assert {"versions", "devices", "backends", "stores"} <= set(json.loads(out))
    runs = mlflow_runs(tmp_path / "hqlt-data" / "mlflow.db")
    assert [status for name, status in runs if name == "search"] == ["FINISHED"]
    assert {status for _, status in runs} == {"FINISHED"}
    assert len(runs) == 1 + 3 + 1 + 2  # search and its trials, rerun and its runs

    assert hqlt("study", "gc", "tiny")[0] == 0
    assert hqlt("study", "delete", "tiny", "--yes")[0] == 0
    assert not (tmp_path / "hqlt-data" / "studies" / "tiny").exists()
    assert hqlt("study", "status", "tiny")[0] == 2


def mlflow_runs(database: Path) -> list[tuple[str, str]]:
    connection = sqlite3.connect(database)
    runs = connection.execute("SELECT name, status FROM runs").fetchall()
    connection.close()
    return runs


@pytest.fixture
def made(hqlt: Run, tmp_path: Path) -> Run:
    """`hqlt` beside a store that holds the study `nothing` with a trial, and without results."""
    from hqlt_orchestration.records.ledger import NewTrial
    from hqlt_orchestration.records.store import Store
    from hqlt_orchestration.records.tables import StudyRow
    from hqlt_search_space.study_file import load_study

    file = tmp_path / "nothing.yaml"
    file.write_text(STUDY.replace("tiny", "nothing"))
    study = load_study(file)
    ledger = Store(tmp_path / "hqlt-data").open()
    ledger.add_study(StudyRow.of(study))
    ledger.add_trial(study.name, NewTrial("search", next(iter(study.configs()))[1], {}, {}, study.seeds))
    ledger.close()
    return hqlt


WRONG: dict[str, tuple[list[str], str]] = {
    "unknown file": (["study", "run", "no.yaml"], "no.yaml: 1 problem"),
    "unknown study": (["study", "status", "nothin"], "no study 'nothin'; did you mean 'nothing'?"),
    "resume of unknown": (["study", "resume", "x"], "no study 'x'"),
    "path as a name": (["pareto", "../nothing"], "no study '../nothing'"),
    "unknown trial": (["rerun", "nothing/4"], "no trial 'nothing/4'"),
    "no number": (["rerun", "nothing/first"], "no trial 'nothing/first'; did you mean 'nothing/0'?"),
    "unknown id": (["logs", "abcdef"], "no trial 'abcdef'; there is nothing/0"),
    "a study for a trial": (["study", "cancel", "nothing"], "did you mean 'nothing/0'?"),
    "front without results": (["pareto", "nothing"], "no complete trial yet"),
    "unknown suffix": (["pareto", "nothing", "--out", "front.xls"], "front.xls"),
    "table of a search": (["ablation", "nothing"], "is a search"),
    "extend by nothing": (["study", "extend", "nothing", "--trials", "0"], "greater than or equal to 1"),
    "no data folder": (["study", "list", "--data", "elsewhere"], "no studies in elsewhere"),
    "unknown database": (["study", "list", "--store", "sqlite:////proc/no.db"], "/proc"),
    "no PostgreSQL": (["study", "list", "--store", "postgresql+psycopg://u:secret@127.0.0.1:1/x"], "cannot reach"),
    "not a URL": (["study", "list", "--store", "nonsense"], "nonsense"),
}


@pytest.mark.parametrize("case", WRONG, ids=list(WRONG))
def test_a_wrong_request_gets_a_sentence(case: str, made: Run) -> None:
    arguments, sentence = WRONG[case]
    code, _, err = made(*arguments)
    assert sentence in " ".join(err.split())
    assert "Traceback" not in err
    assert "secret" not in err
    assert code == (1 if "without results" in case else 2)


def test_an_interrupt_gets_a_sentence_before_the_first_trial_and_none_where_it_is_how_one_ends(
    made: Run, tmp_path: Path
) -> None:
    def started(*arguments: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([HQLT, "study", *arguments], cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)

    watched, run = started("status", "--watch"), started("run", "nothing.yaml", "--executor", "inline")
    assert watched.stdout is not None
    assert run.stderr is not None
    assert "nothing" in watched.stdout.readline()
    assert "results go to" in run.stderr.readline()
    for command in (watched, run):
        command.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert "continue with: hqlt study resume nothing" in said or "on: hqlt study resume nothing" in said, said
    assert (run.returncode, "Traceback" in said) == (1, False), said
    assert (watched.wait(60), watched.communicate()[1]) == (0, "")


def test_a_study_of_the_same_name_and_another_space_is_refused_with_the_difference(made: Run, tmp_path: Path) -> None:
    file = tmp_path / "other.yaml"
    file.write_text(STUDY.replace("tiny", "nothing").replace("window: [2, 4]", "window: [2, 8]"))
    code, _, err = made("study", "run", str(file))
    assert code == 2
    assert "study 'nothing' exists with other contents" in err
    assert "search.space.window: [2,8] in the file, [2,4] in the store" in err


def test_a_space_in_which_nothing_satisfies_the_constraints_is_refused_by_name(hqlt: Run, tmp_path: Path) -> None:
    (tmp_path / "tight.yaml").write_text(STUDY + "constraints: {parameters: {max: 10}}\n")
    for command in (["study", "validate"], ["study", "run"], ["cost"]):
        code, _, err = hqlt(*command, "tight.yaml")
        assert (code, "parameters" in err) == (2, True), err


def test_a_corpus_that_is_not_there_is_told_before_anything_runs(hqlt: Run, tmp_path: Path) -> None:
    parity = next(line for line in STUDY.splitlines() if line.startswith("task: "))
    (tmp_path / "text.yaml").write_text(STUDY.replace(parity, "task: {kind: language_modelling, corpus: no/text.txt}"))
    for command in (["study", "validate"], ["study", "run"], ["cost"]):
        code, _, err = hqlt(*command, "text.yaml")
        assert (code, f"task.corpus: there is no {tmp_path / 'no/text.txt'}" in err) == (2, True), err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_gets_a_sentence(hqlt: Run, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(STUDY)
    (tmp_path / "locked").mkdir(mode=0o500)
    code, _, err = hqlt("study", "run", "tiny.yaml", "--data", "locked")
    assert (code, "cannot write to" in err) == (2, True)


def test_a_damaged_database_gets_a_sentence(made: Run, tmp_path: Path) -> None:
    (tmp_path / "hqlt-data" / "hqlt.db").write_bytes(b"not a database at all, " * 100)
    code, _, err = made("study", "list")
    assert (code, "is not a database" in err, "Traceback" in err) == (2, True, False)


def test_the_plan_and_its_cost_are_printed_without_training(hqlt: Run, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(STUDY)
    code, out, _ = hqlt("study", "run", "tiny.yaml", "--dry-run")
    assert code == 0
    assert "3 trials (random)" in out
    assert "parameters" in out
    assert not (tmp_path / "hqlt-data").exists()
    schema: dict[str, Any] = json.loads(hqlt("schema")[1])
    assert "search" in schema["properties"]
