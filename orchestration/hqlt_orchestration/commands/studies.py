"""What the `hqlt study` commands do: run, resume, extend, cancel, delete, free."""

import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hqlt_dashboards.front import front
from hqlt_search_space.errors import HqltError, StudyConflictError
from hqlt_search_space.study import Study
from hqlt_search_space.tasks import LanguageModelling, Task
from hqlt_search_space.trial import StudyResults

from hqlt_orchestration.commands.plan import checked_study, corpus_place, some_configs
from hqlt_orchestration.commands.room import check_room
from hqlt_orchestration.driving.doors import doors, open_doors_sentence
from hqlt_orchestration.driving.packing import Need, need_of
from hqlt_orchestration.driving.progress import ProgressView
from hqlt_orchestration.records.database import shown
from hqlt_orchestration.records.drivers import living
from hqlt_orchestration.records.ledger import Ledger
from hqlt_orchestration.records.results import study_results
from hqlt_orchestration.records.store import Store
from hqlt_orchestration.records.tables import FINISHED, StudyRow

if TYPE_CHECKING:
    from hqlt_orchestration.driving.executor import Executor
    from hqlt_orchestration.driving.runner import Ending
    from hqlt_orchestration.tracking.spool import Spool

ExecutorName = Literal["ray", "inline"]


class UsageError(HqltError):
    """A request that makes no sense for the study or trial it names."""


DRAIN_S = 60.0  # how long the end of a study waits for MLflow
PAUSED_DRAIN_S = 5.0  # and a pause, of which a cluster may give notice only 30 s before


@dataclass(frozen=True)
class Machine:
    """Where trials are to run."""

    executor: ExecutorName = "ray"
    ray_address: str | None = None


def run(file: Path, store: Store, machine: Machine) -> int:
    """Start the study in `file`, or join or continue it if it is in the store. Returns the exit code.

    Raises:
        StudyConflictError: a study of that name is in the store and differs in what makes a study the same.
        HqltError: the file, the data or the store cannot be used.
    """
    study = with_data(checked_study(file), file.parent)
    text = file.read_text(encoding="utf-8")
    ledger = store.open()
    new = StudyRow.of(study, text)
    stored = ledger.add_study(new)
    if stored.space_hash != study.space_hash:
        raise StudyConflictError(study.name, study.differences(Study.from_json(stored.study)))
    if stored != new:
        study = _update(ledger, stored, study)
    return _drive(study, store, ledger, machine)


def resume(name: str, store: Store, machine: Machine) -> int:
    """Continue the study `name` after any kind of stop. Returns the exit code."""
    ledger = store.open_existing()
    return _drive(Study.from_json(ledger.study(name).study), store, ledger, machine)


def with_data(study: Study, folder: Path) -> Study:
    """`study` with the place (`corpus_place`) and the hash of its corpus, if it reads one.

    Raises:
        DataError: the corpus cannot be used.
    """
    changes: dict[str, object] = {"task": _found(study.task, folder)}
    if study.ablation is not None:
        others = tuple(
            other.model_copy(update={"task": _found(other.task, folder)}) for other in study.ablation.also_on
        )
        changes["ablation"] = study.ablation.model_copy(update={"also_on": others})
    return study.model_copy(update=changes)


def _found(task: Task, folder: Path) -> Task:
    if not isinstance(task, LanguageModelling):
        return task
    from hqlt_trainer.corpus import fingerprint

    place = corpus_place(task, folder)
    if place is not None:
        task = task.model_copy(update={"corpus": str(place)})
    if task.data_sha256 is not None:
        return task
    return task.model_copy(update={"data_sha256": fingerprint(task)})


def _update(ledger: Ledger, stored: StudyRow, study: Study) -> Study:
    """Take over what may change in a study that runs: parallelism, resources, replication, and a larger budget.

    `budget.trials` of the stored study stays as it was, because the population of NSGA follows from it and a study
    must not change its sequence of suggestions; the ledger's budget is what counts.
    """
    before = Study.from_json(stored.study)
    budget = before.budget.model_copy(update={"parallel": study.budget.parallel})
    changes = {"budget": budget, "resources": study.resources, "replication": study.replication}
    merged = before.model_copy(update=changes)
    larger = max(stored.budget, study.n_trials)
    if merged != before or larger != stored.budget:
        ledger.update_study(study.name, study=merged.model_dump_json(), budget=larger, state="open")
    return merged


def _drive(study: Study, store: Store, ledger: Ledger, machine: Machine) -> int:
    """Run `study` until it ends or is interrupted, and print what came of it."""
    if ledger.study(study.name).state == "complete":
        more = f"; for more trials: hqlt study extend {study.name} --trials N" if study.search is not None else ""
        print(f"study {study.name} is complete{more}", file=sys.stderr)
        return _conclude(study, study_results(ledger, study.name), "complete")
    store.refuse_links(study.name)
    try:
        ending = _run_to_an_end(study, store, ledger, machine)
    except KeyboardInterrupt:
        ledger.update_study(study.name, state="paused")
        print(f"ended at once; from the last checkpoints on: hqlt study resume {study.name}", file=sys.stderr)
        return 1
    return _conclude(study, study_results(ledger, study.name), ending)


def _run_to_an_end(study: Study, store: Store, ledger: Ledger, machine: Machine) -> "Ending":
    """Run `study` until it is complete or pauses.

    Raises:
        KeyboardInterrupt: Ctrl-C before the first trial, or the second one.
    """
    with ExitStack() as stack:
        stack.callback(ledger.close)
        # Ray takes seconds to start: it does so while the samplers and the tables are loaded.
        started = stack.enter_context(_in_background(lambda: make_executor(study, machine, ledger)))
        view = stack.enter_context(ProgressView(study.name))
        view.say(f"study {study.name}: results go to {store.data}")
        if warning := check_room(study, _n_left(ledger, study.name), store):
            view.say(warning)

        def executor() -> "Executor":
            found = started()
            warning = open_doors_sentence(doors())
            if warning is not None:
                view.say(warning)
            return found

        from hqlt_orchestration.driving.interrupts import Interrupts
        from hqlt_orchestration.driving.runner import Driver
        from hqlt_orchestration.tracking.spool import Spool

        proposer = None
        if study.search is not None:
            from hqlt_orchestration.driving.sampler import Proposer

            proposer = Proposer(study, ledger)
        spool = Spool(store, study.name)
        ledger.update_study(study.name, state="open", note=None)
        driver = Driver(
            study,
            store=store,
            ledger=ledger,
            executor=executor,
            proposer=proposer,
            spool=spool,
            view=view,
            interrupts=Interrupts(),
        )
        drain_s = 0.0
        try:
            ending = driver.run()
            drain_s = DRAIN_S if ending == "complete" else PAUSED_DRAIN_S
            ledger.update_study(study.name, state=ending)
            if ending == "complete":
                _export_front(study_results(ledger, study.name), store, spool)
        finally:
            left = spool.close(drain_s)
        if spool.broken:
            view.say("the disk was full for a while: what MLflow lacks, `hqlt ui` tells it; the study lacks nothing")
        if left:
            view.say(
                f"MLflow at {shown(store.mlflow_uri)} took not everything: {left:,} bytes wait in "
                f"{store.spool_folder(study.name)} and are sent with the next run"
            )
    return ending


def _n_left(ledger: Ledger, name: str) -> int:
    """Trials of the budget that have not ended."""
    counts = ledger.counts(name)
    return ledger.study(name).budget - sum(counts[state] for state in FINISHED)


def _conclude(study: Study, results: StudyResults, ending: str) -> int:
    if ending == "paused":
        print(f"paused; continue with: hqlt study resume {study.name}", file=sys.stderr)
        return 1
    from hqlt_orchestration.commands.look import ablation_texts, metric_of, screen_width

    if not any(record.state == "complete" for record in results.trials):
        print(f"study {study.name}: no trial has a result; see: hqlt study status {study.name}", file=sys.stderr)
        return 1
    if study.ablation is not None:
        print(ablation_texts(results, metric_of(study)), end="")
        print(
            f"\nnext: hqlt report {study.name}   all of it on one page"
            f"\n      hqlt ablation {study.name} --out table.md",
            file=sys.stderr,
        )
        return 0
    from hqlt_dashboards.tables import front_text

    print(front_text(results, screen_width()), end="")
    best = f"{study.name}/{front(results.trials, results.objectives, results.constraints)[0].number}"
    print(
        f"\nnext: hqlt report {study.name}   all of it on one page"
        f"\n      hqlt pareto {study.name} --out front.html   the front to look into"
        f"\n      hqlt rerun {best}   the best, again"
        "\n      hqlt ui   every curve",
        file=sys.stderr,
    )
    return 0


def _export_front(results: StudyResults, store: Store, spool: "Spool") -> None:
    """Leave the front beside the study, and with MLflow, which draws none. Trials on different tasks have no front."""
    from hqlt_dashboards.ablation import by_task

    if len(by_task(results)) > 1 or not any(record.state == "complete" for record in results.trials):
        return
    from hqlt_dashboards.export import export_front

    from hqlt_orchestration.tracking.told import phase_ends

    folder = store.study_folder(results.name)
    paths = [folder / "front.csv", folder / "front.html"]
    for path in paths:
        export_front(results, path)
    phase = "ablate" if any(record.phase == "ablate" for record in results.trials) else "search"
    spool.put(phase_ends(phase, [str(path) for path in paths]))


def make_executor(study: Study, machine: Machine, ledger: Ledger) -> "Executor":
    """The executor that `machine` asks for, with the resources of `study`; what is in the ledger says what fits.

    Raises:
        ResourceError: a GPU is asked for and there is none.
    """
    from hqlt_orchestration.driving.inline import InlineExecutor
    from hqlt_orchestration.driving.ray_pool import RayExecutor

    cpus = max(1, int(study.resources.cpu))
    gpus = None if study.resources.gpu == "auto" else study.resources.gpu
    if machine.executor == "inline":
        return InlineExecutor(cpus=cpus, gpus=gpus)

    def need() -> Need | None:
        cells = [cell.config for cell in study.cells()]
        replicas = (replica for row in ledger.studies() for replica in ledger.replicas(row.name))
        outcomes = (replica.outcome for replica in replicas if replica.outcome is not None)
        return need_of(cells or some_configs(study), study.seeds, outcomes)

    return RayExecutor(slots=study.budget.parallel, cpus=cpus, gpus=gpus, need=need, address=machine.ray_address)


@contextmanager
def _in_background(make: "Callable[[], Executor]") -> "Iterator[Callable[[], Executor]]":
    """Start to make an executor; what is yielded waits for it. One that nobody asked for is closed."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(make)
        asked = False

        def wait() -> "Executor":
            nonlocal asked
            asked = True
            return future.result()

        try:
            yield wait
        finally:
            if not asked and future.exception() is None:
                future.result().close()


def extend(name: str, trials: int, store: Store) -> None:
    """Give a study `trials` more trials; `resume` runs them.

    Raises:
        UnknownNameError: there is no such study.
    """
    ledger = store.open_existing()
    row = ledger.study(name)
    if Study.from_json(row.study).search is None:
        raise UsageError(f"{name} is an ablation: its trials are its cells; change the file and give it another name")
    ledger.update_study(name, budget=row.budget + trials, state="open", note=None)
    by = "those who run it go on" if living(ledger.drivers(name)) else f"run them with: hqlt study resume {name}"
    print(f"{name}: {row.budget + trials} trials; {by}")


def cancel(trial: str, store: Store) -> None:
    """End a trial that runs or waits, without a result."""
    ledger = store.open_existing()
    study, number = ledger.find_trial(trial)
    asked = ledger.cancel(study, number)
    if not asked:
        raise UsageError(f"trial {study}/{number} has ended already: {ledger.trial(study, number).state}")
    print(f"trial {study}/{number}: cancelled; a running one ends within seconds")


def delete(name: str, store: Store) -> None:
    """Remove a study: its trials, results, checkpoints, sampling history and MLflow experiment.

    Raises:
        UsageError: somebody runs it.
    """
    from hqlt_orchestration.records.history import delete_from_optuna
    from hqlt_orchestration.tracking.mirror import delete_experiment

    ledger = store.open_existing()
    ledger.study(name)
    store.refuse_links(name)
    alive = living(ledger.drivers(name))
    if alive:
        raise UsageError(f"{name} is run by process {alive[0].pid} on {alive[0].host}; stop that first")
    delete_experiment(store.mlflow_uri, name)
    delete_from_optuna(store.url, name)
    ledger.delete_study(name)
    shutil.rmtree(store.study_folder(name), ignore_errors=True)
    print(f"{name}: deleted")


def free(name: str, store: Store) -> None:
    """Remove the checkpoints of ended trials that are not on the front."""
    ledger = store.open_existing()
    results = study_results(ledger, name)
    store.refuse_links(name)
    kept = {record.number for record in front(results.trials, results.objectives, results.constraints)}
    kept |= {record.number for record in results.trials if record.state in ("running", "waiting", "paused")}
    removed: dict[tuple[int, int], int] = {}  # by device and inode: MLflow's artifacts are links to the same files
    for record in results.trials:
        if record.number in kept:
            continue
        for folder in store.trial_folder(name, record.number).glob("seed-*/checkpoints"):
            found = [path.stat() for path in folder.rglob("*") if path.is_file()]
            removed |= {(status.st_dev, status.st_ino): status.st_size for status in found}
            shutil.rmtree(folder)
    for path in (store.artifacts / name).rglob("*"):
        if path.is_file() and (path.stat().st_dev, path.stat().st_ino) in removed:
            path.unlink()
    freed = sum(removed.values())
    print(f"{name}: {freed / 1024**2:.1f} MiB freed; the checkpoints of {len(kept)} trials are kept")
