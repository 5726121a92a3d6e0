"""Formal languages: parity, even pairs, cycle navigation and modular arithmetic, one answer per sequence.

Tokens and answers are those of the published generators (Delétang et al. 2023, arXiv:2207.02098; Grazzi et al. 2025,
arXiv:2411.12537; Irie et al. 2025, arXiv:2506.00744), so scores compare; everything is computed for all rows at once.
A sequence of length L is L - 1 tokens of content, then the answer, which is predicted at the last token of content.
The released parity generator counts the answer among the bits when L = 2; lengths here start at 3.

All but expressions in brackets are made on the device that trains on them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import cycle, islice, pairwise

import numpy as np
import torch
from hqlt_search_space import tasks
from hqlt_search_space.tasks import CycleNavigation, EvenPairs, Lengths, ModularArithmetic, Parity
from torch import Tensor

from hqlt_trainer.tasks.batch import Batch, Device, Integers, LengthBucket, Rows, Split, cropped_batches, random_stream
from hqlt_trainer.tasks.bracketed import MODULUS, bracketed_answer_shares, bracketed_modular_arithmetic
from hqlt_trainer.tasks.draws import Draws, stream_key

FormalLanguage = Parity | EvenPairs | CycleNavigation | ModularArithmetic

N_BUCKETS = 4
EVALUATION_ROWS = 1024
"""How many are made at a time. It bounds the memory that this takes; a table of twice as many would have the same."""


class FormalLanguageData:
    """`TaskData` of a formal language."""

    counts_bytes = False
    reference_metrics: Mapping[str, float] = {}

    def __init__(self, task: FormalLanguage) -> None:
        self._task = task
        self.vocab_size = tasks.vocab_size(task)
        self.chance = _chance(task)

    def length_buckets(self, split: Split) -> tuple[LengthBucket, ...]:
        lengths = _evaluation_lengths(self._task, split)
        span = lengths.high - lengths.low + 1
        count = min(N_BUCKETS, span // 2)  # two lengths at least, or a bucket could hold even lengths only
        if count < 2:
            return ()
        edges = [lengths.low + span * i // count for i in range(count + 1)]
        return tuple(LengthBucket(f"len_{low}_{above - 1}", low - 1, above - 2) for low, above in pairwise(edges))

    def train_batch(self, step: int, batch: int, seed: int, device: Device) -> Batch:
        source = self.row_source((seed,), batch, step, device)
        if not isinstance(source, str):
            return source().batch()
        rng = random_stream(self._task.kind, self._task.version, "train", seed, step)
        return Batch(*(x.to(device) for x in _bracketed(rng, self._task.train_length, batch).batch()))

    def row_source(self, seeds: Sequence[int], batch: int, first_step: int, device: Device) -> Callable[[], Rows] | str:
        task = self._task
        if _has_brackets(task):
            return "how deep brackets nest is drawn as well"
        keys = [stream_key(task.kind, task.version, "train", seed) for seed in seeds]
        return Sentences(task, task.train_length, keys, batch, first_step, device)

    def evaluation_batches(self, split: Split, batch: int, device: Device) -> Iterator[Batch]:
        return cropped_batches(*_evaluation_sequences(self._task, split), batch, device)


def _evaluation_lengths(task: FormalLanguage, split: str) -> Lengths:
    return task.validation_length or task.test_length if split == "validation" else task.test_length


# A worker trains many configs of one task in a row. Two splits of three tasks are 12 MB at the published size.
@lru_cache(maxsize=6)
def _evaluation_sequences(task: FormalLanguage, split: Split) -> tuple[Integers, Integers, Integers]:
    lengths, count = _evaluation_lengths(task, split), task.n_validation if split == "validation" else task.n_test
    if _has_brackets(task):
        return _compact(_bracketed(random_stream(task.kind, task.version, split), lengths, count).batch())
    key = stream_key(task.kind, task.version, split)
    source = Sentences(task, lengths, [key], EVALUATION_ROWS, 0, "cpu")
    inputs, targets, n_content = zip(
        *(_compact(source().batch()) for _ in range(0, count, EVALUATION_ROWS)), strict=True
    )
    return np.concatenate(inputs)[:count], np.concatenate(targets)[:count], np.concatenate(n_content)[:count]


def _compact(batch: Batch) -> tuple[Integers, Integers, Integers]:
    return batch.inputs.to(torch.uint8).numpy(), batch.targets.to(torch.int16).numpy(), batch.lengths.numpy()


def _has_brackets(task: FormalLanguage) -> bool:
    return isinstance(task, ModularArithmetic) and task.brackets


def _bracketed(rng: np.random.Generator, lengths: Lengths, count: int) -> Rows:
    n_content = rng.integers(lengths.low - 1, lengths.high, count)
    inputs, answers = bracketed_modular_arithmetic(rng, n_content, lengths.high - 1)
    return Rows(*(torch.from_numpy(x.astype(np.int64))[None] for x in (inputs, answers, n_content)))


class Sentences:
    """Rows of a language that needs no brackets: for some streams at a time, and other ones at each call.

    A row of `Draws` makes one: its length, then a token for every place, of which those past the length are dropped.
    """

    def __init__(
        self, task: FormalLanguage, lengths: Lengths, keys: Sequence[int], rows: int, n_before: int, device: Device
    ) -> None:
        self._task = task
        length = (lengths.low - 1, lengths.high - lengths.low + 1)
        match task:
            case Parity() | EvenPairs():
                tokens = [(1, 2)]
            case CycleNavigation():
                tokens = [(1, 3)]
            case ModularArithmetic():
                tokens = [(ZERO, MODULUS), (PLUS, 3)]
                length = (lengths.low // 2, (lengths.high + 1) // 2 - lengths.low // 2)  # in digits
        width = lengths.high - 1
        self._draws = Draws(keys, [length, *islice(cycle(tokens), width)], rows, n_before, device)
        self._places = torch.arange(width, device=device)
        self._exponents = torch.tensor(EXPONENTS, device=device)

    def __call__(self) -> Rows:
        drawn = self._draws()
        n_content, tokens = drawn[..., 0], drawn[..., 1:]
        match self._task:
            case Parity():
                inputs = self._cropped(tokens, n_content)
                answers = parity(inputs)
            case EvenPairs():
                inputs = self._cropped(tokens, n_content)
                answers = even_pairs(inputs, n_content)
            case CycleNavigation(n_positions=n_positions):
                inputs = self._cropped(tokens, n_content)
                answers = cycle_navigation(inputs, n_positions)
            case ModularArithmetic():
                n_content = 2 * n_content
                inputs = self._cropped(tokens, n_content)
                inputs.masked_fill_(self._places == n_content[..., None] - 1, EQUALS)
                answers = modular_arithmetic(inputs, self._exponents)
        return Rows(inputs, answers, n_content)

    def _cropped(self, tokens: Tensor, n_content: Tensor) -> Tensor:
        return tokens * (self._places < n_content[..., None])


# Each of these computes the answers [...] of inputs [..., T], which are zero past their end.


def parity(inputs: Tensor) -> Tensor:
    """Bits as tokens 1 and 2; the answer is 1 if the number of 2s is even, else 2."""
    return (inputs == 2).sum(-1) % 2 + 1


def even_pairs(inputs: Tensor, n_content: Tensor) -> Tensor:
    """Tokens 1 and 2; the answer is 1 if the neighbours 12 and 21 are even in number, else 2.

    That is, if first and last are equal, for each such pair switches from one token to the other.
    """
    last = inputs.gather(-1, n_content[..., None] - 1).squeeze(-1)
    return 1 + (inputs[..., 0] != last)


def cycle_navigation(inputs: Tensor, n_positions: int) -> Tensor:
    """Tokens 1, 2, 3 step by 0, +1, -1 on a cycle; the answer is 4 + the position they end at, from 0."""
    return 4 + ((inputs == 2).sum(-1) - (inputs == 3).sum(-1)) % n_positions


PLUS, MINUS, TIMES, EQUALS, ZERO = 1, 2, 3, 4, 5
NO_FACTOR = 2**32
"""More than the exponents of a sequence add up to."""
EXPONENTS = (0, 0, 2, 0, 0, NO_FACTOR, 0, 1, 3, 2)
"""Of 2 for each token as a factor modulo 5: 1, 2, 3, 4 are 2^0, 2^1, 2^3, 2^2, a minus is a factor of -1 = 2^2."""


def modular_arithmetic(inputs: Tensor, exponents: Tensor) -> Tensor:
    """Digits 0 to 4 (tokens 5 to 9) joined by + - * (1, 2, 3), then = (4); the answer is the value modulo 5 as a digit.

    `*` binds tighter. Without a loop: the exponent of a product is the difference of running sums at its ends, which
    are every + - and =; where it has a zero that is `NO_FACTOR` or more. The sums never fall, so the one at the last
    end before a place is the largest of those so far. `exponents` is `EXPONENTS` on the device.
    """
    exponent = exponents.take(inputs)
    before = exponent.cumsum(-1) - exponent
    is_end = (inputs == PLUS) | (inputs == MINUS) | (inputs == EQUALS)
    at_ends = before * is_end
    start = torch.zeros_like(at_ends)
    start[..., 1:] = at_ends.cummax(-1).values[..., :-1]
    of_product = before - start
    value = (1 << (of_product & 3)) * (is_end & (of_product < NO_FACTOR))
    return ZERO + value.sum(-1) % MODULUS


def _chance(task: FormalLanguage) -> float:
    """The accuracy of the best constant answer: nominal where labels are nearly uniform, exact with brackets.

    Without brackets 1/5 as in the papers; a product with a zero makes zero likelier in short expressions: 25 % at
    length 5, 21 % at lengths 3 to 40, no more than the others from 21 on.
    """
    match task:
        case Parity() | EvenPairs():
            return 1 / 2
        case CycleNavigation():
            return 1 / task.n_positions
        case ModularArithmetic():
            if not task.brackets:
                return 1 / MODULUS
            lengths = _evaluation_lengths(task, "validation")
            shares = bracketed_answer_shares(lengths.high - 2)
            return float(shares[lengths.low - 2 : lengths.high - 1].mean(axis=0).max())
