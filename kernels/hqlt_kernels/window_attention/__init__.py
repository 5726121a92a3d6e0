"""KV-memory: causal softmax attention over the last tokens, or over all. See README.md."""

from hqlt_kernels.window_attention.operator import window_attention

__all__ = ["window_attention"]
