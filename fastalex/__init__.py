"""Hand-written CPU and GPU kernels that run the AlexNet family of networks in PyTorch at hardware speed."""

from importlib.metadata import version as _version

from fastalex import models, ops, reference
from fastalex._explain import explain
from fastalex._optimize import optimize
from fastalex._tune import tune
from fastalex.backends import BackendError, use_backend

__version__ = _version("fastalex")

__all__ = [
    "BackendError",
    "explain",
    "models",
    "ops",
    "optimize",
    "reference",
    "tune",
    "use_backend",
]
