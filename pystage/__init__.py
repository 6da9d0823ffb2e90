"""Prefill token ids from the host to the GPU: gathered once into bounded pinned memory, made
``input_ids`` by one small kernel on the stream that needs them.

The public surface is what this file names.
"""

from __future__ import annotations

from . import _interpreter  # noqa: F401  (before torch, which a subinterpreter must not import)

# isort: split
import torch  # noqa: F401  (before the extension: it resolves its symbols against torch's)

from . import _extension  # noqa: F401  (before all that use it: it says why it does not load)

# isort: split
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
