"""`python -m hqlt_trainer trial.json --out DIR`: one trial, with no database, no Ray and no tracking."""

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

import pydantic
from hqlt_search_space.errors import HqltError
from hqlt_search_space.trial import ReplicaResult, Trial, TrialResult

SHOWN_METRICS = (
    "normalised_validation_accuracy",
    "normalised_test_accuracy",
    "validation_bits_per_byte",
    "test_bits_per_byte",
    "gzip_bits_per_byte",
    "train_loss_nats",
    "validation_loss_nats",
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the trial in a file, writes `DIR/result.json` and prints a summary. Returns the exit code.

    0 every replica has a result; 1 one failed, or the trial was interrupted; 2 the request was wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m hqlt_trainer", description=__doc__.partition(": ")[2])
    parser.add_argument("trial", type=Path, help="a Trial as JSON")
    parser.add_argument("--out", type=Path, required=True, help="folder for result.json and checkpoints")
    options = parser.parse_args(arguments)
    try:
        trial = _read_trial(options.trial)
        options.out.mkdir(parents=True, exist_ok=True)
        result = _run(trial, options.out)
    except HqltError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    print(_summary(result))
    return 1 if any(replica.status == "failed" for replica in result.replicas) else 0


def _read_trial(path: Path) -> Trial:
    try:
        return Trial.from_json(path.read_bytes())
    except pydantic.ValidationError as error:
        problems = [f"{'.'.join(map(str, p['loc'])) or 'the file'}: {p['msg']}" for p in error.errors()]
        raise TrialFileError("\n  ".join([f"{path} does not describe a trial", *problems])) from None


def _run(trial: Trial, out: Path) -> TrialResult:
    # torch takes a second to load: a wrong request need not wait for it.
    from hqlt_trainer.checkpoint import write_whole
    from hqlt_trainer.run import run_trial

    interrupted = False

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:  # asked twice: at once
            raise KeyboardInterrupt
        interrupted = True

    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, interrupt)
    result = run_trial(trial, out, cancelled=lambda: interrupted)
    write_whole(out / "result.json", result.model_dump_json(indent=1))
    return result


def _summary(result: TrialResult) -> str:
    backends = ", ".join(dict.fromkeys(f"{backend.operator}: {backend.backend}" for backend in result.backends))
    lines = [f"trial {result.trial.trial_id}" + (f"  ({backends})" if backends else "")]
    return "\n".join([*lines, *map(_replica_line, result.replicas), *(f"  note: {note}" for note in result.notes)])


def _replica_line(replica: ReplicaResult) -> str:
    shown = "  ".join(f"{name} {replica.metrics[name]:.4f}" for name in SHOWN_METRICS if name in replica.metrics)
    speed = f"  {replica.tokens_per_second:.0f} tokens/s" if replica.tokens_per_second else ""
    return f"  seed {replica.seed}: {replica.status} at step {replica.step}  {replica.message or shown}{speed}"


class TrialFileError(HqltError):
    """A file that does not describe a trial."""


if __name__ == "__main__":
    sys.exit(main())
