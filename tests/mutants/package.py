"""Faults in the Python package pystage, except pp and the SGLang plugin.

This is one file because it is a single table, with an entry for each fault, and no other code.
"""

from __future__ import annotations

from . import M, Mutants

SMALL = "pytest tests/test_small_tensors.py"
MUTANTS: Mutants = {
    "pystage/pool.py": {
        "resolve-any-dtype-with-out": M(
            "if isinstance(out, Tensor) and <|out.dtype != dtype|>:", "False"
        ),
        "resolve-out-ignored": M("return staged._resolve(<|out|>, dtype, False)", "None"),
        "resolve-dtype-ignored": M("return staged._resolve(out, <|dtype|>, False)", "None"),
        "size-of-any-type": M("return <|operator.index(value)|>", "int(value)"),
        "capacity-zero": M("if capacity_bytes < <|4096|>:", "0"),
        "capacity-page-refused": M("if capacity_bytes <|<|> 4096:", "<="),
        "reserve-over-capacity": M("if not 0 <= reserve_bytes<| <= capacity_bytes|>:", ""),
        "reserve-negative": M("if not <|0 <= |>reserve_bytes <= capacity_bytes:", ""),
        "reserve-all-refused": M("if not 0 <= reserve_bytes <|<=|> capacity_bytes:", "<"),
        "reserve-all-by-default": M("reserve_bytes = min(capacity_bytes, <|8 << 20|>)", "64 << 20"),
        "timeout-negative": M("if not <|0 <= timeout_s <= 1e6|>:", "timeout_s <= 1e6"),
        "timeout-nan": M(
            "if not <|0 <= timeout_s <= 1e6|>:", "not (timeout_s < 0 or timeout_s > 1e6)"
        ),
        "timeout-endless": M("if not 0 <= timeout_s<| <= 1e6|>:", ""),
        "timeout-zero-refused": M("if not 0 <|<=|> timeout_s <= 1e6:", "<"),
        "eager-by-default": M('eager=issue <|==|> "eager"', "!="),
        "copy-engine-by-default": M('copy_engine=transfer <|==|> "copy_engine"', "!="),
        "wide-by-default": M('narrow_wire=wire <|==|> "auto"', "!="),
        "any-policy": M(
            '_require("at_capacity", at_capacity, ("wait", "fallback", "raise"))', "pass"
        ),
        "any-wire": M('_require("wire", wire, ("auto", "int64"))', "pass"),
        "stops-ignored": M("token_ids, starts, <|stops|>, vocab_size)\n        except", "None"),
        "exhausted-without-stats": M(
            "stops, vocab_size)\n        except PoolExhaustedError as error:\n            <|self._tell(error)|>",
            "pass",
        ),
        "exhausted-swallowed": M(
            "stops, vocab_size)\n        except PoolExhaustedError as error:\n            self._tell(error)\n            <|raise|>",
            "return self.stage([])",
        ),
        "small-without-stats": M(
            "values, dtypes)\n        except PoolExhaustedError as error:\n            <|self._tell(error)|>",
            "pass",
            tests=SMALL,
        ),
        "small-arrays-as-they-are": M(
            "v if isinstance(v, plain) else <|torch.as_tensor(v)|>", "v", tests=SMALL
        ),
        "trim-says-nothing": M("return <|self._pool.trim()|>", "self._pool.trim() and 0"),
        "with-does-not-close": M(
            "        traceback: TracebackType | None,\n    ) -> None:\n        <|self.close()|>",
            "pass",
        ),
        "closed-never": M("return <|self._pool.closed|>", "False"),
        "wire-always-narrow": M("torch.int32 if self._wire_bits == <|32|>", "64"),
        "resolve-anything": M(
            'if not isinstance(staged, StagedTokens):\n        raise TypeError(f"resolve takes',
            'if False:\n        raise TypeError(f"resolve takes',
        ),
        "mixed-anything": M(
            'if not isinstance(staged, StagedTokens):\n        raise TypeError(f"resolve_mixed takes',
            'if False:\n        raise TypeError(f"resolve_mixed takes',
        ),
        "mixed-out-ignored": M("return staged._resolve_mixed(relay, indices, <|out|>)", "None"),
        "device-index-of-cpu": M(
            '    if device.type == "cpu":\n        return torch.device("cpu")\n', ""
        ),
        "require-nothing": M("if value not in allowed:", "if False:"),
    },
    "pystage/_tensor_like.py": {
        "index-length": M("if not -size <= key <|<|> size:", "<="),
        "pinned-always": M("return <|self._is_pinned|>", "True"),
        "to-copy-argument": M('kwargs.pop("copy", None)', "pass"),
        "to-extra-arguments": M("args = args[: <|2|> if isinstance(args[0]", "3"),
        "to-device-arguments": M("(torch.dtype, Tensor)) else <|3|>]", "4"),
        "to-cpu-dtype-lost": M("return ids if dtype is None else <|ids.to(dtype)|>", "ids"),
        "to-int32-cuts": M("if dtype is torch.int32 and <|self._wire_bits == 64|>:", "False"),
        "to-any-device": M(
            "        if device != here:\n            self._wrong_device(device)\n        if dtype",
            "        if dtype",
        ),
        "to-int32-widened": M(
            "if dtype is None or dtype is torch.int64<| or dtype is torch.int32|>:", ""
        ),
        "to-other-dtype-lost": M(
            "return _there(self._resolve(None, torch.int64, False)<|.to(dtype)|>, non_blocking)", ""
        ),
        "to-blocking-inverted": M(
            "return self._resolve(None, dtype, <|not non_blocking|>)",
            "non_blocking",
            equivalent="on the host device both wait",
        ),
        "copy-into-any-device": M(
            '        if out.device.type != "cpu":\n            self._wrong_device(out.device)\n', ""
        ),
        "slice-backwards": M("return self._slice(start, <|max(start, stop)|>)", "stop"),
        "slice-any-step": M("if step == <|1|>:", "step"),
        "index-bool": M("elif isinstance(key, int)<| and not isinstance(key, bool)|>:", ""),
        "index-below": M("if not <|-size|> <= key < size:", "-size - 1"),
        "index-negative": M("at = <|key % size|>", "abs(key)"),
        "index-shares": M(
            "return self._slice(at, at + 1)<|._copy()|>[0]", ".cpu()", equivalent="the same copy"
        ),
        "set-item": M('        _read_only("__setitem__")', "        pass"),
        "array-dtype": M("return <|ids if dtype is None else ids.astype(dtype)|>", "ids"),
        "pickle": M(
            'raise TypeError("staged tokens belong to a pool of this process: pickle .cpu() instead")',
            "return (list, ())",
        ),
        "deepcopy-shares": M(
            "def __deepcopy__(self, memo: Any) -> Tensor:\n        return <|self.cpu()|>", "self"
        ),
        "attribute-of-none": M(
            'if name.startswith("__") or <|not hasattr(Tensor, name)|>:', "False"
        ),
        "attribute-in-place": M(
            '        if name.endswith("_"):\n            _read_only(name)\n', ""
        ),
        "attribute-of-storage": M("if name in _OF_STORAGE:", "if False:"),
        "function-in-place": M("if <|_is_in_place(name) or |>kwargs.get", ""),
        "function-inplace-argument": M('if _is_in_place(name)<| or kwargs.get("inplace")|>:', ""),
        "function-dunder-in-place": M(
            'not name.endswith("__"))<| or name in _MUTATING_DUNDERS|>', ""
        ),
        "function-named-self": M('args[:1] or [<|kwargs.get("self"), |>kwargs', ""),
        "function-named-input": M('kwargs.get("self")<|, kwargs.get("input")|>]', ""),
        "function-in-place-of-any": M("written += <|args[:1]|> or", "args"),
        "function-overload": M('getattr(func, "__name__", "")<|.partition(".")[0]|>', ""),
        "function-out": M('written = [<|kwargs.get("out")|>]', ""),
        "function-lists": M("for leaf in <|pytree.tree_leaves(written)|>)", "written"),
        "function-nested": M(
            "args, kwargs = pytree.tree_map_only(TensorLike, TensorLike.cpu, (args, kwargs))",
            "args = tuple(a.cpu() if isinstance(a, TensorLike) else a for a in args)",
        ),
        "function-kwargs": M("(args, kwargs))\n        return func(*args, **<|kwargs|>)", "{}"),
        "storage-data": M('"set_", <|"data", |>"share_memory_"', ""),
        "storage-numpy": M('["data_ptr", "storage", <|"untyped_storage", |>', ""),
        "in-place-and": M('_IN_PLACE = "add sub mul floordiv truediv mod pow <|and |>or', ""),
        "in-place-shift": M('xor lshift<| rshift|>"', ""),
        "op-device-lost": M(
            'return wire.to(<|device or "cpu"|>, dtype, non_blocking=True)',
            '"cpu"',
            equivalent="without a GPU there is one device",
        ),
        "op-dtype-lost": M(
            'return wire.to(device or "cpu", <|dtype|>, non_blocking=True)', "torch.int64"
        ),
        "operator-swapped": M(
            "return function(<|self.cpu(), *args|>)", "*reversed((self.cpu(), *args))"
        ),
        "operator-of-staged": M(
            "args = tuple(<|a.cpu() if isinstance(a, TensorLike) else a|> for a in args)",
            "a",
            equivalent="torch asks the second operand, and so it is a copy all the same",
        ),
        "hash-of-ids": M(
            "TensorLike.__hash__ = object.__hash__", "TensorLike.__hash__ = lambda self: 0"
        ),
    },
    "pystage/batch.py": {
        "prepare-any-device": M("if device.type != pool.device.type or (", "if ("),
        "prepare-keeps-ids": M(
            "    batch.input_ids = None\n    batch.prefill_input_ids_cpu = staged\n",
            "    batch.prefill_input_ids_cpu = staged\n",
        ),
        "prepare-lens-kept": M("        batch.extend_lens = lens\n", "        pass\n"),
        "prepare-holds-two": M(
            "        batch.prefill_input_ids_cpu = None\n    try:", "        pass\n    try:"
        ),
        "prepare-stays-mixed": M(
            "prefill_input_ids_cpu = staged\n    <|batch.mix_running_indices = None|>", "pass"
        ),
        "filter-takes-masks": M("if <|isinstance(index, bool)|> or getattr(index", "False"),
        "filter-takes-tensor-masks": M('getattr(index, "dtype", None) <|is torch.bool|>:', "is 0"),
        "slice-shares-lens": M("part.extend_lens = <|[*self.extend_lens]|>", "self.extend_lens"),
        "prepare-failed-loses": M(
            "            batch.prefill_input_ids_cpu = _staged_again(parts, held, pool)\n",
            "            pass\n",
        ),
        "prepare-lens-of-starts": M("lens = [int(stop) - <|int(start)|> for", "0 * int(start)"),
        "prepare-stops-ignored": M(
            "if stops is None else <|stops|>\n", "[len(ids) for ids in token_ids]\n"
        ),
        "prepare-vocab-ignored": M(
            "staged = pool.stage(token_ids, starts, stops, <|vocab_size|>)", "None"
        ),
        "prepare-interrupt-loses": M(
            "    except <|BaseException|>:\n        if restage:", "Exception"
        ),
        "mix-again": M(
            '    if indices is not None:\n        raise ValueError(f"{_name(batch)} has running',
            '    if False:\n        raise ValueError(f"{_name(batch)} has running',
        ),
        "mix-nothing": M(
            "    if not parts:\n        raise _nothing_staged(batch)\n    if not len",
            "    if not len",
        ),
        "mix-with-nobody": M("    if not len(mix_running_indices):\n        return\n", ""),
        "mix-keeps-ids": M(
            "batch.prefill_input_ids_cpu = _staging(parts)\n    <|batch.input_ids = None|>", "pass"
        ),
        "mix-lens": M("*[1] * <|len(mix_running_indices)|>]", "1"),
        "resolve-again": M(
            "    if _is_resolved(batch):\n        return\n    parts, indices", "    parts, indices"
        ),
        "resolve-nothing": M(
            "if not parts and indices is None:\n        raise _nothing_staged(batch)\n    if indices",
            "if False:\n        raise _nothing_staged(batch)\n    if indices",
        ),
        "resolve-without-relay": M("if indices is not None and relay is None:", "if False:"),
        "resolve-keeps-staging": M(
            "indices, batch.device)\n    <|batch.prefill_input_ids_cpu = None|>", "pass"
        ),
        "resolve-keeps-indices": M(
            "batch.prefill_input_ids_cpu = None\n    <|batch.mix_running_indices = None|>\n\n\n_guard",
            "pass",
        ),
        "guard-does-not": M("    resolve_forward_inputs(batch, relay)\n    global", "    global"),
        "guard-counts-failures": M(
            "    resolve_forward_inputs(batch, relay)\n    global _forgotten  # noqa: PLW0603\n",
            "    global _forgotten  # noqa: PLW0603\n    _forgotten += 1\n    resolve_forward_inputs(batch, relay)\n    _forgotten -= 1\n",
        ),
        "guard-counts-all": M(
            "    if _is_resolved(batch):\n        return\n    resolve_forward",
            "    resolve_forward",
        ),
        "guard-does-not-count": M("_forgotten += 1", "pass"),
        "guard-warns-each-time": M("_warned.add(site)", "pass"),
        "guard-warns-never": M("    if first:\n", "    if False:\n"),
        "guard-of-another-line": M("stacklevel=stacklevel <|+ 1|>,", "+ 2"),
        "guard-names-another": M("caller = sys._getframe(<|stacklevel|>)", "stacklevel + 1"),
        "merge-nothing-staged": M(
            'if not ids and running is None and getattr(side, "extend_lens", None):', "if False:"
        ),
        "merge-one-resolved": M("resolved = <|all|>(_is_resolved(side)", "any"),
        "merge-never-resolved": M(
            "resolved = <|all(_is_resolved(side) or _is_empty(side) for side in (batch, other))|>",
            "False",
        ),
        "merge-empty-counts": M("all(_is_resolved(side)<| or _is_empty(side)|> for", ""),
        "merge-behind-running": M("if <|indices is not None|> and (more or len(", "False"),
        "merge-of-no-ids-behind-running": M(
            '(more<| or len(getattr(other, "extend_lens", ())) > decodes|>)', ""
        ),
        "empty-indices-count": M(
            "return <|None if indices is None or not len(indices) else |>indices", ""
        ),
        "merge-keeps-empty": M("parts, more = _not_empty(parts), <|_not_empty(more)|>", "more"),
        "merge-lens-only": M('for name in ("extend_lens"<|, "req_pool_indices"|>)', ","),
        "merge-indices-of-one": M("indices = torch.cat([indices<|, more_indices|>])", ""),
        "merge-indices-lost": M(
            "indices = <|more_indices if indices is None else indices|>", "indices"
        ),
        "merge-swapped": M(
            "_assign(batch, (<|*parts, *more|>), indices, resolved)", "*more, *parts"
        ),
        "filter-nothing-staged": M(
            "    if lens and not parts and indices is None:\n        raise _nothing_staged(batch)\n",
            "",
        ),
        "filter-lens-unchecked": M(
            "if prefill < 0 or sum(lens[:prefill]) != sum(map(len, parts)) or set(lens[prefill:]) - {1}:",
            "if False:",
        ),
        "filter-running-of-two": M("sum(map(len, parts))<| or set(lens[prefill:]) - {1}|>:", ""),
        "filter-negative": M("if not <|0 <= |>i < len(lens):", ""),
        "filter-beyond": M("if not 0 <= i <|<|> len(lens):", "<="),
        "filter-all-is-work": M("    if keep == list(range(len(lens))):\n        return\n", ""),
        "filter-running-first": M(
            "if keep != sorted(keep, key=lambda i: i >= prefill):", "if False:"
        ),
        "filter-order-lost": M("if keep != sorted(keep<|, key=lambda i: i >= prefill|>):", ""),
        "filter-first-running": M(
            "for i in keep if i <|<|> prefill])\n",
            "<=",
            equivalent="its range begins where the ids of the prefill end",
        ),
        "filter-indices-kept": M(
            "indices = _picked(indices, [i - prefill for i in keep if i >= prefill])", "pass"
        ),
        "filter-indices-unshifted": M(
            "_picked(indices, [i<| - prefill|> for", " - prefill + prefill"
        ),
        "filter-rows-kept": M("rows = _picked(rows, keep) if keep else rows[:0]", "pass"),
        "filter-no-rows": M("_picked(rows, keep)<| if keep else rows[:0]|>", ""),
        "filter-resolved-lost": M(
            "_assign(batch, kept, indices, <|_is_resolved(batch)|>)", "False"
        ),
        "filter-lens-kept": M("batch.extend_lens = [lens[i] for i in keep]", "pass"),
        "resolved-though-staged": M("        and batch.prefill_input_ids_cpu is None\n", ""),
        "resolved-though-mixed": M("        and batch.mix_running_indices is None\n", ""),
        "extend-from-relay": M("if indices is None and <|not _extends(batch)|>:", "True"),
        "decode-without-rows": M(
            'indices = getattr(batch, "req_pool_indices", None)\n    return ()',
            "pass\n    return ()",
        ),
        "extends-always": M("return mode is not None and <|bool(mode.is_extend())|>", "True"),
        "empty-parts-kept": M("return tuple(part for part in parts<| if len(part)|>)", ""),
        "empty-though-running": M(
            "return not _not_empty(parts)<| and _some(indices) is None|>", ""
        ),
        "idle-without-ids": M(
            "    if not parts and indices is None:\n        ids = torch.empty(0",
            "    if False:\n        ids = torch.empty(0",
        ),
        "assign-first-part": M(
            "ids = <|parts[0] if len(parts) == 1 else torch.cat(parts)|>", "parts[0]"
        ),
        "assign-keeps-staging": M(
            "batch.prefill_input_ids_cpu = <|None if ids is not None else _staging(parts)|>",
            "_staging(parts)",
        ),
        "assign-indices-lost": M(
            "batch.mix_running_indices = indices\n\n\ndef _staging", "pass\n\n\ndef _staging"
        ),
        "cut-negative-start": M("part[<|max(start - at, 0)|> : stop - at]", "start - at"),
        "cut-one-early": M("part[max(start - at, 0) : <|stop - at|>]", "stop - at - 1"),
        "cut-not-joined": M("if joined and joined[-1][1] == start:", "if False:"),
        "cut-joins-all": M("if joined<| and joined[-1][1] == start|>:", ""),
        "cut-joins-start": M("joined[-1] = (<|joined[-1][0]|>, stop)", "start"),
        "cut-empty-ranges": M("elif <|start < stop|>:", "True"),
        "cut-order": M("elif start <|<|> stop:", "<="),
        "cut-part-before": M("if start < at + len(part)<| and stop > at|>\n", ""),
        "cut-part-behind": M("if <|start < at + len(part) and |>stop > at\n", ""),
        "cut-part-begin": M("start <|<|> at + len(part)", "<="),
        "picked-first": M("if len(pieces) < <|2|>:", "3"),
        "picked-none": M("return pieces[0] if pieces else None", "return pieces[0]"),
        "joined-one": M("if a is None <|or|> b is None:", "and"),
        "again-never": M("return <|pool.stage([ids])|>", "ids"),
        "again-fails": M(
            "        except PystageError:\n            return ids\n",
            "        except ZeroDivisionError:\n            return ids\n",
        ),
        "one-part-without-running": M(
            "        if indices is None:\n            return resolve(parts[0])\n", ""
        ),
        "one-part-copied": M(
            "if len(parts) == 1 and isinstance(parts[0], StagedTokens):", "if False:"
        ),
        "parts-size": M("sum(map(len, parts)) + <|running|>, dtype", "0"),
        "parts-written-at-start": M("        at += len(part)\n    if indices", "    if indices"),
        "running-not-gathered": M("_C.gather(relay, indices, ids[at:])", "pass"),
        "running-at-start": M("_C.gather(relay, indices, <|ids[at:]|>)", "ids[: len(indices)]"),
        "part-not-into-out": M(
            "resolve(part, <|out=out|>)\n        return", "None)\n        return"
        ),
    },
    "pystage/ops.py": {
        "dtype-ignored": M(
            "torch.ops.pystage.transfer(wire, <|dtype=dtype|>, device=where)", "dtype=torch.int64"
        ),
        "fake-dtype": M("wire.new_empty(wire.shape, <|dtype=dtype|>,", "dtype=wire.dtype"),
        "fake-any-dtype": M("wire.dtype in _INTS, lambda", "True, lambda"),
        "fake-any-output": M(
            'dtype in _INTS, lambda: f"token ids must be int64 or int32, not {dtype}"',
            'True, lambda: f"token ids must be int64 or int32, not {dtype}"',
        ),
        "fake-any-shape": M("torch._check_value(wire.dim() == 1,", "torch._check_value(True,"),
        "fake-out-any-shape": M("out.shape == wire.shape,", "True,"),
    },
    "pystage/errors.py": {
        "position-is-request": M("self.position = position", "self.position = request"),
        "vocab-is-value": M("self.vocab_size = vocab_size", "self.vocab_size = value"),
        "no-value-error": M("class TokenRangeError(PystageError<|, ValueError|>):", ""),
        "message-of-all": M("return str(self.args[0])", "return str(self.args)"),
        "too-large-apart": M("class RequestTooLargeError(<|PoolExhaustedError|>):", "PystageError"),
    },
    "pystage/testing.py": {
        "hold-not-released": M(
            "hold.release()",
            "pass",
            equivalent="the hold ends with its last reference, right after",
        ),
        "hold-released-on-success-only": M(
            "    try:\n        yield\n    finally:\n        hold.release()",
            "    yield\n    hold.release()",
            equivalent="the hold ends with its last reference, right after",
        ),
        "stream-not-restored": M("_C.set_host_stream(previous)", "pass"),
        "stream-restored-on-success-only": M(
            "    try:\n        yield\n    finally:\n        _C.set_host_stream(previous)",
            "    yield\n    _C.set_host_stream(previous)",
        ),
        "synchronize-does-not": M("_C.synchronize(pool._pool)", "pass"),
    },
    "pystage/trace.py": {
        "history-of-all": M("if not 0 <= self.history <|<|> self.length:", "<="),
        "length-zero": M("if not <|1|> <= self.length", "0"),
        "batch-tokens": M("return sum(self.stops)<| - sum(self.starts)|>", ""),
        "vocabulary-of-none": M("if length < 0 <|or|> vocab_size < 1:", "and"),
        "chunk-overfull": M("stop = min(request.length, <|start + room|>)", "start + room + 1"),
        "requests-unbounded": M("if room == 0<| or len(batch.requests) == max_requests|>:", ""),
        "last-batch-lost": M("    if batch.requests:\n        yield batch", "    pass"),
        "history-prefilled": M("start = <|request.history|>\n", "0\n"),
        "room-not-used": M("room -= stop - start", "pass"),
        "ids-kept": M("                del live[index]", "                pass"),
        "cycle-not": M("length = lengths[index<| % len(lengths)|>]", ""),
        "blocks-too-many": M("if blocks * MOONCAKE_BLOCK_TOKENS <|>=|> length", ">"),
        "history-last-token": M(
            "max(0, min(blocks * MOONCAKE_BLOCK_TOKENS, <|length - 1|>))", "length"
        ),
        "budget-of-nothing": M("if chunk_tokens < 1 <|or|> max_requests < 1:", "and"),
        "blocks-not-remembered": M("    seen.update(ids)\n", ""),
        "blocks-all-reused": M("if block not in seen), <|len(ids)|>)", "0"),
        "blocks-anywhere": M(
            "reused = <|next((at for at, block in enumerate(ids) if block not in seen), len(ids))|>",
            "sum(block in seen for block in ids)",
        ),
        "blocks-of-any-size": M("if len(ids) > -(-length // MOONCAKE_BLOCK_TOKENS):", "if False:"),
        "true-is-a-count": M(
            "if <|type(value) is not int|> or value < 0:", "not isinstance(value, int)"
        ),
        "negative-count": M("if type(value) is not int<| or value < 0|>:", ""),
        "json-line-number": M("enumerate(lines, <|1|>):", "0"),
        "row-too-long": M("if <|None in row or |>None in row.values():", ""),
        "row-too-short": M("if None in row<| or None in row.values()|>:", ""),
        "no-requests": M("    if not requests:\n        raise", "    if False:\n        raise"),
        "line-number": M("{name}, line {reader.<|line_num|>}: {error}", "line_num - 1"),
    },
    "pystage/cli/replay.py": {
        "difference-passed": M("if not torch.equal(ours, plain):", "if False:"),
        "difference-position": M("return request, <|start + at|>", "at"),
        "difference-request": M("at -= stop - start", "at -= stop"),
        "warm-up-counted": M("if number == work.warm_up_batches:", "if number == 0:"),
        "both-is-stage": M(
            "both=_host_time(<|np.add(paths.stage_ns, paths.resolve_ns)|>)", "paths.stage_ns"
        ),
        "wire-of-all": M("wire_bytes=now.wire_bytes<| - warm.wire_bytes|>,", ""),
        "allocations-of-all": M(
            "allocations_after_warm_up=now.allocations<| - warm.allocations|>,", ""
        ),
        "p99-is-max": M("np.percentile(microseconds, [50, <|99|>])", "100"),
    },
    "pystage/_extension.py": {
        "any-folder-is-source": M("if <|not is_source or |>any", ""),
        "built-is-not-looked-at": M('is_source<| or any(package.glob("_C*.so"))|>:', ""),
        "another-without-extension": M(
            'for package in packages<| if any(package.glob("_C*.so"))|>)', ""
        ),
    },
    "pystage/cli/__init__.py": {
        "errors-escape": M(
            "except (CannotRunError, <|trace.TraceError, |>PystageError, OSError)", ""
        ),
        "interrupt-escapes": M("except KeyboardInterrupt:", "except ZeroDivisionError:"),
        "reader-left-escapes": M("except BrokenPipeError:", "except ZeroDivisionError:"),
        "not-flushed": M("        sys.stdout.flush()", "        pass"),
        "other-modules-missing": M('if error.name not in ("typer", "rich"):', "if True:"),
    },
    "pystage/cli/output.py": {
        "failed-passes": M("EXIT_FAILED = <|1|>", "0"),
        "cannot-run-passes": M("EXIT_CANNOT_RUN = <|2|>", "0"),
        "interrupted-passes": M("EXIT_INTERRUPTED = <|130|>", "0"),
        "any-device": M(
            'if device is None or device.type not in ("cpu", "cuda"):', "if device is None:"
        ),
        "missing-device": M("if not count:", "if False:"),
        "index-past-end": M("if (device.index or 0) <|>=|> count:", ">"),
        "old-file-kept": M("file.truncate(0)", "pass"),
        "old-file-removed": M("if <|new and |>not written:", ""),
        "empty-file-left": M("            os.unlink(path)", "            pass"),
        "devices-truncated": M("if stat.S_ISREG(os.fstat(file.fileno()).st_mode):", "if True:"),
        "nan-written": M(
            "None if isinstance(value, float) and not <|math.isfinite(value)|>", "True"
        ),
        "lists-not-entered": M("[_finite(item) for item in value]", "value"),
        "wider-than-the-terminal": M("widths[widths.index(max(widths))] -= 1", "break"),
        "numbers-at-the-left": M("part.rjust(w) if <|table.numbers and at|> else", "False"),
    },
    "pystage/cli/demo.py": {
        "json-not-written": M("write(_figures(report, chunks, options))", "pass"),
        "plan-in-spite": M(
            "chunks = _size_chunks(device, options.issue, tell)<| if options.profile else None|>",
            "",
        ),
        "ratio-inverted": M("return <|plain.p50_us / both.p50_us|>,", "both.p50_us / plain.p50_us"),
        "ratio-of-a-stand-in": M('if report.device == "cpu":\n        return None', "pass"),
        "tables-among-json": M('_nothing if options.json == "-" else <|show|>', "_nothing"),
        "json-among-tables": M('tell = <|_nothing if options.json == "-" else |>show', ""),
        "profiler-logs": M("logger.setLevel(logging.ERROR)", "pass"),
        "line-for-the-bar": M("disable=<|not console.is_terminal|>,", "False"),
        "bars-stay": M("transient=<|True|>,", "False"),
        "worse-plan-praised": M("if planned <|<|> fixed:", ">"),
    },
    "pystage/cli/chunks.py": {
        "unusable-plan-run": M(
            "planned = run(sizer.plan(size.context))<| if model.report.usable else None|>", ""
        ),
    },
    "pystage/cli/doctor.py": {
        "wrong-passes": M("return <|EXIT_FAILED if wrong else 0|>", "0"),
        "advice-is-wrong": M('return "note" if self.advice else "ok"', 'return "ok"'),
        "any-maker": M('.read_text().strip() <|==|> "0x10de"', "!="),
        "any-function": M(
            '\n            and (device / "class").read_text().startswith("0x03")', ""
        ),
        "idle-gpu-always": M("idle_gpu = <|device is None and |>_has", ""),
        "hidden-is-wrong": M("if hidden is not None:", "if False:"),
        "cpu-torch-is-wrong": M("if torch.version.cuda is None:", "if False:"),
        "driver-always-needed": M("needed = <|idle_gpu and |>torch", ""),
        "build-needs-no-gpu": M(
            "not info.cuda<| and (torch.cuda.is_available() or _has_nvidia_gpu())|>:", ""
        ),
        "errors-are-well": M("checks.append(Check(name, <|False|>, str(error)", "True"),
        "rebuilt-torch": M("if info.torch_built != info.torch:", "if False:"),
        "self-test-compares-not": M("if not torch.equal(ids.cpu(), expected[at]):", "if False:"),
        "self-test-allocations": M(
            'ok = <|not figures["allocations_after_warm_up"] and |>not stats.fallbacks', ""
        ),
        "self-test-fallbacks": M(
            'ok = not figures["allocations_after_warm_up"]<| and not stats.fallbacks|>', ""
        ),
        "narrow-link": M("int(width) <|<|> int(width_max)", "<="),
        "versions-as-text": M("return tuple(map(<|int|>, version.split", "str"),
        "plugin-failed": M("if done.returncode != 0:", "if False:"),
        "plugin-off-is-well": M('ok = <|bool(status["active"]) and |>not status["broken"]', ""),
        "plugin-broken-is-well": M('ok = bool(status["active"])<| and not status["broken"]|>', ""),
        "chosen-off-is-wrong": M("if <|ok or chosen_off|>:", "ok"),
    },
}
