"""`hqlt doctor`: what is installed, what runs here and why, and whether a store is sound."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from hqlt_search_space.errors import HqltError

from hqlt_orchestration.commands.invariants import database_violations, invariants
from hqlt_orchestration.commands.repair import repair
from hqlt_orchestration.records.database import shown
from hqlt_orchestration.records.store import Store

PACKAGES = ("hqlt", "torch", "numpy", "optuna", "ray", "mlflow", "sqlalchemy", "pydantic", "triton", "flash-attn-4")


def doctor(store: Store, study: str | None, *, as_json: bool) -> int:
    """Print a report; with `study`, mend that, and check every result and checkpoint of it.

    Returns 1 if anything is wrong that could not be mended.
    """
    report: dict[str, Any] = {
        "versions": _versions(),
        "devices": _devices(),
        "backends": _backends(),
        "stores": list(_stores(store)),
    }
    problems = [problem for found in report["stores"] for problem in found["problems"]]
    if study is not None:
        mended = repair(store, study)
        found = invariants(store, study)
        report["study"] = {"name": study, "mended": mended, "problems": found}
        problems += found
    print(json.dumps(report) if as_json else _text(report))
    return int(bool(problems))


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _devices() -> list[dict[str, Any]]:
    import torch

    cpu = {
        "kind": "cpu",
        "name": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
    }
    gpus = [
        {
            "kind": "cuda",
            "name": torch.cuda.get_device_name(i),
            "memory_bytes": torch.cuda.get_device_properties(i).total_memory,
        }
        for i in range(torch.cuda.device_count())
    ]
    return [cpu, *gpus]


def _backends() -> list[dict[str, str]]:
    from hqlt_kernels.backends import survey

    return [{"operator": choice.operator, "backend": choice.backend, "reason": choice.reason} for choice in survey()]


def _stores(store: Store) -> Iterator[dict[str, Any]]:
    from hqlt_orchestration.tracking.spool import unshipped_bytes

    if store.database is None and not (store.data / "hqlt.db").exists():
        return
    problems: list[str] = []
    studies = 0
    try:
        ledger = store.open()
        studies = len(ledger.studies())
        problems += database_violations(store.url)
    except HqltError as error:
        problems.append(str(error))
    yield {"path": shown(store.url), "studies": studies, "problems": problems, **_disk(store.data)}
    mlflow = store.data / "mlflow.db"
    if mlflow.exists():
        waiting = sum(unshipped_bytes(folder) for folder in store.data.glob("studies/*/spool"))
        yield {
            "path": str(mlflow),
            "unshipped_bytes": waiting,
            "problems": list(database_violations(f"sqlite:///{mlflow}")),
            **_disk(store.data),
        }


def _disk(folder: Path) -> dict[str, int]:
    return {"free_bytes": shutil.disk_usage(folder).free}


def _text(report: dict[str, Any]) -> str:
    lines = ["  ".join(f"{name} {version or '-'}" for name, version in _halves(report["versions"], 0))]
    lines.append("  ".join(f"{name} {version or '-'}" for name, version in _halves(report["versions"], 1)))
    for device in report["devices"]:
        extra = f", {device['cores']} cores, {device['instruction_set']}" if device["kind"] == "cpu" else ""
        lines.append(f"{device['kind']}: {device['name']}{extra}, {device['memory_bytes'] / 1024**3:.1f} GiB")
    if len(report["devices"]) == 1:
        lines.append("no GPU")
    lines.append("")
    lines += [f"{each['operator']:<18} {each['backend']:<14} {each['reason']}" for each in report["backends"]]
    lines.append("")
    for found in report["stores"]:
        state = "sound" if not found["problems"] else "; ".join(found["problems"])
        waiting = f", {found['unshipped_bytes']:,} bytes wait for MLflow" if found.get("unshipped_bytes") else ""
        lines.append(f"{found['path']}: {state}{waiting}, {found['free_bytes'] / 1024**3:.0f} GiB free")
    if not report["stores"]:
        lines.append("no studies stored yet")
    if "study" in report:
        lines += [f"mended: {what}" for what in report["study"]["mended"]]
        found = report["study"]["problems"]
        lines += found or [f"study {report['study']['name']}: every result and checkpoint is sound"]
    return "\n".join(lines)


def _halves(versions: dict[str, str | None], half: int) -> list[tuple[str, str | None]]:
    items = list(versions.items())
    middle = (len(items) + 1) // 2
    return items[middle:] if half else items[:middle]
