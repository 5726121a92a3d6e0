"""Rows and columns of activations, one pass each: the projections of a mixer taken apart, chosen rows, embeddings."""

from hqlt_kernels.projections.columns import split_columns
from hqlt_kernels.projections.operator import embed, split_projections, take_rows

__all__ = ["embed", "split_columns", "split_projections", "take_rows"]
