"""What stands around the memories in a block: norm, SwiGLU, short convolution, and the products that read them."""

from hqlt_kernels.block_parts.operator import add_rms_norm, rms_norm, short_convolution, swiglu
from hqlt_kernels.block_parts.products import linear, norm_linear, swiglu_linear

__all__ = ["add_rms_norm", "linear", "norm_linear", "rms_norm", "short_convolution", "swiglu", "swiglu_linear"]
