"""The GPU's serving path: the functions of reference.py as Triton kernels."""

from .attend import attend
from .merge import merge
from .write import reset, write

__all__ = ["attend", "merge", "reset", "write"]
