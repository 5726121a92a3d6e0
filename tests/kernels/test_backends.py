from unittest import mock

import pytest
import torch
from hqlt_kernels import backends
from hqlt_kernels.backends import (
    LIBRARIES,
    OPERATORS,
    SHORT_WINDOW,
    BackendUnavailableError,
    Choice,
    Operator,
    choose_backend,
    keys_seen,
    survey,
)
from hqlt_kernels.blend import blend
from hqlt_kernels.fast_weight import fast_weight
from hqlt_kernels.window_attention import window_attention

RULES = tuple(operator for operator in OPERATORS if operator not in ("window_attention", "blend"))


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


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_forced_attention_library_is_refused_where_it_cannot_run(library):
    with pytest.raises(BackendUnavailableError, match=f"{library} backend cannot run window_attention"):
        choose_backend("window_attention", device="cpu", dtype=torch.bfloat16, head_dim=64, forced=library)


@pytest.mark.parametrize("rule", RULES)
def test_an_attention_library_changes_nothing_for_fast_weights(rule):
    where = {"device": "cpu", "dtype": torch.float32, "head_dim": 64}
    assert choose_backend(rule, forced="torch_flash", **where) == choose_backend(rule, **where)


def test_operators_refuse_a_forced_backend_that_cannot_run():
    q, k, v = torch.ones(3, 1, 2, 1, 4)
    for call in (
        lambda: fast_weight(q, k, v, backend="triton"),
        lambda: window_attention(q, k, v, window=1, backend="triton"),
        lambda: window_attention(q, k, v, window=1, backend="flash_attn_4"),
        lambda: blend(q, k, v, timing="synchronous", window=1, backend="triton"),
        lambda: blend(q, k, v, timing="synchronous", window=1, backend="torch_flash"),
    ):
        with pytest.raises(BackendUnavailableError):
            call()


@pytest.mark.parametrize("arguments", [{"operator": "softmax"}, {"forced": "numpy"}], ids=str)
def test_an_unknown_name_is_answered_with_the_known_ones(arguments):
    with pytest.raises(ValueError, match="there is"):
        choose_backend(**{"operator": "delta", "device": "cpu", "dtype": torch.float32, "head_dim": 8} | arguments)


def on_a_card(
    capability: tuple[int, int], installed: set[str], keys: int | None, dtype: torch.dtype = torch.bfloat16
) -> Choice:
    """What a machine that is not here would choose for attention."""
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.object(backends, "_is_installed", installed.__contains__),
        mock.patch.object(backends, "_TRITON_IS_INSTALLED", True),
    ):
        return choose_backend("window_attention", device="cuda", dtype=dtype, head_dim=128, keys=keys)


HOPPER, AMPERE = (9, 0), (8, 0)


@pytest.mark.parametrize(
    ("capability", "installed", "keys", "expected"),
    [
        (HOPPER, set(), 64, "triton"),
        (HOPPER, set(), 1024, "triton"),
        (HOPPER, set(), None, "torch_flash"),
        (HOPPER, {"flash-attn-4"}, 64, "triton"),
        (HOPPER, {"flash-attn-4"}, 1024, "flash_attn_4"),
        (HOPPER, {"flash-attn-4"}, None, "flash_attn_4"),
        (HOPPER, {"flash-attn"}, None, "flash_attn_2"),
        (AMPERE, {"flash-attn-4"}, 64, "torch_flash"),
        (AMPERE, {"flash-attn"}, 64, "flash_attn_2"),
        ((7, 5), set(), 64, "chunked"),
    ],
    ids=str,
)
def test_attention_goes_where_it_is_fastest_of_what_is_installed(capability, installed, keys, expected):
    assert on_a_card(capability, installed, keys).backend == expected


def test_a_reason_tells_what_would_have_been_better():
    assert "not flash_attn_4: the package flash-attn-4 is not installed" in on_a_card(HOPPER, set(), None).reason


def test_float32_attention_never_goes_to_a_library_of_16_bits():
    assert on_a_card(HOPPER, {"flash-attn-4", "flash-attn"}, None, torch.float32).backend == "triton"


@pytest.mark.parametrize(
    ("window", "n_keys", "expected"),
    [(None, 4096, None), (8192, 4096, None), (64, 4096, 64), (None, 40, 40), (64, 40, 40), (None, SHORT_WINDOW, 256)],
)
def test_keys_seen_tells_all_of_a_long_sequence_from_a_number(window, n_keys, expected):
    assert keys_seen(window, n_keys) == expected


def test_the_survey_names_every_operator_in_order():
    assert list(dict.fromkeys(choice.operator for choice in survey())) == list(OPERATORS)


def test_heads_of_256_have_kernels_for_fast_weights_in_16_bits_only():
    def choice(operator: Operator, dtype: torch.dtype) -> Choice:
        with (
            mock.patch.object(torch.cuda, "get_device_capability", return_value=HOPPER),
            mock.patch.object(backends, "_TRITON_IS_INSTALLED", True),
        ):
            return choose_backend(operator, device="cuda", dtype=dtype, head_dim=256)

    assert choice("gated_delta", torch.bfloat16).backend == "triton"
    assert "do not fit on a multiprocessor" in choice("gated_delta", torch.float32).reason
    assert "head dims are 32, 64, 128, not 256" in choice("blend", torch.bfloat16).reason
