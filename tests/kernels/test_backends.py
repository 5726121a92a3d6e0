import pytest
import torch
from hqlt_kernels.backends import OPERATORS, BackendUnavailableError, Choice, choose_backend, survey
from hqlt_kernels.blend import blend
from hqlt_kernels.fast_weight import fast_weight
from hqlt_kernels.window_attention import window_attention


@pytest.mark.parametrize("operator", OPERATORS)
def test_on_a_cpu_every_operator_is_chunked_and_says_why(operator):
    choice = choose_backend(operator, device="cpu", dtype=torch.float32, head_dim=64)
    assert choice == Choice(operator, "chunked", "cpu, float32, head_dim 64")


@pytest.mark.parametrize("forced", ["definition", "chunked"])
def test_a_forced_backend_is_taken_and_said_to_be_forced(forced):
    choice = choose_backend("delta", device="cpu", dtype=torch.bfloat16, head_dim=32, forced=forced)
    assert choice == Choice("delta", forced, "forced; cpu, bfloat16, head_dim 32")


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_forced_backend_that_cannot_run_is_an_error_and_not_another_backend(operator):
    with pytest.raises(BackendUnavailableError, match=f"cannot run {operator} .*needs a CUDA device, not cpu"):
        choose_backend(operator, device="cpu", dtype=torch.float32, head_dim=64, forced="triton")


def test_operators_refuse_a_forced_backend_that_cannot_run():
    q, k, v = torch.ones(3, 1, 2, 1, 4)
    for call in (
        lambda: fast_weight(q, k, v, backend="triton"),
        lambda: window_attention(q, k, v, window=1, backend="triton"),
        lambda: blend(q, k, v, timing="synchronous", window=1, backend="triton"),
    ):
        with pytest.raises(BackendUnavailableError):
            call()


@pytest.mark.parametrize("arguments", [{"operator": "softmax"}, {"forced": "numpy"}], ids=str)
def test_an_unknown_name_is_answered_with_the_known_ones(arguments):
    with pytest.raises(ValueError, match="there is"):
        choose_backend(**{"operator": "delta", "device": "cpu", "dtype": torch.float32, "head_dim": 8} | arguments)


def test_the_survey_names_every_operator_once():
    assert [choice.operator for choice in survey()] == list(OPERATORS)
