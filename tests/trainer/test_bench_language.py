import torch
from hqlt_trainer import bench_language


def test_without_a_card_it_says_so_and_measures_nothing(capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_language.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out
