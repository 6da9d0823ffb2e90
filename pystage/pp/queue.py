"""The chunk size while prompts wait behind each other.

Note [One size while prompts wait]
A prompt that runs alone pays for the time in which the pipeline fills and drains, so `choose` takes
short chunks. In a queue the next prompt fills the pipeline, so that time counts once for all. The
more tokens wait, the longer is the best chunk. One size is best for all of them, because stages
wait for each other where chunks of different times follow each other. So a size stays while prompts
wait, also when the queue gets shorter. bench/pp/queues.py compares the rules (docs/pp.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pystage.pp.forms import Floats
from pystage.pp.makespan import stages_of


class QueueSizer:
    """Sizes chunks while prompts wait: the fixed size with which all of them are done soonest.

    Use it where the next prompt begins in the chunk in which one ends. `ChunkSizer.for_queue` makes
    it, on one rank: the others make theirs of the same `ms_by_size`, since timings differ. All
    ranks must ask for the same chunks in the same order, since it remembers its size. Not
    thread-safe. See Note [One size while prompts wait] in queue.py.

    Args:
        ms_by_size: the time of a chunk on the first stage in ms, by its size in tokens. Kept as an
            attribute.
        ranks, stage_factors, overhead_ms: as for `ChunkSizer.choose`.

    Raises:
        ValueError: there are no sizes, or an argument is out of range.
    """

    def __init__(
        self,
        ms_by_size: Mapping[int, float],
        ranks: int,
        *,
        stage_factors: Sequence[float] | None = None,
        overhead_ms: float | Sequence[float] = 0.0,
    ) -> None:
        if ranks < 1:
            raise ValueError(f"ranks={ranks} must be positive")
        if not ms_by_size or not all(n > 0 and ms > 0 for n, ms in ms_by_size.items()):
            raise ValueError(f"ms_by_size={dict(ms_by_size)}: positive times of positive sizes")
        factors, more = stages_of(ranks, stage_factors, overhead_ms)
        self.ms_by_size = dict(sorted(ms_by_size.items()))
        self._sizes = np.array(list(self.ms_by_size), dtype=np.float64)
        on_stages = np.outer(factors, list(self.ms_by_size.values())) + np.array(more)[:, None]
        self._slowest: Floats = on_stages.max(axis=0)
        self._others: Floats = on_stages.sum(axis=0) - self._slowest
        self._kept = 0

    def __repr__(self) -> str:
        return f"<QueueSizer: {self.ms_by_size}>"

    def size(self, tokens: int) -> int:
        """The chunk size with which `tokens`, of any number of prompts, are done soonest."""
        return int(self._sizes[np.argmin(self._done_ms(tokens))])

    def next_chunk(self, left: int, waiting: int) -> int | None:
        """The size of the next chunk, or None if the prompt is to follow its own plan.

        While prompts wait, the size never gets smaller. It starts anew once none waits, or a chunk
        takes all of them.

        Args:
            left: tokens of the prompt that are not yet computed.
            waiting: such tokens of all prompts that wait behind it, and those of chunks that are
                still in the pipeline, as far as they are known. If they are fewer than `left`, the
                result is None.

        Raises:
            ValueError: `left` is not positive, or `waiting` is negative.
        """
        if left < 1 or waiting < 0:
            raise ValueError(f"left={left} must be positive, waiting={waiting} not negative")
        if not waiting:
            self._kept = 0
        if waiting < left:
            return None
        size = max(self._kept, self.size(left + waiting))
        self._kept = size if left + waiting > size else 0
        return size

    def _done_ms(self, tokens: int) -> Floats:
        """For each size, when the last stage is done: the slowest stage's chunks, and the way of
        one chunk through the others."""
        return np.maximum(tokens / self._sizes, 1.0) * self._slowest + self._others
