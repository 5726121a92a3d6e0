"""Formal languages: parity, even pairs, cycle navigation and modular arithmetic, one answer per sequence.

Tokens and answers are those of the published generators (Delétang et al. 2023, arXiv:2207.02098; Grazzi et al. 2025,
arXiv:2411.12537; Irie et al. 2025, arXiv:2506.00744), so scores compare; everything is computed for all rows at once.
A sequence of length L is L - 1 tokens of content, then the answer, which is predicted at the last token of content.
The released parity generator counts the answer among the bits when L = 2; lengths here start at 3.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from hqlt_search_space import tasks
from hqlt_search_space.tasks import CycleNavigation, EvenPairs, Lengths, ModularArithmetic, Parity

from hqlt_trainer.tasks.batch import (
    IGNORED,
    Batch,
    Device,
    Integers,
    LengthBucket,
    Split,
    cropped_batches,
    random_stream,
    to_batch,
)

FormalLanguage = Parity | EvenPairs | CycleNavigation | ModularArithmetic
Bytes = npt.NDArray[np.uint8]

MODULUS = 5
N_BUCKETS = 4


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
        rng = random_stream(self._task.kind, self._task.version, "train", seed, step)
        return to_batch(*_sequences(self._task, rng, self._task.train_length, batch), device)

    def evaluation_batches(self, split: Split, batch: int, device: Device) -> Iterator[Batch]:
        return cropped_batches(*_evaluation_sequences(self._task, split), batch, device)


def _evaluation_lengths(task: FormalLanguage, split: str) -> Lengths:
    return task.validation_length or task.test_length if split == "validation" else task.test_length


# A worker trains many configs of one task in a row. Two splits of three tasks are 12 MB at the published size.
@lru_cache(maxsize=6)
def _evaluation_sequences(task: FormalLanguage, split: Split) -> tuple[Bytes, npt.NDArray[np.int16], Integers]:
    rng = random_stream(task.kind, task.version, split)
    count = task.n_validation if split == "validation" else task.n_test
    return _sequences(task, rng, _evaluation_lengths(task, split), count)


def _sequences(
    task: FormalLanguage, rng: np.random.Generator, lengths: Lengths, count: int
) -> tuple[Bytes, npt.NDArray[np.int16], Integers]:
    """Inputs [count, high - 1], targets of the same shape, and the number of content tokens [count]."""
    width = lengths.high - 1
    if _odd_only(task):
        n_content = 2 * rng.integers(lengths.low // 2, (lengths.high + 1) // 2, count)
    else:
        n_content = rng.integers(lengths.low - 1, lengths.high, count)
    match task:
        case Parity():
            inputs, answers = parity(rng, n_content, width)
        case EvenPairs():
            inputs, answers = even_pairs(rng, n_content, width)
        case CycleNavigation():
            inputs, answers = cycle_navigation(rng, n_content, width, task.n_positions)
        case ModularArithmetic():
            generate = bracketed_modular_arithmetic if task.brackets else modular_arithmetic
            inputs, answers = generate(rng, n_content, width)
    targets = np.full(inputs.shape, IGNORED, np.int16)
    targets[np.arange(count), n_content - 1] = answers
    return inputs, targets, n_content


def _odd_only(task: FormalLanguage) -> bool:
    return isinstance(task, ModularArithmetic) and not task.brackets


def parity(rng: np.random.Generator, n_content: Integers, width: int) -> tuple[Bytes, Integers]:
    """Bits as tokens 1 and 2; the answer is 1 if the number of 2s is even, else 2."""
    inputs = rng.integers(1, 3, (len(n_content), width), np.uint8) * _content(n_content, width)
    return inputs, np.count_nonzero(inputs == 2, axis=1) % 2 + 1


def even_pairs(rng: np.random.Generator, n_content: Integers, width: int) -> tuple[Bytes, Integers]:
    """Tokens 1 and 2; the answer is 1 if the neighbours 12 and 21 are even in number, else 2.

    That is, if first and last are equal, for each such pair switches from one token to the other.
    """
    inputs = rng.integers(1, 3, (len(n_content), width), np.uint8) * _content(n_content, width)
    last = inputs[np.arange(len(inputs)), n_content - 1]
    return inputs, 1 + (inputs[:, 0] != last)


def cycle_navigation(
    rng: np.random.Generator, n_content: Integers, width: int, n_positions: int
) -> tuple[Bytes, Integers]:
    """Tokens 1, 2, 3 step by 0, +1, -1 on a cycle; the answer is 4 + the position they end at, from 0."""
    inputs = rng.integers(1, 4, (len(n_content), width), np.uint8) * _content(n_content, width)
    steps = np.count_nonzero(inputs == 2, axis=1) - np.count_nonzero(inputs == 3, axis=1)
    return inputs, 4 + steps % n_positions


def modular_arithmetic(rng: np.random.Generator, n_content: Integers, width: int) -> tuple[Bytes, Integers]:
    """Digits 0 to 4 (tokens 5 to 9) joined by + - * (1, 2, 3), then = (4); the answer is the value modulo 5 as a digit.

    `*` binds tighter. `n_content` is even: a digit before each operator and before the =.
    """
    plus, minus, times, equals, zero = 1, 2, 3, 4, 5
    n_digits = n_content // 2
    inputs = np.empty((len(n_content), width), np.uint8)
    inputs[:, 0::2] = rng.integers(zero, zero + MODULUS, (len(inputs), (width + 1) // 2), np.uint8)
    inputs[:, 1::2] = rng.integers(plus, times + 1, (len(inputs), width // 2), np.uint8)
    inputs[np.arange(len(inputs)), n_content - 1] = equals
    inputs *= _content(n_content, width)

    # Beyond the last digit the sum goes on with + 0, which changes nothing. Transposed: a step reads a row.
    digit = np.ascontiguousarray((inputs[:, 0:-1:2] - zero).T.astype(np.int16))
    digit *= np.arange(len(digit))[:, None] < n_digits
    operator = np.ascontiguousarray(inputs[:, 1:-1:2].T)
    operator[np.arange(1, len(operator) + 1)[:, None] >= n_digits] = plus
    total = np.zeros(len(inputs), np.int16)
    term = digit[0]
    for joined_by, value in zip(operator, digit[1:], strict=False):
        multiplies = joined_by == times
        total += np.where(multiplies, 0, term)
        term = np.where(multiplies, term * value % MODULUS, np.where(joined_by == minus, -value, value))
    return inputs, zero + (total + term) % MODULUS


PLUS, MINUS, TIMES, OPEN, CLOSE, EQUALS, PADDING = range(MODULUS, MODULUS + 7)  # digits are their own tokens


def bracketed_modular_arithmetic(rng: np.random.Generator, n_content: Integers, width: int) -> tuple[Bytes, Integers]:
    """A fully bracketed expression in + - * and digits, then =; the answer is its value modulo 5.

    An expression of up to four tokens is a digit d, -d, (d) or (-d); a longer one is (left operator right) with the
    split and the operator drawn uniformly. All expressions of one depth, of all rows, are split at once.
    """
    inputs = np.full((len(n_content), width), PADDING, np.uint8)
    inputs[np.arange(len(inputs)), n_content - 1] = EQUALS
    flat = inputs.reshape(-1)
    start = np.arange(len(inputs)) * width  # of each expression, in `flat`
    length = n_content - 1
    splits: list[tuple[npt.NDArray[np.bool_], Bytes, Bytes]] = []  # by depth: which are split, leaf values, operators
    while len(start):
        bracketed = length >= 3
        flat[start[bracketed]] = OPEN
        flat[(start + length - 1)[bracketed]] = CLOSE

        split = length >= 5
        leaf_start, leaf_length = start[~split], length[~split]
        digit = rng.integers(0, MODULUS, len(leaf_start), np.uint8)
        negative = leaf_length % 2 == 0
        flat[leaf_start + leaf_length // 2] = digit
        flat[(leaf_start + leaf_length // 2 - 1)[negative]] = MINUS

        left_length = rng.integers(1, length[split] - 3)
        operator = rng.integers(PLUS, TIMES + 1, len(left_length), np.uint8)
        flat[start[split] + 1 + left_length] = operator
        splits.append((split, np.where(negative, MODULUS - digit, digit), operator))
        start, length = (
            np.concatenate([start[split] + 1, start[split] + left_length + 2]),
            np.concatenate([left_length, length[split] - 3 - left_length]),
        )

    value = np.empty(0, np.uint8)
    for split, leaf_value, operator in reversed(splits):
        left, right = np.split(value, 2)
        value = np.empty(len(split), np.uint8)
        value[~split] = leaf_value
        results = (left + right, left + (MODULUS - right), left * right)
        value[split] = np.choose(operator - PLUS, results)
        value %= MODULUS
    return inputs, value


def _content(n_content: Integers, width: int) -> npt.NDArray[np.bool_]:
    return np.arange(width) < n_content[:, None]


def _chance(task: FormalLanguage) -> float:
    """The accuracy of the best constant answer: nominal where labels are nearly uniform, exact with brackets.

    Without brackets 1/5 as in the papers, though zero is the answer of 22 % (a product with a zero is zero).
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


def bracketed_answer_shares(longest: int) -> npt.NDArray[np.float64]:
    """Probability [longest + 1, 5] of each value of a bracketed expression, by its number of tokens; row 0 is unused.

    Zero wins with length: 0.20 at 1 token, 0.29 at 40, 0.31 at 254.
    """
    operand = np.arange(MODULUS)
    result = np.zeros((MODULUS, MODULUS, MODULUS))  # [left, right, value]: share of the three operators
    for value in (np.add.outer(operand, operand), np.subtract.outer(operand, operand), np.outer(operand, operand)):
        result += np.eye(MODULUS)[value % MODULUS] / 3
    shares = np.full((longest + 1, MODULUS), 1 / MODULUS)
    for length in range(5, longest + 1):
        left = shares[1 : length - 3]
        shares[length] = np.einsum("sl,sr,lrv->v", left, left[::-1], result) / len(left)
    return shares
