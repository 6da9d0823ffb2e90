"""Faults in pystage.pp."""

from __future__ import annotations

from . import M, Mutants

MUTANTS: Mutants = {
    "pystage/pp/forms.py": {
        "predict-drops-floor": M("return soft_max(body, self.floor_ms)", "return body"),
        "area-without-history": M("area = <|2.0 * history + |>chunk", ""),
        "behind-everywhere": M("np.where(history <|>|> 0, chunk, 0.0)", ">="),
        "wave-floors": M("waved = area * (np.<|ceil|>(tiled / self.wave)", "floor"),
    },
    "pystage/pp/fitting.py": {
        "holdout-fits-on-all": M(
            "train, seen = data.pick(<|~test|>), data.pick(test)", "test | True"
        ),
        "behind-not-told-apart": M("raw[:, behind] = 0.0", "pass"),
        "holdout-repeats-split": M(
            "return np.asarray(<|(order % _FOLDS)[which.ravel()]|>, dtype=np.int64)",
            "np.arange(data.ms.size) % _FOLDS",
        ),
        "point-slow-kept": M(
            "near = tuple(s for s in repeats if s.latency_ms <= limit)", "near = tuple(repeats)"
        ),
        "point-slow-forgotten": M("tuple(s for s in repeats if s.latency_ms > limit))", "())"),
        "outliers-kept": M(
            "used = np.abs(residual) <= max(4.0 * scale, math.log(_REJECT_RATIO))",
            "used = everything",
        ),
        "floor-not-fitted": M('with_floor = form.name <|!=|> "linear"', "=="),
    },
    "pystage/pp/queue.py": {
        "others-free": M(
            "<|np.maximum(tokens / self._sizes, 1.0)|> * self._slowest + self._others", "1.0"
        ),
        "no-way-through": M("* self._slowest<| + self._others|>\n", ""),
        "less-than-a-chunk": M(
            "<|np.maximum(tokens / self._sizes, 1.0)|>", "(tokens / self._sizes)"
        ),
        "overhead-lost": M("ms_by_size.values()))<| + np.array(more)[:, None]|>", ""),
        "first-stage-alone": M("on_stages.<|max(axis=0)|>\n", "min(axis=0)"),
        "never-kept": M("size = max(<|self._kept|>, self.size", "0"),
        "kept-for-ever": M("        if not waiting:\n            self._kept = 0\n", ""),
        "kept-by-nobody": M("self._kept = <|size if left + waiting > size else 0|>", "size"),
        "alone-too": M("if <|waiting < left|>:", "False"),
        "what-waits-alone": M("self.size(<|left + waiting|>)", "waiting"),
    },
    "pystage/pp/model.py": {
        "gate-min-samples-off": M("if report.samples_used < gate.min_samples:", "if False:"),
        "gate-min-samples-one-off": M(
            "report.samples_used <|<|> gate.min_samples:",
            "<=",
        ),
        "gate-rejected-off": M(
            "if len(report.rejected) > gate.max_rejected * total:",
            "if False:",
        ),
        "gate-median-off": M(
            "if not report.misfit_median <= gate.max_holdout_median:", "if False:"
        ),
        "gate-p95-off": M("if not report.misfit_p95 <= gate.max_holdout_p95:", "if False:"),
        "gate-p95-by-median": M(
            "if not report.<|misfit_p95|> <= gate.max_holdout_p95:", "misfit_median"
        ),
        "gate-uncertainty-off": M(
            "if not report.uncertainty <= gate.max_uncertainty:", "if False:"
        ),
        "gate-unseen-off": M("if not report.unseen <= gate.max_unseen:", "if False:"),
        "noise-is-misfit": M("sigmas * <|self.repeat_noise|>", "0"),
        "report-p95-is-median": M("np.percentile(errors, <|95|>)) if measured", "50"),
        "usable-in-spite": M(
            "model.report = replace(report, <|usable=False|>, reason=reason)", "usable=True"
        ),
        "live-holdout-is-fitted": M("pool = (*scaled, *live<|)|>", ", *held)"),
        "profile-as-it-was": M("latency_ms=s.latency_ms<| * drift|>)", ""),
        "live-every-third-held-out": M("if live.seen % <|4|> == 0 else live.fit", "3"),
        "live-none-held-out": M(
            "(live.holdout if live.seen % 4 == 0 else live.fit).append(sample)",
            "live.fit.append(sample); live.holdout.append(sample)",
        ),
        "refit-never": M("return self._live.seen // self.REFIT_EVERY <|>|> before", "<"),
        "refit-always": M("return self._live.seen // self.REFIT_EVERY <|>|> before", ">="),
        "refit-worse-median": M("better = np.median(new) <|<|> np.median(old)", ">"),
        "refit-equal-median": M("better = np.median(new) <|<|> np.median(old)", "<="),
        "refit-ignores-p95": M(
            "if not better or np.percentile(new, 95) > np.percentile(old, 95):", "if not better:"
        ),
        "refit-keeps-form": M(
            "        self.form = form\n        self.committee", "        self.committee"
        ),
        "refit-keeps-report": M(
            """coefficients=dict(zip(form.terms(), form.coefficients, strict=True)),
            floor_ms=form.floor_ms,
            tile=form.tile,
            wave=form.wave,
        )
        self.form""",
            """
        )
        self.form""",
        ),
        "update-takes-nan": M('raise ValueError(f"not a latency: {sample}")', "continue"),
        "live-unbounded": M("deque(maxlen=<|LatencyModel.KEPT * 3 // 4|>)", "None"),
        "fit-takes-three": M("if len(kept) < <|4|>:", "3"),
        "fit-takes-zero-latency": M(
            "if not all(math.isfinite(s.latency_ms) and s.latency_ms <|>|> 0 for s in kept)", ">="
        ),
        "fit-takes-infinite": M(
            "if not all(<|math.isfinite(s.latency_ms) and |>s.latency_ms > 0 for s in kept)", ""
        ),
        "fit-unknown-forms": M("if unknown := set(forms) - set(FORMS):", "if unknown := None:"),
        "predict-swaps": M(
            "self.form.predict(<|history.ravel(), chunk.ravel()|>)",
            "chunk.ravel(), history.ravel()",
        ),
        "errors-inverted": M(
            "ratio = data.ms / self.form.predict(data.history, data.chunk)",
            "ratio = self.form.predict(data.history, data.chunk) / data.ms",
        ),
        "rejected-not-reported": M("for i in np.flatnonzero(<|~used|>)", "~(used | True)"),
        "samples-used-all": M("samples_used=len(kept)<| - len(rejected)|>,", ""),
        "json-drops-samples": M('"samples": <|samples_to_json(self._samples)|>,', "[]"),
        "json-any-version": M('if data.get("version") != 1:', "if False:"),
        "warning-lost": M(
            'logger.warning("latency model: %s; the static chunk size stays", model.report)', "pass"
        ),
    },
    "pystage/pp/sizer.py": {
        "queue-mean": M("ms = <|np.median|>(timed", "np.mean"),
        "queue-no-history": M("points = [(<|history|>, n) for", "0"),
        "queue-beyond": M("for n in sizes<| if history + n <= self.context_len|>]", ""),
        "queue-bad-model": M("sizes = sizes if <|self._usable()|> else", "True"),
        "min-chunk-not-rounded": M(
            "self._floor = _up(max(min_chunk, 1), page_size)", "self._floor = max(min_chunk, 1)"
        ),
        "cap-not-rounded": M("self._cap = limit // page_size * page_size", "self._cap = limit"),
        "cap-is-base": M("limit = max_chunk if max_chunk is not None else <|2 * |>base_chunk", ""),
        "floor-above-cap": M("if not self._floor <= self._cap:", "if False:"),
        "floor-at-cap-refused": M("if not self._floor <|<=|> self._cap:", "<"),
        "smooth-zero": M("if not 0.0 <|<|> smooth <= 1.0:", "<="),
        "smooth-over-one": M("if not 0.0 < smooth<| <= 1.0|>:", ""),
        "context-zero": M("if base_chunk < 1 or context_len < 1:", "if base_chunk < 1:"),
        "target-of-max": M("self.model.predict(<|0|>, self.base_chunk)", "self.base_chunk"),
        "next-negative-history": M("if history_len <|<|> 0:", "<="),
        "next-unusable": M(
            """        if not self._usable():
            return None
""",
            "",
        ),
        "margin-ignored": M("room = self.context_len - history_len<| - self.context_margin|>", ""),
        "margin-added": M("room = self.context_len - history_len <|-|> self.context_margin", "+"),
        "room-not-paged": M("room = room // self.page_size * self.page_size", "pass"),
        "room-of-a-page-refused": M("if room <|<|> self.page_size:", "<="),
        "room-ignored": M(
            "return min(self._equal_time(history_len, self.target_ms), room)",
            "return self._equal_time(history_len, self.target_ms)",
        ),
        "plan-first-stretch-only": M("if plans[-1][0] <= _EVEN:", "if True:"),
        "plan-least-even": M(
            "return <|min(plans, key=lambda plan: plan[0])[1]|>\n\n    def _fewest", "max(plans)[1]"
        ),
        "fastest-last-cut-elsewhere": M("chunks[<|-1|>] -= cells * grain - prompt_len", "0"),
        "plan-without-even-tail": M(
            "chunks = <|self._even_tail(self._fewest(prompt_len, self.target_ms * stretch, known))|>",
            "self._fewest(prompt_len, self.target_ms * stretch, known)",
        ),
        "usable-says-each-time": M("self._told = True", "pass"),
        "far-over-never": M(
            "if times[at] < _UNDER and at + 1 < times.size and times[at + 1] <= _FAR_OVER:",
            "if False:",
        ),
        "far-over-past-the-end": M(
            "if times[at] < _UNDER<| and at + 1 < times.size|> and times[at + 1]", ""
        ),
        "smooth-unaligned": M("size = size // self.page_size * self.page_size", "pass"),
        "smooth-inverted": M(
            "int(self.base_chunk + self.smooth * (size - self.base_chunk))",
            "int(size + self.smooth * (self.base_chunk - size))",
        ),
        "smooth-below-floor": M("return min(<|max(size, self._floor)|>, self._cap)", "size"),
        "smooth-above-cap": M(
            "return <|min(max(size, self._floor), self._cap)|>",
            "max(size, self._floor)",
        ),
        "cover-one-more": M("if len(chunks) <|==|> at_most:", ">"),
        "cover-past-the-prompt": M(
            "chunks.append(<|min(self._equal_time(done, target_ms, known), prompt_len - done)|>)",
            "self._equal_time(done, target_ms, known)",
        ),
        "tail-donor-last": M(
            "donor = int(np.argmax(<|times[:-1]|>))",
            "times",
            equivalent="a last chunk that is the slowest only gets slower: both stop",
        ),
        "tail-below-floor": M("if <|moved[donor] < self._floor or |>moved[-1] > self._cap:", ""),
        "tail-above-cap": M("if moved[donor] < self._floor<| or moved[-1] > self._cap|>:", ""),
        "tail-any-spread": M(
            """            if np.ptp(self._times(moved)) >= np.ptp(times):
                break
""",
            "",
        ),
    },
    "pystage/pp/makespan.py": {
        "no-factors": M("return <|factors|>, more", "(1.0,) * ranks"),
        "fixed-rest-lost": M("return [size] * whole<| + [rest] * bool(rest)|>", ""),
        "fixed-rest-zero": M("[rest] * <|bool(rest)|>", "1"),
        "histories-inclusive": M("return np.cumsum(sizes)<| - sizes|>", ""),
        "pipeline-hop-everywhere": M("        if <|stage|>:\n            arrived", "True"),
        "pipeline-no-wait": M("np.maximum.accumulate(<|arrived|> - (ends - row))", "0 * arrived"),
        "pipeline-no-queue": M("<|np.maximum.accumulate|>(arrived - (ends - row))", ""),
        "pipeline-first-chunk": M("pipeline_ends(stage_ms, transfer_ms)[<|-1|>]", "0"),
        "makespan-ranks-ignored": M("rows[0].sum() + <|(len(factors) - 1)|> * rows[0].max()", "0"),
        "makespan-stages-alike": M("if len(set(factors)) == <|len(set(more.tolist())) == |>1:", ""),
        "stages-absolute": M("np.polyfit(alone, ms, 1<|, w=1.0 / alone|>)", ""),
        "stages-below-nothing": M("if <|more < 0 or |>factor <= 0:", ""),
        "stages-shrinking": M("if more < 0<| or factor <= 0|>:", ""),
        "stages-any-shape": M("<|alone.ndim != 1 or alone.size < 2 or |>piped.ndim != 2", ""),
    },
    "pystage/pp/budget.py": {
        "area-of-all": M("self.area += (2 * history_len + <|chunk_len|>)", "self.tokens"),
        "history-of-the-last": M("self.history <|+=|> history_len", "="),
        "nothing-behind": M("self.behind += <|chunk_len if history_len else 0|>", "0"),
        "decodes-not-read": M("return ms<| + load.decoded * self.decode_ms_per_token|>", ""),
        "chunks-are-decodes": M("history_len if chunk_len <|==|> 1 else 0", ">="),
        "decodes-are-prefills": M("        if chunk_len > <|1|>:", "0"),
        "budget-over": M("size)) <= <|self.budget_ms|>", "self.budget_ms * 1.1"),
        "full-gets-more": M("if most <= 0<| or self._ms(batch.prefills) > self.budget_ms|>:", ""),
        "tokens-unbounded": M("room = self.max_tokens<| - batch.all.tokens|>", ""),
        "rest-in-pages": M(
            "if <|left is not None and left <= room and |>fits(left):",
            "False and ",
        ),
        "nobody-gets-on": M("if <|size < self.min_chunk and not batch.prefills.tokens|>:", "False"),
        "floor-of-a-page": M(
            "min_chunk = max(<|min(model.report.chunk_range[0], max_tokens)|>, page_size)", "1"
        ),
        "all-get-on": M("size < self.min_chunk<| and not batch.prefills.tokens|>", ""),
        "tiles-begun": M("size = <|self._whole_tiles(|>low * self.page_size", "(lambda n, _: n)("),
        "tiles-without-others": M("tiles = (<|beside + |>size) // self.tile", ""),
        "tiles-only-one": M("if tiles >= <|2|> and", "1"),
        "tiles-nothing-left": M("if tiles >= 2<| and pages > 0|> else size", ""),
        "order-not-kept": M("if takes[i] < left:\n                <|break|>", "continue"),
        "unusable-is-fine": M("if not model.report.usable:", "if False:"),
    },
    "pystage/pp/correction.py": {
        "waits-for-nothing": M("while self._running<| and self._running[0][3].query()|>:", ""),
        "decodes-count": M(
            "return <|len(pieces) == 1 and pieces[0][1] > 1|>",
            "bool(pieces)",
        ),
        "running-unbounded": M(
            "self._running: deque[tuple[int, int, Event, Event]] = deque(<|maxlen=pending|>)", ""
        ),
        "new-forever": M("            self._new = <|False|>\n            return", "True"),
        "new-without-news": M("            if not self._new:\n", "            if False:\n"),
        "refit-in-this-process": M("<|apart(_updated, |>self._draft.to_json()", "_updated("),
        "refit-forgets-old-chunks": M("list(self._recent)<|)|> if new", "[-new:])"),
        "no-time-counts": M("or not (<|math.isfinite(ms) and ms > 0|>):", "True"),
        "refit-of-single-chunks": M(
            "len(self._done) // lot<| * lot|>", " * lot or len(self._done)"
        ),
    },
    "pystage/pp/apart.py": {
        "apart-fails-silently": M("if done.returncode:", "if False:"),
        "apart-mixes-output": M('fdopen(os.dup(1), "wb")<|\nos.dup2(2, 1)|>', ""),
        "apart-swallows-the-log": M("for line in <|said|>:", "[]"),
        "apart-has-gpus": M('<|, "CUDA_VISIBLE_DEVICES": ""|>', ""),
        "apart-uses-all-cores": M("env={**os.environ, <|**threads, |>", ""),
    },
    "pystage/pp/choice.py": {
        "grain-over-the-limits": M("while <|-(-smallest // grain) > largest // grain|>:", "False"),
        "cover-not-reversed": M("plans.append(<|chunks[::-1]|>)", "chunks"),
        "cover-last-not-cut": M("<|chunks[-1] -= sum(chunks) - self.q.prompt_len|>", "pass"),
        "runs-not-asked": M("if run is not None and <|runs >= _FEWEST_RUNS|>:", "runs > 99"),
        "runs-of-nothing": M("if run is not None and runs >= <|_FEWEST_RUNS|>:", "0"),
        "runs-search-upwards-only": M("for step in (<|-1, 1|>):", "1,"),
        "runs-search-downwards-only": M("for step in (<|-1, 1|>):", "-1,"),
        "runs-search-stops-at-once": M("while ahead <= <|2|> and", "1"),
        "runs-search-does-not-move": M("at, ahead = <|at + ahead * step|>, 1", "at"),
        "runs-over-budget": M("len(sizes)<| and runs.left >= 4|>:", ""),
        "runs-over-budget-at-the-end": M("while <|runs.left >= len(tried)|>:", "runs.left > 0"),
        "runs-first-counts": M("steady = <|plan.took[1:] or |>plan.took", ""),
        "runs-any-time": M("if not (<|math.isfinite(ms) and |>ms > 0):", ""),
        "runs-no-other-plan": M("for plan in <|free[:2]|>:", "[]"),
        "runs-within-noise": M("better = saved > <|max(error, _LEAST_GAIN)|>", "0.0"),
        "smallest-rival-not-timed": M("[*near[:2], <|smallest, |>fixed[self.q.base]", ""),
        "few-finalists": M("near[: max(4, <|forwards // 3 - len(kinds)|>)]", "0"),
        "measured-best-not-again": M("[_best_fixed(sizes)<|, sizes[0]|>]", ""),
        "timed-one-after-another": M(
            "for k in range(each) for plan, at in zip(plans, places, strict=True)",
            "for plan, at in zip(plans, places, strict=True) for k in range(each)",
        ),
        "timed-slowest-as-work": M("if turn < <|(each - slow) * len(plans)|> else", "0"),
        "compared-not-sorted": M("in <|sorted(measured, key=lambda c: c.timed)|>)", "measured"),
        "noise-is-misfit": M("np.var(medians, ddof=1))<| - by_noise|>", ""),
        "sizes-not-corrected": M("if <|len(ratios.get(size, ()))|> >= _FEWEST", "0"),
        "one-timing-corrects-a-size": M("_FEWEST_OF_SIZE = <|4|>", "1"),
        "own-error-forgotten": M("error = math.hypot(error, <|own_error * rest|>)", "0.0"),
        "own-error-once-too-often": M(
            "error, rest = math.hypot(error, of_size * share), <|rest - share|>", "rest"
        ),
        "own-sizes-are-alike": M("math.hypot(noise, <|between|>)", "0.0"),
        "own-size-is-many": M("if <|len(set(plan.chunks)) > 1|>:\n            between", "True"),
        "chosen-for-luck": M("key=lambda c: c.timed<| * math.exp(c.timed_error)|>)", ""),
        "overhead-forgotten": M("ms.reshape(cells, sizes.size)<| + q.overhead|>", ""),
        "overhead-of-the-first": M(
            "<|max(zip(self.factors, self.overhead_ms, strict=True))|>[1]",
            "(0.0, self.overhead_ms[0])",
        ),
        "own-timings-alone": M("ratios = _by_size(<|tried|>)", "tried[:1]"),
        "drift-is-noise": M("np.abs(np.diff(values))", "np.abs(values - np.median(values))"),
    },
    "pystage/pp/samples.py": {
        "sample-negative-history": M("if <|self.history_len < 0 or |>self.chunk_len <= 0:", ""),
        "sample-empty-chunk": M("if self.history_len < 0 or self.chunk_len <|<=|> 0:", "<"),
    },
    "pystage/pp/profile.py": {
        "plan-without-points": M("if not self.points:", "if False:"),
        "plan-two-forwards": M("if self.max_forwards < <|3|>:", "1"),
        "spread-page-floor": M("size = <|max(align(chunk), page_size)|>", "int(chunk)"),
        "spread-beyond-context": M("align(min(history, <|top - size|>))", "top"),
        "spread-max-tokens-ignored": M(
            "top = <|min(context_len, max_tokens or context_len)|>", "context_len"
        ),
        "warm-up-once": M("while len(self.warmup_ms) < <|self.plan.max_warmup|> and", "1"),
        "warm-up-unlimited": M(
            "while <|len(self.warmup_ms) < self.plan.max_warmup and |>self.spent() is None", ""
        ),
        "warm-up-over-budget": M(
            "while len(self.warmup_ms) < self.plan.max_warmup<| and self.spent() is None|>", ""
        ),
        "warm-up-first-is-a-sample": M("self.samples += [<|last, sample|>]", "sample, sample"),
        "warm-up-all-steady": M(
            "if gap <= <|self.plan.steady * min(sample.latency_ms, last.latency_ms)|>:", "1e9"
        ),
        "budget-one-more": M("if self.forwards <|>=|> self.plan.max_forwards:", ">"),
        "budget-seconds-off": M(
            "if time.perf_counter() - self.started >= self.plan.max_seconds:", "if False:"
        ),
        "zero-ms-is-a-time": M("timing.latency_ms <|>|> 0):", ">="),
        "oom-tried-again": M(
            "if any(point[0] >= h and point[1] >= c for h, c in self.skipped):", "if False:"
        ),
        "oom-skips-all": M(
            "if any(point[0] >= h <|and|> point[1] >= c for h, c in self.skipped):", "or"
        ),
        "oom-not-told": M(
            """            self.skipped.append(point)
            torch.cuda""",
            """            torch.cuda""",
        ),
        "min-samples-ignored": M(
            """        if len(self.samples) < self.plan.min_samples:
            return ""
""",
            "",
        ),
        "settled-ignores-p95": M(
            "            and report.holdout_p95 <= 4 * self.plan.target_error\n", ""
        ),
        "settled-ignores-median": M(
            "report.holdout_median <= self.plan.target_error\n            and ", ""
        ),
        "settled-ignores-rejected": M(
            "            and len(report.rejected) <= 0.05 * len(self.samples)\n", ""
        ),
        "settled-never": M(
            "        if small:\n            return f", "        if False:\n            return f"
        ),
        "on-policy-off": M(
            "if len(self.samples) < 2 * plan.check_every or not plan.on_policy:", "if True:"
        ),
        "on-policy-in-spite": M(
            "if len(self.samples) < 2 * plan.check_every<| or not plan.on_policy|>:", ""
        ),
        "on-policy-unusable": M(
            """        if not model.report.usable:
            return
""",
            "",
        ),
        "edges-unbounded": M("if plan.min_chunk <= size <= largest:", "if True:"),
        "repeats-off": M(
            "if not self.plan.repeats or len(self.samples) < self.plan.check_every:", "if True:"
        ),
        "repeats-in-spite": M(
            "if <|not self.plan.repeats or |>len(self.samples) < self.plan.check_every:", ""
        ),
        "repeats-without-base": M("yield from (self.plan.base, self.plan.base)", "yield from ()"),
        "error-not-chained": M(
            ") from error\n        profile = Profile(", ") from None\n        profile = Profile("
        ),
        "context-not-left": M(
            'stack.enter_context(cast("AbstractContextManager[Step]", step))',
            'cast("AbstractContextManager[Step]", step).__enter__()',
        ),
        "interrupt-swallowed": M(
            "except <|Exception|> as error:\n            # The step's exit", "BaseException"
        ),
        "spoiled-not-again": M("if not sample.history_len:\n                    <|yield|>", "_ ="),
        "spoiled-all-again": M("if <|not sample.history_len|>:\n                    yield", "True"),
        "spoiled-too-early": M(
            "if <|len(self.samples) >= self.plan.min_samples|>:\n            for", "True"
        ),
        "flight-not-collected": M("run.sample()\n            <|run.collect()|>", "pass"),
        "flight-read-twice": M("<|self.in_flight.clear()|>", "pass"),
        "forwards-not-counted": M("self.forwards += 1", "self.forwards += 2"),
        "ids-above": M(".integers(0, <|vocab_size|>, size=count", "vocab_size + 1"),
    },
    "pystage/pp/share.py": {
        "all-profile": M("if dist.get_rank() != src:", "if False:"),
        "group-forgotten": M("dist.broadcast(size, src=src, <|group=group|>)", "group=None"),
        "failure-not-told": M(
            """        _send(text, group, src, torch.device(device))
        raise""",
            "        raise",
            tests="pytest tests/test_pp_share.py -k a_failure",
        ),
        "failure-not-raised": M(
            """        _send(text, group, src, torch.device(device))
        raise""",
            """        _send(text, group, src, torch.device(device))
        return {"samples": [], "forwards": 0, "seconds": 0.0, "stop_reason": "", "warmup_ms": [], "skipped": []}""",
            tests="pytest tests/test_pp_share.py -k a_failure",
        ),
        "only-exceptions-told": M(
            "except <|BaseException|> as error:",
            "Exception",
            tests="pytest tests/test_pp_share.py -k a_failure",
        ),
    },
}
