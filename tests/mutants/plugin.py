"""Faults in the SGLang plugin. Most show only in the real SGLang."""

from __future__ import annotations

from . import M, Mutants

SGLANG_SMALL = (
    "sglang tests/test_sglang.py -k 'small or rows or leaves_torch or other_code or others_see'"
)
MUTANTS: Mutants = {
    "pystage/integrations/sglang/small.py": {
        "tensor-left": M("<|torch.tensor, torch.full = _tensor, _full|>", "torch.full = _full"),
        "not-delivered-at-the-end": M("        self._parcel.end()", "        pass"),
        "any-fill": M("args == ((1,), -1)", "args[0] == (1,)"),
        "fill-of-any-code": M("\n            and sys._getframe(1).f_code in self._codes", ""),
        "no-comprehensions": M(
            "todo += [const for const in code.co_consts", "todo += [const for const in ()"
        ),
        "minus-one-anew": M("self._made[pool.device] = tensor", "pass"),
        "one-delivery": M("PREPARED: (<|5, 9|>)", "4, 9"),
        "late-delivery": M("BUILT: (<|2|>,)", "3"),
    },
    "pystage/integrations/sglang/entry.py": {
        "off-is-on": M("if not process.state.settings.enabled:", "if False:"),
        "errors-of-settings": M("return _stay_off(str(error), logging.ERROR)", "pass"),
        "optional-not-looked-for": M(
            "[hook for hook in optional(process.state.settings)<| if is_there(hook)|>]", ""
        ),
        "relay-checks-unseen": M(
            'process.state.checks_relay = bool(getattr(overlap_utils, "_DEBUG_ASSERT", False))',
            "pass",
        ),
        "not-verified": M(
            "        HookRegistry.apply_hooks()\n        verify()",
            "        HookRegistry.apply_hooks()",
        ),
        "verified-once-more": M("HookRegistry.apply_hooks = as_it_was", "pass"),
    },
    "pystage/integrations/sglang/hooks.py": {
        "fields-unchecked": M(
            'if name not in getattr(batch, "__dataclass_fields__", {}):', "if False:"
        ),
        "needed-unchecked": M(
            "        look_up(hook.target, hook.takes)\n    batch =", "        pass\n    batch ="
        ),
    },
    "pystage/integrations/sglang/metrics.py": {
        "counters-repeat": M("self._told[name] = now", "pass"),
        "gauge-of-one-pool": M("gauge.set(<|sum(getattr(stats, name) for stats in pools)|>)", "0"),
        "counters-not-added": M("counter.inc(max(0, now - self._told.get(name, 0)))", "pass"),
        "figures-end-the-server": M(
            "        except Exception as error:  # whatever it is, the server has to serve\n            process.state.metrics = None",
            "        except ZeroDivisionError as error:\n            process.state.metrics = None",
        ),
        "figures-not-updated": M("process.state.metrics.update(process.pools.stats())", "pass"),
    },
    "pystage/integrations/sglang/process.py": {
        "pool-on-the-cpu": M('if kind == "cpu" and not settings.cpu:', "if False:"),
        "pools-of-one-device": M(
            'current_cuda_device() if name == "cuda" else -1)',
            "-1)",
            equivalent="without a GPU there is one device",
        ),
        "pool-of-any-device": M('if kind not in ("cuda", "cpu"):', "if False:"),
        "pool-capacity-default": M("settings.capacity_mib << 20,", "64 << 20,"),
        "pool-policy-default": M("at_capacity=settings.at_capacity,", 'at_capacity="fallback",'),
        "pool-issue-default": M("issue=settings.issue,\n", 'issue="deferred",\n'),
        "pools-closed-kept": M("self._pools.clear()", "pass"),
        "said-twice": M("        self.said = True\n        logger.info", "        logger.info"),
        "once-each-time": M("_warned.add(message)", "pass"),
    },
    "pystage/integrations/sglang/resolving.py": {
        "mixed-of-unknown-code": M("elif <|state.preempts and |>batch.spec", ""),
        "mixed-under-speculation": M(
            "elif state.preempts and <|batch.spec_algorithm.is_none() and |>not state.checks_relay:",
            "",
        ),
        "mixed-in-spite-of-checks": M(
            "batch.spec_algorithm.is_none()<| and not state.checks_relay|>:", ""
        ),
        "mixed-not": M(
            "elif state.preempts and batch.spec_algorithm.is_none() and not state.checks_relay:",
            "elif False:",
        ),
        "merge-not-guarded": M(
            "if other.prefill_input_ids_cpu is not None and len(other.reqs):", "if False:"
        ),
        "merge-keeps-one": M(
            "for side in (batch, other):\n            if _staged",
            "for side in (batch,):\n            if _staged",
        ),
        "merge-of-mixed": M("if <|side.mix_running_indices is not None or |>(", ""),
        "mixed-not-counted": M('state.left_to_sglang["mixed"] += 1', "pass"),
        "resolve-not": M("if type(staged) is StagedTokens:", "if False:"),
        "resolve-keeps-staging": M(
            "staged._resolve(None, None, False)\n                <|batch.prefill_input_ids_cpu = None|>",
            "pass",
        ),
        "mixed-keeps-indices": M(
            "            batch.mix_running_indices = None\n        else", "        else"
        ),
        "guard-not": M(
            'if batch.input_ids is None and getattr(batch, "prefill_input_ids_cpu", None) is not None:',
            "if False:",
        ),
        "guard-line": M("ensure_resolved(batch, stacklevel=<|3|>)", "2"),
    },
    "pystage/integrations/sglang/settings.py": {
        "zero-mib": M("text.isdigit() and <|1|> <= int(text)", "0"),
        "endless-mib": M("1 <= int(text)<| <= 1 << 20|>:", ""),
        "any-choice": M("if text not in _CHOICES[variable]:", "if False:"),
        "any-switch": M('if text in ("0", "1"):', "if True:"),
        "choices-case": M(".strip()<|.lower()|>", ""),
    },
    "pystage/integrations/sglang/sizer.py": {
        "profiler-not-folded": M("if ids.size and ids.max() >= vocab_size:", "if False:"),
        "profiler-top-id": M("if ids.size and ids.max() <|>=|> vocab_size:", ">"),
        "profiler-request-kept": M("        module.Req = request", "        pass"),
    },
    "pystage/integrations/sglang/staging.py": {
        "small-left-open": M(
            "        here.views = False\n        if small is not None:",
            "        here.views = False\n        if False:",
            tests=SGLANG_SMALL,
        ),
        "rows-not-counted": M(
            'process.state.left_to_sglang["rows"] += 1', "pass", tests=SGLANG_SMALL
        ),
        "rows-not-written": M(
            "        if written:\n            return None",
            "        if True:\n            return None",
            tests=SGLANG_SMALL,
        ),
        "stagings-not-counted": M('process.state.left_to_sglang["stagings"] += 1', "pass"),
        "pin-ignored": M(
            'if not pin and pool.device.type == "cuda":',
            "if False:",
            equivalent="without a GPU there is one device",
        ),
        "raise-all-errors": M(
            'if <|isinstance(error, PoolExhaustedError) and |>process.state.settings.at_capacity == "raise":',
            "",
        ),
        "views-of-anything": M("if type(ids) is array and type(end) is int:", "if True:"),
        "views-in-spite": M("here.views = pool is not None<| and process.state.gives_views|>", ""),
        "pool-left-set": M(
            "    finally:\n        here.pool = None\n        here.views = False",
            "    finally:\n        here.views = False",
        ),
        "views-left-set": M(
            "    finally:\n        here.pool = None\n        here.views = False",
            "    finally:\n        here.pool = None",
        ),
        "pool-left-on-error": M(
            "    try:\n        return original(batch, *args, **kwargs)\n    finally:\n        here.pool = None\n        here.views = False",
            "    result = original(batch, *args, **kwargs)\n    here.pool = None\n    here.views = False\n    return result",
        ),
        "views-always": M("if process.here.views:\n        ids, end", "if True:\n        ids, end"),
        "views-never": M("if process.here.views:\n        ids, end", "if False:\n        ids, end"),
        "views-after-staging": M(
            "        process.here.views = False\n        staged = _stage", "        staged = _stage"
        ),
        "history-start": M("return ids_view(ids, <|0|>, end)", "1"),
        "raise-is-not": M(
            'if isinstance(error, PoolExhaustedError) and process.state.settings.at_capacity == "raise":',
            "if False:",
        ),
        "raise-always": M(
            'if isinstance(error, PoolExhaustedError)<| and process.state.settings.at_capacity == "raise"|>:',
            "",
        ),
        "views-to-sglang": M(
            "arrays = [<|part.copy() if type(part) is IdsView else part|> for", "part"
        ),
    },
    "pystage/integrations/sglang/symbols.py": {
        "any-parameters": M("if found != takes:", "if False:"),
        "reached-always": M(
            "if not any(value is hook.function for f in chain for value in _closed_over(f)):",
            "if False:",
        ),
        "copies-not-noticed": M(
            "if any(value is old for value in list(vars(module).values()) for old in chain[1:]):",
            "if False:",
        ),
    },
    "pystage/integrations/sglang/validation.py": {
        "vocab-left-set": M("        process.here.vocab_size = None\n", "        pass\n"),
        "validation-not": M(
            "if error is None and process.here.vocab_size is not None:", "if False:"
        ),
        "validation-over-error": M(
            "if <|error is None and |>process.here.vocab_size is not None:", ""
        ),
        "validation-not-aborted": M(
            "            req.set_finish_with_abort(error)\n", "            pass\n"
        ),
        "bad-id-of-pictures": M(
            "if <|req.multimodal_inputs is not None or |>req.input_embeds is not None:", ""
        ),
        "bad-id-of-embeddings": M(
            "if req.multimodal_inputs is not None<| or req.input_embeds is not None|>:", ""
        ),
        "bad-id-negative": M("np.flatnonzero(<|(ids < 0) | |>(ids >= vocab_size))", ""),
        "bad-id-vocab": M("| (ids <|>=|> vocab_size))", ">"),
        "bad-id-last": M("at = int(bad[<|0|>])", "-1"),
    },
    "pystage/integrations/sglang/verification.py": {
        "small-of-unknown-code": M(
            "            release_of(targets, function)\n", "", tests=SGLANG_SMALL
        ),
        "small-though-hooked": M(
            "if targets in (ALLOCATE, SAMPLING) and function is not current(target):",
            "if False:",
            tests=SGLANG_SMALL,
        ),
        "rows-of-unknown-code": M(
            'why = _shared("rows")<| or _unknown(WRITE_ROWS)|>', "", tests=SGLANG_SMALL
        ),
        "rows-though-shared": M('why = <|_shared("rows")|> or', '""', tests=SGLANG_SMALL),
        "small-in-spite": M(
            "    if state.settings.small:\n        left",
            "    if True:\n        left",
            tests=SGLANG_SMALL,
        ),
        "shared-not-noticed": M('return next(filter(None, reasons), "")', 'return ""'),
        "views-though-shared": M('state.gives_views = <|"history" in state.active|>', "True"),
        "preempts-always": M('state.preempts = <|"mixed" not in left|>', "True"),
        "left-is-active": M(
            "[part for part in parts if part not in found<| and part not in left|>]", ""
        ),
        "broken-is-active": M(
            "[part for part in parts if <|part not in found and |>part not in left]", ""
        ),
        "broken-not-told": M(
            'state.broken = [f"{part} ({why})" for part, why in found.items()]',
            "state.broken = []",
        ),
        "wanted-not-there": M("if wanted and part not in parts:", "if False:"),
    },
    "pystage/integrations/sglang/pp.py": {
        "stages-are-equal": M("return [<|count / counts[0]|> for count in counts]", "1.0"),
        "stages-not-told": M("stage_factors=<|stages|>,", "None"),
        "queue-lost": M("        queue=<|queue|>,\n    )", "None"),
        "queue-stages-equal": M(
            "len(stages), <|stage_factors=stages|>) if times", "stage_factors=None"
        ),
        "queue-of-tiny-chunks": M('min(max(sizes["min_chunk"], <|_SMALLEST|>), base)', "64"),
        "queue-larger-than-prefills": M(
            'base = <|min(sizes["base_chunk"], largest)|>\n', 'sizes["base_chunk"]\n'
        ),
        "queue-beyond-the-cache": M("history = <|min(base // 2, limit - largest)|>\n", "base // 2"),
        "queue-of-one-stage": M("if <|len(stages) == 1|> or not model", "False"),
        "queue-of-all-bad": M("1 or <|not model.report.usable|> or not base", "False"),
        "queue-without-room": M("usable or <|not base|>:", "False"),
        "queues-differ": M("if <|queues_agree(serving.scheduler)|>:", "True"),
        "short-whole": M("if size is None and <|prompt_len <= self.base|>:", "False"),
        "long-by-queue": M("if size is None and <|prompt_len <= self.base|>:", "True"),
        "queue-larger-than-largest": M(
            "size = <|min(size, self.largest)|>\n        return size", "size"
        ),
        "queue-short-tail": M("if waiting else <|self._with_tail(size, left) or |>size", ""),
        "queue-tail-of-others": M("return size if <|waiting|> else", "False"),
        "in-flight-not-there": M("next_chunk(left, waiting<| + in_flight|>)", ""),
        "cached-waits": M(
            "return <|round(tokens * serving.uncached / serving.tokens) if serving.tokens else |>tokens",
            "",
        ),
        "taken-twice": M("    if <|not continued|>:\n        serving.tokens", "True"),
        "never-forgotten": M("serving.uncached = serving.uncached<| * _FORGET|> +", ""),
        "done-is-in-flight": M("        <|and batch is not done|>\n", ""),
        "decodes-are-in-flight": M("        <|and batch.forward_mode.is_extend()|>\n", ""),
        "own-chunks-beside": M("and <|not any(other is req for other in batch.reqs)|>", "True"),
        "limit-off-the-page": M(
            "limit = (tokens - kept)<| // adder.page_size * adder.page_size|>", ""
        ),
        "decodes-leave-nothing": M("max(size - decodes, <|least|>, plans.page_size", "0"),
        "nothing-kept": M("if most is not None<| and tokens|>:", " and False"),
        "waits-behind-itself": M("for other in first<| if other is not req|>)", ""),
        "looks-at-all": M("first = <|itertools.islice(queue, _LOOK_AHEAD)|>", "queue"),
        "queue-as-good": M("as_good = as_good <|and not set(queue) - {base}|>", ""),
        "static-is-as-good": M("return {} if <|as_good|> else", "False"),
        "failure-ends-the-server": M(
            "    except Exception as error:  # as SGLang",
            "    except ZeroDivisionError as error:  # as SGLang",
        ),
        "sizer-left": M("    serving.model = serving.plans = None\n", ""),
        "follow-not": M("is_first_rank and dist.get_rank() != 0:", "is_first_rank and False:"),
        "plan-beyond-cache": M("max(page, min(context, <|free - page, |>row - page))", ""),
        "plan-beyond-row": M("max(page, min(context, free - page<|, row - page|>))", ""),
        "plan-small-page": M(
            "    page = <|max(int(owner.page_size), _SMALLEST_PAGE)|>\n", "int(owner.page_size)\n"
        ),
        "plan-largest": M(
            "max_chunk=<|int(owner.max_prefill_tokens) if dynamic else base|>,", "None"
        ),
        "plan-of-dynamic-sizes": M("int(owner.max_prefill_tokens)<| if dynamic else base|>,", ""),
        "sizer-largest": M(
            "return max(<|min(int(owner.max_prefill_tokens), 2 * base)|>, page_of(owner))",
            "2 * base",
        ),
        "predict-always": M(
            "serving.plans is None else serving.plans.next_chunk(<|history_len|>)", "0"
        ),
        "leader-does-not-tell": M(
            "        if together:\n            _tell((history_len, chunk_len), stage.cpu_group)\n",
            "",
        ),
        "leader-does-not-stop": M(
            "        if together:\n            _tell(_STOP, stage.cpu_group)", "        pass"
        ),
        "follower-does-not-run": M(
            "            return\n        step(history_len, chunk_len)", "            return"
        ),
        "history-not-there": M("            if history_len:\n", "            if False:\n"),
        "request-kept": M(
            "        finally:\n            request.release()", "        finally:\n            pass"
        ),
        "shared-batch-resized": M("or budget is None<| or adder.can_run_list|>", ""),
        "whole-request-cut": M("if not continued and left <= budget:", "if False:"),
        "decodes-not-taken-off": M("max(size<| - decodes|>, least,", ""),
        "sizes-not-aligned": M("size = max(size // serving.align, 1) * serving.align", "pass"),
        "host-hits-not-history": M("(0 if continued else int(req.host_hit_length))", "0"),
        "short-tail-left": M("(whole := <|self._with_tail(size, rest)|>)", "None"),
        "one-vocabulary": M(
            "random_token_ids(tokens, <|int(self.owner.model_config.vocab_size)|>, self.count)", "8"
        ),
    },
    "pystage/integrations/sglang/budget.py": {
        "decodes-are-free": M("Batch.of(<|_decodes(adder)|>)", "()"),
        "prefills-are-free": M(
            "for other in adder.can_run_list[<|taken|>:]:", "len(adder.can_run_list)"
        ),
        "prefills-count-twice": M("batch, <|len(adder.can_run_list)|>  # one", "0"),
        "batch-of-nothing": M(
            "max(room // align, <|1 if room and not adder.can_run_list else 0|>)", "0"
        ),
        "decodes-of-other-batches": M("if <|not get_schedule().enable_mixed_chunk or |>adder", ""),
        "unusable-budget": M("if model is None<| or not model.report.usable|>:", ""),
        "no-limit": M("    pp.set_budget(adder, room, sizer.page_size)\n", "    pass\n"),
    },
    "pystage/integrations/sglang/correction.py": {
        "not-sent": M("return [*requests<|, *serving.leader.message()|>]", ""),
        "handled-by-sglang": M("return [r for r in requests if <|not _is_message(r)|>]", "True"),
        "not-applied": M("    _apply(found[-1])\n", ""),
        "load-backs-timed": M("\n        or batch.hicache_consumer_index >= 0", ""),
        "drafts-timed": M('\n        or batch.forward_mode.name != "EXTEND"', ""),
        "logprobs-timed": M("\n        or batch.return_logprob", ""),
        "other-ranks-timed": M("global_num_tokens or ())) > <|1|>", "9"),
        "too-few-batches": M("<|self.correction.collect() >= LatencyModel.REFIT_EVERY|>", "False"),
        "old-plans": M(
            '        pp.serving.plans = pp.plans_of(serving.owner, message["plans"], queue)\n',
            "        pass\n",
        ),
    },
}
