"""How a model is trained: optimiser, schedule, batch, steps, precision."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

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
    beta1: Annotated[float, Field(ge=0, lt=1, description="AdamW's averaging of gradients.")] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1, description="AdamW's averaging of squared gradients.")] = 0.999
    epsilon: Annotated[float, Field(gt=0, description="AdamW's term in the denominator.")] = 1e-8
    clip: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Largest global gradient norm; null: no clipping."
    )
    init_std: Annotated[float, Field(gt=0, description="Standard deviation of the initial weights.")] = 0.02
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Of activations and matrix products; weights and fast-weight states are float32."
    )
    accumulation: Annotated[int, Field(ge=1, description="Micro-batches a step; must divide the batch.")] = 1

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.batch % self.accumulation:
            raise ValueError(f"accumulation {self.accumulation} does not divide batch {self.batch}")
        return self
