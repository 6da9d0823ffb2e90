"""Prefill token ids from the host to the GPU: gathered once into bounded pinned memory, made
``input_ids`` by one small kernel on the stream that needs them.

The public surface is what this file names.
"""

from __future__ import annotations

from . import _interpreter  # noqa: F401  (before torch, which a subinterpreter must not import)

# isort: split
import torch  # noqa: F401  (before the extension: it resolves its symbols against torch's)

try:
    from . import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"pystage's extension does not load ({error}). It is built for one torch: after installing "
        "another, rebuild with: pip install --no-build-isolation ."
    ) from error

from . import batch, ops
from ._build import BuildInfo, __version__, build_info
from .errors import (
    CaptureError,
    DeviceError,
    ForgottenResolveWarning,
    ForkedProcessError,
    PageableMemoryWarning,
    PoolClosedError,
    PoolExhaustedError,
    PystageError,
    RequestTooLargeError,
    TokenRangeError,
    UnresolvedInputsError,
)
from .pool import StagedTokens, StagingPool, resolve, resolve_mixed
from .stats import StagingStats

__all__ = [
    "BuildInfo",
    "CaptureError",
    "DeviceError",
    "ForgottenResolveWarning",
    "ForkedProcessError",
    "PageableMemoryWarning",
    "PoolClosedError",
    "PoolExhaustedError",
    "PystageError",
    "RequestTooLargeError",
    "StagedTokens",
    "StagingPool",
    "StagingStats",
    "TokenRangeError",
    "UnresolvedInputsError",
    "__version__",
    "batch",
    "build_info",
    "ops",
    "resolve",
    "resolve_mixed",
]
