from unittest import mock

import pytest
import torch
from hqlt_kernels import backends
from hqlt_kernels.blend.choice import SHORT, choose_blend, kernel_dtype

BF16 = torch.bfloat16


def choose(**changes):
    """What a Hopper GPU would take for the paper's synthetic models, with changes."""
    usual = {"n_tokens": 40, "window": 8, "device": "cuda", "dtype": BF16, "head_dim": 32, "capability": (9, 0)}
    with mock.patch.object(backends, "_TRITON_IS_INSTALLED", True):
        return choose_blend(**usual | changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "one program a head"),
        ({"n_tokens": SHORT, "head_dim": 64, "window": None}, "one program a head"),
        ({"normaliser": "time"}, "one program a head"),
        ({"n_tokens": SHORT + 1}, "scans"),
        ({"head_dim": 128}, "scans"),
        ({"dtype": torch.float32}, "scans"),
        ({"kv_positions": True}, "scans"),
    ],
    ids=str,
)
def test_one_operator_runs_both_memories_and_says_how(changes, expected):
    choice = choose(**changes)
    assert choice.backend == "triton"
    assert choice.reason.endswith(f"; {expected}")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"normaliser": "heads", "n_tokens": SHORT + 1}, "normaliser heads"),
        ({"normaliser": "time", "dtype": torch.float32}, "normaliser time"),
        ({"several_writes": True}, "several writes a token"),
        ({"fw_positions": True}, "positions in FW-memory"),
        ({"carries_state": True}, "a state is carried"),
        ({"window": None, "n_tokens": 4096}, "attention to all keys"),
    ],
    ids=str,
)
def test_what_no_operator_does_is_left_to_the_parts_and_the_reason_said(changes, expected):
    choice = choose(**changes)
    assert choice.backend == "chunked"
    assert choice.reason.startswith(f"of its parts: {expected}")


@pytest.mark.parametrize("changes", [{"device": "cpu"}, {"forced": "chunked"}, {"head_dim": 48}], ids=str)
def test_where_no_kernel_runs_the_reason_is_that_of_every_operator(changes):
    asked = {"device": "cuda", "dtype": BF16, "head_dim": 32, "capability": (9, 0)} | changes
    with mock.patch.object(backends, "_TRITON_IS_INSTALLED", True):
        assert choose(**changes) == backends.choose_backend("blend", **asked)


def test_kernels_compute_in_the_widest_type_given_or_in_autocasts_but_float64_stays():
    narrow, wide, widest = (torch.ones(1, dtype=dtype) for dtype in (BF16, torch.float32, torch.float64))
    assert kernel_dtype(narrow, narrow, wide) == torch.float32
    with torch.autocast("cpu", BF16):
        assert kernel_dtype(wide, narrow, wide) == BF16
        assert kernel_dtype(widest, wide, wide) == torch.float64
