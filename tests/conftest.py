"""What several folders of tests share."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import version

import pytest
import torch

# Without a CUDA device the Triton kernels run in Triton's interpreter. It is chosen when a kernel is decorated, that
# is, when any test first imports one: so here, before all of them.
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_report_header() -> str:
    """What the kernels run on."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__}, no CUDA device"
    return f"torch {torch.__version__}, triton {version('triton')}, {torch.cuda.get_device_name()}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, for all to see, what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: make test-gpu on a machine with one"))


@pytest.fixture(scope="session")
def ray() -> Iterator[None]:
    """One Ray for all tests that need it: it takes seconds to start. Executors find it running and leave it alone."""
    from hqlt_orchestration.executor import start_ray

    folder = start_ray(2, None)  # before anything imports ray, which then reads its settings
    import ray

    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
