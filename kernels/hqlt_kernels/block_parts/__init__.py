"""What stands around the memories in a block: norm, SwiGLU, short convolution."""

from hqlt_kernels.block_parts.operator import add_rms_norm, rms_norm, short_convolution, swiglu

__all__ = ["add_rms_norm", "rms_norm", "short_convolution", "swiglu"]
