"""What several folders of tests share."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Without a CUDA driver the Triton kernels run in Triton's interpreter. It is chosen when a kernel is decorated, that
# is, when any test first imports one: so here, before all of them. (Asking torch would import it for every test.)
if importlib.util.find_spec("triton") and not Path("/proc/driver/nvidia").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def ray() -> Iterator[None]:
    """One Ray for all tests that need it: it takes seconds to start. Executors find it running and leave it alone."""
    import ray
    from hqlt_orchestration.executor import start_ray

    start_ray(2, None)
    yield
    ray.shutdown()
