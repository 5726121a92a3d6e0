"""Other people's attention computes what ours is defined as."""

import pytest
import torch
from hqlt_kernels.backends import LIBRARIES, BackendUnavailableError, Library, choose_backend
from hqlt_kernels.window_attention import window_attention
from triton_cases import CUDA, assert_as_good_as_torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]


@pytest.mark.parametrize("rope_base", [None, 1e4], ids=["no rope", "rope"])
@pytest.mark.parametrize("window", [50, 300, None], ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_computes_the_definition(library: Library, window, rope_base):
    try:
        choose_backend("window_attention", device="cuda", dtype=torch.bfloat16, head_dim=64, forced=library)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 600, 3, 64, generator=generator).cuda().bfloat16()

    def results(dtype: torch.dtype, backend) -> dict[str, torch.Tensor]:
        q, k, v = (y.to(dtype).detach().requires_grad_() for y in x[:3])
        o = window_attention(q, k, v, window=window, rope_base=rope_base, backend=backend)
        o.backward(x[3].to(dtype))
        return {"o": o.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}

    assert_as_good_as_torch(
        results(torch.bfloat16, library),
        results(torch.bfloat16, "chunked"),
        results(torch.float64, "definition"),
        factor=2.5,  # probabilities are rounded to 16 bits before their product with v
    )
