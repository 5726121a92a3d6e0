"""`hqlt report` on a study that really trained, and on what it must refuse."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hqlt_dashboards.front import front_members
from hqlt_orchestration.commands.report import options_of, report, report_parts
from hqlt_orchestration.driving.importances import LEAST_TRIALS
from hqlt_orchestration.records.store import Store
from hqlt_orchestration.records.tables import StudyRow
from hqlt_search_space.errors import HqltError, NoResultError
from hqlt_search_space.study import Study

MakeStudy = Callable[..., Study]


def test_the_page_of_a_study_that_trained_is_made_from_the_store_alone_and_without_torch(
    make_training: MakeStudy, store: Store, drive: Callable[[Study, Store], str], tmp_path: Path
) -> None:
    drive(make_training(replication={"seeds": [7, 8]}), store)
    code = (
        "import sys\nfrom hqlt_orchestration.cli import app\n"
        f"app(['report', 'small', '--data', {str(store.data)!r}], standalone_mode=False)\n"
        "print(sorted({'torch', 'ray', 'mlflow', 'matplotlib.pyplot'} & sys.modules.keys()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert (ran.stdout.strip(), ran.stderr.strip()) == ("[]", "written to small-report.html")
    page = (tmp_path / "small-report.html").read_text(encoding="utf-8")
    assert "Finished: 3 of 3 trials (3 complete)." in page
    assert "means over fresh seeds, which had no part in choosing" in page

    with closing(store.open()) as ledger:
        results, background = report_parts(ledger, "small")
    (first, *_) = front_members(results)
    assert f"hqlt rerun small/{first.record.number} --data {store.data}" in page
    assert [said.silent for said in results.importances] == [
        f"3 complete trials are too few: it takes {LEAST_TRIALS}" for _ in results.objectives
    ]
    (environment,) = background.environments
    assert environment.device == "cpu"
    assert len(set(background.backends)) == len(background.backends) > 0


def test_a_command_on_the_page_finds_the_study_and_holds_no_password() -> None:
    assert options_of(Store(Path("hqlt-data"))) == ""
    assert options_of(Store(Path("my data"))) == " --data 'my data'"
    elsewhere = Store(Path("hqlt-data"), "postgresql+psycopg://anna:secret@db/hqlt")
    assert options_of(elsewhere) == ' --store "$HQLT_STORE"'


def test_what_cannot_be_reported_or_written_gets_a_sentence_and_leaves_no_file(
    make_training: MakeStudy, store: Store, tmp_path: Path
) -> None:
    with closing(store.open()) as ledger:
        ledger.add_study(StudyRow.of(make_training()))
    with pytest.raises(NoResultError, match="'small' has no finished trial yet") as refused:
        report("small", tmp_path / "page.html", store)
    assert refused.value.exit_code == 1
    with pytest.raises(HqltError, match=r"cannot write a report as '\.pdf'; give \.html"):
        report("small", tmp_path / "page.pdf", store)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
