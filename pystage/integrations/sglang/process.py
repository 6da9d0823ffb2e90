"""The plugin's state and pools in this process."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from types import CodeType
from typing import TYPE_CHECKING, Any

from ..._build import __version__
from ..._C import current_cuda_device
from ...batch import forgotten_resolves
from ...errors import PystageError
from ...pool import StagingPool
from ...stats import StagingStats
from .settings import Settings
from .symbols import Hook

if TYPE_CHECKING:
    from .metrics import Metrics

logger = logging.getLogger("pystage.sglang")


class Pools:
    """The pools of the process, one per device. A pool is made on first use, because loading the
    plugin must not initialize CUDA."""

    def __init__(self) -> None:
        self._pools: dict[tuple[str, int], StagingPool | None] = {}
        self._lock = threading.Lock()

    def of(self, device: Any) -> StagingPool | None:
        """The pool that stages for a batch's device, or None if there is no pool for it."""
        name = device if isinstance(device, str) else str(device)
        key = (name, current_cuda_device() if name == "cuda" else -1)
        try:
            return self._pools[key]
        except KeyError:
            with self._lock:
                if key not in self._pools:
                    self._pools[key] = self._open(*key)
                return self._pools[key]

    def _open(self, name: str, index: int) -> StagingPool | None:
        settings = state.settings
        kind = name.partition(":")[0]
        if kind == "cpu" and not settings.cpu:
            logger.info(
                "pystage: the plugin gains nothing on the CPU: SGLang stages the ids itself"
            )
            return None
        if kind not in ("cuda", "cpu"):
            logger.warning("pystage: no pool for %s devices: SGLang stages the ids itself", name)
            return None
        try:
            pool = StagingPool(
                f"cuda:{index}" if index >= 0 else name,
                settings.capacity_mib << 20,
                at_capacity=settings.at_capacity,
                issue=settings.issue,
            )
        except (PystageError, ValueError) as error:
            logger.warning(
                "pystage: no pool for %s (%s): SGLang stages the ids itself", name, error
            )
            return None
        state.say()
        return pool

    def stats(self) -> list[StagingStats]:
        return [pool.stats() for pool in list(self._pools.values()) if pool is not None]

    def close(self) -> None:
        """Closes all pools. The next batch opens new ones."""
        for pool in self._pools.values():
            if pool is not None:
                pool.close()
        self._pools.clear()


class Here(threading.local):
    """What this thread is doing at the moment."""

    pool: StagingPool | None = None  # set inside prepare_for_extend: stages there
    views: bool = False  # ... until its ids are staged
    vocab_size: int | None = None  # of the model, while a request is handled


@dataclass
class State:
    """The plugin's state in this process.

    Attributes:
        active: parts that work.
        broken: parts that should work but do not, with the reason.
        left: parts that are left to SGLang's own code, with the reason.
        gives_views: ``get_fill_ids`` returns views inside ``prepare_for_extend``.
        preempts: the plugin resolves batches before SGLang's ``resolve_forward_inputs`` sees them.
        small_codes: the code that makes the small tensors that the plugin sends, in groups, by the
            function that it hooks; empty if it sends none.
        writes_rows: the plugin writes rows of KV indices instead of ``write_cache_indices``.
        left_to_sglang: by kind of work, how many batches SGLang handled itself although there was a
            pool for them.
    """

    settings: Settings = field(default_factory=Settings)
    hooks: list[Hook] = field(default_factory=list)
    active: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    no_history: str = ""
    gives_views: bool = False
    preempts: bool = False
    small_codes: dict[str, tuple[tuple[CodeType, ...], ...]] = field(default_factory=dict)
    writes_rows: bool = False
    left_to_sglang: dict[str, int] = field(
        default_factory=lambda: {"stagings": 0, "mixed": 0, "small": 0, "rows": 0}
    )
    loaded: bool = False
    off: str = "not loaded"
    checks_relay: bool = False  # SGLang checks and marks the relay when it reads it (in its CI)
    metrics: Metrics | None = None
    said: bool = False

    def say(self) -> None:
        """Logs the status line once: when logging is set up, at the latest with the first batch."""
        if self.said or not logger.isEnabledFor(logging.INFO):
            return
        self.said = True
        logger.info("%s", self)

    def __str__(self) -> str:
        s = self.settings
        if self.off:
            return f"pystage {__version__} is off: {self.off}"
        parts = ", ".join(self.active) or "nothing"
        text = f"pystage {__version__} is active: {parts}"
        if self.broken:
            text += f"; NOT active: {'; '.join(self.broken)}"
        if self.left:
            text += f"; left to SGLang: {'; '.join(self.left)}"
        ids = "validated" if "validation" in self.active else "not validated"
        return (
            f"{text} (pool of {s.capacity_mib} MiB, at capacity {s.at_capacity}, {s.issue}; "
            f"ids {ids})"
        )


state = State()
pools = Pools()
here = Here()
_warned: set[str] = set()


def once(message: str, *args: object) -> None:
    """Logs a warning the first time only."""
    if message not in _warned:
        _warned.add(message)
        logger.warning(message, *args)


def pool_stats() -> list[StagingStats]:
    """The statistics of this process's pools."""
    return pools.stats()


def counts() -> dict[str, int]:
    """The plugin's own counters, which the pools' statistics do not have."""
    return {
        "forgotten_resolves": forgotten_resolves(),
        **{f"sglang_{name}": count for name, count in state.left_to_sglang.items()},
    }
