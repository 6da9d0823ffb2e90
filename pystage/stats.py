"""A pool's figures."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class StagingStats:
    """A pool's figures at one moment. Sizes in bytes; counts since the pool was made.

    Attributes:
        capacity_bytes: the cap on ``reserved_bytes``.
        reserved_bytes: memory held from the device, all waste included.
        in_use_bytes: of it, in slots that are leased, in flight or quarantined.
        high_water_bytes: the most ``in_use_bytes`` ever was.
        pageable_bytes: of ``reserved_bytes``, what should have been pinned and could not be. The
            host device pins nothing and has none.
        leased_slots: slots that staged tokens hold.
        in_flight_slots: slots whose staged tokens are gone and that a stream still reads.
        quarantined_slots: slots never used again, because a device call failed at a point after
            which nobody can tell when they are read last.
        stages: batches staged.
        tokens: ids in them.
        wire_bytes: bytes transferred from slots to the device.
        waits: stages that waited for a slot.
        wait_seconds: time they waited in all.
        exhausted: times :class:`PoolExhaustedError` was raised.
        fallbacks: stages that left the pool for torch's own allocator.
        allocations: pieces of memory taken from the device (pinned, where it can be).
        frees: pieces given back.
        range_errors: times :class:`TokenRangeError` was raised.
        kernel_transfers: transfers by a kernel (on the host device: by a worker thread).
        copy_engine_transfers: transfers by ``cudaMemcpyAsync``.
        eager_transfers: of these two, launched at stage time.
        fallback_transfers: copies out of torch's own memory, after a fallback.
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
        """A table of two columns."""
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value:>14}" for name, value in rows)

    def _repr_html_(self) -> str:
        """For notebooks."""
        cells = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
            for name, value in self._rows()
        )
        return f"<table>{cells}</table>"

    def _rows(self) -> list[tuple[str, str]]:
        return [(name, _written(name, value)) for name, value in asdict(self).items()]


def in_units(count: int) -> str:
    """Bytes, for a reader: ``"8.0 MiB"``."""
    if count < 1024:
        return f"{count} bytes"
    power = min((count.bit_length() - 1) // 10, 3)
    return f"{count / (1 << 10 * power):.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


def _written(name: str, value: float) -> str:
    if name == "wait_seconds":
        return f"{value:.3f}"
    return f"{value:,}"
