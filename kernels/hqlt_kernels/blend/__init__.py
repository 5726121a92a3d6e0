"""A hybrid of both memories: who sees which token when, and the gated mix of what they answer. See README.md."""

from hqlt_kernels.blend.operator import blend
from hqlt_kernels.blend.state import BlendOutput, BlendState, Tokens

__all__ = ["BlendOutput", "BlendState", "Tokens", "blend"]
