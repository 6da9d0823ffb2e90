"""What pystage raises. Wrong types and shapes raise the built-in TypeError and ValueError."""

from __future__ import annotations

from .stats import StagingStats


class PystageError(RuntimeError):
    """Base of all below."""


class TokenRangeError(PystageError, ValueError):
    """A token id lies outside ``[0, vocab_size)``. Nothing was staged.

    Attributes:
        request: index into ``token_ids``.
        position: index into that request, counted from its start (not from ``starts``).
        value: the id.
        vocab_size: the bound it broke.
    """

    def __init__(
        self, message: str, request: int, position: int, value: int, vocab_size: int
    ) -> None:
        super().__init__(message, request, position, value, vocab_size)
        self.request = request
        self.position = position
        self.value = value
        self.vocab_size = vocab_size

    def __str__(self) -> str:
        return str(self.args[0])


class PoolExhaustedError(PystageError):
    """No slot could be had within the pool's policy.

    Attributes:
        stats: the pool's figures when it was raised, or None.
    """

    stats: StagingStats | None = None


class RequestTooLargeError(PoolExhaustedError):
    """The batch is larger than the pool's capacity: no wait would help."""


class PoolClosedError(PystageError):
    """The pool is closed. What was staged before stays valid."""


class ForkedProcessError(PystageError):
    """A pool, or tokens staged in it, was used in a child of the process that made it."""


class CaptureError(PystageError):
    """``resolve`` on a stream that captures a CUDA graph."""


class UnresolvedInputsError(PystageError):
    """A batch has neither ids nor staged ids, or lacks its relay; says which call is missing."""


class DeviceError(PystageError):
    """A device call failed; the message names the call, the device and the device's error."""


class PageableMemoryWarning(RuntimeWarning):
    """Pinned memory could not be had; the message says why."""


class ForgottenResolveWarning(RuntimeWarning):
    """A forward was built from a batch that nobody had resolved; ``ensure_resolved`` did."""
