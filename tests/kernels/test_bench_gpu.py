import pytest
from hqlt_kernels import bench_gpu
from hqlt_kernels.bench_gpu import CASES, Case


def test_without_a_card_the_benchmark_says_what_measures_a_cpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bench_gpu.main([]) == 2
    assert "bench_cpu" in capsys.readouterr().out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_needs_more_bytes_and_operations_than_forward(case):
    forward_bytes, both_bytes, forward_operations, both_operations = case.work()
    assert 0 < 2 * forward_bytes < both_bytes
    assert 0 < 2 * forward_operations < both_operations


def test_a_window_of_all_keys_does_half_the_square():
    case = Case("window_attention", 1, 1024, 1, 64)
    assert case.work()[2] == 2 * (2 * 64) * 1024 * 1024 / 2
