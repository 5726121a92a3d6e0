"""A trial and what came of it: the values that cross every border between search and training."""

from typing import Annotated, Literal

from pydantic import Field

from hqlt_search_space.arch import Arch
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.spec import Spec, short_hash
from hqlt_search_space.tasks import Task

Seed = Annotated[int, Field(ge=0, lt=2**31)]

FailureReason = Literal["diverged", "out_of_memory", "crashed", "hung", "disk_full", "bad_data", "error"]
"""Why a trial has no result: ten non-finite steps; memory; the process died; no progress; disk; data; an exception."""


class Config(Spec):
    """Everything that decides the outcome but the seed: arch, recipe and task (with its data's hash)."""

    arch: Arch
    recipe: Recipe
    task: Task

    @property
    def config_id(self) -> str:
        """Sixteen hexadecimal digits: the trial's id everywhere a user meets it."""
        return short_hash(self.canonical_json())


class Runtime(Spec):
    """Where and how a trial runs. Not part of the config: it may change times, and on another machine last bits."""

    device: Literal["cpu", "cuda"] = "cpu"
    n_threads: Annotated[int, Field(ge=1)] = 1
    backend: Literal[
        "auto", "definition", "chunked", "triton", "flash_attn_4", "flash_attn_2", "torch_flash", "flex_attention"
    ] = Field(default="auto", description="Of the operators; the last four of attention alone.")
    knock_outs: bool = Field(default=True, description="Evaluate with each memory silenced as well.")
    gpu_share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Of a GPU's memory, CUDA's own included, that the process may take; null: all of it."
    )
    gpu_share_reason: str = Field(default="", description="Why it has that share.")
    accumulation: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Micro-batches a step where memory was too small for the recipe's; seeds train alone."
    )


class Trial(Spec):
    """One config to be trained for some seeds. Study, number and source version are attributes, not part of the id."""

    config: Config
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    rungs: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(), description="Steps at which to ask on_rung.")
    runtime: Runtime = Runtime()
    study: str | None = None
    number: int | None = None
    source_version: str | None = None

    @property
    def trial_id(self) -> str:
        return self.config.config_id


class Backend(Spec):
    """Which implementation of an operator ran, and why."""

    operator: str
    backend: str
    reason: str


class CurvePoint(Spec):
    """One reading during training. `metrics` has the names of `ReplicaResult.metrics`, or `train_loss_nats`."""

    step: int
    metrics: dict[str, float]


class KnockOut(Spec):
    """Validation metrics with one memory silenced (its output set to zero) in every hybrid layer."""

    silenced: Literal["kv", "fw"]
    metrics: dict[str, float]


class MeanGate(Spec):
    """What share FW-memory has in a hybrid layer's mix, averaged over validation tokens and channels."""

    layer: int
    fw: float
    kv: float


class Environment(Spec):
    """What must be equal for a rerun to be equal to the bit, and what else is worth knowing."""

    python: str
    torch: str
    hqlt: str
    source_version: str | None
    platform: str
    cpu: str
    instruction_set: str
    n_threads: int
    device: str


class ReplicaResult(Spec):
    """The outcome of one seed.

    `metrics` holds, as the task gives them: `train_loss_nats`, `validation_loss_nats`, `validation_accuracy`,
    `normalised_validation_accuracy` = (accuracy - chance) / (1 - chance), `validation_bits_per_byte`, the same with
    `test_`, per length bucket `validation_accuracy_len_LO_HI`, and for language `gzip_bits_per_byte`,
    `xz_bits_per_byte`. Times and memory stand apart because no rerun repeats them.
    """

    seed: Seed
    status: Literal["complete", "stopped", "failed"]
    reason: FailureReason | None = None
    message: str | None = Field(default=None, description="The sentence, or the traceback of a programmer's mistake.")
    step: int = Field(description="Optimiser steps taken.")
    metrics: dict[str, float] = Field(default={})
    knock_outs: tuple[KnockOut, ...] = ()
    gates: tuple[MeanGate, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    skipped_steps: int = Field(default=0, description="Steps with a non-finite loss or gradient, skipped.")
    accumulation: int | None = Field(
        default=None, description="Micro-batches a step, if memory was too small for the recipe's."
    )
    weights_sha256: str | None = None
    tokens_per_second: float | None = None
    train_seconds: float | None = None
    wall_seconds: float | None = None
    peak_memory_bytes: int | None = None
    checkpoint: str | None = Field(default=None, description="Folder of the last checkpoint, relative to the trial's.")


class TrialResult(Spec):
    """What `run_trial` returns: a replica result for each seed, in the trial's order."""

    trial: Trial
    replicas: tuple[ReplicaResult, ...]
    backends: tuple[Backend, ...] = ()
    environment: Environment
    notes: tuple[str, ...] = Field(default=(), description="Fallbacks taken and what else deserves a word.")


class Objective(Spec):
    """A quantity to optimise, by the name of a metric or of a cost (`parameters`, `state_bytes`, ...)."""

    name: str
    direction: Literal["minimize", "maximize"]


class TrialRecord(Spec):
    """A trial of a study as it stands: what was asked, what came of it, and how it counts."""

    number: int
    phase: Literal["search", "replicate", "ablate"]
    state: Literal["waiting", "running", "complete", "stopped", "failed", "paused", "quarantined"]
    config: Config
    choices: dict[str, str | int | float | bool | None] = Field(description="The axis values that made the config.")
    cell: str | None = Field(default=None, description="Its label in an ablation: `baseline`, or what differs.")
    costs: dict[str, float] = Field(default={}, description="Every cost of `cost.COSTS`.")
    objectives: dict[str, float] = Field(default={}, description="Over the search seeds; empty without a result.")
    replicas: tuple[ReplicaResult, ...] = ()
    replication: tuple[ReplicaResult, ...] = Field(default=(), description="Fresh seeds after a search.")

    @property
    def trial_id(self) -> str:
        return self.config.config_id


class AxisImportance(Spec):
    """What an axis has to do with reaching the best values of an objective."""

    axis: str
    share: float = Field(description="Of what all axes have to do with it together.")
    chance: float = Field(description="The share that 95 in 100 shuffles of the objective's values stay below.")


class Importances(Spec):
    """The axes of a search by how much they decide who is among the `n_best` of `n_trials` in one objective."""

    objective: str
    n_trials: int
    n_best: int
    axes: tuple[AxisImportance, ...] = Field(default=(), description="The most important first; empty if `silent`.")
    silent: str | None = Field(default=None, description="Why nothing can be said, as a sentence without its stop.")


class StudyResults(Spec):
    """A whole study as values: what the dashboards draw from."""

    name: str
    objectives: tuple[Objective, ...]
    trials: tuple[TrialRecord, ...]
    budget: int
    seeds: tuple[Seed, ...] = Field(default=(), description="That every trial is trained with.")
    constraints: dict[str, tuple[float | None, float | None]] = Field(default={}, description="(min, max) by cost.")
    importances: tuple[Importances, ...] = Field(default=(), description="Of a search, if they were asked for.")
