"""Fitting a form to samples: robust, bounded, cross-validated.

Residuals are logarithms of ratios, so a 20 ms chunk counts as much as a 200 ms one. The fit is
SciPy's `least_squares` on the median of each point's repeats, first with a soft-L1 loss, then with
a Huber loss scaled by the median absolute residual. Samples far from the fit are set aside, with
the reason in the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pystage.pp.forms import SHARPNESS, Floats, Form, soft_max
from pystage.pp.samples import Sample

if TYPE_CHECKING:
    from types import ModuleType

_TILES = (1, 64, 128, 256)
_WAVES = tuple(round(64 * 2 ** (i / 6)) for i in range(12, 37))  # 256 to 4,096 tokens
_FOLDS = 5
_BEHIND_PRIOR = 0.5
_REJECT_RATIO = 1.35  # a sample within this factor of the fit is never an outlier


def scipy_optimize() -> ModuleType:
    """SciPy's optimizers, which the fit needs. The ImportError says how to install SciPy."""
    try:
        from scipy import optimize
    except ImportError as error:
        raise ImportError(
            "fitting a latency model needs SciPy: pip install 'pystage-h2d[pp]'"
        ) from error
    return optimize  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Repeats:
    """All samples of one (history, chunk) point.

    The fit sees only their centre, weighted by the square root of their number. If repeats differed
    only by noise, each should count in full. But the points that are measured again are those that
    fit worst, and at full weight they would distort the fit.
    """

    centre: Sample
    repeats: tuple[Sample, ...]
    slow: tuple[Sample, ...]
    """Repeats that took far too long: something else ran, or a kernel was loaded."""

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> list[Repeats]:
        points: dict[tuple[int, int], list[Sample]] = {}
        for sample in samples:
            points.setdefault((sample.history_len, sample.chunk_len), []).append(sample)
        return [cls._of_one(repeats) for repeats in points.values()]

    @classmethod
    def _of_one(cls, repeats: list[Sample]) -> Repeats:
        # The lower median: the faster of two, but not the fastest of many, which noise would pick.
        limit = _REJECT_RATIO * sorted(s.latency_ms for s in repeats)[(len(repeats) - 1) // 2]
        near = tuple(s for s in repeats if s.latency_ms <= limit)
        centre = replace(near[0], latency_ms=float(np.median([s.latency_ms for s in near])))
        return cls(centre, near, tuple(s for s in repeats if s.latency_ms > limit))


@dataclass(frozen=True)
class Data:
    history: Floats
    chunk: Floats
    ms: Floats
    weight: Floats

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Data:
        return cls(
            np.array([s.history_len for s in samples], dtype=np.float64),
            np.array([s.chunk_len for s in samples], dtype=np.float64),
            np.array([s.latency_ms for s in samples], dtype=np.float64),
            np.ones(len(samples)),
        )

    @classmethod
    def of_points(cls, points: Sequence[Repeats]) -> Data:
        data = cls.of([p.centre for p in points])
        return replace(data, weight=np.sqrt([float(len(p.repeats)) for p in points]))

    def pick(self, mask: NDArray[np.bool_]) -> Data:
        return Data(self.history[mask], self.chunk[mask], self.ms[mask], self.weight[mask])


def folds(data: Data, seed: int) -> NDArray[np.int64]:
    """The fold of each sample. Repeats of a point share one, or they would predict each other."""
    points, which = np.unique(np.stack([data.history, data.chunk]), axis=1, return_inverse=True)
    order = np.random.default_rng(seed).permutation(points.shape[1])
    return np.asarray((order % _FOLDS)[which.ravel()], dtype=np.int64)


def cross_validate(
    optimize: ModuleType, names: Sequence[str], data: Data, seed: int
) -> tuple[dict[str, Floats], dict[str, tuple[Form, ...]]]:
    """For each form, log(measured / predicted) of every sample, predicted by a fit that has not
    seen its point; and these fits, one per fold."""
    held_with = folds(data, seed)
    # The errors stay infinite if nothing can be held out, because all samples are of one point.
    errors = {name: np.full_like(data.ms, np.inf) for name in names}
    fits: dict[str, list[Form]] = {name: [] for name in names}
    for fold in range(_FOLDS):
        test = held_with == fold
        if not test.any() or test.all():
            continue
        train, seen = data.pick(~test), data.pick(test)
        pair = find_tile_and_wave(optimize, train) if {"waves", "table"} & set(names) else (1, 1)
        for name in names:
            form, _, _ = fit_form(optimize, name, train, pair)
            errors[name][test] = np.log(seen.ms) - np.log(form.predict(seen.history, seen.chunk))
            fits[name].append(form)
    return errors, {name: tuple(forms) for name, forms in fits.items()}


def repeat_noise(points: Sequence[Repeats]) -> float:
    """Relative scatter (one sigma) of repeats of a point, without those that are far too slow."""
    squares, free = 0.0, 0
    for point in points:
        logs = np.log([s.latency_ms for s in point.repeats])
        squares += float(((logs - logs.mean()) ** 2).sum())
        free += len(logs) - 1
    return math.sqrt(squares / free) if free else math.nan


def jackknife(values: Floats) -> Floats:
    """Jackknife standard error along axis 0: value i was computed without part i of the data."""
    parts = len(values)
    return np.asarray(values.std(axis=0) * math.sqrt(parts - 1), dtype=np.float64)


def linearised_error(
    form: Form, data: Data, scale: float, history: Floats, chunk: Floats
) -> Floats:
    """Relative standard error of the form's predictions that follows from the scatter of its
    samples, `scale`, if only the terms with positive coefficients can vary."""
    used = np.asarray(form.coefficients) > 0
    fitted = form.design(data.history, data.chunk)[:, used]
    fitted = (
        fitted / form.predict(data.history, data.chunk)[:, None] * np.sqrt(data.weight)[:, None]
    )
    norms = np.linalg.norm(fitted, axis=0)
    asked = form.design(history, chunk)[:, used] / form.predict(history, chunk)[:, None] / norms
    covariance = np.linalg.pinv(fitted.T @ fitted / np.outer(norms, norms), rcond=1e-9)
    return np.asarray(scale * np.sqrt(np.einsum("ij,jk,ik->i", asked, covariance, asked)))


def simplest_as_good(errors: dict[str, Floats]) -> str:
    """The first form whose mean error is within one standard error of the best form's.

    The standard error is that of the differences between the two forms, sample by sample.
    """
    best = errors[min(errors, key=lambda name: float(errors[name].mean()))]

    def as_good(name: str) -> bool:
        gap = errors[name] - best
        return bool(gap.mean() <= gap.std() / math.sqrt(gap.size) + 5e-4)

    return next(name for name in errors if as_good(name))


def knots_of(data: Data) -> tuple[float, ...]:
    low, high = float(data.chunk.min()), float(data.chunk.max())
    if high <= low:
        return ()
    return tuple(float(k) for k in np.geomspace(low, high, 5)[:-1])


def fit_form(
    optimize: ModuleType, name: str, data: Data, pair: tuple[int, int]
) -> tuple[Form, NDArray[np.bool_], float]:
    """The fitted form, which samples it was fitted to, and the noise (relative, one sigma)."""
    everything = np.ones(data.ms.shape, dtype=np.bool_)
    form = Form(name, tile=pair[0], wave=pair[1], knots=knots_of(data) if name == "table" else ())
    form = _solve(optimize, form, data, "soft_l1", 0.1)
    used, scale = everything, 0.0
    for _ in range(2):
        residual = np.log(data.ms) - np.log(form.predict(data.history, data.chunk))
        scale = max(1.4826 * float(np.median(np.abs(residual[used]))), 1e-3)
        used = np.abs(residual) <= max(4.0 * scale, math.log(_REJECT_RATIO))
        used |= _is_structure(data, ~used & (residual > 0))
        if used.sum() < min(4, data.ms.size):
            return form, everything, scale
        form = _solve(optimize, form, data.pick(used), "huber", 1.345 * scale)
    return form, used, scale


def _is_structure(data: Data, slow: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which of the slow samples are real, not spikes.

    Such a sample has one of the largest attention areas, was measured again with the same result,
    and no sample with at least as much history and as many tokens was fast. If a launch floor hides
    attention in most samples, the few that show it must not be set aside.
    """
    area = (2.0 * data.history + data.chunk) * data.chunk
    longer = data.history >= data.history[:, None]
    larger = data.chunk >= data.chunk[:, None]
    disproved = (longer & larger & ~slow).any(axis=1)
    return slow & ~disproved & (data.weight > 1.0) & (area >= np.quantile(area, 0.85))


def find_tile_and_wave(optimize: ModuleType, data: Data) -> tuple[int, int]:
    """The pair with the least relative error of a linear fit (non-negative least squares).

    Weights of 1 / measured limit what a spike can add to the error, so a spike does not decide
    which pair is taken.
    """
    ones = np.ones_like(data.ms)

    def cost(pair: tuple[int, int]) -> float:
        form = Form("waves", tile=pair[0], wave=pair[1])
        design = form.design(data.history, data.chunk) / data.ms[:, None]
        norms = np.linalg.norm(design, axis=0)
        norms[norms == 0] = 1.0  # no sample has history
        coefficients, _ = optimize.nnls(design / norms, ones)
        left = np.abs(design / norms @ coefficients - 1.0)
        return float((data.weight * np.minimum(left, 0.3)).sum())

    # In ascending order: if the samples cannot distinguish some waves, the shortest is taken. A
    # chunk just below an edge costs little, a chunk just above it costs a whole wave.
    coarse = min((1, *_WAVES), key=lambda wave: cost((128, wave)))
    near = (coarse + offset for offset in range(-(coarse // 10), coarse // 10 + 1, 32))
    wave = min(sorted({coarse, *near}), key=lambda wave: cost((128, wave)))
    return min(((tile, wave) for tile in _TILES), key=cost)


def _solve(optimize: ModuleType, form: Form, data: Data, loss: str, f_scale: float) -> Form:
    """Robust bounded least squares on log ratios. The launch floor is one more parameter.

    Starts from the form's coefficients if it has any."""
    raw = form.design(data.history, data.chunk)
    names = form.terms()
    behind = names.index("x behind L") if "x behind L" in names else -1
    if behind >= 0 and ((data.history > 0).all() or (data.history == 0).all()):
        raw[:, behind] = 0.0  # the samples cannot distinguish it from x
    norms = np.linalg.norm(raw / data.ms[:, None], axis=0)
    norms[norms == 0.0] = 1.0
    design = raw / norms
    log_ms = np.log(data.ms)
    weight = np.sqrt(data.weight)  # the square root, because the loss squares residuals
    with_floor = form.name != "linear"

    def body_and_time(p: Floats) -> tuple[Floats, Floats]:
        body = design @ p[: design.shape[1]] + 1e-9
        return body, soft_max(body, float(p[-1]) if with_floor else 0.0)

    # The term "x behind L" counts only with history. A prior keeps it at 0, and the time in the
    # shared term x, unless the samples need it: if it is a tenth of the time, that costs as much as
    # one sample that is off by 5 %.
    prior = _BEHIND_PRIOR / math.sqrt(data.ms.size)

    def residuals(p: Floats) -> Floats:
        out = weight * (np.log(body_and_time(p)[1]) - log_ms)
        return np.append(out, prior * p[behind] if behind >= 0 else 0.0)

    def jacobian(p: Floats) -> Floats:
        body, ms = body_and_time(p)
        out = design * ((body / ms) ** (SHARPNESS - 1.0) / ms)[:, None]
        if with_floor:
            out = np.column_stack([out, (p[-1] / ms) ** (SHARPNESS - 1.0) / ms])
        last = np.zeros((1, out.shape[1]))
        last[0, behind] = prior if behind >= 0 else 0.0
        return np.vstack([weight[:, None] * out, last])

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
    coefficients = np.where(raw.any(axis=0), found[: design.shape[1]] / norms, 0.0)
    return replace(form, coefficients=tuple(float(v) for v in coefficients), floor_ms=floor)


def _starts(optimize: ModuleType, design: Floats, ms: Floats, with_floor: bool) -> list[Floats]:
    """Points to start from: a plain relative fit of all samples, with a floor below them; and a fit
    of the samples well above the fastest ones, with the floor at the fastest ones."""
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
