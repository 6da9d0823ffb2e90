"""The errors and warnings of pystage. Wrong types and shapes raise TypeError and ValueError."""

from __future__ import annotations

from .stats import StagingStats


class PystageError(RuntimeError):
    """Base class of pystage's errors."""


class TokenRangeError(PystageError, ValueError):
    """A token id is outside ``[0, vocab_size)``. Nothing was staged.

    Attributes:
        request: index of the request in ``token_ids``.
        position: index of the id in that request, counted from its start (not from ``starts``).
        value: the id.
        vocab_size: the vocabulary size that was given.
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
    """No slot was available under the pool's ``at_capacity`` policy.

    Attributes:
        stats: the pool's figures when the error was raised, or None.
    """

    stats: StagingStats | None = None


class RequestTooLargeError(PoolExhaustedError):
    """The batch is larger than the pool's capacity, so waiting would not help."""


class PoolClosedError(PystageError):
    """The pool is closed. Tokens staged before stay valid."""


class ForkedProcessError(PystageError):
    """A pool, or tokens staged in it, was used in a child of the process that made it."""


class CaptureError(PystageError):
    """``resolve`` was called on a stream that is capturing a CUDA graph."""


class UnresolvedInputsError(PystageError):
    """A batch has neither ids nor staged ids, or its relay is missing.

    The message names the missing call.
    """


class DeviceError(PystageError):
    """A device call failed. The message names the call, the device and the device's error."""


class PageableMemoryWarning(RuntimeWarning):
    """Memory could not be pinned. The message gives the reason."""


class ForgottenResolveWarning(RuntimeWarning):
    """A forward was built from an unresolved batch, and ``ensure_resolved`` resolved it."""
