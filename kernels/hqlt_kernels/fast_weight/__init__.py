"""FW-memory: a matrix per head, written by one of five update rules and read by queries. See README.md."""

from hqlt_kernels.fast_weight.operator import fast_weight, fast_weight_step

__all__ = ["fast_weight", "fast_weight_step"]
