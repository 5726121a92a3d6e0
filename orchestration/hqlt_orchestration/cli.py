"""The `hqlt` command. Parsing only: every command imports its implementation when it runs."""

import errno
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from hqlt_search_space.errors import HqltError
from typer.core import TyperGroup


class _StudyFirst(TyperGroup):
    """What one begins with stands first; typer would put a group after all commands."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]  # typer's own Context
        return sorted(super().list_commands(ctx), key="study".__ne__)


app = typer.Typer(
    cls=_StudyFirst,
    help="Architecture search and ablation for models that blend KV-memory and FW-memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
study = typer.Typer(help="Run and look after studies.", no_args_is_help=True)
app.add_typer(study, name="study")

StudyFile = Annotated[Path, typer.Argument(metavar="FILE", help="The study's YAML file.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The study's name.")]
TrialName = Annotated[str, typer.Argument(metavar="TRIAL", help="A trial's id, the beginning of one, or STUDY/NUMBER.")]
Data = Annotated[Path, typer.Option(envvar="HQLT_DATA", help="Folder of everything that studies make.")]
Database = Annotated[
    str | None,
    typer.Option("--store", envvar="HQLT_STORE", help="URL of a database to use instead of DATA/hqlt.db."),
]
Mlflow = Annotated[
    str | None,
    typer.Option("--mlflow", envvar="HQLT_MLFLOW", help="URL of an MLflow server to use instead of DATA/mlflow.db."),
]
RayAddress = Annotated[str | None, typer.Option(help="Join this Ray cluster instead of starting Ray here.")]
ExecutorName = Annotated[
    Literal["ray", "inline"], typer.Option(help="Where trials run: Ray's processes, or a thread of this one.")
]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]
DEFAULT_DATA = Path("hqlt-data")
CTRL_C = 130  # the exit code that typer makes of it


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"hqlt {version('hqlt')}")
        raise typer.Exit


@app.callback()
def hqlt(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    # Only --version; typer's help of the whole command stands above.
    del version


@study.command()
def run(
    file: StudyFile,
    data: Data = DEFAULT_DATA,
    store: Database = None,
    mlflow: Mlflow = None,
    ray_address: RayAddress = None,
    executor: ExecutorName = "ray",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its cost; train nothing.")] = False,
) -> None:
    """Start the study in FILE, or join it, or continue it."""
    if dry_run:
        from hqlt_orchestration.commands.plan import print_plan
        from hqlt_orchestration.records.store import Store

        print_plan(file, Store(data, store))
        return
    from hqlt_orchestration.commands.studies import Machine, run
    from hqlt_orchestration.records.store import Store

    raise typer.Exit(run(file, Store(data, store, mlflow), Machine(executor, ray_address)))


@study.command()
def resume(
    name: Name,
    data: Data = DEFAULT_DATA,
    store: Database = None,
    mlflow: Mlflow = None,
    ray_address: RayAddress = None,
    executor: ExecutorName = "ray",
) -> None:
    """Continue a study after any kind of stop. Finished trials are not repeated."""
    from hqlt_orchestration.commands.studies import Machine, resume
    from hqlt_orchestration.records.store import Store

    raise typer.Exit(resume(name, Store(data, store, mlflow), Machine(executor, ray_address)))


@study.command()
def status(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="The study's name; without it, all.")] = None,
    data: Data = DEFAULT_DATA,
    store: Database = None,
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again every two seconds.")] = False,
) -> None:
    """How a study stands, on one screen."""
    from hqlt_orchestration.commands.look import status
    from hqlt_orchestration.records.store import Store

    status(name, Store(data, store), as_json=as_json, watch=watch)


@study.command()
def validate(file: StudyFile) -> None:
    """Every problem of a study file at once, or the size of its space."""
    from hqlt_orchestration.commands.plan import validate

    validate(file)


@study.command("list")
def list_studies(data: Data = DEFAULT_DATA, store: Database = None) -> None:
    """Every study in the store."""
    from hqlt_orchestration.commands.look import list_studies
    from hqlt_orchestration.records.store import Store

    list_studies(Store(data, store))


@study.command()
def extend(
    name: Name,
    trials: Annotated[int, typer.Option(min=1, help="How many more.")],
    data: Data = DEFAULT_DATA,
    store: Database = None,
) -> None:
    """Give a study more trials."""
    from hqlt_orchestration.commands.studies import extend
    from hqlt_orchestration.records.store import Store

    extend(name, trials, Store(data, store))


@study.command()
def cancel(trial: TrialName, data: Data = DEFAULT_DATA, store: Database = None) -> None:
    """Stop a trial, for good."""
    from hqlt_orchestration.commands.studies import cancel
    from hqlt_orchestration.records.store import Store

    cancel(trial, Store(data, store))


@study.command()
def delete(
    name: Name,
    data: Data = DEFAULT_DATA,
    store: Database = None,
    mlflow: Mlflow = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a study with its results and checkpoints."""
    from hqlt_orchestration.commands.studies import delete
    from hqlt_orchestration.records.store import Store

    if not yes:
        typer.confirm(f"Remove the study {name} and everything it made?", abort=True, err=True)
    delete(name, Store(data, store, mlflow))


@study.command()
def gc(name: Name, data: Data = DEFAULT_DATA, store: Database = None) -> None:
    """Remove checkpoints of trials that are not on the front."""
    from hqlt_orchestration.commands.studies import free
    from hqlt_orchestration.records.store import Store

    free(name, Store(data, store))


@app.command()
def cost(file: StudyFile, data: Data = DEFAULT_DATA, store: Database = None) -> None:
    """Parameters, FLOPs, memory and hours of a study, before it runs."""
    from hqlt_orchestration.commands.plan import print_cost
    from hqlt_orchestration.records.store import Store

    print_cost(file, Store(data, store))


@app.command()
def pareto(
    name: Name,
    out: Annotated[Path | None, typer.Option(help="A .csv, .json, .parquet, .html or .png file.")] = None,
    data: Data = DEFAULT_DATA,
    store: Database = None,
) -> None:
    """The front of a study, printed or written to a file."""
    from hqlt_orchestration.commands.look import pareto
    from hqlt_orchestration.records.store import Store

    pareto(name, out, Store(data, store))


@app.command()
def ablation(
    name: Name,
    out: Annotated[Path | None, typer.Option(help="A .md or .tex file.")] = None,
    metric: Annotated[str | None, typer.Option(help="Another metric than the first objective.")] = None,
    data: Data = DEFAULT_DATA,
    store: Database = None,
) -> None:
    """The table of an ablation, printed or written to a file."""
    from hqlt_orchestration.commands.look import ablation
    from hqlt_orchestration.records.store import Store

    ablation(name, out, metric, Store(data, store))


@app.command()
def report(
    name: Name,
    out: Annotated[Path | None, typer.Option(help="An .html file. Default: NAME-report.html, here.")] = None,
    data: Data = DEFAULT_DATA,
    store: Database = None,
) -> None:
    """A study on one page: what was asked, what came out, and how sure that is."""
    from hqlt_orchestration.commands.report import report
    from hqlt_orchestration.records.store import Store

    report(name, out, Store(data, store))


@app.command()
def rerun(
    trial: TrialName,
    seed: Annotated[int | None, typer.Option(min=0, help="The seed: a stored one, or a new one.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Short for --set steps=N.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="AXIS=VALUE", help="Change an axis: a variation of the trial.")
    ] = None,
    data: Data = DEFAULT_DATA,
    store: Database = None,
    mlflow: Mlflow = None,
    as_json: Json = False,
) -> None:
    """Run a stored trial again and compare to the bit, or run a variation of it."""
    from hqlt_orchestration.commands.rerun import rerun
    from hqlt_orchestration.records.store import Store

    raise typer.Exit(
        rerun(trial, Store(data, store, mlflow), seed=seed, steps=steps, settings=settings or [], as_json=as_json)
    )


@app.command()
def ui(
    data: Data = DEFAULT_DATA,
    store: Database = None,
    mlflow: Mlflow = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
) -> None:
    """MLflow's pages on the recorded studies, for this machine only."""
    from hqlt_orchestration.commands.ui import serve
    from hqlt_orchestration.records.store import Store

    serve(Store(data, store, mlflow), port)


@app.command()
def logs(
    trial: TrialName,
    seed: Annotated[int | None, typer.Option(min=0, help="Which of its seeds.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the trial ends.")] = False,
    data: Data = DEFAULT_DATA,
    store: Database = None,
) -> None:
    """What a trial printed."""
    from hqlt_orchestration.commands.look import logs
    from hqlt_orchestration.records.store import Store

    logs(trial, Store(data, store), seed=seed, follow=follow)


@app.command()
def doctor(
    data: Data = DEFAULT_DATA,
    store: Database = None,
    mlflow: Mlflow = None,
    study: Annotated[str | None, typer.Option(metavar="NAME", help="Mend this study and check its results.")] = None,
    as_json: Json = False,
) -> None:
    """What is installed, which backends run here and why, and whether the store is sound."""
    from hqlt_orchestration.commands.doctor import doctor
    from hqlt_orchestration.records.store import Store

    raise typer.Exit(doctor(Store(data, store, mlflow), study, as_json=as_json))


@app.command()
def schema() -> None:
    """JSON Schema of the study file."""
    import json

    from hqlt_search_space.study_file import study_schema

    typer.echo(json.dumps(study_schema(), indent=2))


def main() -> None:
    """Entry point: an error that the user can mend is one message and its exit code, never a traceback."""
    try:
        app()
    except SystemExit as ended:
        if ended.code != CTRL_C:
            raise
        typer.echo("interrupted", err=True)
        sys.exit(1)
    except HqltError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(error.exit_code)
    except ValueError as error:
        from pydantic import ValidationError

        if not isinstance(error, ValidationError):
            raise
        # What users write is checked where it is read; this came from a database.
        where = ".".join(map(str, error.errors()[0]["loc"]))
        said = f"{where + ': ' if where else ''}{error.errors()[0]['msg']}"
        typer.secho(
            f"error: the store holds a {error.title} that this hqlt cannot read: {said[:300]}", fg="red", err=True
        )
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        typer.secho("error: there is no space left to write to; nothing that was committed is lost", fg="red", err=True)
        sys.exit(1)
