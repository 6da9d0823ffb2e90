"""Latency of a prefill chunk as a function of history and chunk length.

Note [What a chunk costs]
For a dense decoder the time of a chunk of x tokens behind L cached ones starts from

    t(L, x) = c + g L + b x + a (2 L + x) x          (ms; L and x in tokens)

c: launches and weight reads; b: the projections; a: causal attention, whose work is the area
(2 L x + x^2) / 2; g: reading the history. Engines run another attention kernel once there is
history, so b may be larger there. Real devices bend this in two more places. Short forwards are
bound by the host launching kernels, so t has a floor. And kernels run in tiles and waves: the
matrix products see x rounded up to a tile, and attention sees it rounded up to the number of query
rows that fill the device once (on an H100 with FlashAttention-2, 128-row blocks, 2 a
multiprocessor, 32 heads: 132 * 2 * 128 / 32 = 1,056 tokens; a half-filled wave takes half), which
makes short chunks behind a long history a staircase. Both the tile and the wave are found from the
samples, not from a device table.

So there are nested forms, from two terms to a table over x, each with non-negative terms that do
not fall with x: every form is monotone by construction. Which one is used is decided by
cross-validated error; a simpler form wins unless a richer one is clearly better.
Residuals are logarithms of ratios, so a 20 ms chunk counts as much as a 200 ms one. The fit is
SciPy's `least_squares` on the median of each point's repeats, with a soft-L1, then a Huber loss
scaled by the median absolute residual; samples far outside are set aside with the reason in the
report.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pystage.pp.profile import Profile, Sample, samples_from_json, samples_to_json

if TYPE_CHECKING:
    from types import ModuleType

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]

FORMS = ("linear", "law", "waves", "table")
"""Simplest first; the order breaks ties."""

_TILES = (1, 64, 128, 256)
_WAVES = tuple(round(64 * 2 ** (i / 6)) for i in range(12, 37))  # 256 to 4,096 tokens
_SHARPNESS = 12.0  # of the soft maximum with the launch floor: 6 % above both where they cross
_FOLDS = 5
_REJECT_RATIO = 1.35  # nothing closer to the fit than this factor is called an outlier


class FitError(ValueError):
    """The samples cannot be fitted at all: too few, or not finite."""


@dataclass(frozen=True)
class QualityGate:
    """When a fitted model may decide chunk sizes. Errors are relative (0.15 is 15 %)."""

    max_holdout_median: float = 0.15
    max_holdout_p95: float = 0.60
    max_rejected: float = 0.34
    min_samples: int = 10


@dataclass(frozen=True)
class Form:
    """One form with its coefficients. `knots` in tokens, only for the table."""

    name: str
    coefficients: tuple[float, ...] = ()
    floor_ms: float = 0.0
    tile: int = 1
    wave: int = 1
    knots: tuple[float, ...] = ()

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
        """One column a term, [n, terms]."""
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
        body = self.design(history, chunk) @ np.asarray(self.coefficients)
        return _soft_max(body, self.floor_ms)


def _soft_max(body: Floats, floor: float) -> Floats:
    if floor <= 0.0:
        return body
    high = np.maximum(body, floor)
    low = np.minimum(body, floor)
    return np.asarray(high * (1.0 + (low / high) ** _SHARPNESS) ** (1.0 / _SHARPNESS))


@dataclass(frozen=True)
class FitReport:
    """What the fit found. Errors are relative, measured on samples left out of each fit."""

    form: str
    coefficients: dict[str, float]
    """Term to ms per unit of the term."""
    floor_ms: float
    tile: int
    wave: int
    holdout_median: float
    holdout_p95: float
    scores: dict[str, float]
    """Mean cross-validated error of every form tried, each capped at 30 %."""
    samples_used: int
    rejected: tuple[tuple[Sample, str], ...]
    usable: bool
    reason: str
    """Why the model is not usable, or empty."""

    def __str__(self) -> str:
        verdict = "usable" if self.usable else f"NOT usable: {self.reason}"
        return (
            f"{self.form} form, hold-out error median {self.holdout_median:.1%}, "
            f"p95 {self.holdout_p95:.1%}, {self.samples_used} samples used, "
            f"{len(self.rejected)} rejected; {verdict}"
        )


@dataclass
class _Live:
    """Timings of real chunks since the profile; every fourth is kept out of refits."""

    fit: deque[Sample] = field(default_factory=lambda: deque(maxlen=192))
    holdout: deque[Sample] = field(default_factory=lambda: deque(maxlen=64))
    seen: int = 0


class LatencyModel:
    """Predicts chunk latency in ms. See Note [What a chunk costs].

    Reading (`predict`) is safe from any thread; `update` must be called from one at a time.
    """

    REFIT_EVERY = 32
    """Reported chunks between two attempts at a refit."""

    def __init__(self, form: Form, report: FitReport, samples: Sequence[Sample]) -> None:
        self.form = form
        self.report = report
        self._samples = tuple(samples)
        self._live = _Live()

    # --- fitting -----------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        samples: Profile | Iterable[Sample],
        *,
        forms: Sequence[str] = FORMS,
        gate: QualityGate | None = None,
        seed: int = 0,
    ) -> LatencyModel:
        """Fits every form, keeps the best by cross-validation. Same samples, same model.

        Needs SciPy (extra `pp`). A poor fit does not raise: `report.usable` is False, the reason
        is logged, and a `ChunkSizer` keeps the static size. `FitError` is for samples that cannot
        be fitted at all.
        """
        model = cls._fit(samples, forms, gate or QualityGate(), seed)
        if model.report.usable:
            logger.info("latency model: %s", model.report)
        else:
            logger.warning("latency model: %s; the static chunk size stays", model.report)
        return model

    @classmethod
    def _fit(
        cls,
        samples: Profile | Iterable[Sample],
        forms: Sequence[str],
        gate: QualityGate,
        seed: int,
    ) -> LatencyModel:
        """`fit` without its word in the log."""
        optimize = scipy_optimize()
        kept = tuple(samples)
        if unknown := set(forms) - set(FORMS):
            raise ValueError(f"unknown forms {sorted(unknown)}; known: {', '.join(FORMS)}")
        if len(kept) < 4:
            raise FitError(f"{len(kept)} samples: at least 4 are needed")
        if not all(math.isfinite(s.latency_ms) and s.latency_ms > 0 for s in kept):
            raise FitError("a sample's latency is not a positive number")
        points = _Point.of(kept)
        data = _Data.of_points(points)

        # A form with more than half as many terms as samples cannot be told from noise.
        names = [name for name in FORMS if name in forms]
        few = [n for n in names if len(points) >= 2 * len(Form(n, knots=_knots(data)).terms())]
        left_out = _left_out_errors(optimize, few or names[:1], data, seed)
        capped = {n: np.minimum(np.abs(errors), 0.3) for n, errors in left_out.items()}
        name = _simplest_as_good(capped)
        pair = _find_tile_and_wave(optimize, data) if name in ("waves", "table") else (1, 1)
        form, used, scale = _fit_form(optimize, name, data, pair)
        errors = np.abs(np.expm1(left_out[name][used]))
        measured = bool(np.isfinite(errors).all())
        residual = np.log(data.ms) - np.log(form.predict(data.history, data.chunk))
        rejected = [
            (sample, f"{sample.latency_ms / point.centre.latency_ms:.2f} x its fastest repeats")
            for point in points
            for sample in point.slow
        ] + [
            (sample, f"{math.exp(residual[i]):.2f} x the fit, noise {scale:.1%}")
            for i in np.flatnonzero(~used)
            for sample in points[i].repeats
        ]
        report = FitReport(
            form=name,
            coefficients=dict(zip(form.terms(), form.coefficients, strict=True)),
            floor_ms=form.floor_ms,
            tile=form.tile,
            wave=form.wave,
            holdout_median=float(np.median(errors)) if measured else math.inf,
            holdout_p95=float(np.percentile(errors, 95)) if measured else math.inf,
            scores={n: float(errors.mean()) for n, errors in capped.items()},
            samples_used=len(kept) - len(rejected),
            rejected=tuple(rejected),
            usable=True,
            reason="",
        )
        if reason := _gate_reason(report, gate):
            report = replace(report, usable=False, reason=reason)
        return cls(form, report, kept)

    # --- use ---------------------------------------------------------------------------------

    def predict(self, history_len: ArrayLike, chunk_len: ArrayLike) -> Any:
        """Latency in ms of `chunk_len` new tokens behind `history_len`: a float for two numbers,
        else an array of the broadcast shape."""
        history, chunk = np.broadcast_arrays(
            np.asarray(history_len, dtype=np.float64), np.asarray(chunk_len, dtype=np.float64)
        )
        ms = self.form.predict(history.ravel(), chunk.ravel()).reshape(history.shape)
        return float(ms) if ms.ndim == 0 else ms

    def errors(self, samples: Iterable[Sample]) -> Floats:
        """log(measured / predicted) of each sample: 0.03 is 3 % slower than predicted."""
        data = _Data.of(tuple(samples))
        ratio = data.ms / self.form.predict(data.history, data.chunk)
        return np.asarray(np.log(ratio), dtype=np.float64)

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The profile's samples."""
        return self._samples

    # --- online refit ------------------------------------------------------------------------

    def update(self, samples: Iterable[Sample]) -> bool:
        """Takes timings of real chunks; True if they led to new coefficients.

        Keeps at most 256 of them. Every 32nd tries a refit of the same form on the profile and
        the recent chunks together, and takes it only if it predicts the held-out recent chunks
        (every fourth, never fitted) better in the median and no worse at the 95th percentile.
        Such a call costs a fit (tens of ms), so call this off the launching thread.
        """
        changed = False
        for sample in samples:
            if not (math.isfinite(sample.latency_ms) and sample.latency_ms > 0):
                raise ValueError(f"not a latency: {sample}")
            live = self._live
            live.seen += 1
            (live.holdout if live.seen % 4 == 0 else live.fit).append(sample)
            if live.seen % self.REFIT_EVERY == 0:
                changed |= self._refit()
        return changed

    def _refit(self) -> bool:
        held = tuple(self._live.holdout)
        pool = self._samples + tuple(self._live.fit)
        pair = (self.form.tile, self.form.wave)
        data = _Data.of_points(_Point.of(pool))
        form, _, _ = _fit_form(scipy_optimize(), self.form.name, data, pair)
        candidate = LatencyModel(form, self.report, ())
        old, new = np.abs(self.errors(held)), np.abs(candidate.errors(held))
        better = np.median(new) < np.median(old)
        if not better or np.percentile(new, 95) > np.percentile(old, 95):
            return False
        logger.info(
            "latency model refitted on %d samples: median error on %d held-out chunks "
            "%.1f %% -> %.1f %%",
            len(pool),
            len(held),
            100 * np.median(old),
            100 * np.median(new),
        )
        self.report = replace(
            self.report,
            coefficients=dict(zip(form.terms(), form.coefficients, strict=True)),
            floor_ms=form.floor_ms,
            tile=form.tile,
            wave=form.wave,
        )
        self.form = form
        return True

    # --- JSON --------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Form, report and the profile's samples. Chunks reported to `update` are not kept."""
        report = asdict(self.report)
        report["rejected"] = [
            [samples_to_json([sample])[0], why] for sample, why in self.report.rejected
        ]
        return {
            "version": 1,
            "form": asdict(self.form),
            "report": report,
            "samples": samples_to_json(self._samples),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LatencyModel:
        if data.get("version") != 1:
            raise ValueError(f"unknown latency model version {data.get('version')!r}, 1 is known")
        form = dict(data["form"])
        form["coefficients"] = tuple(form["coefficients"])
        form["knots"] = tuple(form["knots"])
        report = dict(data["report"])
        report["rejected"] = tuple(
            (samples_from_json([row])[0], str(why)) for row, why in report["rejected"]
        )
        return cls(Form(**form), FitReport(**report), samples_from_json(data["samples"]))

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> LatencyModel:
        """Needs no SciPy: a saved model predicts with NumPy alone."""
        return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))


def scipy_optimize() -> ModuleType:
    """What the fit needs; ImportError says how to get it."""
    try:
        from scipy import optimize
    except ImportError as error:
        raise ImportError(
            "fitting a latency model needs SciPy: pip install 'pystage-h2d[pp]'"
        ) from error
    return optimize  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Point:
    """All samples of one (history, chunk). The fit sees their centre, with the square root of their
    number as weight: against noise they should count in full, but the points that are measured
    again are those that fit worst, and would bend it."""

    centre: Sample
    repeats: tuple[Sample, ...]
    slow: tuple[Sample, ...]
    """Far over the fastest: something else ran, or a kernel was loaded."""

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> list[_Point]:
        points: dict[tuple[int, int], list[Sample]] = {}
        for sample in samples:
            points.setdefault((sample.history_len, sample.chunk_len), []).append(sample)
        return [cls._of_one(repeats) for repeats in points.values()]

    @classmethod
    def _of_one(cls, repeats: list[Sample]) -> _Point:
        limit = _REJECT_RATIO * min(s.latency_ms for s in repeats)
        near = tuple(s for s in repeats if s.latency_ms <= limit)
        centre = replace(near[0], latency_ms=float(np.median([s.latency_ms for s in near])))
        return cls(centre, near, tuple(s for s in repeats if s.latency_ms > limit))


@dataclass(frozen=True)
class _Data:
    history: Floats
    chunk: Floats
    ms: Floats
    weight: Floats

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> _Data:
        return cls(
            np.array([s.history_len for s in samples], dtype=np.float64),
            np.array([s.chunk_len for s in samples], dtype=np.float64),
            np.array([s.latency_ms for s in samples], dtype=np.float64),
            np.ones(len(samples)),
        )

    @classmethod
    def of_points(cls, points: Sequence[_Point]) -> _Data:
        data = cls.of([p.centre for p in points])
        return replace(data, weight=np.sqrt([float(len(p.repeats)) for p in points]))

    def pick(self, mask: NDArray[np.bool_]) -> _Data:
        return _Data(self.history[mask], self.chunk[mask], self.ms[mask], self.weight[mask])


def _gate_reason(report: FitReport, gate: QualityGate) -> str:
    total = report.samples_used + len(report.rejected)
    if report.samples_used < gate.min_samples:
        return f"{report.samples_used} samples left, {gate.min_samples} needed"
    if len(report.rejected) > gate.max_rejected * total:
        return f"{len(report.rejected)} of {total} samples rejected"
    if not report.holdout_median <= gate.max_holdout_median:
        return f"median error {report.holdout_median:.0%} over {gate.max_holdout_median:.0%}"
    if not report.holdout_p95 <= gate.max_holdout_p95:
        return f"p95 error {report.holdout_p95:.0%} over {gate.max_holdout_p95:.0%}"
    return ""


def _folds(data: _Data, seed: int) -> NDArray[np.int64]:
    """A fold per sample; repeats of one point share theirs, else they would predict each other."""
    points, which = np.unique(np.stack([data.history, data.chunk]), axis=1, return_inverse=True)
    order = np.random.default_rng(seed).permutation(points.shape[1])
    return np.asarray((order % _FOLDS)[which.ravel()], dtype=np.int64)


def _left_out_errors(
    optimize: ModuleType, names: Sequence[str], data: _Data, seed: int
) -> dict[str, Floats]:
    """By form: log(measured / predicted), each sample predicted by a fit without its point."""
    folds = _folds(data, seed)
    # Infinite where nothing could be held out: all samples at one point.
    errors = {name: np.full_like(data.ms, np.inf) for name in names}
    for fold in range(_FOLDS):
        test = folds == fold
        if not test.any() or test.all():
            continue
        train, seen = data.pick(~test), data.pick(test)
        pair = _find_tile_and_wave(optimize, train) if {"waves", "table"} & set(names) else (1, 1)
        for name in names:
            form, _, _ = _fit_form(optimize, name, train, pair)
            errors[name][test] = np.log(seen.ms) - np.log(form.predict(seen.history, seen.chunk))
    return errors


def _simplest_as_good(errors: dict[str, Floats]) -> str:
    """The first form whose errors are within one standard error of the best form's, paired."""
    best = errors[min(errors, key=lambda name: float(errors[name].mean()))]

    def as_good(name: str) -> bool:
        gap = errors[name] - best
        return bool(gap.mean() <= gap.std() / math.sqrt(gap.size) + 5e-4)

    return next(name for name in errors if as_good(name))


def _knots(data: _Data) -> tuple[float, ...]:
    low, high = float(data.chunk.min()), float(data.chunk.max())
    if high <= low:
        return ()
    return tuple(float(k) for k in np.geomspace(low, high, 5)[:-1])


def _fit_form(
    optimize: ModuleType, name: str, data: _Data, pair: tuple[int, int]
) -> tuple[Form, NDArray[np.bool_], float]:
    """The fitted form, which samples it rests on, and the noise (relative, one sigma)."""
    everything = np.ones(data.ms.shape, dtype=np.bool_)
    form = Form(name, tile=pair[0], wave=pair[1], knots=_knots(data) if name == "table" else ())
    form = _solve(optimize, form, data, "soft_l1", 0.1)
    used, scale = everything, 0.0
    for _ in range(2):
        residual = np.log(data.ms) - np.log(form.predict(data.history, data.chunk))
        scale = max(1.4826 * float(np.median(np.abs(residual[used]))), 1e-3)
        used = np.abs(residual) <= max(4.0 * scale, math.log(_REJECT_RATIO))
        if used.sum() < min(4, data.ms.size):
            return form, everything, scale
        form = _solve(optimize, form, data.pick(used), "huber", 1.345 * scale)
    return form, used, scale


def _find_tile_and_wave(optimize: ModuleType, data: _Data) -> tuple[int, int]:
    """The pair whose linear fit, by non-negative least squares, leaves the least relative error.

    Weights of 1 / measured bound what a spike can add, so a spike does not choose the pair.
    """
    ones = np.ones_like(data.ms)

    def cost(pair: tuple[int, int]) -> float:
        form = Form("waves", tile=pair[0], wave=pair[1])
        design = form.design(data.history, data.chunk) / data.ms[:, None]
        norms = np.linalg.norm(design, axis=0)
        coefficients, _ = optimize.nnls(design / norms, ones)
        left = np.abs(design / norms @ coefficients - 1.0)
        return float((data.weight * np.minimum(left, 0.3)).sum())

    # Ascending, so that of waves the samples cannot tell apart the shortest is taken: a chunk just
    # below an edge costs little, one just above it a whole wave.
    coarse = min((1, *_WAVES), key=lambda wave: cost((128, wave)))
    near = (coarse + offset for offset in range(-(coarse // 10), coarse // 10 + 1, 32))
    wave = min(sorted({coarse, *near}), key=lambda wave: cost((128, wave)))
    return min(((tile, wave) for tile in _TILES), key=cost)


def _solve(optimize: ModuleType, form: Form, data: _Data, loss: str, f_scale: float) -> Form:
    """Robust bounded least squares on log ratios; the launch floor is one more parameter.

    Starts from the form's coefficients if it has any."""
    raw = form.design(data.history, data.chunk)
    norms = np.linalg.norm(raw / data.ms[:, None], axis=0)
    norms[norms == 0.0] = 1.0
    design = raw / norms
    log_ms = np.log(data.ms)
    weight = np.sqrt(data.weight)  # of a residual, for the loss squares it
    with_floor = form.name != "linear"

    def body_and_time(p: Floats) -> tuple[Floats, Floats]:
        body = design @ p[: design.shape[1]] + 1e-9
        return body, _soft_max(body, float(p[-1]) if with_floor else 0.0)

    def residuals(p: Floats) -> Floats:
        return np.asarray(weight * (np.log(body_and_time(p)[1]) - log_ms), dtype=np.float64)

    def jacobian(p: Floats) -> Floats:
        body, ms = body_and_time(p)
        out = design * ((body / ms) ** (_SHARPNESS - 1.0) / ms)[:, None]
        if with_floor:
            out = np.column_stack([out, (p[-1] / ms) ** (_SHARPNESS - 1.0) / ms])
        return np.asarray(weight[:, None] * out, dtype=np.float64)

    if form.coefficients:
        starts = [np.append(np.multiply(form.coefficients, norms), form.floor_ms)]
        starts[0] = starts[0][: design.shape[1] + with_floor]
    else:
        starts = _starts(optimize, design, data.ms, with_floor)
    solutions = [
        optimize.least_squares(
            residuals,
            np.maximum(p0, 1e-6),
            jac=jacobian,
            bounds=(0.0, np.inf),
            loss=loss,
            f_scale=f_scale,
            max_nfev=60,
        )
        for p0 in starts
    ]
    best = min(solutions, key=lambda s: float(s.cost))
    found = np.asarray(best.x, dtype=np.float64)
    floor = float(found[-1]) if with_floor else 0.0
    coefficients = found[: design.shape[1]] / norms
    return replace(form, coefficients=tuple(float(v) for v in coefficients), floor_ms=floor)


def _starts(optimize: ModuleType, design: Floats, ms: Floats, with_floor: bool) -> list[Floats]:
    """The plain relative fit of all samples with a floor below them, and that of the samples well
    above the fastest ones with the floor there."""
    plain, _ = optimize.nnls(design / ms[:, None], np.ones_like(ms))
    if not with_floor:
        return [plain]
    quick = float(np.sort(ms)[min(2, ms.size - 1)])
    starts = [np.append(plain, 0.2 * quick)]
    above = ms > 1.3 * quick
    if above.sum() > design.shape[1]:
        upper, _ = optimize.nnls(design[above] / ms[above, None], np.ones(int(above.sum())))
        starts.append(np.append(upper, quick))
    return starts
