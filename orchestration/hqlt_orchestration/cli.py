"""The `hqlt` command. Parsing only: every command imports its implementation when it runs."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from hqlt_search_space.errors import HqltError

app = typer.Typer(
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
        from hqlt_orchestration.plan import print_plan

        print_plan(file)
        return
    from hqlt_orchestration.store import Store
    from hqlt_orchestration.studies import Machine, run

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
    from hqlt_orchestration.store import Store
    from hqlt_orchestration.studies import Machine, resume

    raise typer.Exit(resume(name, Store(data, store, mlflow), Machine(executor, ray_address)))


def main() -> None:
    """Entry point: an error that the user can mend is one message and its exit code, never a traceback."""
    try:
        app()
    except HqltError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("stopped; `hqlt study resume NAME` continues", err=True)
        sys.exit(1)
