import pytest
import torch
from hqlt_kernels.feature_maps import FEATURE_MAPS, map_features
from torch.nn import functional

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def vectors(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("identity", lambda x: x),
        ("elu_plus_one", lambda x: torch.where(x > 0, x + 1, x.exp())),
        ("silu_l2", lambda x: x.sigmoid() * x / ((x.sigmoid() * x).square().sum(-1, keepdim=True) + 1e-6).sqrt()),
        ("relu_l2", lambda x: x.clamp(min=0) / (x.clamp(min=0).square().sum(-1, keepdim=True) + 1e-6).sqrt()),
    ],
)
def test_a_feature_map_is_its_formula(name, formula):
    x = vectors(3, 5, 8)
    torch.testing.assert_close(map_features(x, name), formula(x))


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_the_gradient_of_a_feature_map_matches_finite_differences(name):
    assert torch.autograd.gradcheck(lambda x: map_features(x, name), vectors(2, 3, 4).requires_grad_())


@pytest.mark.parametrize("name", ["silu_l2", "relu_l2"])
def test_a_normalised_key_is_never_longer_than_one(name):
    assert map_features(100 * vectors(50, 8), name).norm(dim=-1).max() <= 1
    zero = torch.zeros(2, 4, requires_grad=True)
    mapped = map_features(zero, name)
    mapped.sum().backward()
    assert torch.equal(mapped, torch.zeros(2, 4))
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize("name", ["silu_l2", "relu_l2"])
def test_in_float32_a_map_is_no_worse_than_torch(name, assert_no_worse_than_torch):
    x = vectors(64, 16).float().requires_grad_()
    weight = vectors(64, 16).float()

    def composed(x: torch.Tensor) -> torch.Tensor:
        s = functional.silu(x) if name == "silu_l2" else functional.relu(x)
        return s * torch.rsqrt((s * s).sum(-1, keepdim=True) + 1e-6)

    truth = composed(x.double())
    assert_no_worse_than_torch(map_features(x, name), composed(x), truth, name="y")
    gradients = [
        torch.autograd.grad((y * weight).sum(), x)[0]
        for y in (map_features(x, name), composed(x), composed(x.double()))
    ]
    assert_no_worse_than_torch(*gradients, name="x")


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_vmap_leaves_the_last_axis_the_one_that_is_normalised(name, dim):
    x = vectors(3, 4, 5)
    mapped = torch.func.vmap(lambda x: map_features(x, name), in_dims=dim)(x)
    torch.testing.assert_close(mapped, map_features(x.movedim(dim, 0), name))
