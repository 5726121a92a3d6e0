"""How a model is trained: optimiser, schedule, batch, steps, precision."""

from typing import Annotated, Literal

from pydantic import Field

from hqlt_search_space.spec import Spec


class Recipe(Spec):
    """AdamW with linear warm-up and cosine decay. Defaults are the paper's recipe for the synthetic tasks, but for the
    gradient clip, which the released code read and never applied (so its default here is null, as it ran).
    """

    steps: Annotated[int, Field(ge=1, description="Optimiser steps.")] = 20_000
    batch: Annotated[int, Field(ge=1, description="Sequences a step.")] = 1024
    learning_rate: Annotated[float, Field(gt=0, description="Peak learning rate.")] = 5e-3
    min_learning_rate_fraction: Annotated[float, Field(ge=0, le=1, description="Last over peak learning rate.")] = 1e-3
    warmup_fraction: Annotated[float, Field(ge=0, le=1, description="Share of the steps that warm up.")] = 0.1
    weight_decay: Annotated[float, Field(ge=0, description="Decoupled; not on norms, scalars and embeddings.")] = 0.1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    clip: Annotated[float, Field(gt=0, description="Largest global gradient norm; null: no clipping.")] | None = None
    init_std: Annotated[float, Field(gt=0, description="Standard deviation of the initial weights.")] = 0.02
    precision: Literal["float32", "bfloat16"] = "float32"
    accumulation: Annotated[int, Field(ge=1, description="Micro-batches a step; must divide the batch.")] = 1
