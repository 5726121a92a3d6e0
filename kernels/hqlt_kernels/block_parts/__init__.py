"""What stands around the memories in a block: norm, SwiGLU, and the products that read them."""

from hqlt_kernels.block_parts.operator import add_rms_norm, rms_norm, swiglu
from hqlt_kernels.block_parts.products import linear, mix_norm_linear, norm_linear, swiglu_linear

__all__ = ["add_rms_norm", "linear", "mix_norm_linear", "norm_linear", "rms_norm", "swiglu", "swiglu_linear"]
