"""Every exception hqlt raises on purpose, for mistakes that a user can mend.

HqltError
├── StudyFileError        the YAML does not describe a valid study
├── InvalidArchError      a model that cannot be built, or makes no sense
├── MatchError            no architecture reaches the size that was asked for
├── UnknownNameError      no study, trial or model of that name
├── DataError             a corpus or data file cannot be used
├── StoreError            the data folder or a database cannot be used
├── StudyConflictError    a study of that name exists and differs
├── BackendError          a forced kernel backend cannot run here
├── CheckpointError       a checkpoint is damaged or belongs to something else
├── ResourceError         a device was asked for that is not there
├── NoResultError         a study without a complete trial has no front
├── TrialFailedError      a trial ended without a result
└── TrialPausedError      a trial was asked to stop and wrote a checkpoint

Exceptions cross process borders (Ray pickles them), so each one hands all of its fields to ``super().__init__`` and
builds its text in ``__str__``.
"""


class HqltError(Exception):
    """Something a user can act on: printed as one message, without a traceback."""

    exit_code = 2


class StudyFileError(HqltError):
    """A study file with all of its problems, each as `line:column  path: sentence`."""

    def __init__(self, path: str, problems: tuple[str, ...]) -> None:
        super().__init__(path, problems)
        self.path = path
        self.problems = problems

    def __str__(self) -> str:
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        return "\n  ".join([f"{self.path}: {count}", *self.problems])


class InvalidArchError(HqltError):
    """A model that cannot be built or makes no sense, with every reason."""

    def __init__(self, reasons: tuple[str, ...]) -> None:
        super().__init__(reasons)
        self.reasons = reasons

    def __str__(self) -> str:
        return "; ".join(self.reasons)


class MatchError(HqltError):
    """No architecture within reach has the parameters, FLOPs or state that was asked for."""


class UnknownNameError(HqltError):
    """A name that is not there, with the names that are."""

    def __init__(self, what: str, name: str, known: tuple[str, ...]) -> None:
        super().__init__(what, name, known)
        self.what = what
        self.name = name
        self.known = known

    def __str__(self) -> str:
        import difflib

        near = difflib.get_close_matches(self.name, self.known, n=1)
        if near:
            return f"no {self.what} {self.name!r}; did you mean {near[0]!r}?"
        if not self.known:
            return f"no {self.what} {self.name!r}; there is none yet"
        shown = ", ".join(self.known[:10]) + (f" and {len(self.known) - 10} more" if len(self.known) > 10 else "")
        return f"no {self.what} {self.name!r}; there is {shown}"


class DataError(HqltError):
    """A corpus or data file that cannot be used: missing, empty, unreadable, not UTF-8, or changed."""


class StoreError(HqltError):
    """A data folder or database that cannot be used: read-only, full, locked or of another version."""


class StudyConflictError(HqltError):
    """A study of the same name is in the store with another content."""

    def __init__(self, name: str, differences: tuple[str, ...]) -> None:
        super().__init__(name, differences)
        self.name = name
        self.differences = differences

    def __str__(self) -> str:
        return "\n  ".join(
            [
                f"study {self.name!r} exists with other contents:",
                *self.differences,
                f"change `name` in the file, or remove the old study with `hqlt study delete {self.name}`",
            ]
        )


class BackendError(HqltError):
    """A kernel backend was forced and cannot run here."""


class CheckpointError(HqltError):
    """A checkpoint that is damaged, incomplete, or of another configuration."""


class ResourceError(HqltError):
    """A device, or an amount of one, that this machine or cluster does not have."""


class NoResultError(HqltError):
    """A front or a table was asked for and no trial has come to a result yet."""

    exit_code = 1


class TrialFailedError(HqltError):
    """A trial that ended without a result. `reason` is one of the words of `trial.FailureReason`."""

    exit_code = 1

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


class TrialPausedError(HqltError):
    """A trial that was asked to stop and wrote a checkpoint: run again on the same folder, it continues from there."""

    exit_code = 1

    def __init__(self, seed: int, step: int) -> None:
        super().__init__(seed, step)
        self.seed = seed
        self.step = step

    def __str__(self) -> str:
        return f"paused at step {self.step} of seed {self.seed}; run it again on the same folder to continue"
