"""The functions of history and chunk length ("forms") that model the time of a chunk.

Note [What a chunk costs]
For a dense decoder, the time of a chunk of x tokens behind L cached tokens is in first
approximation

    t(L, x) = c + g L + b x + a (2 L + x) x          (ms; L and x in tokens)

c covers launches and weight reads, g reading the history, b the projections, and a causal
attention, whose work is the area (2 L x + x^2) / 2. Engines run a different attention kernel once
there is history, so b may be larger there. Real devices differ from this in two more ways. Short
forwards are bound by the host, which launches the kernels, so t has a floor. And kernels run in
tiles and waves: x is rounded up to a tile in matrix products, and in attention to the number of
query rows that fill the device once. On an H100 with FlashAttention-2, 128-row blocks, 2 blocks per
multiprocessor and 32 heads, that number is 132 * 2 * 128 / 32 = 1,056 tokens; a half-filled wave
takes half the time. As a result, the time of short chunks behind a long history is a staircase in
x. Both the tile and the wave are found from the samples, not from a device table.

So there are nested forms, from two terms to a table over x. Each has non-negative terms that do not
fall with x, so every form is monotone by construction. Cross-validated error decides which form is
used. A simpler form wins unless a richer one is clearly better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FORMS = ("linear", "law", "waves", "table")
"""The simplest form first. The order breaks ties."""
SHARPNESS = 12.0  # of the soft maximum with the launch floor: 6 % above both where they cross


@dataclass(frozen=True)
class Form:
    """One form with its coefficients. `knots` are in tokens, and only the table has them."""

    name: str
    coefficients: tuple[float, ...] = ()
    floor_ms: float = 0.0
    tile: int = 1
    wave: int = 1
    knots: tuple[float, ...] = ()

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Form:
        lists = {name: tuple(data[name]) for name in ("coefficients", "knots")}
        return cls(**(data | lists))

    def terms(self) -> list[str]:
        if self.name == "linear":
            return ["1", "x"]
        if self.name == "law":
            return ["1", "L", "x", "x behind L", "(2L+x)x"]
        if self.name == "waves":
            return [
                *("1", "L", "x", "x behind L", "x up to tile"),
                *("(2L+x)x", "(2L+x)(x up to wave)"),
            ]
        ramps = range(len(self.knots) + 1)
        return [
            *("1", "L", "x behind L"),
            *(f"ramp{i}" for i in ramps),
            *(f"(2L+x)ramp{i}" for i in ramps),
            "(2L+x)(x up to wave)",
        ]

    def design(self, history: Floats, chunk: Floats) -> Floats:
        """The design matrix, [n, terms]: one column per term."""
        one = np.ones_like(chunk)
        if self.name == "linear":
            return np.stack([one, chunk], axis=1)
        area = 2.0 * history + chunk
        behind = np.where(history > 0, chunk, 0.0)
        if self.name == "law":
            return np.stack([one, history, chunk, behind, area * chunk], axis=1)
        tiled = np.ceil(chunk / self.tile) * self.tile
        waved = area * (np.ceil(tiled / self.wave) * self.wave)  # blocks of rows fill the waves
        if self.name == "waves":
            return np.stack([one, history, chunk, behind, tiled, area * chunk, waved], axis=1)
        edges = np.array([0.0, *self.knots, np.inf])
        lower, width = edges[:-1], np.diff(edges)
        ramps = np.clip(tiled[:, None] - lower, 0.0, width)
        plain = np.clip(chunk[:, None] - lower, 0.0, width)
        return np.column_stack([one, history, behind, ramps, area[:, None] * plain, waved])

    def predict(self, history: Floats, chunk: Floats) -> Floats:
        return self._sum(self.design(history, chunk))

    def predict_batch(self, history: Floats, chunk: Floats) -> float:
        """Time in ms of one forward over several pieces; both arguments are [pieces], in tokens.

        The pieces count as one chunk of all their tokens, behind the history that gives it the same
        attention area. For several short pieces with little history, no history is short enough;
        then the area is scaled down.
        """
        area = float(((2.0 * history + chunk) * chunk).sum())
        behind = float(chunk[history > 0].sum())
        return self.predict_sums(float(chunk.sum()), area, float(history.sum()), behind)

    def predict_sums(self, total: float, area: float, history: float, behind: float) -> float:
        """`predict_batch` from sums over the pieces: of x, of (2 L + x) x, of L, and of x where
        there is history."""
        if total <= 0:
            return 0.0
        # For one chunk of all tokens behind H, the area is (2 H + total) total.
        same = area / (2.0 * total) - total / 2.0  # H; negative for short pieces, little history
        row = self.design(np.array([max(same, 0.0)]), np.array([total]))
        names = self.terms()
        scale = np.ones(len(names))
        for i, name in enumerate(names):
            if "(2L+x)" in name and same < 0:
                scale[i] = area / total**2
            elif name == "L":
                row[0, i] = history
            elif name == "x behind L":
                row[0, i] = behind
        return float(self._sum(row * scale)[0])

    def _sum(self, design: Floats) -> Floats:
        # Term by term: the last bit of a matrix product depends on the BLAS kernel, so it differs
        # between ranks on different CPUs.
        body = np.zeros(len(design))
        for column, coefficient in zip(design.T, self.coefficients, strict=True):
            body = body + coefficient * column
        return soft_max(body, self.floor_ms)


def soft_max(body: Floats, floor: float) -> Floats:
    if floor <= 0.0:
        return body
    high = np.maximum(body, floor)
    low = np.minimum(body, floor)
    return np.asarray(high * (1.0 + (low / high) ** SHARPNESS) ** (1.0 / SHARPNESS))
