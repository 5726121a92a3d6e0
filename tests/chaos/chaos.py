"""`make chaos`: one study, faults at random from a printed seed, and what came of both.

The study runs as a person would run it, by `hqlt study run`, and after every end by `hqlt study resume`. Faults strike
as a Poisson process until it is complete. Then all invariants must hold, the budget must be met exactly, and since the
sampler is random and nothing stops early, every trial must be to the bit what it is in an unbroken run.
"""

import argparse
import os
import random
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch  # noqa: F401  loaded late, after many other libraries, its own have failed to load
from faults import FAULTS, Blow, Scene
from hqlt_orchestration.commands.invariants import invariants, mirror_violations
from hqlt_orchestration.records.ledger import Ledger
from hqlt_search_space.errors import HqltError
from lab import Lab, study_text, wait_until
from sqlalchemy.exc import SQLAlchemyError

NAME = "chaos"
MEAN_PAUSE_S = 20.0  # between two faults
HANG_AFTER_S = 20.0  # instead of two minutes: a fault that takes a third of the time of a trial to notice
LOOK_S = 0.5
SYNC_S = 0.3  # five times in a checkpoint: the look that finds one half written comes in time
PATIENCE_S = 40.0  # of a fault that cannot strike; a trial writes a checkpoint every 30 s
PROBE_STEPS = 300
UNBROKEN_SHARE = 0.25  # of the time under fire; the rest goes to what is done twice, and to starting again
MAX_RESTARTS_IN_A_ROW = 5  # commands that end within QUICK_S and hold nothing meanwhile
QUICK_S = 20.0
FINISH_S = 600.0  # for what follows the last fault


@dataclass(frozen=True)
class Plan:
    """What is run, and how roughly."""

    seconds: float
    seed: int
    trials: int
    steps: int
    parallel: int
    rows: tuple[int, ...]
    database: str
    with_server: bool
    disk_mib: int | None
    mean_pause_s: float

    def text(self) -> str:
        keys = {"resources": {"gpu": 0, "hang_after_s": HANG_AFTER_S}}
        return study_text(
            NAME, trials=self.trials, steps=self.steps, parallel=self.parallel, sampler_seed=self.seed, **keys
        )


@dataclass
class Outcome:
    """What came of a round: every fault, and every sentence that should not be there."""

    blows: list[Blow]
    problems: list[str]
    unbroken_s: float
    under_fire_s: float
    n_commands: int
    lost: set[tuple[int, int]]
    doubled: set[tuple[int, int]]


class Deck:
    """The faults in random order, each once before any comes again."""

    def __init__(self, rows: Sequence[int], generator: random.Random) -> None:
        self._rows, self._random = rows, generator
        self._deal()

    def _deal(self) -> None:
        self._left = self._random.sample(self._rows, len(self._rows))
        self._top_since = time.monotonic()

    @property
    def top(self) -> int:
        return self._left[0]

    def take_top(self) -> None:
        self._left.pop(0)
        self._top_since = time.monotonic()
        if not self._left:
            self._deal()

    def wait(self) -> None:
        """The top cannot strike now. It has some time, and then comes last."""
        if time.monotonic() - self._top_since > PATIENCE_S:
            print(f"         row {self.top:2d}  could not strike for {PATIENCE_S:.0f} s", flush=True)
            self._left.append(self._left.pop(0))
            self._top_since = time.monotonic()


def unbroken(plan: Plan, folder: Path) -> tuple[dict[tuple[int, int], Any], float]:
    """Every trial's result without a fault, and the seconds that it took."""
    lab = Lab(folder, NAME, plan.text())
    started = time.monotonic()
    try:
        code = lab.run().wait(10 * plan.seconds + 600)
        assert code == 0, f"the unbroken run ended with {code}; see {folder}"
        return summary(lab.ledger), time.monotonic() - started
    finally:
        lab.close()


def summary(ledger: Ledger) -> dict[tuple[int, int], Any]:
    """(number, seed) -> config, state and result of every replica: what no fault may change."""
    configs = {row.number: row.config.config_id for row in ledger.trials(NAME)}
    return {
        (replica.number, replica.seed): (
            configs[replica.number],
            replica.state,
            replica.result and (replica.result.metrics, replica.result.curve, replica.result.weights_sha256),
        )
        for replica in ledger.replicas(NAME)
    }


def under_fire(plan: Plan, folder: Path, expected: dict[tuple[int, int], Any], unbroken_s: float) -> Outcome:
    """Run the study with faults until it is complete, and judge it."""
    lab = Lab(
        folder,
        NAME,
        plan.text(),
        database=plan.database,
        disk_mib=plan.disk_mib,
        with_server=plan.with_server,
        sync_s=SYNC_S if 2 in plan.rows else None,
    )
    try:
        if lab.mlflow is not None:
            wait_until(lambda: lab.mlflow is not None and lab.mlflow.answers, 180, "the MLflow server")
        started = time.monotonic()
        scene = Scene(lab, random.Random(plan.seed), lab.run())
        commands = _fire(plan, scene)
        seconds = time.monotonic() - started
        problems = _tidy(scene) + [f"{row}" for row in lab.orphans()]
        problems += [f"{blow.what}: not recovered" for blow in scene.blows if blow.recovered_s is None]
        problems += invariants(lab.store, NAME) + mirror_violations(lab.store, NAME)
        n_done = lab.ledger.counts(NAME)["complete"]
        if n_done != plan.trials:
            problems.append(f"{n_done} trials are complete, of a budget of {plan.trials}")
        found = summary(lab.ledger)
        lost = {key for key in expected if key not in found or found[key][1] != "complete"}
        wins = [(a.number, a.seed) for a in lab.ledger.attempts(NAME) if a.state == "complete"]
        doubled = {key for key in wins if wins.count(key) > 1} | (set(found) - set(expected))
        for key in sorted(expected.keys() & found.keys()):
            if found[key] != expected[key]:
                problems.append(f"trial {key[0]}, seed {key[1]}: differs from the unbroken run")
        return Outcome(scene.blows, problems, unbroken_s, seconds, commands, lost, doubled)
    finally:
        lab.close()


def _fire(plan: Plan, scene: Scene) -> int:
    """Strike, lift and resume until the study is complete. Returns how many commands it took."""
    started = time.monotonic()
    next_blow = started + scene.random.expovariate(1 / plan.mean_pause_s)
    deck = Deck(plan.rows, scene.random)
    deadline = started + 3 * plan.seconds + 600
    commands, quick_ends, began = 1, 0, started
    while True:
        now = time.monotonic()
        if now > deadline:
            raise TimeoutError(f"not complete after {now - started:.0f} s: {scene.lab.ledger.counts(NAME)}")
        _lift(scene, now)
        _note_recoveries(scene)
        if scene.driver.has_ended and not _is_broken(scene):
            if scene.driver.wait(0) == 0 and _is_complete(scene):
                break
            quick_ends = quick_ends + 1 if now - began < QUICK_S else 0
            if quick_ends > MAX_RESTARTS_IN_A_ROW:
                raise RuntimeError(f"the study does not go on; its last command said:\n{scene.driver.said[-3000:]}")
            scene.driver, began = scene.lab.resume(), now
            commands += 1
        in_time = next_blow <= now < started + 1.5 * plan.seconds
        if in_time and not scene.driver.has_ended and _strike(deck, scene, now - started):
            next_blow = time.monotonic() + scene.random.expovariate(1 / plan.mean_pause_s)
        time.sleep(LOOK_S)
    _finish(scene)
    return commands


def _strike(deck: Deck, scene: Scene, at_s: float) -> bool:
    """Whether a fault struck: while nothing trains it waits, or the study would never come so far."""
    if not scene.lab.held():
        return False
    is_down = any(blow.row == deck.top and blow.lift is not None for blow in scene.blows)
    blow = None if is_down else FAULTS[deck.top][1](scene)
    if blow is None:
        deck.wait()
        return False
    scene.blows.append(blow)
    print(f"{at_s:6.0f} s  row {blow.row:2d}  {blow.what}", flush=True)
    if blow.row == deck.top:
        deck.take_top()
    return True


def _lift(scene: Scene, now: float) -> None:
    for blow in scene.blows:
        if blow.lift is not None and now - blow.struck_at >= blow.lasts_s:
            blow.lift()
            blow.lift = None


def _is_broken(scene: Scene) -> bool:
    """Whether a person would see that the disk is full or the database down, and mend that first."""
    return any(blow.lift is not None and blow.row in (5, 7) for blow in scene.blows)


def _is_complete(scene: Scene) -> bool:
    return scene.lab.ledger.study(NAME).state == "complete"


def _note_recoveries(scene: Scene) -> None:
    if not scene.lab.can_ask:
        return
    for blow in scene.blows:
        if blow.recovered_s is not None or blow.lift is not None:
            continue
        try:
            is_over = blow.is_over() and all(map(scene.lab.is_over, blow.hit))
        except (HqltError, SQLAlchemyError):  # the database is down or locked, which is what this is about
            return
        if is_over:
            blow.recovered_s = time.monotonic() - blow.struck_at


def _finish(scene: Scene) -> None:
    """End what the last faults have left, and let the guest see that the study is complete."""
    for blow in scene.blows:
        if blow.lift is not None:
            blow.lift()
            blow.lift = None
    if scene.guest is not None:
        scene.guest.wait(FINISH_S)
    _note_recoveries(scene)


def _tidy(scene: Scene) -> list[str]:
    """What a person does in the end: MLflow is told what it missed, and the doctor clears away what kills have left."""
    server, problems = scene.lab.mlflow, []
    if server is not None:
        wait_until(lambda: server.answers, FINISH_S, "the MLflow server")
    for arguments in (("study", "resume", NAME), ("doctor", "--study", NAME)):
        command = scene.lab.hqlt(*arguments)
        code = command.wait(FINISH_S)
        if code:
            problems.append(f"hqlt {' '.join(arguments)} ended with {code}: {command.said[-2000:]}")
    _note_recoveries(scene)
    return problems


def report(outcomes: Sequence[Outcome], rows: Sequence[int], n_trials: int) -> str:
    """What came of all rounds, as it stands in orchestration/README.md."""
    n_all = n_trials * len(outcomes)
    n_complete = n_all - sum(len(outcome.lost) for outcome in outcomes)
    unbroken_s = sum(outcome.unbroken_s for outcome in outcomes)
    under_fire_s = sum(outcome.under_fire_s for outcome in outcomes)
    n_commands = sum(outcome.n_commands for outcome in outcomes)
    struck = [blow.row for outcome in outcomes for blow in outcome.blows]
    never = [f"{row} ({FAULTS[row][0]})" for row in rows if row not in struck]
    said = f"{n_all} trials, unbroken in {unbroken_s:.0f} s, under {len(struck)} faults in {under_fire_s:.0f} s and "
    said += f"{n_commands} {'command' if n_commands == 1 else 'commands'}. {n_complete} of {n_all} complete"
    if not any(outcome.problems for outcome in outcomes):
        said += " and equal to the unbroken run to the bit, every invariant held, nothing was left behind"
    said += f".\nNever injected: row {', row '.join(never)}." if never else "; every row was injected."
    return f"{said}\n\n{table(outcomes, sorted({*rows, *struck}))}"


def table(outcomes: Sequence[Outcome], rows: Sequence[int]) -> str:
    """A line for each row of the fault matrix, and one for all."""
    head = "| row | fault | injected | attempts hit | recovered | lost | doubled | median s | max s |"
    lines = [head, "|" + "---|" * 9]
    lines += [_line(str(row), FAULTS[row][0], outcomes, {row}) for row in rows]
    lines.append(_line("", "all", outcomes, set(rows)))
    return "\n".join(lines)


def _line(name: str, fault: str, outcomes: Sequence[Outcome], rows: set[int]) -> str:
    n_hit = n_lost = n_doubled = 0
    blows: list[Blow] = []
    for outcome in outcomes:
        own = [blow for blow in outcome.blows if blow.row in rows]
        hit = [(key.number, key.seed) for blow in own for key in blow.hit]
        blows += own
        n_hit += len(hit)
        n_lost += len(outcome.lost & set(hit))
        n_doubled += len(outcome.doubled & set(hit))
    times = [blow.recovered_s for blow in blows if blow.recovered_s is not None]
    spent = (f"{median(times):.1f}", f"{max(times):.1f}") if times else ("-", "-")
    cells = [name, fault, len(blows), n_hit, len(times), n_lost, n_doubled, *spent]
    return "| " + " | ".join(map(str, cells)) + " |"


def setting(arguments: Sequence[str], seed: int, loads: Sequence[float]) -> str:
    """Where and how it was run, as it stands in orchestration/README.md."""
    models = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    command = shlex.join(["python", "tests/chaos/chaos.py", *arguments])
    if "--seed" not in command:
        command += f" --seed {seed}"
    where = f"{os.cpu_count()} cores of {models[0] if models else 'an unknown processor'}"
    return f"{where} (load {min(loads):.0f} to {max(loads):.0f}), {time.strftime('%d %B %Y')}:\n`{command}`"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1800, help="how long the study should last under fire")
    parser.add_argument("--seed", type=int, default=None, help="of the study and of the faults")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--steps", type=int, default=None, help="a trial's; measured so that the time is filled")
    parser.add_argument("--pause", type=float, default=MEAN_PAUSE_S, help="mean seconds between two faults")
    parser.add_argument("--rows", type=int, nargs="*", default=list(FAULTS), help="of the fault matrix")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default=None, help="what is installed")
    parser.add_argument("--no-server", action="store_true", help="MLflow's own SQLite file, not its server")
    parser.add_argument("--keep", action="store_true", help="leave the folder, for a look at what happened")
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    is_root = os.getuid() == 0
    postgres = shutil.which("initdb") is not None or any(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"seed {seed}, folder {folder}, {os.cpu_count()} cores", flush=True)
    if not is_root:
        print("row 5 is left out: only root can mount a disk to fill")
    plan = Plan(
        seconds=options.seconds,
        seed=seed,
        trials=options.trials,
        steps=PROBE_STEPS,
        parallel=options.parallel,
        rows=tuple(row for row in options.rows if is_root or row != 5),
        database=options.database or ("postgresql" if postgres else "sqlite"),
        with_server=not options.no_server,
        disk_mib=256 if is_root else None,
        mean_pause_s=options.pause,
    )
    plan = replace(plan, steps=options.steps or measured_steps(plan, folder / "probe"))
    outcomes: list[Outcome] = []
    loads = [os.getloadavg()[0]]
    while sum(outcome.under_fire_s for outcome in outcomes) < options.seconds:
        outcomes.append(one_round(plan, folder / f"seed-{plan.seed}"))
        loads.append(os.getloadavg()[0])
        if outcomes[-1].problems:
            break
        plan = replace(plan, seed=plan.seed + 1)
    print(f"\n{setting(sys.argv[1:], seed, loads)}.\n{report(outcomes, plan.rows, plan.trials)}")
    is_well = not outcomes[-1].problems
    if not options.keep and is_well:
        shutil.rmtree(folder)
    return int(not is_well)


def one_round(plan: Plan, folder: Path) -> Outcome:
    """A study without faults, and the same study with them; prints what came of both."""
    expected, unbroken_s = unbroken(plan, folder / "unbroken")
    print(f"seed {plan.seed}, unbroken: {plan.trials} trials of {plan.steps} steps in {unbroken_s:.0f} s", flush=True)
    outcome = under_fire(plan, folder / "broken", expected, unbroken_s)
    print(f"under fire: {outcome.under_fire_s:.0f} s and {outcome.n_commands} commands", flush=True)
    print("\n".join(outcome.problems) or "every invariant holds, and every trial is as in the unbroken run", flush=True)
    return outcome


def measured_steps(plan: Plan, folder: Path) -> int:
    """How many steps make the unbroken run take its share of the time, from a look at as many trials as run at once."""
    lab = Lab(folder, NAME, replace(plan, trials=plan.parallel).text())
    try:
        assert lab.run().wait(600) == 0
        took = [a.ended_at - a.started_at for a in lab.ledger.attempts(NAME) if a.ended_at is not None]
    finally:
        lab.close()
    rounds = plan.trials / plan.parallel
    return max(PROBE_STEPS, round(UNBROKEN_SHARE * plan.seconds / rounds / (median(took) / PROBE_STEPS)))


if __name__ == "__main__":
    sys.exit(main())
