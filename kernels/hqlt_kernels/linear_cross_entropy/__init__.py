"""The loss of a language model's head, without its logits; see operator.py."""

from hqlt_kernels.linear_cross_entropy.operator import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
