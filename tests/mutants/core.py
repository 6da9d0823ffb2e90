"""Faults in csrc.

This is one file because it is a single table, with an entry for each fault, and no other code.
"""

from __future__ import annotations

from . import M, Mutants

FIGURES = "pytest tests/test_figures.py"
MUTANTS: Mutants = {
    "csrc/small_tensors.cpp": {
        "delivered-twice": M(
            "if (<|delivered_ == used_|>) return false;",
            "false",
            equivalent="a delivery of nothing writes nothing",
        ),
        "from-the-start": M("launch_values(<|values_.data() + from|>, bytes", "values_.data()"),
        "to-the-start": M(
            "<|static_cast<char*>(memory_.mutable_data_ptr()) + from|>, 0,",
            "static_cast<char*>(memory_.mutable_data_ptr())",
        ),
        "room-for-any": M("if (<|!has_room(bytes)|>)", "false", equivalent="callers ask first"),
        "not-aligned": M("used_ += <|room(bytes)|>;", "bytes"),
        "no-check-of-the-pool": M("pool_->core().check_usable();", ";"),
        "fallback-not-counted": M("++pool_->core().counters().fallbacks;", ";"),
        "not-waited-for": M("backend_.synchronize(resolved.fence);", ";"),
        "looks-delivered": M(
            "if (<|device_.is_cpu() && !values_.empty()|>)",
            "false",
            equivalent="new memory seldom has the values by chance: then a test would not see",
        ),
    },
    "csrc/python_small_tensors.cpp": {
        "int-overflow": M("if (<|overflow|> || number <", "false"),
        "int-too-small": M("<|number < std::numeric_limits<Int>::min()|> ||", "false"),
        "int-too-large": M("<|number > std::numeric_limits<Int>::max()|>)", "false"),
        "float-overflow": M("<|std::fabs(number) > FLT_MAX|>", "false"),
        "infinity-refused": M("if (<|std::isfinite(number)|> &&", "true"),
        "any-bool": M("if (<|number != 0 && number != 1|>)", "false"),
        "below-zero-unsigned": M("<|!from.lt(0).any().item().toBool()|>", "true"),
        "sign-bit-as-a-sign": M("<|!to.lt(0).any().item().toBool()|>", "true"),
        "tensor-overflows-float": M("<|from.abs().gt(FLT_MAX)|>", "from.isnan()"),
        "list-shrinks": M("if (<|i >= PySequence_Fast_GET_SIZE(list)|>)", "false"),
        "narrow-without-look": M("TORCH_CHECK_VALUE(<|holds(one.tensor, tensor)|>,", "true"),
    },
    "csrc/python_rows.cpp": {
        "rows-anywhere": M("<|0 <= row && row < table.size(0)|> &&", "true"),
        "rows-too-long": M("<|length <= table.size(1) - prefix_count|> &&", "true"),
        "rows-beyond-the-rest": M("<|length <= rest.numel() - rest_at|>;", "true"),
        "rows-of-short-prefix": M(
            "prefix_count <= std::min(<|prefix.numel()|>, table.size(1)) &&", "table.size(1)"
        ),
        "rest-not-counted": M("rest_at += length;", ";"),
        "too-many-rows": M("if (<|count > backend.most_rows()|> ||", "false"),
    },
    "csrc/python_parcel.cpp": {
        "any-code": M("if (<|caller == Caller::kUnknown|>) return original();", "false"),
        "any-group": M("!arguments.dtype || <|caller != Caller::kThisGroup|>)", "false"),
        "any-thread": M("if (<|self->thread != std::this_thread::get_id()|> ||", "false"),
        "no-give-up": M("<|give_up(self);|>\n      return original();", ";"),
        "no-give-up-of-to": M("if (<|is_ours(self)|>) give_up(self);", "false"),
        "never-ends": M("<|++self->group == self->deliver_at.size()|>;", "++self->group == 99"),
        "never-delivers": M("if (<|self->made != self->deliver_at[self->group]|>) return;", "true"),
        "to-stays": M("if (<|PyObject_SetAttr(host, g_to, nullptr) != 0|>)", "false"),
        "minus-one-of-anything": M(
            "PyLong_CheckExact(value) && <|PyLong_AsLongAndOverflow(value, &overflow) == -1|>",
            "true",
        ),
    },
    "csrc/gather.cpp": {
        "low-ids-unchecked": M("bad |= <|(v - lo) | (hi - v)|>;", "hi - v"),
        "high-ids-unchecked": M("bad |= <|(v - lo) | (hi - v)|>;", "v - lo"),
        "top-id-refused": M("bad |= <|(v - lo) | (hi - v)|>;", "(v - lo) | (hi - 1 - v)"),
        "one-too-many": M("bad |= <|(v - lo) | (hi - v)|>;", "(v - lo) | (hi + 1 - v)"),
        "clean-is-bad": M(
            "return <|static_cast<int64_t>(bad) >= 0|>;", "static_cast<int64_t>(bad) > 0"
        ),
        "blocks-unchecked": M(
            "bad |= copy_block<In, Out, kChecked>(src + at, dst + at, kBlock, lo, hi);",
            "copy_block<In, Out, kChecked>(src + at, dst + at, kBlock, lo, hi);",
        ),
        "rest-lost": M("dst + run * kRuns, <|count - run * kRuns|>,", "size_t{0}"),
        "blocks-one-more": M(
            "for (size_t at = i; <|at < run * kRuns|>; at += run)", "at <= run * kRuns"
        ),
        "run-too-long": M(
            "const size_t run = <|count / kRuns / kBlock * kBlock|>;",
            "(count / kRuns / kBlock + (count > 4 * kRuns * kBlock)) * kBlock",
        ),
        "never-prefetches": M(
            "if (<|i + kAhead + kBlock <= run|>)", "false", equivalent="only time"
        ),
        "strided-low-unchecked": M("!kChecked || (<|v >= bounds.lo|> &&", "true"),
        "strided-lowest-refused": M("!kChecked || (<|v >= bounds.lo|> &&", "v > bounds.lo"),
        "strided-high-unchecked": M("(v >= bounds.lo && <|v <= bounds.hi|>);", "true"),
        "strided-top-refused": M("(v >= bounds.lo && <|v <= bounds.hi|>);", "v < bounds.hi"),
        "strided-last-decides": M("ok = <|ok && in_range|>;", "in_range"),
        "stride-ignored": M("<|part.stride == static_cast<ptrdiff_t>(sizeof(In))|> &&", "true"),
        "unaligned-read": M(
            "<|reinterpret_cast<uintptr_t>(part.data) % alignof(In) == 0|>;",
            "true",
            equivalent="x86 reads it; UndefinedBehaviorSanitizer tells (make -C csrc/tests asan)",
        ),
        "error-stride-ignored": M(
            "<|static_cast<ptrdiff_t>(index) * part.stride|>;",
            "static_cast<ptrdiff_t>(index) * static_cast<ptrdiff_t>(size_of(part.type))",
        ),
        "error-width-ignored": M(
            "index) * part.stride;\n  if (<|part.type == IntType::kInt64|>)", "true"
        ),
        "error-low-skipped": M("if (<|v < bounds->lo|> || v > bounds->hi)", "false"),
        "error-high-skipped": M("if (v < bounds->lo || <|v > bounds->hi|>)", "false"),
        "error-of-the-part": M("Violation{parts[p].request, <|parts[p].first + i|>, v}", "i"),
        "error-counts-parts": M("Violation{<|parts[p].request|>, parts[p].first + i, v}", "p"),
        "mended-ids-pass": M(
            "return Violation{parts[p].request, parts[p].first, id_at(parts[p], 0)};",
            "return std::nullopt;",
        ),
        "mended-named-from-zero": M(
            "Violation{parts[p].request, <|parts[p].first|>, id_at(parts[p], 0)}", "size_t{0}"
        ),
        "parts-overlap": M("out += <|parts[p].count * size_of(wire)|>;", "parts[p].count * 4"),
        "convert-by-output-width": M(
            "<|static_cast<ptrdiff_t>(size_of(from))|>, from}",
            "static_cast<ptrdiff_t>(size_of(to))",
        ),
    },
    "csrc/host_device.cpp": {
        "fence-point-early": M("return <|recorded_.fetch_add(1) + 1|>;", "recorded_.fetch_add(1)"),
        "fence-goes-back": M("if (point > reached_) reached_ = point;", "reached_ = point;"),
        "fence-waiters-not-told": M("reached_ = point;\n    <|changed_.notify_all();|>", ""),
        "fence-done-early": M("return <|reached_ >= recorded_|>;", "reached_ + 1 >= recorded_"),
        "fence-wait-early": M(
            "changed_.wait(lock, [&] { return <|reached_ >= point|>; });", "reached_ + 1 >= point"
        ),
        "fence-wait-for-none": M("void wait() { <|wait(recorded_);|> }", "wait(0);"),
        "stream-last-in-first-out": M(
            "tasks_.push_back(std::move(task));", "tasks_.push_front(std::move(task));"
        ),
        "stream-not-told": M(
            "push_back(std::move(task));\n    }\n    <|changed_.notify_all();|>", ""
        ),
        "holds-do-not-nest": M("++holds_;", "holds_ = 1;"),
        "release-ends-all-holds": M("--holds_;", "holds_ = 0;"),
        "release-not-told": M("--holds_;\n    }\n    <|changed_.notify_all();|>", ""),
        "held-never": M(
            "std::lock_guard<std::mutex> guard(mutex_);\n    return <|holds_ > 0|>;", "false"
        ),
        "held-always": M(
            "std::lock_guard<std::mutex> guard(mutex_);\n    return <|holds_ > 0|>;", "true"
        ),
        "hold-ignored": M("if (<|holds_ > 0|> && std::chrono", "false"),
        "relay-read-wide": M(
            "return <|type == IntType::kInt32|> ? static_cast<const int32_t*>(data)[at]", "false"
        ),
        "relay-no-negatives": M("const bool ok = <|index >= -size|> &&", "index >= 0"),
        "relay-lowest-refused": M("const bool ok = <|index >= -size|> &&", "index > -size"),
        "relay-one-below": M("const bool ok = <|index >= -size|> &&", "index >= -size - 1"),
        "relay-one-too-many": M("&& <|index < size|>;", "index <= size"),
        "relay-last-bad-named": M("if (<|!ok && !tail.bad|>)", "!ok"),
        "relay-bad-not-told": M("if (<|!ok && !tail.bad|>)", "false"),
        "relay-bad-is-zero": M(": <|-1|>;\n", "0"),
        "tail-over-the-ids": M("static_cast<int64_t*>(t.dst) + <|t.count|>);", "0"),
        "tail-forgotten": M("if (<|t.tail|>) write_tail", "false"),
        "fence-reached-at-once": M(
            "static_cast<HostStream*>(stream)->put([f, point] { f->reach(point); });",
            "f->reach(point);",
        ),
        "query-always-done": M("return <|(*static_cast<FencePtr*>(fence))->done()|>;", "true"),
        "synchronize-does-not": M("<|(*static_cast<FencePtr*>(fence))->wait();|>", ""),
        "stream-does-not-wait": M("const uint64_t point = <|f->last()|>;", "uint64_t{0}"),
        "stream-waits-for-later-points": M(
            "put([f, point] { <|f->wait(point);|> });", "f->wait();"
        ),
        "streams-not-told-apart": M(
            "return <|reinterpret_cast<uintptr_t>(stream)|>;", "uintptr_t{1}"
        ),
        "stream-minus-one": M("if (<|number < kHostEagerStream|> ||", "false"),
        "stream-one-too-many": M("|| <|number >= kHostStreams|>)", "number > kHostStreams"),
        "current-stream-unchecked": M("<|device().stream(number);|>  // checks", ""),
        "device-kept-over-fork": M("[] { <|g_device.store(nullptr);|> }", ""),
    },
    "csrc/pool.h": {
        "rounds-out-of-reach": M(
            "return <|std::min(size_class(bytes) + guards_, options_.capacity_bytes)|>;",
            "size_class(bytes) + guards_",
        ),
        "fits-anything": M("return <|bytes <= options_.capacity_bytes - guards_|>;", "true"),
        "fits-one-page-less": M(
            "return <|bytes <= options_.capacity_bytes - guards_|>;",
            "bytes < options_.capacity_bytes - guards_",
        ),
        "tickets-equal": M("return <|tickets_.fetch_add(1)|>;", "tickets_.load()"),
        "reaps-on-every-call": M(
            "return <|in_flight_slots_ >= 16 || in_flight_bytes_ >= size_t{256} << 10|>;", "true"
        ),
        "reaps-late": M(
            "return <|in_flight_slots_ >= 16 || in_flight_bytes_ >= size_t{256} << 10|>;", "false"
        ),
        "reaps-at-17": M("return <|in_flight_slots_ >= 16|> ||", "in_flight_slots_ > 16"),
        "reaps-not-by-bytes": M("|| <|in_flight_bytes_ >= size_t{256} << 10|>;", "false"),
        "device-base-for-all": M("return base ? <|base + offset_|> : nullptr;", "base"),
        "host-base-for-all": M(
            "return <|slot_->segment->memory.host + offset_|>;", "slot_->segment->memory.host"
        ),
    },
    "csrc/pool.cpp": {
        "canaries-though-zero": M(
            'return value && *value && <|std::strcmp(value, "0") != 0|>;', "true"
        ),
        "not-poisoned": M(
            "if (<|guards_|>) std::memset(slot->segment->memory.host + slot->offset", "false"
        ),
        "poison-unseen": M(
            "<|first_other(segment.memory.host + offset, bytes, kFreeByte)|>)",
            "static_cast<const char*>(nullptr)",
        ),
        "canary-behind-unseen": M(
            "first_other(end, slot.bytes - kGuard - lease.bytes_, kGuardByte)",
            "static_cast<const char*>(nullptr)",
        ),
        "canary-in-front-unseen": M(
            "if (const char* at = <|first_other(start, kGuard, kGuardByte)|>)", "nullptr"
        ),
        "given-wakes-none": M(
            "free_.insert(std::move(slot->node));\n  <|slot_freed_.notify_all();|>\n}\n\nReader*",
            "",
        ),
        "failed-allocation-loses-slot": M(
            "reserved_bytes_ -= bytes;\n    <|put_by(slot);|>", "", equivalent="a few bytes stay"
        ),
        "failed-allocation-wakes-none": M("<|slot_freed_.notify_all();|>  // others may", ""),
        "grown-by-the-closed": M("<|finish_if_closed(lock);|>  // close() may", ""),
        "reap-error-is-none": M(
            "} catch (const std::exception&) {\n    <|return false;|>", "return true;"
        ),
        "reap-error-escapes": M(
            "} catch (const std::exception&) {\n    <|return false;|>", "throw;"
        ),
        "ticket-read-late": M("const uint64_t ticket = <|asked->ticket|>;", "tickets_.load()"),
        "spare-readers-lost": M("<|spare_readers_ = reader->next;|>", ""),
        "split-front-link": M("<|rest->before = slot;|>", ""),
        "spare-slots-lost": M("<|spare_slots_ = slot->after;|>", ""),
        "lease-not-made-keeps-slot": M("--leased_slots_;\n    <|give(slot);|>\n    throw;", ""),
        "poll-locked": M(
            "    lock_.unlock();\n    <|poll_();|>\n", "lock_.lock(); poll_(); lock_.unlock();"
        ),
        "poll-once": M("<|next_ = Clock::now() + kPollEvery;|>\n  }", ""),
        "poll-each-time": M("if (!poll_ || <|Clock::now() < next_|>) return;", "false"),
        "wait-is-deaf": M(
            "pause = std::min(pause * 2, std::chrono::microseconds(1000));\n    <|polling.look();|>\n  }\n}",
            "",
        ),
        "acquire-leaves-orphans": M(
            "check_process();\n  <|reap_orphans();|>\n  Lock lock(mutex_);\n  check_open();\n  if (!fits(bytes)) {\n    if",
            "",
        ),
        "quick-try-asks-device": M("if (<|!slot && ask_device|>) {", "!slot"),
        "quick-try-leaves-orphans": M("else if (<|have_orphans()|>)", "false"),
        "orphans-of-one": M(
            "<|next_orphan_ = g_orphans.load();|>\n    while",
            "",
            equivalent="the exchange loads it as well",
        ),
        "close-is-deaf": M(
            "pause = std::min(pause * 2, std::chrono::microseconds(1000));\n      <|polling.look();|>\n    }\n  }\n  reap_orphans",
            "",
        ),
        "close-waits-for-a-lost-device": M(
            "while (<|try_reap(lock) && in_flight_slots_ && Clock::now() < deadline|>) {",
            "(try_reap(lock), in_flight_slots_) && Clock::now() < deadline",
        ),
        "ticket-of-the-first-launch": M(
            "reader->ticket = <|pool_->draw_ticket()|>;",
            "is_new ? pool_->draw_ticket() : reader->ticket",
        ),
        "youngest-segment-first": M(
            "return <|segment_id(a) < segment_id(b)|>;", "segment_id(a) > segment_id(b)"
        ),
        "highest-address-first": M("return <|a->offset < b->offset|>;", "a->offset > b->offset"),
        "smallest-first-not": M("return <|a->bytes < b->bytes|>;", "a->bytes > b->bytes"),
        "class-one-power-up": M("while (<|power <= bytes / 2|>)", "power <= bytes"),
        "class-steps-double": M("std::max(kMinSlot, <|power / 8|>);", "power / 4"),
        "class-steps-any": M("const size_t step = <|std::max(kMinSlot, power / 8)|>;", "power / 8"),
        "class-wraps": M("if (<|bytes > SIZE_MAX - step|>)", "false"),
        "class-of-nothing": M("return round_up(<|std::max(bytes, kMinSlot)|>, step);", "bytes"),
        "round-up-one-more": M(
            "return <|(value + multiple - 1) / multiple * multiple|>;",
            "(value + multiple) / multiple * multiple",
        ),
        "fork-not-counted": M(
            "<|g_fork_generation.fetch_add(1, std::memory_order_relaxed);|>\n", ""
        ),
        "orphans-kept-over-fork": M("<|g_orphans.store(nullptr);|>  // the parent's", ""),
        "launch-in-a-child": M("<|pool_->check_process();|>\n  const uint64_t id", ""),
        "one-fence-for-all-streams": M("while (<|reader && reader->stream != id|>)", "false"),
        "lease-unlocked": M(
            "std::lock_guard<sync::Mutex> guard(<|mutex_|>);\n  Reader* reader = readers_;",
            "[]() -> sync::Mutex& { static thread_local sync::Mutex own; return own; }()",
        ),
        "failed-launch-loses-fence": M("<|pool_->put_by(reader);|>\n    }\n    throw;", ""),
        "earlier-readers-forgotten": M("<|reader->next = readers_;|>", ""),
        "reader-not-kept": M("reader->next = readers_;\n    <|readers_ = reader;|>", ""),
        "ticket-after-record": M(
            "reader->ticket = pool_->draw_ticket();\n  try {\n    pool_->device_.record(reader->fence, stream);\n  } catch (...) {\n    quarantined_ = true;\n    throw;\n  }",
            "try { pool_->device_.record(reader->fence, stream); } catch (...) { quarantined_ = true; throw; } reader->ticket = pool_->draw_ticket();",
        ),
        "not-quarantined": M("<|quarantined_ = true;|>\n    throw;", ""),
        "fence-not-recorded-again": M(
            "try {\n    <|pool_->device_.record(reader->fence, stream);|>",
            "if (is_new) pool_->device_.record(reader->fence, stream);",
        ),
        "wire-bytes-of-int64": M("transfer.count * <|size_of(transfer.wire)|>;", "8"),
        "all-by-kernel": M("++(<|transfer.kind == TransferKind::kKernel|> ?", "true"),
        "reserve-beyond-cap": M(
            "round_up(<|std::min(options.reserve_bytes, pool->options_.capacity_bytes)|>, kPage)",
            "options.reserve_bytes",
        ),
        "create-leaves-orphans": M("<|reap_orphans();|>\n  std::shared_ptr<Pool> pool(new", ""),
        "capacity-not-paged": M(
            "options_.capacity_bytes = <|options.capacity_bytes / kPage * kPage|>;",
            "options.capacity_bytes",
        ),
        "capacity-of-nothing": M("if (<|!options_.capacity_bytes|>)", "false"),
        "fences-leak": M(
            "for (const Reader& reader : readers_) device_.destroy_fence(reader.fence);", ";"
        ),
        "quarantine-freed": M("if (<|!quarantined|>) device_.free", "true"),
        "nothing-freed-at-end": M(
            "if (<|!quarantined|>) device_.free",
            "false",
            equivalent="all that is not quarantined is freed before the pool ends",
        ),
        "child-unchecked": M("void Pool::check_process() const {\n  if (<|forked()|>)", "false"),
        "usable-though-closed": M("<|check_open();|>\n}", ""),
        "usable-in-a-child": M("void Pool::check_usable() const {\n  <|check_process();|>", ""),
        "closed-in-a-child": M("bool Pool::closed() const {\n  <|check_process();|>", ""),
        "never-closed": M("void Pool::check_open() const {\n  if (<|closed_|>)", "false"),
        "drop-in-a-child": M("<|if (pool->forked()) return abandon(std::move(pool));|>", ""),
        "drop-leaves-open": M("<|pool->closed_ = true;|>", ""),
        "drop-frees-nothing": M("<|pool->finish_if_closed(lock);|>\n  lock.unlock", ""),
        "close-in-a-child": M(
            "void Pool::close(const Poll& poll) {\n  <|if (forked()) return;|>", ""
        ),
        "close-leaves-open": M("Lock lock(mutex_);\n    <|closed_ = true;|>", ""),
        "close-wakes-none": M("closed_ = true;\n    <|slot_freed_.notify_all();|>", ""),
        "close-waits-out": M(
            "while (<|try_reap(lock) && in_flight_slots_ && Clock::now() < deadline|>) {",
            "try_reap(lock) && Clock::now() < deadline",
        ),
        "close-does-not-wait": M(
            "while (<|try_reap(lock) && in_flight_slots_ && Clock::now() < deadline|>) {",
            "try_reap(lock) && false",
        ),
        "close-waits-for-ever": M(
            "while (<|try_reap(lock) && in_flight_slots_ && Clock::now() < deadline|>) {",
            "try_reap(lock) && in_flight_slots_",
        ),
        "close-frees-nothing": M("if (<|lock.owns_lock()|>) pool.finish_if_closed(lock);", "false"),
        "close-leaves-orphans": M("      polling.look();\n    }\n  }\n  <|reap_orphans();|>", ""),
        "open-pools-freed": M("if (<|!closed_|>) return;", "false"),
        "no-orphans": M("if (<|in_flight_slots_ && !orphaned_|>) {", "false"),
        "orphan-listed-twice": M("if (in_flight_slots_ && <|!orphaned_|>) {", "true"),
        "orphan-not-kept": M("<|self_ = shared_from_this();|>", ""),
        "orphans-never-reaped": M(
            "bool Pool::have_orphans() { return <|g_orphans.load(std::memory_order_relaxed) != nullptr|>; }",
            "false",
        ),
        "orphan-not-put-back": M("<|pool->orphaned_ = false;|>", ""),
        "orphan-not-finished": M("<|pool->finish_if_closed(lock);|>  // puts", ""),
        "orphan-not-looked-at": M("<|pool->try_reap(lock);|>\n    pool->orphaned_", ""),
        "try-in-a-child": M(
            "std::shared_ptr<Lease> Pool::try_acquire(size_t bytes, bool ask_device) {\n  <|check_process();|>",
            "",
        ),
        "try-leaves-orphans": M("if (ask_device)\n    <|reap_orphans();|>\n  else", ""),
        "try-though-closed": M(
            "    return nullptr;\n  Lock lock(mutex_);\n  <|check_open();|>\n  if (!fits", ""
        ),
        "try-does-not-reap": M("if (!slot && ask_device) {\n    <|reap(lock);|>", ""),
        "acquire-in-a-child": M(
            "std::shared_ptr<Lease> Pool::acquire(size_t bytes, const Poll& poll) {\n  <|check_process();|>",
            "",
        ),
        "too-large-does-not-fall-back": M(
            "if (<|options_.at_capacity == AtCapacity::kFallback|>) return nullptr;\n    ++exhausted_;",
            "false",
        ),
        "too-large-not-counted": M("<|++exhausted_;|>\n    throw RequestTooLargeError", ""),
        "wait-not-timed": M("if (<|waiting|>) total += seconds();", "false"),
        "all-calls-timed": M("if (<|waiting|>) total += seconds();", "true"),
        "closed-while-waiting": M(
            "reap(lock);\n    <|check_open();|>\n    if (Slot* slot = take", ""
        ),
        "acquire-does-not-reap": M("for (;;) {\n    <|reap(lock);|>", ""),
        "never-grows": M("if (<|grow(lock, need)|>) continue;", "false"),
        "always-waits": M(
            "const double patience = <|options_.at_capacity == AtCapacity::kWait|> ?", "true"
        ),
        "never-times-out": M("const bool give_up = <|so_far >= patience|>;", "!patience"),
        "raise-beside-a-look": M("if (give_up && (<|reaping_|> || allocating_", "false"),
        "raise-beside-growth": M("(reaping_ || <|allocating_|> || freeing_)", "false"),
        "raise-beside-a-free": M("allocating_ || <|freeing_|>)", "false"),
        "waits-for-a-stuck-call": M("&& <|so_far < patience + kSettle|>) {", "true"),
        "full-does-not-fall-back": M(
            "if (<|options_.at_capacity == AtCapacity::kFallback|>) return nullptr;\n    if (give_up)",
            "false",
        ),
        "waits-counted-each-time": M("if (<|!wait.waiting|>) ++waits_;", "true"),
        "waits-not-counted": M("if (<|!wait.waiting|>) ++waits_;", "false"),
        "wait-told-though-none": M(
            "raise_exhausted(bytes, <|wait.waiting ? so_far : 0|>);", "so_far"
        ),
        "slot-not-split": M("Slot* rest = <|slot->bytes > bytes|> ? spare_slot()", "false"),
        "split-overlaps": M("rest->offset = <|slot->offset + bytes|>;", "slot->offset"),
        "split-loses-memory": M(
            "rest->bytes = <|slot->bytes - bytes|>;", "slot->bytes - bytes - 64"
        ),
        "split-back-link": M("<|if (rest->after) rest->after->before = rest;|>", ""),
        "split-rest-unlinked": M("<|slot->after = rest;|>", ""),
        "segment-not-in-use": M("<|++slot->segment->used_slots;|>", ""),
        "use-not-counted": M("<|in_use_bytes_ += bytes;|>", ""),
        "leases-not-counted": M("<|++leased_slots_;|>", ""),
        "high-water-follows": M(
            "high_water_bytes_ = <|std::max(high_water_bytes_, in_use_bytes_)|>;", "in_use_bytes_"
        ),
        "use-not-given-back": M("<|in_use_bytes_ -= slot->bytes;|>", ""),
        "segment-always-in-use": M("<|--slot->segment->used_slots;|>", ""),
        "merge-back-link": M("<|if (left->after) left->after->before = left;|>", ""),
        "merge-size": M("<|left->bytes += right->bytes;|>", ""),
        "no-merge-after": M(
            "if (Slot* after = slot->after; <|after && after->state == Slot::State::kFree|>)",
            "false",
        ),
        "no-merge-before": M(
            "if (Slot* before = slot->before; <|before && before->state == Slot::State::kFree|>)",
            "false",
        ),
        "merge-with-leased": M(
            "before && <|before->state == Slot::State::kFree|>)",
            "before->state != Slot::State::kLeased",
        ),
        "freed-wakes-none": M("<|slot_freed_.notify_all();|>  // there is room", ""),
        "lease-ends-in-a-child": M("<|if (forked()) return abandon(std::move(lease.pool_));|>", ""),
        "quarantine-ignored": M("if (<|lease.quarantined_|>) {", "false"),
        "slot-free-while-read": M("} else if (<|!lease.readers_|>) {", "true"),
        "first-reader-frees": M("<|++slot->pending;|>", "slot->pending = 1;"),
        "queue-tail-stays": M("<|queue->tail = reader;|>", ""),
        "queues-of-all-streams": M("return <|q.stream == reader->stream|>; });", "true"),
        "a-queue-each": M("return <|q.stream == reader->stream|>; });", "false"),
        "in-flight-not-weighed": M("<|in_flight_bytes_ += slot->bytes;|>", ""),
        "in-flight-stays-weighed": M("<|in_flight_bytes_ -= slot->bytes;|>", ""),
        "lease-end-leaves-closed": M("<|finish_if_closed(lock);|>\n}\n\n// Takes a reader", ""),
        "retire-each-frees": M("<|if (--slot->pending > 0) return;|>", "--slot->pending;"),
        "fences-not-reused": M("Slot* slot = reader->slot;\n  <|put_by(reader);|>", ""),
        "two-reap": M("if (<|reaping_|> || !in_flight_slots_) return;", "false"),
        "reap-undone-fences": M("if (<|!done|>) {", "false"),
        "stuck-head-asked-again": M("if (<|asked == queues_[q].head|>) break;", "false"),
        "stuck-tail-ends-look": M("if (<|asked == queues_[q].head|>) break;", "true"),
        "vouch-equal-tickets": M(
            "(reader = queues_[q].head) && <|reader->ticket <= ticket|>;)",
            "reader->ticket < ticket",
        ),
        "vouch-for-all": M("(reader = queues_[q].head) && <|reader->ticket <= ticket|>;)", "true"),
        "vouch-for-none": M(
            "(reader = queues_[q].head) && <|reader->ticket <= ticket|>;)", "reader == asked"
        ),
        "asks-oldest-first": M("Reader* asked = <|newest|> ?", "false"),
        "one-queue-only": M(
            "for (size_t q = 0; <|q < queues_.size()|>;)", "q < 1 && q < queues_.size()"
        ),
        "idle-queue-not-swapped": M("<|queues_[q] = queues_.back();|>", ""),
        "reap-locked": M(
            "lock.unlock();\n      const bool done = device_.query(<|asked->fence|>);",
            "queues_[q].head->fence",
        ),
        "grow-not-paged": M(
            "<|need = round_up(need, kPage);|>",
            "",
            equivalent="room, step and every class above it are whole pages",
        ),
        "grow-beyond-cap": M("if (<|room < need|>) return false;\n  allocate", "false"),
        "grow-step-beyond-cap": M(
            "allocate_segment(lock, <|std::min(room, std::max(need, kGrow))|>);",
            "std::max(need, kGrow)",
        ),
        "grow-no-step": M(
            "allocate_segment(lock, std::min(room, <|std::max(need, kGrow)|>));", "need"
        ),
        "grow-keeps-idle": M("&& <|!release_idle_for(lock, need)|>)", "true"),
        "reserved-after-allocation": M("<|reserved_bytes_ += bytes;|>", ""),
        "failed-allocation-counts": M("<|reserved_bytes_ -= bytes;|>\n    put_by(slot);", ""),
        "allocation-locked": M("<|++allocations_;|>", ""),
        "pageable-not-counted": M(
            "if (<|segment.memory.fallback|>) pageable_bytes_ += bytes;", "false"
        ),
        "pageable-not-told": M("if (<|!why.empty()|>) why_pageable_.swap(why);", "false"),
        "segment-ids-equal": M("segment.id = <|next_segment_id_++|>;", "next_segment_id_"),
        "grown-wakes-none": M("<|slot_freed_.notify_all();|>\n}\n\n// Other sizes", ""),
        "idle-counts-used": M("if (<|!segment.used_slots|>) room", "true"),
        "idle-freed-in-vain": M("if (<|room < need|>) return false;\n  free_segments", "false"),
        "used-segments-freed": M("if (<|segment->used_slots|>) continue;", "false"),
        "freed-stays-reserved": M("<|reserved_bytes_ -= bytes;|>\n  slot_freed_", ""),
        "pageable-stays": M(
            "if (<|segment.memory.fallback|>) pageable_bytes_ -= segment.memory.bytes;", "false"
        ),
        "frees-not-counted": M("<|++frees_;|>", ""),
        "trim-in-a-child": M("size_t Pool::trim() {\n  <|check_process();|>", ""),
        "trim-leaves-orphans": M(
            "size_t Pool::trim() {\n  check_process();\n  <|reap_orphans();|>", ""
        ),
        "trim-does-not-reap": M("Lock lock(mutex_);\n  <|reap(lock);|>\n  return free", ""),
        "trim-says-nothing": M("<|bytes += segment.memory.bytes;|>", ""),
        "exhausted-not-counted": M(
            "void Pool::raise_exhausted(size_t bytes, double waited_s) {\n  <|++exhausted_;|>", ""
        ),
        "stats-in-a-child": M("PoolStats Pool::stats() {\n  <|check_process();|>", ""),
        "stats-do-not-reap": M("<|try_reap(lock);|>\n  s.capacity_bytes", ""),
        "stats-frees": M("s.frees = <|frees_|>;", "allocations_"),
        "stats-high-water": M("s.high_water_bytes = <|high_water_bytes_|>;", "in_use_bytes_"),
        "why-in-a-child": M("std::string Pool::why_pageable() const {\n  <|check_process();|>", ""),
    },
    "csrc/requests.h": {
        "buffers-stay-exported": M("for (Py_buffer& view : views_) PyBuffer_Release(&view);", ";"),
    },
    "csrc/requests.cpp": {
        "tensor-without-memory": M("<|check_memory(tensor, name);|>", ""),
        "negated-tensor": M("tensor = tensor.resolve_neg();", ";"),
        "two-digits-compact": M(
            "if (<|digits < -1 || digits > 1|>)",
            "digits < -2 || digits > 2",
        ),
        "compact-unsigned": M("*value = <|digits|> *", "(digits != 0)"),
        "errors-of-index-hidden": M(
            "if (<|!PyErr_ExceptionMatches(PyExc_TypeError)|>) throw py::error_already_set();\n    PyErr_Clear();\n    throw py::type_error(where(request",
            "false",
        ),
        "too-deep-not-told": M('(<|PySequence_Check(object)|> ? ": token_ids is', "false"),
        "int64-overflow-taken": M(
            "if (<|overflow|>) throw py::value_error(where(request, position)", "false"
        ),
        "item-one-past": M(
            "if (<|at >= static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence))|>)",
            "at > static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence))",
        ),
        "item-of-the-whole": M("const size_t at = <|part.first + index|>;", "index"),
        "item-not-held": M(
            "const auto keep = py::reinterpret_borrow<py::object>(<|object|>);", "Py_None"
        ),
        "item-position-of-part": M(
            "any_int(object, part.request, <|part.first + index|>)", "index"
        ),
        "quad-top-refused": M(
            "__builtin_prefetch(items[at + kAhead]);\n      if (!compact_int(items[at], &value)) return std::nullopt;\n      ok &= <|value >= bounds.lo && value <= bounds.hi|>;",
            "value >= bounds.lo && value < bounds.hi",
        ),
        "quad-lowest-refused": M(
            "__builtin_prefetch(items[at + kAhead]);\n      if (!compact_int(items[at], &value)) return std::nullopt;\n      ok &= <|value >= bounds.lo && value <= bounds.hi|>;",
            "value > bounds.lo && value <= bounds.hi",
        ),
        "quad-unchecked": M(
            "__builtin_prefetch(items[at + kAhead]);\n      if (!compact_int(items[at], &value)) return std::nullopt;\n      ok &= <|value >= bounds.lo && value <= bounds.hi|>;",
            "true",
        ),
        "rest-top-refused": M(
            "at < count; ++at) {\n    if (!compact_int(items[at], &value)) return std::nullopt;\n    ok &= <|value >= bounds.lo && value <= bounds.hi|>;",
            "value >= bounds.lo && value < bounds.hi",
        ),
        "rest-unchecked": M(
            "at < count; ++at) {\n    if (!compact_int(items[at], &value)) return std::nullopt;\n    ok &= <|value >= bounds.lo && value <= bounds.hi|>;",
            "true",
        ),
        "rest-lost": M("for (size_t at = run * kRuns; <|at < count|>; ++at)", "at + 1 < count"),
        "shrunk-list-read": M(
            "if (<|static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence)) >= part.first + part.count|>)",
            "true",
        ),
        "list-from-its-start": M("PySequence_Fast_ITEMS(sequence) + <|part.first|>;", "0"),
        "slow-unchecked": M(
            "read_id(part, i);\n    ok &= <|value >= bounds.lo && value <= bounds.hi|>;", "true"
        ),
        "slow-top-refused": M(
            "read_id(part, i);\n    ok &= <|value >= bounds.lo && value <= bounds.hi|>;",
            "value >= bounds.lo && value < bounds.hi",
        ),
        "format-prefix-refused": M("if (<|*f && kNative.find(*f) != kNative.npos|>) ++f;", "false"),
        "format-n-refused": M("&& <|*f != 'n'|>)", "true"),
        "format-q-refused": M("&& <|*f != 'q'|> &&", "true"),
        "format-unsigned-taken": M("if ((<|*f != 'i'|> &&", "*f != 'i' && *f != 'L'"),
        "list-not-held": M(
            "<|owners_.push_back(py::reinterpret_borrow<py::object>(object));|>", ""
        ),
        "lists-forgotten": M("<|has_lists_ = true;|>", ""),
        "tuples-refused": M("if (PyList_Check(object) || <|PyTuple_Check(object)|>) {", "false"),
        "narrow-not-first": M("<|part.first = start;|>", ""),
        "narrow-not-moved": M(
            "static_cast<const char*>(part.data) + <|static_cast<ptrdiff_t>(start) * part.stride|>;",
            "0",
        ),
        "tensor-of-any-device": M("if (<|!tensor.is_cpu()|>)", "false"),
        "tensor-of-any-dtype": M(
            "if (<|tensor.scalar_type() != at::kLong && tensor.scalar_type() != at::kInt|>)",
            "false",
        ),
        "tensor-of-any-shape": M("if (<|tensor.dim() != 1|>)", "tensor.dim() < 1"),
        "tensor-stride-in-ids": M(
            "static_cast<ptrdiff_t>(tensor.stride(0)) * <|static_cast<ptrdiff_t>(size_of(part.type))|>;",
            "8",
        ),
        "tensor-not-held": M("<|tensors_.push_back(std::move(tensor));|>", ""),
        "buffer-of-any-shape": M("if (<|view.ndim != 1|>)", "view.ndim < 1"),
        "buffer-stride-packed": M(
            "part.stride = <|view.strides ? view.strides[0] : view.itemsize|>;", "view.itemsize"
        ),
        "strings-are-sequences": M("if (<|PyUnicode_Check(object.ptr())|> ||", "false"),
        "mappings-are-sequences": M("|| <|PyDict_Check(object.ptr())|>)", "false"),
        "errors-of-iteration-hidden": M(
            "if (<|!PyErr_ExceptionMatches(PyExc_TypeError)|>) throw py::error_already_set();\n    PyErr_Clear();\n    throw py::type_error(std::string(name)",
            "false",
        ),
        "fewer-ends": M("if (<|size != count|>)", "size < count"),
        "shrunk-ends-read": M(
            "if (<|i >= static_cast<size_t>(PySequence_Fast_GET_SIZE(fast.ptr()))|>)\n      throw Error(std::string(name)",
            "false",
        ),
        "ends-below-zero": M("if (<|value < 0|>)", "value < -1"),
        "ends-wrap": M("if (<|value < 0|>)", "false"),
        "end-errors-lost": M(
            "if (<|value == -1 && PyErr_Occurred()|>) throw py::error_already_set();\n    if (value < 0)",
            "false",
        ),
    },
    "csrc/python.cpp": {
        "fallbacks-all-warned": M(
            'log(<|first ? "warning" : "debug"|>,', '"warning"', tests=FIGURES
        ),
        "growth-not-remembered": M(
            "  pool.logged_allocations = s.allocations;\n", "", tests=FIGURES
        ),
        "fallback-counts-as-closing": M(
            "pool.closing = true;",
            ";",
            equivalent="the GIL is held while memory is unpinned, and nothing else",
        ),
        "hold-current-only": M(
            "if (<|pool.options().eager|>) hold(pool, pool.eager_stream());", "false"
        ),
        "hold-never-released": M(
            "void release() { <|holds_.clear();|> }",
            "",
            equivalent="the hold ends with the generator of hold_transfers, right after",
        ),
        "synchronize-current-only": M("if (<|pool.options().eager|>) streams.push_back", "false"),
        "synchronize-does-not": M("<|device.synchronize(fence.get());|>", ""),
        "policy-wait-is-raise": M(
            'at_capacity == "wait"       ? <|AtCapacity::kWait|>', "AtCapacity::kRaise"
        ),
        "timeout-ignored": M("options.pool.timeout_s = <|timeout_s|>;", "1.0"),
        "reserve-ignored": M("options.pool.reserve_bytes = <|reserve_bytes|>;", "size_t{4096}"),
        "wire-always-narrow": M("options.narrow_wire = <|narrow_wire|>;", "true"),
        "copy-engine-ignored": M("options.copy_engine = <|copy_engine|>;", "false"),
        "too-large-is-exhausted": M(
            'raise_as(<|"RequestTooLargeError"|>, e);', '"PoolExhaustedError"'
        ),
        "closed-is-an-error": M('raise_as(<|"PoolClosedError"|>, e);', '"PystageError"'),
        "stats-waits": M("PYSTAGE_STAT(waits);", 'd["waits"] = s.fallbacks;'),
        "stats-quarantined": M(
            "PYSTAGE_STAT(in_flight_slots);", 'd["in_flight_slots"] = s.leased_slots;'
        ),
    },
    "csrc/python_stage.cpp": {
        "news-not-told": M("  pool.may_have_news = true;\n", "", tests=FIGURES),
        "told-each-time": M(
            "if (<|pool->may_have_news|>) tell_news",
            "true",
            equivalent="it looks again whether there is something to tell",
        ),
        "request-not-held": M(
            "const auto request = py::reinterpret_borrow<py::object>(\n        <|PySequence_Fast_GET_ITEM(requests.ptr(), static_cast<Py_ssize_t>(i))|>);",
            "PySequence_Fast_GET_ITEM(requests.ptr(), 0)",
        ),
        "vocab-zero": M("if (<|vocab_size && *vocab_size < 1|>)", "vocab_size && *vocab_size < 0"),
        "vocab-negative": M("if (<|vocab_size && *vocab_size < 1|>)", "false"),
        "one-below-int32": M(": <|kInt32Bounds|>;", "Bounds{kInt32Bounds.lo - 1, kInt32Bounds.hi}"),
        "one-above-int32": M(": <|kInt32Bounds|>;", "Bounds{kInt32Bounds.lo, kInt32Bounds.hi + 1}"),
        "lowest-int32-wide": M(
            ": <|kInt32Bounds|>;", "Bounds{kInt32Bounds.lo + 1, kInt32Bounds.hi}"
        ),
        "highest-int32-wide": M(
            ": <|kInt32Bounds|>;", "Bounds{kInt32Bounds.lo, kInt32Bounds.hi - 1}"
        ),
        "vocab-over-int32-cut": M(
            "std::min(*vocab_size - 1, <|kInt32Bounds.hi|>)", "kInt32Bounds.hi + 1"
        ),
        "vocab-id-taken": M("std::min(<|*vocab_size - 1|>, kInt32Bounds.hi)", "*vocab_size"),
        "wide-vocab-id-taken": M("std::optional<Bounds>({0, <|*vocab_size - 1|>})", "*vocab_size"),
        "wide-vocab-negatives": M("std::optional<Bounds>({<|0|>, *vocab_size - 1})", "int64_t{-1}"),
        "outer-list-one-past": M(
            "if (<|i >= static_cast<size_t>(PySequence_Fast_GET_SIZE(requests.ptr()))|>)", "false"
        ),
        "start-over-stop": M("if (<|start > stop|> || stop > length", "false"),
        "stop-over-length": M("|| <|stop > length|>)", "false"),
        "stop-at-length-refused": M("|| <|stop > length|>)", "stop >= length"),
        "starts-alone-narrow": M("if (start != 0 || <|stop != length|>) parts.narrow", "false"),
        "stops-alone-narrow": M("if (<|start != 0|> || stop != length) parts.narrow", "false"),
        "ids-wrap": M("if (<|total > kMaxIds|>)", "false"),
        "gil-free-over-lists": M("<|!parts.has_lists()|> && total >= kReleaseGil", "true"),
        "gil-kept": M(
            "!parts.has_lists() && <|total >= kReleaseGil|>",
            "false",
            equivalent="other threads wait longer, and nothing else",
        ),
        "negatives-in-vocab": M("(<|v.value < 0|> || v.value >= *vocab_size)", "false"),
        "vocab-itself-in-vocab": M(
            "(v.value < 0 || <|v.value >= *vocab_size|>)", "v.value > *vocab_size"
        ),
        "range-errors-not-counted": M("<|++pool.counters().range_errors;|>", ""),
        "stages-not-counted": M("<|pool.counters().stages += 1;|>", ""),
        "tokens-not-counted": M("<|pool.counters().tokens += total;|>", ""),
        "eager-is-not": M("if (<|self->options().eager|>) {", "false"),
        "nothing-staged-though-closed": M("<|pool.check_usable();|>", ""),
        "nothing-is-wide": M("IntType::kInt32, 0, <|true|>}", "false"),
        "wide-fits-int32": M("fits_int32 = <|!violation|>;", "true"),
        "wide-never-fits-int32": M("fits_int32 = <|!violation|>;", "false"),
        "wide-unchecked": M("if (violation) raise_out_of_vocab(*violation);", ";"),
        "fallbacks-not-counted": M("<|++pool.counters().fallbacks;|>", ""),
        "fallback-always-fits": M(
            "return staged({self, std::move(fallback), <|fits_int32|>});", "true"
        ),
        "fallback-never-fits": M(
            "return staged({self, std::move(fallback), <|fits_int32|>});", "false"
        ),
        "vocab-overflow-taken": M('if (<|overflow|>) throw py::value_error("vocab_size', "false"),
        "vocab-errors-lost": M("if (<|*vocab_size == -1 && PyErr_Occurred()|>)", "false"),
    },
    "csrc/python_staged_tokens.cpp": {
        "host-does-not-wait": M(
            "(<|host ? !host_stream_held(host_current_stream()) : blocking|>)", "false"
        ),
        "bad-index-not-told": M("if (<|resolved.tail && resolved.tail->bad|>)", "false"),
        "dtype-of-anything": M("if (<|!THPDtype_Check(dtype.ptr())|>)", "false"),
        "dtype-ignored": M(
            "<|scalar_type = reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;|>", ""
        ),
        "pool-not-held": M("<|Py_XINCREF(pool);|>", ""),
        "pool-never-let-go": M("<|Py_XDECREF(self->pool);|>", ""),
        "weak-references-dangle": M(
            "<|if (self->weak_references) PyObject_ClearWeakRefs(object);|>", ""
        ),
        "slots-never-let-go": M("<|self->tokens.~StagedTokens();|>", ""),
        "pool-not-traversed": M(
            "<|Py_VISIT(reinterpret_cast<StagedTokensObject*>(object)->pool);|>", ""
        ),
        "pool-not-cleared": M(
            "<|Py_CLEAR(reinterpret_cast<StagedTokensObject*>(object)->pool);|>",
            "",
            equivalent="every cycle goes through the dict of a pool, which breaks it",
        ),
        "wire-bits": M("PyLong_FromSize_t(<|8 * size_of(tokens_of(self).wire())|>)", "64"),
    },
    "csrc/staging.cpp": {
        "op-negated": M('<|plain(wire, "wire")|>.contiguous();', "wire"),
        "fallback-not-held": M("<|t.src_owner = owner_of(from);|>", ""),
        "eager-not-into-out": M("if (<|!out|> && dtype == at::kLong) {", "true"),
        "eager-any-width": M("if (!out && <|dtype == at::kLong|>) {", "true"),
        "fallback-from-the-start": M(
            "<|static_cast<int64_t>(offset_)|>, static_cast<int64_t>(offset_ + count_)", "0"
        ),
        "wrapper-without-memory": M(
            "const bool has_memory = <|tensor.layout() == at::kStrided|> &&", "true"
        ),
        "out-without-memory": M('<|check_memory(out, "out");|>', ""),
        "negated-out": M("TORCH_CHECK_VALUE(<|!out.is_neg()|>,", "true"),
        "negated-indices": M('<|plain(indices, "indices")|>.contiguous();', "indices"),
        "negated-relay": M('const at::Tensor source = <|plain(relay, "relay")|>;', "relay"),
        "out-longer": M(
            "out.dim() == 1 && <|out.size(0) == static_cast<int64_t>(count)|>,",
            "out.size(0) >= static_cast<int64_t>(count)",
        ),
        "out-shorter": M(
            "out.dim() == 1 && <|out.size(0) == static_cast<int64_t>(count)|>,",
            "out.size(0) <= static_cast<int64_t>(count)",
        ),
        "out-of-rows": M("TORCH_CHECK_VALUE(<|out.dim() == 1|> && out.size(0)", "true"),
        "out-strided": M("TORCH_CHECK_VALUE(<|out.is_contiguous()|>,", "true"),
        "out-elsewhere": M("TORCH_CHECK_VALUE(<|out.device() == device|>,", "true"),
        "relay-of-floats": M(
            "TORCH_CHECK_TYPE(<|dtype == at::kLong || dtype == at::kInt|>,\n                     std::string(name)",
            "true",
        ),
        "relay-of-rows": M("TORCH_CHECK_VALUE(<|tensor.dim() == 1|>,", "true"),
        "relay-elsewhere": M("<|tensor.device() == device|>,", "true"),
        "relay-strided": M("TORCH_CHECK_VALUE(<|relay.is_contiguous()|>,", "true"),
        "relay-any-size": M(
            "tail->relay_size = <|static_cast<size_t>(source.numel())|>;", "size_t{1} << 20"
        ),
        "indices-not-held": M("<|tail->owners.push_back(owner_of(packed));|>", ""),
        "relay-not-held": M("<|tail->owners.push_back(owner_of(source));|>", ""),
        "mixed-out-any-width": M("TORCH_CHECK_TYPE(<|out.scalar_type() == at::kLong|>,", "true"),
        "gathered-not-held": M("<|t.dst_owner = owner_of(out);|>\n  backend.launch", ""),
        "gathered-not-fenced": M("<|backend.record(resolved.fence, stream);|>", ""),
        "slice-of-a-slice": M("<|part.offset_ += start;|>", "part.offset_ = start;"),
        "slice-to-the-end": M("part.count_ = <|stop - start|>;", "count_ - start"),
        "slice-keeps-eager": M("<|part.eager_ = nullptr;|>", ""),
        "cpu-in-a-child": M("<|pool_->core().check_process();|>  // a child", ""),
        "cpu-shares-fallback": M("return <|fallback_ids().clone()|>;", "fallback_ids()"),
        "cpu-from-the-start": M(
            "convert(lease_->data() + <|offset_ * size_of(wire_)|>, wire_, ids", "0"
        ),
        "src-from-the-start": M("t.src = lease_->data() + <|offset_ * size_of(wire_)|>;", "0"),
        "out-not-held": M("<|t.dst_owner = owner_of(out);|>\n    return lease_", ""),
        "eager-not-counted": M("<|++pool_->core().counters().eager_transfers;|>", ""),
        "eager-not-waited-for": M("<|pool_->backend_->wait(stream, eager_->fence);|>", ""),
        "resolve-in-a-child": M("<|core.check_process();|>", ""),
        "resolve-truncates": M(
            "TORCH_CHECK_VALUE(<|int_type(dtype) == IntType::kInt64 || fits_int32_|>,", "true"
        ),
        "fallback-transfers-not-counted": M("<|++core.counters().fallback_transfers;|>", ""),
        "mixed-in-a-child": M("<|pool_->core().check_process();|>\n  const c10::Device device", ""),
        "mixed-out-without-running": M(
            "check_out(*out, device, <|count_ + static_cast<size_t>(indices.numel())|>);",
            "static_cast<size_t>(out->numel())",
        ),
        "mixed-eager-not-held": M(
            "if (<|device.is_cpu()|>) t.src_owner = owner_of(eager);", "false"
        ),
        "mixed-tail-not-told": M(
            "transfer_to(ids, stream, tail));\n    <|resolved.tail = tail;|>", ""
        ),
        "mixed-in-two": M(
            "if (<|lease_ && count_ && by_kernel()|>) {", "false", equivalent="only time"
        ),
        "gather-out-any-size": M(
            "check_out(*out, device, <|static_cast<size_t>(indices.numel())|>);",
            "static_cast<size_t>(out->numel())",
        ),
        "op-of-rows": M("TORCH_CHECK_VALUE(<|wire.dim() == 1|>,", "true"),
        "op-strided": M(
            'const at::Tensor src = <|plain(wire, "wire").contiguous()|>;', 'plain(wire, "wire")'
        ),
        "op-out-any-size": M(
            "check_out(out, device, <|static_cast<size_t>(wire.numel())|>);",
            "static_cast<size_t>(out.numel())",
        ),
        "op-counts-a-refusal": M(
            "  count_write(out);\n  if (!wire.numel()) return;",
            "  if (!wire.numel()) return;",
        ),
        "apart-of-nothing": M("if (<|!indices.numel()|>) return;  // nothing", "false"),
        "copy-engine-is-kernel": M(
            "t.kind =\n      <|mapped && !pool_->options_.copy_engine|> ?", "true"
        ),
        "pinned-always": M("return <|lease_ && lease_->pinned()|>;", "true"),
    },
    "csrc/ids_view.cpp": {
        "one-id-refused": M(
            "else if (made->stride != whole.itemsize && <|made->count > 1|> && wants", "true"
        ),
        "part-from-the-array": M(
            "return make_view(view.ids, <|view.start + start|>, view.start + start + size);",
            "start",
        ),
        "part-to-the-end": M(
            "return make_view(view.ids, view.start + start, <|view.start + start + size|>);",
            "view.stop",
        ),
        "any-step-is-one": M("if (<|step == 1|>) {", "true"),
        "copy-of-all": M("PySequence_GetSlice(view.ids, <|view.start|>, view.stop)", "0"),
        "array-not-held": M("<|Py_INCREF(ids);|>", ""),
        "array-never-let-go": M("<|Py_DECREF(view_of(object).ids);|>", ""),
        "writable": M("if (<|flags & PyBUF_WRITABLE|>) {", "false"),
        "writable-told": M("out->readonly = <|1|>;", "0"),
        "of-matrices": M("if (<|whole.ndim != 1|>)", "false"),
        "of-a-shrunk-array": M("else if (<|view.stop > whole.shape[0]|>)", "false"),
        "not-to-the-end": M(
            "else if (<|view.stop > whole.shape[0]|>)", "view.stop >= whole.shape[0]"
        ),
        "strides-not-asked-for": M(
            "else if (<|made->stride != whole.itemsize && made->count > 1 && wants_contiguous(flags)|>)",
            "false",
        ),
        "buffer-from-the-array": M(
            "static_cast<char*>(whole.buf) + <|view.start * made->stride|>;", "0"
        ),
        "buffer-start-packed": M("<|view.start * made->stride|>;", "view.start * whole.itemsize"),
        "buffer-not-let-go": M("<|PyBuffer_Release(&made->whole);|>", ""),
        "refused-buffer-not-let-go": M(
            "PyErr_SetString(PyExc_BufferError, problem);\n    <|PyBuffer_Release(&whole);|>", ""
        ),
        "view-not-held": M("<|Py_INCREF(object);|>", ""),
        "length-in-items": M("out->len = <|made->count * whole.itemsize|>;", "made->count"),
        "format-not-told": M(
            "out->format = <|flags & PyBUF_FORMAT ? whole.format : nullptr|>;", "nullptr"
        ),
        "bounds-not-clipped": M(
            "const Py_ssize_t size = <|PySlice_AdjustIndices(length, &bounds[0], &bounds[1], 1)|>;",
            "bounds[1] - bounds[0]",
        ),
        "part-not-clipped": M(
            "const Py_ssize_t size = <|PySlice_AdjustIndices(length_of(object), &start, &stop, 1)|>;",
            "stop - start",
        ),
        "error-of-bounds-lost": M(
            "if (<|bounds[i] == -1 && PyErr_Occurred()|>) return nullptr;", "false"
        ),
    },
    "csrc/ops.cpp": {
        "device-ignored": M(
            "<|device.value_or(wire.device())|>",
            "wire.device()",
            equivalent="without a GPU there is one device",
        ),
        "dtype-ignored": M("dtype(<|dtype|>)", "at::kLong"),
        "fills-nothing": M("<|transfer_tensor(wire, out);|>\n  return out;", ""),
    },
}
