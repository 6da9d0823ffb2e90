"""Gets prefill token ids onto the GPU with one host copy.

:meth:`StagingPool.stage` gathers the ids of a batch into a size-capped pool of pinned memory.
:func:`resolve` launches a small kernel on the current stream, which reads them from there and
writes ``input_ids``.

The public API is what this file lists in ``__all__``.
"""

from __future__ import annotations

from . import _interpreter  # noqa: F401  (first: a subinterpreter must not import torch)

# isort: split
import torch  # noqa: F401  (before the extension, which needs torch's symbols)

from . import _extension  # noqa: F401  (before its users: it explains why a load fails)

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
