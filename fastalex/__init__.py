"""Hand-written CPU and GPU kernels for the AlexNet family of networks in PyTorch."""

from importlib.metadata import version as _version

from fastalex import _interpreter as _interpreter  # first: it refuses before torch is imported

# isort: split
from fastalex import models, ops, reference
from fastalex._explain import explain
from fastalex._memory import cached_bytes, empty_cache
from fastalex._optimize import optimize
from fastalex._precision import get_conv_precision, set_conv_precision
from fastalex._tune import tune
from fastalex.backends import BackendError, use_backend

__version__ = _version("fastalex")

__all__ = [
    "BackendError",
    "cached_bytes",
    "empty_cache",
    "explain",
    "get_conv_precision",
    "models",
    "ops",
    "optimize",
    "reference",
    "set_conv_precision",
    "tune",
    "use_backend",
]
