"""What several folders of tests share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray() -> Iterator[None]:
    """One Ray for all tests that need it: it takes seconds to start. Executors find it running and leave it alone."""
    import ray
    from hqlt_orchestration.executor import start_ray

    start_ray(2, None)
    yield
    ray.shutdown()
