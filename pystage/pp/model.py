"""Latency of a prefill chunk as a function of history and chunk length."""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pystage.pp.fitting import (
    Data,
    Repeats,
    cross_validate,
    find_tile_and_wave,
    fit_form,
    jackknife,
    knots_of,
    linearised_error,
    repeat_noise,
    simplest_as_good,
)
from pystage.pp.fitting import scipy_optimize as scipy_optimize  # noqa: PLC0414
from pystage.pp.forms import FORMS, Floats, Form
from pystage.pp.samples import (
    Profile,
    Sample,
    samples_from,
    samples_from_json,
    samples_to_json,
)

logger = logging.getLogger(__name__)


class FitError(ValueError):
    """The samples cannot be fitted at all: too few, or not finite."""


@dataclass(frozen=True)
class QualityGate:
    """Limits within which a fitted model may decide chunk sizes. Errors are relative (0.30 is
    30 %).

    They are wide: a plan can be good although its times are not exact, since the best fixed size is
    its floor and the finalists can be timed. In the study of docs/pp.md, 100 profiles with noise of
    1 to 30 % were accepted, and no plan was worse than chunks of 8,192."""

    max_holdout_median: float = 0.30
    """Limit on the median error of samples left out of the fit, after the scatter of repeats has
    been subtracted. `max_uncertainty` limits the effect of that scatter."""
    max_holdout_p95: float = 0.90
    max_rejected: float = 0.34
    min_samples: int = 10
    max_uncertainty: float = 0.35
    max_unseen: float = 0.04
    """The same limit without history, if no sample was without: there only the form determines
    the prediction."""


@dataclass(frozen=True)
class FitReport:
    """The result of a fit. Errors are relative and measured on samples left out of each fit."""

    form: str
    coefficients: dict[str, float]
    """Term to its coefficient, in ms per unit of the term."""
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
    """Why the model is not usable; empty if it is."""
    history_range: tuple[int, int] = (0, 0)
    """Shortest and longest sampled history, in tokens. A prediction beyond it is a guess."""
    chunk_range: tuple[int, int] = (0, 0)
    uncertainty: float = 0.0
    """Relative standard error of the model's predictions: the largest at the corners of the sampled
    region. Unlike the hold-out error, it falls with more samples."""
    unseen: float = 0.0
    """The same without history, if no sample was without history; else 0."""
    repeat_noise: float = 0.0
    """Relative scatter of repeats of one point; NaN if no point was repeated."""

    @property
    def misfit_median(self) -> float:
        """`holdout_median` without the scatter of repeats: the error of the model itself."""
        return self._net(self.holdout_median, 0.6745)

    @property
    def misfit_p95(self) -> float:
        return self._net(self.holdout_p95, 1.96)

    def _net(self, error: float, sigmas: float) -> float:
        noise = 0.0 if math.isnan(self.repeat_noise) else sigmas * self.repeat_noise
        return math.sqrt(max(error * error - noise * noise, 0.0))

    def __str__(self) -> str:
        verdict = "usable" if self.usable else f"NOT usable: {self.reason}"
        return (
            f"{self.form} form, hold-out error median {self.holdout_median:.1%}, "
            f"p95 {self.holdout_p95:.1%}, {self.samples_used} samples used, "
            f"{len(self.rejected)} rejected, predictions uncertain by {self.uncertainty:.1%}, "
            f"histories {self.history_range[0]:,} to {self.history_range[1]:,}, "
            f"chunks {self.chunk_range[0]:,} to {self.chunk_range[1]:,}; {verdict}"
        )


@dataclass
class _Live:
    """Timings of real chunks since the profile. Every fourth is held out of refits."""

    fit: deque[Sample] = field(default_factory=lambda: deque(maxlen=LatencyModel.KEPT * 3 // 4))
    holdout: deque[Sample] = field(default_factory=lambda: deque(maxlen=LatencyModel.KEPT // 4))
    seen: int = 0


class LatencyModel:
    """Predicts chunk latency in ms. See Note [What a chunk costs] in forms.py.

    `predict` may be called from any thread. `update` must not be called from two threads at once.
    """

    REFIT_EVERY = 32
    """Number of reported chunks between two attempts at a refit."""
    KEPT = 256
    """Number of reported chunks that a refit uses, the latest."""

    def __init__(
        self,
        form: Form,
        report: FitReport,
        samples: Sequence[Sample],
        committee: Sequence[Form] = (),
    ) -> None:
        self.form = form
        self.report = report
        self.committee = tuple(committee)
        """Fits that each leave out a fifth of the points. How much they differ shows how uncertain
        the samples leave a prediction."""
        self._samples = tuple(samples)
        self._live = _Live()

    # --- fitting -----------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        samples: Profile | Iterable[Sample] | Iterable[Sequence[float]] | ArrayLike,
        *,
        forms: Sequence[str] = FORMS,
        gate: QualityGate | None = None,
        seed: int = 0,
    ) -> LatencyModel:
        """Fits every form and keeps the best by cross-validation. The same samples give the same
        model.

        `samples` may also be rows of (history_len, chunk_len, latency_ms), in tokens and ms.

        Fitting needs SciPy (extra `pp`). A poor fit does not raise: `report.usable` is False, the
        reason is logged, and a `ChunkSizer` keeps the static size. `FitError` is raised if the
        samples cannot be fitted at all.
        """
        model = cls._fit(samples_from(samples), forms, gate or QualityGate(), seed)
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
        """`fit` without the log message."""
        optimize = scipy_optimize()
        kept = tuple(samples)
        if unknown := set(forms) - set(FORMS):
            raise ValueError(f"unknown forms {sorted(unknown)}; known: {', '.join(FORMS)}")
        if len(kept) < 4:
            raise FitError(f"{len(kept)} samples: at least 4 are needed")
        if not all(math.isfinite(s.latency_ms) and s.latency_ms > 0 for s in kept):
            raise FitError("a sample's latency is not a positive number")
        points = Repeats.of(kept)
        data = Data.of_points(points)

        # With more than half as many terms as points, a form fits the noise.
        names = [name for name in FORMS if name in forms]
        few = [n for n in names if len(points) >= 2 * len(Form(n, knots=knots_of(data)).terms())]
        left_out, fits = cross_validate(optimize, few or names[:1], data, seed)
        capped = {n: np.minimum(np.abs(errors), 0.3) for n, errors in left_out.items()}
        name = simplest_as_good(capped)
        pair = find_tile_and_wave(optimize, data) if name in ("waves", "table") else (1, 1)
        form, used, scale = fit_form(optimize, name, data, pair)
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
            history_range=(int(data.history.min()), int(data.history.max())),
            chunk_range=(int(data.chunk.min()), int(data.chunk.max())),
            repeat_noise=repeat_noise(points),
        )
        model = cls(form, report, kept, fits[name])
        open_, unseen = model._uncertainty_of_corners(data.pick(used), scale)
        report = model.report = replace(report, uncertainty=open_, unseen=unseen)
        if reason := _gate_reason(report, gate):
            model.report = replace(report, usable=False, reason=reason)
        return model

    def _uncertainty_of_corners(self, data: Data, scale: float) -> tuple[float, float]:
        """The largest relative standard error at three points, and the largest without history if
        no sample was without history (else 0).

        The points are a median and a large sampled chunk without history, and a median one behind
        the longest history. The error is the geometric mean of two estimates. The jackknife also
        includes what the form does not explain, but five parts are few and may agree by chance. The
        linearised fit includes noise alone.
        """
        if not self.committee:
            return math.inf, 0.0
        middle, large = np.quantile(data.chunk, (0.5, 0.9))
        history = np.array([0.0, 0.0, 1.0]) * data.history.max()
        chunk = np.array([middle, large, middle])
        linear = linearised_error(self.form, data, scale, history, chunk)
        error = np.sqrt(self.uncertainty(history, chunk) * linear)
        unseen = float(error[:2].max()) if data.history.min() > 0 else 0.0
        return float(error.max()), unseen

    # --- use ---------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"<LatencyModel: {self.report}>"

    def predict(self, history_len: ArrayLike, chunk_len: ArrayLike) -> Any:
        """Latency in ms of `chunk_len` new tokens behind `history_len` cached tokens. Returns a
        float for two numbers, else an array of the broadcast shape.

        Raises:
            ValueError: a negative history, or a chunk of less than one token.
        """
        history, chunk = np.broadcast_arrays(
            np.asarray(history_len, dtype=np.float64), np.asarray(chunk_len, dtype=np.float64)
        )
        if not (np.all(history >= 0) and np.all(chunk >= 1)):
            raise ValueError(
                f"history_len={history_len!r}, chunk_len={chunk_len!r}: tokens, at least 0 and 1"
            )
        ms = self.form.predict(history.ravel(), chunk.ravel()).reshape(history.shape)
        return float(ms) if ms.ndim == 0 else ms

    def uncertainty(self, history_len: ArrayLike, chunk_len: ArrayLike) -> Any:
        """Relative standard error of `predict` for the same arguments: 0.05 is 5 %. It is computed
        from the differences between the fits in `committee` (a jackknife), and is zero for a model
        without them."""
        history, chunk = np.broadcast_arrays(
            np.asarray(history_len, dtype=np.float64), np.asarray(chunk_len, dtype=np.float64)
        )
        if not self.committee:
            error = np.zeros(history.shape)
        else:
            logs = np.log([f.predict(history.ravel(), chunk.ravel()) for f in self.committee])
            error = jackknife(logs).reshape(history.shape)
        return float(error) if error.ndim == 0 else error

    def errors(self, samples: Iterable[Sample]) -> Floats:
        """log(measured / predicted) of each sample: 0.03 is 3 % slower than predicted."""
        data = Data.of(tuple(samples))
        ratio = data.ms / self.form.predict(data.history, data.chunk)
        return np.asarray(np.log(ratio), dtype=np.float64)

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The profile's samples."""
        return self._samples

    # --- online refit ------------------------------------------------------------------------

    def update(self, samples: Iterable[Sample]) -> bool:
        """Takes timings of real chunks. Returns True if they led to new coefficients.

        The model keeps the latest 256 of them. A call that brings the 32nd since the last attempt
        refits the same form to the recent chunks and the profile together, the profile's times
        scaled by the median change of speed since. It takes the refit only
        if that predicts the held-out recent chunks (every fourth, never fitted) better in the
        median and no worse at the 95th percentile. Such a call is up to a second of Python. In a
        process that launches forwards, use `Correction`, which does it in another process.
        """
        before = self._live.seen // self.REFIT_EVERY
        for sample in samples:
            if not (math.isfinite(sample.latency_ms) and sample.latency_ms > 0):
                raise ValueError(f"not a latency: {sample}")
            live = self._live
            live.seen += 1
            (live.holdout if live.seen % 4 == 0 else live.fit).append(sample)
        return self._live.seen // self.REFIT_EVERY > before and self._refit()

    def _refit(self) -> bool:
        held, live = tuple(self._live.holdout), tuple(self._live.fit)

        def fitted(data: Data) -> Form:
            pair = (self.form.tile, self.form.wave)
            return fit_form(scipy_optimize(), self.form.name, data, pair)[0]

        # If the engine as a whole has become slower, the profile is too fast by as much. Together
        # with recent chunks as it is, it would give a fit between the two speeds.
        profile = Data.of_points(Repeats.of(self._samples))
        profiled = LatencyModel(fitted(profile), self.report, ())
        drift = math.exp(float(np.median(profiled.errors(live))))
        scaled = (replace(s, latency_ms=s.latency_ms * drift) for s in self._samples)
        pool = (*scaled, *live)
        data = Data.of_points(Repeats.of(pool))
        form = fitted(data)
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
        self.committee = cross_validate(scipy_optimize(), [form.name], data, 0)[1][form.name]
        return True

    def adopt(self, other: LatencyModel) -> None:
        """Takes over another model's coefficients and report, so that sizers which hold this model
        use them."""
        self.form, self.committee, self.report = other.form, other.committee, other.report

    # --- JSON --------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The form, the report and the profile's samples, but not the chunks given to `update`."""
        report = asdict(self.report)
        report["rejected"] = [
            [samples_to_json([sample])[0], why] for sample, why in self.report.rejected
        ]
        return {
            "version": 1,
            "form": asdict(self.form),
            "committee": [asdict(form) for form in self.committee],
            "report": report,
            "samples": samples_to_json(self._samples),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LatencyModel:
        if data.get("version") != 1:
            raise ValueError(
                f"unknown latency model version {data.get('version')!r}: this release reads "
                "version 1"
            )
        report = dict(data["report"])
        for name in ("history_range", "chunk_range"):
            report[name] = tuple(report.get(name, (0, 0)))
        report["rejected"] = tuple(
            (samples_from_json([row])[0], str(why)) for row, why in report["rejected"]
        )
        return cls(
            Form.from_json(data["form"]),
            FitReport(**report),
            samples_from_json(data["samples"]),
            [Form.from_json(form) for form in data.get("committee", ())],
        )

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> LatencyModel:
        """Reads a model that `save` wrote. It predicts with NumPy alone, without SciPy."""
        return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))


def _gate_reason(report: FitReport, gate: QualityGate) -> str:
    total = report.samples_used + len(report.rejected)
    if report.samples_used < gate.min_samples:
        return f"{report.samples_used} samples left, {gate.min_samples} needed"
    if len(report.rejected) > gate.max_rejected * total:
        return f"{len(report.rejected)} of {total} samples rejected"
    if not report.misfit_median <= gate.max_holdout_median:
        return f"median error {report.misfit_median:.0%} over {gate.max_holdout_median:.0%}"
    if not report.misfit_p95 <= gate.max_holdout_p95:
        return f"p95 error {report.misfit_p95:.0%} over {gate.max_holdout_p95:.0%}"
    if not report.uncertainty <= gate.max_uncertainty:
        return (
            f"predictions uncertain by {report.uncertainty:.0%}, over {gate.max_uncertainty:.0%}: "
            "more samples, or less noise, are needed"
        )
    if not report.unseen <= gate.max_unseen:
        return (
            f"no sample without history, where predictions are uncertain by {report.unseen:.0%}, "
            f"over {gate.max_unseen:.0%}"
        )
    return ""
