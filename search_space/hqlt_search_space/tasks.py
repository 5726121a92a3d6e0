"""What a model is trained and judged on, as data. The trainer makes the batches.

Every length counts tokens including the answer, as in the paper's generators; a prediction is read at the last
content token. `version` changes when a generator would give other data, so old results keep their identity.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hqlt_search_space.spec import Spec


class Lengths(Spec):
    """Lengths drawn uniformly from low to high, both included."""

    low: Annotated[int, Field(ge=3, description="The shortest, the answer included.")]
    high: Annotated[int, Field(ge=3, description="The longest, the answer included.")]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class _FormalLanguage(Spec):
    """One supervised position a sequence. Published lengths: 3-40 in training, 40-256 in validation and test."""

    version: Literal[1] = Field(default=1, description="Of the generator.")
    train_length: Lengths = Field(default=Lengths(low=3, high=40), description="Of training sequences.")
    validation_length: Lengths | None = Field(default=None, description="As test_length unless given.")
    test_length: Lengths = Field(default=Lengths(low=40, high=256), description="Of test sequences.")
    n_validation: Annotated[int, Field(ge=1, description="Validation sequences.")] = 8192
    n_test: Annotated[int, Field(ge=1, description="Test sequences.")] = 8192


class Parity(_FormalLanguage):
    """Is the number of ones odd? Tokens 1 and 2 are the bits; vocabulary 3, chance 1/2."""

    kind: Literal["parity"] = "parity"


class EvenPairs(_FormalLanguage):
    """Is the number of 12 and 21 switches even, that is, are first and last equal? Vocabulary 3, chance 1/2."""

    kind: Literal["even_pairs"] = "even_pairs"


class CycleNavigation(_FormalLanguage):
    """Where on a cycle do steps of 0, +1, -1 end? Tokens 1, 2, 3; vocabulary 4 + n_positions, chance 1/n_positions."""

    kind: Literal["cycle_navigation"] = "cycle_navigation"
    n_positions: Annotated[int, Field(ge=2, le=64, description="Places on the cycle.")] = 5


class ModularArithmetic(_FormalLanguage):
    """The value modulo 5 of an expression in + - * and digits 0 to 4; chance 1/5.

    Without brackets: vocabulary 10, odd lengths, `*` binds tighter. With brackets: vocabulary 12, fully bracketed
    expressions with unary minus.
    """

    kind: Literal["modular_arithmetic"] = "modular_arithmetic"
    brackets: bool = Field(default=False, description="Fully bracketed expressions with unary minus.")

    @model_validator(mode="after")
    def _has_sequences(self) -> Self:
        for lengths in (self.train_length, self.validation_length or self.test_length, self.test_length):
            if not self.brackets and lengths.low == lengths.high and lengths.low % 2 == 0:
                raise ValueError(
                    f"without brackets lengths are odd (digits, operators between, = and the answer); "
                    f"got {lengths.low} to {lengths.high}"
                )
        return self


class Mqar(Spec):
    """Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927).

    `n_pairs` keys and values first, then queries at power-law gaps (exponent a = 0.01), filler between. Keys are drawn
    from the lower half of the vocabulary, values from the upper half, without replacement; scored at every query.
    """

    kind: Literal["mqar"] = "mqar"
    version: Literal[1] = Field(default=1, description="Of the generator.")
    vocab_size: Annotated[int, Field(ge=16, description="Keys, values and filler; half are keys, half values.")] = 8192
    length: Annotated[int, Field(ge=8, description="Tokens a sequence.")] = 64
    n_pairs: Annotated[int, Field(ge=1, description="Keys and values a sequence.")] = 4
    test_length: Annotated[int, Field(ge=8)] | None = Field(default=None, description="As `length` unless given.")
    test_pairs: Annotated[int, Field(ge=1)] | None = Field(default=None, description="As `n_pairs` unless given.")
    n_validation: Annotated[int, Field(ge=1, description="Validation sequences.")] = 1000
    n_test: Annotated[int, Field(ge=1, description="Test sequences.")] = 1000

    @model_validator(mode="after")
    def _fits(self) -> Self:
        n_keys = self.vocab_size // 2 - 1  # token 0 is no key
        shapes = ((self.length, self.n_pairs), (self.test_length or self.length, self.test_pairs or self.n_pairs))
        for length, n_pairs in dict.fromkeys(shapes):
            if length < 4 * n_pairs:
                raise ValueError(f"{n_pairs} pairs and their queries need length {4 * n_pairs} or more; got {length}")
            if n_pairs > n_keys:
                raise ValueError(f"a vocabulary of {self.vocab_size} has {n_keys} keys; got {n_pairs} pairs")
        return self


class LanguageModelling(Spec):
    """Next-byte prediction. Vocabulary 257: the bytes and a beginning-of-document mark.

    `corpus: stdlib` is the Python standard library of the running interpreter, tests excluded; otherwise a path to a
    .txt, .jsonl or .parquet file, or a folder of them. `data_sha256` is filled in before a trial is made.
    """

    kind: Literal["language_modelling"] = "language_modelling"
    version: Literal[1] = Field(default=1, description="Of the splitting and the sampling.")
    corpus: str = Field(
        default="stdlib",
        description="`stdlib`, or a .txt, .jsonl or .parquet file, or a folder; relative to the study's file.",
    )
    column: str = Field(default="text", description="Which field of a .jsonl or .parquet file holds the text.")
    context: Annotated[int, Field(ge=2, description="Tokens a training sequence.")] = 256
    n_validation_bytes: Annotated[int, Field(ge=1, description="Of validation text.")] = 65536
    n_test_bytes: Annotated[int, Field(ge=1, description="Of test text.")] = 65536
    data_sha256: str | None = Field(default=None, description="Of the corpus; filled in when the study starts.")


class Nothing(Spec):
    """No training: a trial that returns at once. What the overhead benchmark runs."""

    kind: Literal["nothing"] = "nothing"


Task = Annotated[
    Parity | EvenPairs | CycleNavigation | ModularArithmetic | Mqar | LanguageModelling | Nothing,
    Field(discriminator="kind"),
]


def vocab_size(task: Task) -> int:
    """Distinct tokens of `task`, the padding token 0 included."""
    match task:
        case Parity() | EvenPairs():
            return 3
        case CycleNavigation():
            return 4 + task.n_positions
        case ModularArithmetic():
            return 12 if task.brackets else 10
        case Mqar():
            return task.vocab_size
        case LanguageModelling():
            return 257
        case Nothing():
            return 2


def context_length(task: Task) -> int:
    """The longest sequence, in tokens, that a model of this task reads: what cost at a context is computed at."""
    match task:
        case Parity() | EvenPairs() | CycleNavigation() | ModularArithmetic():
            validation = task.validation_length or task.test_length
            return max(task.train_length.high, validation.high, task.test_length.high)
        case Mqar():
            return max(task.length, task.test_length or 0)
        case LanguageModelling():
            return task.context
        case Nothing():
            return 1


def training_length(task: Task) -> int:
    """The longest training sequence, in tokens: what the cost of training is computed at."""
    match task:
        case Parity() | EvenPairs() | CycleNavigation() | ModularArithmetic():
            return task.train_length.high
        case Mqar():
            return task.length
        case LanguageModelling():
            return task.context
        case Nothing():
            return 1


METRICS = (
    "validation_accuracy",
    "normalised_validation_accuracy",
    "validation_loss_nats",
    "validation_bits_per_byte",
    "train_loss_nats",
)
"""What a study can optimise, besides costs; not every task gives every one. Test metrics are only reported."""


def metric_names(task: Task) -> tuple[str, ...]:
    """Those of `METRICS` that `task` gives."""
    match task:
        case LanguageModelling():
            return tuple(name for name in METRICS if not name.endswith("accuracy"))
        case Nothing():
            return ("validation_loss_nats",)
        case _:
            return tuple(name for name in METRICS if name != "validation_bits_per_byte")
