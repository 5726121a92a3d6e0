"""Modular arithmetic in brackets, drawn for all rows at once.

How deep an expression nests is drawn as well, so these data are made by NumPy on a CPU: a GPU could only make them with
a look at each depth, or with as many depths for every row as the longest row can have.
"""

import numpy as np
import numpy.typing as npt

from hqlt_trainer.tasks.batch import Integers

Bytes = npt.NDArray[np.uint8]

MODULUS = 5
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
