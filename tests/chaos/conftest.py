"""Labs that are cleared away."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for lab.py and its neighbours

from lab import Lab


@pytest.fixture
def make_lab(tmp_path: Path) -> Iterator[Callable[..., Lab]]:
    """Makes a lab; skipped where what it is to break is not there."""
    made: list[Lab] = []

    def make(text: str, **parts: object) -> Lab:
        try:
            lab = Lab(tmp_path / "lab", "chaos", text, **parts)
        except FileNotFoundError as error:
            pytest.skip(str(error))
        except KeyError as error:
            pytest.skip(f"PostgreSQL does not run as root, and there is no other user: {error}")
        made.append(lab)
        return lab

    yield make
    for lab in made:
        lab.close()
