"""How well a model does on held-out data, with both memories, with one silenced, and how it weighs them."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from hqlt_search_space.trial import KnockOut, MeanGate
from torch import Tensor
from torch.nn import functional

from hqlt_trainer.corpus import DOCUMENT_START
from hqlt_trainer.memory import EVALUATION_TOKENS
from hqlt_trainer.mixers import HybridLayer, Memory
from hqlt_trainer.model import Model
from hqlt_trainer.precision import autocast
from hqlt_trainer.tasks.batch import IGNORED, Batch, LengthBucket, Split, TaskData


class EvaluationData:
    """One split, on the device, so that every rung and knock-out reads the same batches without making them again."""

    def __init__(
        self,
        task_data: TaskData,
        split: Split,
        context: int,
        device: torch.device | str,
        on_batch: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_batch` is called whenever a batch has been judged: an evaluation may be long."""
        self.split = split
        self.on_batch = on_batch
        self.chance = task_data.chance
        self.counts_bytes = task_data.counts_bytes
        self.buckets: tuple[LengthBucket, ...] = task_data.length_buckets(split)
        rows = max(1, EVALUATION_TOKENS[torch.device(device).type] // context)
        self.batches: tuple[Batch, ...] = tuple(task_data.evaluation_batches(split, rows, device))


@torch.no_grad()
def evaluate(model: Model, data: EvaluationData, precision: str) -> dict[str, float]:
    """Loss, accuracy, normalised accuracy and accuracy per length bucket, or loss and bits per byte.

    The names are those of `ReplicaResult.metrics`, with the split in them. A score of nothing is left out.
    """
    losses, correct, lengths, n_bytes = [], [], [], 0
    for batch in data.batches:
        with autocast(batch.inputs.device, precision):
            logits, targets = scored_logits(model, batch.inputs, batch.targets)
        losses.append(functional.cross_entropy(logits.float(), targets, reduction="none").double())
        correct.append(logits.argmax(-1) == targets)
        n_bytes += int((targets != DOCUMENT_START).sum())
        lengths.append(batch.lengths.repeat_interleave((batch.targets != IGNORED).sum(-1)))
        data.on_batch()
    loss, right, length = torch.cat(losses), torch.cat(correct), torch.cat(lengths)
    loss_nats = loss.mean().item()
    metrics = {f"{data.split}_loss_nats": loss_nats}
    if data.counts_bytes:
        # All that must be told, the marks between documents too, over the bytes that are told by it.
        metrics[f"{data.split}_bits_per_byte"] = loss.sum().item() / math.log(2) / max(1, n_bytes)
    if data.chance is not None:
        accuracy = _mean(right)
        metrics[f"{data.split}_accuracy"] = accuracy
        metrics[f"normalised_{data.split}_accuracy"] = (accuracy - data.chance) / (1 - data.chance)
        for bucket in data.buckets:
            inside = right[(length >= bucket.low) & (length <= bucket.high)]
            if len(inside):
                metrics[f"{data.split}_accuracy_{bucket.label}"] = _mean(inside)
    return metrics


def knock_outs(model: Model, data: EvaluationData, precision: str) -> tuple[KnockOut, ...]:
    """Metrics with KV-memory and with FW-memory silenced in every hybrid layer; empty without a hybrid layer."""
    if not _hybrids(model):
        return ()
    found = []
    memories: tuple[Memory, ...] = ("kv", "fw")
    for memory in memories:
        with silenced(model, memory):
            found.append(KnockOut(silenced=memory, metrics=evaluate(model, data, precision)))
    return tuple(found)


@contextlib.contextmanager
def silenced(model: Model, memory: Memory) -> Iterator[None]:
    """Replaces the output of `memory` by zeros in every hybrid layer, before the mixing."""
    for _, layer in _hybrids(model):
        layer.silenced = memory
    try:
        yield
    finally:
        for _, layer in _hybrids(model):
            layer.silenced = None


@torch.no_grad()
def mean_gates(model: Model, data: EvaluationData, precision: str) -> tuple[MeanGate, ...]:
    """What each hybrid layer multiplies its memories by, averaged over tokens (padding not counted) and channels.

    Layers whose mixing learns no factor are left out.
    """
    totals = {i: torch.zeros(3, dtype=torch.float64) for i, _ in _hybrids(model)}
    real = torch.empty(0)

    def observe(total: Tensor, kv: Tensor, fw: Tensor) -> None:
        # A factor may lack the axes B and T (static) or the channel (scalar).
        for i, factor in enumerate((kv, fw)):
            per_token = factor.double().mean(dim=(-1, -2)).expand(real.shape)
            total[i] += (per_token * real).sum().cpu()
        total[2] += real.sum().cpu()

    for i, layer in _hybrids(model):
        layer.observer = lambda kv, fw, total=totals[i]: observe(total, kv, fw)
    try:
        for batch in data.batches:
            places = torch.arange(batch.inputs.shape[1], device=batch.lengths.device)
            real = (places < batch.lengths[:, None]).double()
            with autocast(real.device, precision):
                scored_logits(model, batch.inputs, batch.targets)
            data.on_batch()
    finally:
        for _, layer in _hybrids(model):
            layer.observer = None
    return tuple(
        MeanGate(layer=i, kv=(total[0] / total[2]).item(), fw=(total[1] / total[2]).item())
        for i, total in totals.items()
        if total[2] > 0
    )


def scored_logits(model: Model, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, vocabulary] and targets [N] at the N positions of `targets` [B, T] that are scored, row by row.

    Both are moved to the model's device; which positions are scored is found out where `targets` is, so that a GPU
    need not be waited for.
    """
    device = model.head.weight.device
    flat = targets.flatten()
    at = (flat != IGNORED).nonzero().squeeze(-1)
    if len(at) == len(flat):  # language modelling: every position is scored
        return model(inputs.to(device)).flatten(0, 1), flat.to(device)
    return model(inputs.to(device), at.to(device)), flat.index_select(0, at).to(device)


def _hybrids(model: Model) -> Sequence[tuple[int, HybridLayer]]:
    return [(i, layer) for i, layer in enumerate(model.mixers) if isinstance(layer, HybridLayer)]


def _mean(right: Tensor) -> float:
    return right.double().mean().item()
