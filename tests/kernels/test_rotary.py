import pytest
import torch
from hqlt_kernels.rotary import rotate

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def vectors(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_rotation_is_a_product_of_complex_numbers():
    x = vectors(2, 7, 3, 8)
    frequencies = 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    angles = (5 + torch.arange(7, dtype=torch.float64))[:, None] * frequencies
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(rotate(x, 100.0, position=5), torch.cat([turned.real, turned.imag], -1))


def test_inner_products_depend_on_the_distance_only():
    q, k = vectors(1, 1, 1, 16).float(), vectors(1, 1, 2, 16)[:, :, 1:].float()
    products = [(rotate(q, 1e4, 17 + far) * rotate(k, 1e4, far)).sum() for far in (0, 3, 1_000_000)]
    torch.testing.assert_close(torch.stack(products), products[0].expand(3), rtol=1e-5, atol=1e-5)


def test_several_writes_of_a_token_share_its_position():
    x = vectors(2, 5, 3, 2, 8)
    torch.testing.assert_close(rotate(x, 1e4)[:, :, 1], rotate(x[:, :, 1], 1e4))


def test_the_gradient_is_turned_back():
    assert torch.autograd.gradcheck(lambda x: rotate(x, 10.0, position=3), vectors(2, 4, 1, 6).requires_grad_())


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap_over_replicas_turns_along_time(dim):
    x = vectors(3, 4, 5, 2, 6)
    mapped = torch.func.vmap(lambda x: rotate(x, 10.0), in_dims=dim)(x)
    torch.testing.assert_close(mapped, torch.stack([rotate(part, 10.0) for part in x.unbind(dim)]))


def test_a_table_that_inference_made_serves_training():
    x = vectors(1, 11, 1, 4)
    with torch.inference_mode():
        rotate(x, 12345.0)
    leaf = x.clone().requires_grad_()
    rotate(leaf, 12345.0).sum().backward()
    assert leaf.grad is not None


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="needs an even width, got 5"):
        rotate(vectors(1, 2, 1, 5), 1e4)
