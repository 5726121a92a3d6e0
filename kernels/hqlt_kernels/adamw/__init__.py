"""AdamW of many small models in one pass."""

from hqlt_kernels.adamw.operator import Settings, adamw_

__all__ = ["Settings", "adamw_"]
