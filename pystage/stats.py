"""The figures that a pool reports."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class StagingStats:
    """A pool's figures at one moment. Sizes are in bytes. Counts start when the pool is made.

    Attributes:
        capacity_bytes: the limit for ``reserved_bytes``.
        reserved_bytes: memory that the pool holds, including all rounding.
        in_use_bytes: the part of ``reserved_bytes`` in slots that are leased, in flight or
            quarantined.
        high_water_bytes: the highest ``in_use_bytes`` so far.
        pageable_bytes: the part of ``reserved_bytes`` that should be pinned but could not be. 0 on
            the host device, which pins nothing.
        leased_slots: slots that staged tokens hold.
        in_flight_slots: slots whose staged tokens are gone but that a stream still reads.
        quarantined_slots: slots that are never used again, because after a failed device call
            nothing can tell when the device last reads them.
        stages: batches staged.
        tokens: ids in these batches.
        wire_bytes: bytes transferred from slots to the device.
        waits: stages that waited for a slot.
        wait_seconds: total time that stages waited.
        exhausted: times :class:`PoolExhaustedError` was raised.
        fallbacks: stages that used memory from torch's own allocator.
        allocations: pieces of memory allocated from the device (pinned if possible).
        frees: pieces of memory freed.
        range_errors: times :class:`TokenRangeError` was raised.
        kernel_transfers: transfers by a kernel (on the host device: by a worker thread).
        copy_engine_transfers: transfers by ``cudaMemcpyAsync``.
        eager_transfers: the transfers, of both kinds, that were launched at stage time.
        fallback_transfers: copies from torch's own memory, after a fallback.
    """

    capacity_bytes: int
    reserved_bytes: int
    in_use_bytes: int
    high_water_bytes: int
    pageable_bytes: int
    leased_slots: int
    in_flight_slots: int
    quarantined_slots: int
    stages: int
    tokens: int
    wire_bytes: int
    waits: int
    wait_seconds: float
    exhausted: int
    fallbacks: int
    allocations: int
    frees: int
    range_errors: int
    kernel_transfers: int
    copy_engine_transfers: int
    eager_transfers: int
    fallback_transfers: int

    def __str__(self) -> str:
        """The figures as a table of two columns."""
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value:>14}" for name, value in rows)

    def _repr_html_(self) -> str:
        """The figures as an HTML table, for notebooks."""
        cells = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
            for name, value in self._rows()
        )
        return f"<table>{cells}</table>"

    def _rows(self) -> list[tuple[str, str]]:
        return [(name, _written(name, value)) for name, value in asdict(self).items()]


def in_units(count: int) -> str:
    """Formats a number of bytes for people: ``"8.0 MiB"``."""
    if count < 1024:
        return f"{count} bytes"
    power = min((count.bit_length() - 1) // 10, 3)
    return f"{count / (1 << 10 * power):.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


def _written(name: str, value: float) -> str:
    if name == "wait_seconds":
        return f"{value:.3f}"
    return f"{value:,}"
