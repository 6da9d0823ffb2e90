// This file is longer than 500 lines on purpose: all its code works on the state that one mutex
// guards, and the order of the steps is easier to check in one place.
#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

namespace pystage {
namespace {

constexpr size_t kMinSlot = 64;  // a cache line, so that no two slots share one
constexpr size_t kPage = 4096;   // segments are whole pages
constexpr double kSettle = 1.0;  // seconds for what other threads have begun with the device
constexpr size_t kGrow = size_t{1} << 20;  // the largest size that is pinned in well under 1 ms
constexpr auto kPollEvery = std::chrono::milliseconds(50);

size_t round_up(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// See Note [Debug canaries].
constexpr size_t kGuard = kMinSlot;  // keeps leased ranges aligned to cache lines
constexpr unsigned char kGuardByte = 0xCA;
constexpr unsigned char kFreeByte = 0xDB;

bool canaries_wanted() {
  const char* value = std::getenv("PYSTAGE_DEBUG_CANARIES");
  return value && *value && std::strcmp(value, "0") != 0;
}

// The first byte that differs from `value`; null if none does.
const char* first_other(const char* from, size_t bytes, unsigned char value) {
  if (!bytes) return nullptr;
  const auto expected = static_cast<char>(value);
  if (*from == expected && std::memcmp(from, from + 1, bytes - 1) == 0) return nullptr;
  return std::find_if(from, from + bytes, [&](char byte) { return byte != expected; });
}

std::atomic<uint64_t> g_fork_generation{0};

// The head of the list of orphans: closed pools that slots in flight keep alive. At process exit
// they are left alone: the system takes back the memory, and the device may be gone.
sync::Atomic<Pool*> g_orphans{nullptr};

void after_fork_in_child() {
  g_fork_generation.fetch_add(1, std::memory_order_relaxed);
  g_orphans.store(nullptr);  // the parent's orphans are left alone
}

[[maybe_unused]] const int g_fork_handler = pthread_atfork(nullptr, nullptr, after_fork_in_child);

// Calls `poll` without the lock, every kPollEvery during a wait.
class Polling {
 public:
  Polling(const Pool& pool, std::unique_lock<sync::Mutex>& lock, const Poll& poll)
      : pool_(pool), lock_(lock), poll_(poll) {}
  void look() {
    if (!poll_ || Clock::now() < next_) return;
    struct Relock {  // also if `poll` throws
      ~Relock() {
        if (generation == fork_generation()) lock.lock();
      }
      std::unique_lock<sync::Mutex>& lock;
      const uint64_t generation = fork_generation();
    } relock{lock_};
    lock_.unlock();
    poll_();
    pool_.check_process();  // `poll` may have forked
    next_ = Clock::now() + kPollEvery;
  }

 private:
  using Clock = sync::Clock;
  const Pool& pool_;
  std::unique_lock<sync::Mutex>& lock_;
  const Poll& poll_;
  Clock::time_point next_ = Clock::now() + kPollEvery;
};

}  // namespace

uint64_t fork_generation() { return g_fork_generation.load(std::memory_order_relaxed); }

size_t size_class(size_t bytes) {
  size_t power = kMinSlot;
  while (power <= bytes / 2) power *= 2;
  const size_t step = std::max(kMinSlot, power / 8);
  if (bytes > SIZE_MAX - step) return bytes;  // rounding would overflow; no pool is this large
  return round_up(std::max(bytes, kMinSlot), step);
}

bool BySizeThenAddress::operator()(const Slot* a, const Slot* b) const {
  if (a->bytes != b->bytes) return a->bytes < b->bytes;
  auto segment_id = [](const Slot* s) { return s->segment ? s->segment->id : 0; };
  if (a->segment != b->segment) return segment_id(a) < segment_id(b);
  return a->offset < b->offset;
}

// --- Lease -------------------------------------------------------------------------------------

Lease::~Lease() { pool_->end_lease(*this); }

FenceHandle Lease::launch_transfer(const Transfer& transfer, StreamHandle stream) {
  pool_->check_process();
  const uint64_t id = pool_->device_.stream_id(stream);
  std::lock_guard<sync::Mutex> guard(mutex_);
  Reader* reader = readers_;
  while (reader && reader->stream != id) reader = reader->next;
  const bool is_new = reader == nullptr;
  if (is_new) reader = pool_->take_reader();
  try {
    pool_->device_.launch(transfer, stream);
  } catch (...) {
    if (is_new) {
      std::lock_guard<sync::Mutex> pool_guard(pool_->mutex_);
      pool_->put_by(reader);
    }
    throw;
  }
  if (is_new) {
    reader->stream = id;
    reader->slot = slot_;
    reader->next = readers_;
    readers_ = reader;
  }
  reader->ticket = pool_->draw_ticket();
  try {
    pool_->device_.record(reader->fence, stream);
  } catch (...) {
    quarantined_ = true;
    throw;
  }
  PoolCounters& counters = pool_->counters_;
  counters.wire_bytes += transfer.count * size_of(transfer.wire);
  ++(transfer.kind == TransferKind::kKernel ? counters.kernel_transfers
                                            : counters.copy_engine_transfers);
  return reader->fence;
}

// --- Pool: life --------------------------------------------------------------------------------

std::shared_ptr<Pool> Pool::create(Device& device, const PoolOptions& options) {
  reap_orphans();
  std::shared_ptr<Pool> pool(new Pool(device, options));
  Lock lock(pool->mutex_);
  const size_t reserve =
      round_up(std::min(options.reserve_bytes, pool->options_.capacity_bytes), kPage);
  if (reserve) pool->allocate_segment(lock, reserve);
  return pool;
}

Pool::Pool(Device& device, const PoolOptions& options)
    : device_(device),
      options_(options),
      fork_generation_(pystage::fork_generation()),
      guards_(canaries_wanted() ? 2 * kGuard : 0) {
  // Whole pages, so that the sum of the segments is the memory that is really allocated.
  options_.capacity_bytes = options.capacity_bytes / kPage * kPage;
  if (!options_.capacity_bytes) throw Error("capacity_bytes must be at least one page (4096)");
}

// Runs only when there are no leases and no slots in flight, because both keep the pool alive.
// Never runs in a child of fork, where abandon() keeps the references.
Pool::~Pool() {
  for (const Reader& reader : readers_) device_.destroy_fence(reader.fence);
  for (const Segment& segment : segments_) {
    bool quarantined = false;
    for (const Slot* s = segment.first; s; s = s->after)
      quarantined |= s->state == Slot::State::kQuarantined;
    if (!quarantined) device_.free(segment.memory);
  }
}

bool Pool::forked() const { return fork_generation_ != pystage::fork_generation(); }

void Pool::check_process() const {
  if (forked())
    throw ForkedProcessError("this StagingPool (" + device_.name() +
                             ") belongs to the parent process: make a new pool after fork, or "
                             "start workers with the spawn method");
}

void Pool::check_usable() const {
  check_process();
  Lock lock(mutex_);
  check_open();
}

void Pool::check_open() const {
  if (closed_) throw PoolClosedError("this StagingPool (" + device_.name() + ") is closed");
}

bool Pool::closed() const {
  check_process();
  Lock lock(mutex_);
  return closed_;
}

// A forked child must not even destroy the pool: the condition variable may count waiting threads
// of the parent, and its destructor would wait for them. So this keeps one reference for ever.
void Pool::abandon(std::shared_ptr<Pool> pool) noexcept {
  alignas(std::shared_ptr<Pool>) unsigned char kept[sizeof pool];
  new (kept) std::shared_ptr<Pool>(std::move(pool));
}

void Pool::drop(std::shared_ptr<Pool> pool) noexcept {
  if (pool->forked()) return abandon(std::move(pool));
  Lock lock(pool->mutex_);
  pool->closed_ = true;
  pool->finish_if_closed(lock);
  lock.unlock();
}

void Pool::close(const Poll& poll) {
  if (forked()) return;
  {
    Lock lock(mutex_);
    closed_ = true;
    slot_freed_.notify_all();
    struct Finish {  // also if `poll` throws
      ~Finish() {
        if (lock.owns_lock()) pool.finish_if_closed(lock);  // else this is a child of fork
      }
      Pool& pool;
      Lock& lock;
    } finish{*this, lock};
    Polling polling(*this, lock, poll);
    const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                             std::chrono::duration<double>(options_.timeout_s));
    auto pause = std::chrono::microseconds(20);
    while (try_reap(lock) && in_flight_slots_ && Clock::now() < deadline) {
      slot_freed_.wait_for(lock, pause);
      pause = std::min(pause * 2, std::chrono::microseconds(1000));
      polling.look();
    }
  }
  reap_orphans();
}

// Called with the lock held, after every step that may leave segments of a closed pool idle.
void Pool::finish_if_closed(Lock& lock) noexcept {
  if (!closed_) return;
  if (in_flight_slots_ && !orphaned_) {
    orphaned_ = true;
    self_ = shared_from_this();
    next_orphan_ = g_orphans.load();
    while (!g_orphans.compare_exchange_weak(next_orphan_, this)) {
    }
  }
  free_segments(lock, detach_idle_segments());
}

bool Pool::have_orphans() { return g_orphans.load(std::memory_order_relaxed) != nullptr; }

void Pool::reap_orphans() noexcept {
  if (!have_orphans()) return;
  for (Pool* next = g_orphans.exchange(nullptr); next;) {
    const std::shared_ptr<Pool> pool = std::move(next->self_);
    next = pool->next_orphan_;
    Lock lock(pool->mutex_);
    pool->try_reap(lock);
    pool->orphaned_ = false;
    pool->finish_if_closed(lock);  // puts it back if slots are still in flight
  }
}

// --- Pool: slots -------------------------------------------------------------------------------

std::shared_ptr<Lease> Pool::try_acquire(size_t bytes, bool ask_device) {
  check_process();
  if (ask_device)
    reap_orphans();
  else if (have_orphans())
    return nullptr;
  Lock lock(mutex_);
  check_open();
  if (!fits(bytes)) return nullptr;
  const size_t need = with_guards(bytes);
  Slot* slot = worth_reaping() ? nullptr : take(need);
  if (!slot && ask_device) {
    reap(lock);
    check_open();
    slot = take(need);
  }
  return slot ? make_lease(slot, bytes) : nullptr;
}

std::shared_ptr<Lease> Pool::acquire(size_t bytes, const Poll& poll) {
  check_process();
  reap_orphans();
  Lock lock(mutex_);
  check_open();
  if (!fits(bytes)) {
    if (options_.at_capacity == AtCapacity::kFallback) return nullptr;
    ++exhausted_;
    throw RequestTooLargeError("a batch of " + std::to_string(bytes) +
                               " bytes can never fit: " + figures() +
                               "; raise capacity_bytes, stage less at once, or use "
                               "at_capacity=\"fallback\"");
  }
  const size_t need = with_guards(bytes);
  struct Wait {  // counts the wait, however it ends
    ~Wait() {
      if (waiting) total += seconds();
    }
    double seconds() const { return std::chrono::duration<double>(Clock::now() - start).count(); }
    double& total;
    Clock::time_point start = Clock::now();
    bool waiting = false;
  } wait{wait_seconds_};
  Polling polling(*this, lock, poll);
  auto pause = std::chrono::microseconds(20);
  for (;;) {
    reap(lock);
    check_open();
    if (Slot* slot = take(need)) return make_lease(slot, bytes);
    if (grow(lock, need)) continue;
    const double so_far = wait.seconds();
    const double patience = options_.at_capacity == AtCapacity::kWait ? options_.timeout_s : 0.0;
    const bool give_up = so_far >= patience;
    if (give_up && (reaping_ || allocating_ || freeing_) && so_far < patience + kSettle) {
      // Another thread is going through the queues, or takes or gives back memory, which may make
      // room.
      slot_freed_.wait_for(lock, std::chrono::microseconds(20));
      polling.look();
      continue;
    }
    if (options_.at_capacity == AtCapacity::kFallback) return nullptr;
    if (give_up) raise_exhausted(bytes, wait.waiting ? so_far : 0);
    if (!wait.waiting) ++waits_;
    wait.waiting = true;
    // The end of a lease notifies, but the end of a transfer does not. So check repeatedly.
    const auto left = std::chrono::duration<double>(options_.timeout_s - so_far);
    slot_freed_.wait_for(lock, std::min<std::chrono::duration<double>>(pause, left));
    pause = std::min(pause * 2, std::chrono::microseconds(1000));
    polling.look();
  }
}

std::shared_ptr<Lease> Pool::make_lease(Slot* slot, size_t bytes) {
  try {
    if (!guards_)
      return std::make_shared<Lease>(shared_from_this(), slot, slot->offset, slot->bytes);
    arm(*slot, bytes);
    return std::make_shared<Lease>(shared_from_this(), slot, slot->offset + kGuard, bytes);
  } catch (...) {
    --leased_slots_;
    give(slot);
    throw;
  }
}

Slot* Pool::spare_slot() {
  if (Slot* slot = spare_slots_) {
    spare_slots_ = slot->after;
    return slot;
  }
  Slot* slot = &slots_.emplace_back();
  try {
    FreeSlots alone;
    alone.insert(slot);
    slot->node = alone.extract(alone.begin());
  } catch (...) {
    slots_.pop_back();
    throw;
  }
  return slot;
}

void Pool::put_by(Slot* slot) noexcept {
  slot->after = spare_slots_;
  spare_slots_ = slot;
}

Slot* Pool::take(size_t bytes) {
  Slot probe;
  probe.bytes = bytes;
  const auto it = free_.lower_bound(&probe);
  if (it == free_.end()) return nullptr;
  Slot* slot = *it;
  Slot* rest = slot->bytes > bytes ? spare_slot() : nullptr;
  slot->node = free_.extract(it);
  if (rest) {
    rest->segment = slot->segment;
    rest->offset = slot->offset + bytes;
    rest->bytes = slot->bytes - bytes;
    rest->before = slot;
    rest->after = slot->after;
    if (rest->after) rest->after->before = rest;
    slot->after = rest;
    slot->bytes = bytes;
    free_.insert(std::move(rest->node));
  }
  slot->state = Slot::State::kLeased;
  ++slot->segment->used_slots;
  ++leased_slots_;
  in_use_bytes_ += bytes;
  high_water_bytes_ = std::max(high_water_bytes_, in_use_bytes_);
  return slot;
}

// Frees a slot and merges it with its free neighbours.
void Pool::give(Slot* slot) noexcept {
  in_use_bytes_ -= slot->bytes;
  --slot->segment->used_slots;
  slot->state = Slot::State::kFree;
  if (guards_) std::memset(slot->segment->memory.host + slot->offset, kFreeByte, slot->bytes);
  auto absorb = [&](Slot* left, Slot* right) {  // removes `right`
    left->bytes += right->bytes;
    left->after = right->after;
    if (left->after) left->after->before = left;
    put_by(right);
  };
  if (Slot* after = slot->after; after && after->state == Slot::State::kFree) {
    after->node = free_.extract(after);
    absorb(slot, after);
  }
  if (Slot* before = slot->before; before && before->state == Slot::State::kFree) {
    before->node = free_.extract(before);
    absorb(before, slot);
    slot = before;
  }
  free_.insert(std::move(slot->node));
  slot_freed_.notify_all();
}

Reader* Pool::take_reader() {
  Lock lock(mutex_);
  if (Reader* reader = spare_readers_) {
    spare_readers_ = reader->next;
    return reader;
  }
  lock.unlock();
  const FenceHandle fence = device_.create_fence();
  lock.lock();
  try {
    if (queues_.capacity() <= readers_.size()) queues_.reserve(2 * readers_.size() + 8);
    Reader* reader = &readers_.emplace_back();
    reader->fence = fence;
    return reader;
  } catch (...) {
    lock.unlock();
    device_.destroy_fence(fence);
    throw;
  }
}

void Pool::put_by(Reader* reader) noexcept {
  reader->next = spare_readers_;
  spare_readers_ = reader;
}

void Pool::end_lease(Lease& lease) noexcept {
  if (forked()) return abandon(std::move(lease.pool_));
  if (guards_) check_guards(lease);
  Lock lock(mutex_);
  Slot* slot = lease.slot_;
  --leased_slots_;
  if (lease.quarantined_) {
    slot->state = Slot::State::kQuarantined;
    ++quarantined_slots_;
  } else if (!lease.readers_) {
    give(slot);
  } else {
    slot->state = Slot::State::kInFlight;
    ++in_flight_slots_;
    in_flight_bytes_ += slot->bytes;
    for (Reader *reader = lease.readers_, *next; reader; reader = next) {
      next = reader->next;
      reader->next = nullptr;
      ++slot->pending;
      auto queue = std::find_if(queues_.begin(), queues_.end(),
                                [&](const StreamQueue& q) { return q.stream == reader->stream; });
      if (queue == queues_.end()) {
        queues_.push_back({reader->stream, reader, reader});
      } else {
        (queue->head ? queue->tail->next : queue->head) = reader;
        queue->tail = reader;
      }
    }
    slot_freed_.notify_one();  // so that a waiting thread queries the fence sooner
  }
  finish_if_closed(lock);
}

// Takes a reader whose fence is done off its slot. Frees the slot if it was the last reader.
void Pool::retire(Reader* reader) noexcept {
  Slot* slot = reader->slot;
  put_by(reader);
  if (--slot->pending > 0) return;
  --in_flight_slots_;
  in_flight_bytes_ -= slot->bytes;
  give(slot);
}

// Frees the slots in flight whose fences are done. Releases the lock during each query.
void Pool::reap(Lock& lock) {
  if (reaping_ || !in_flight_slots_) return;
  reaping_ = true;
  struct Done {  // also if a query throws
    ~Done() {
      if (!lock.owns_lock()) lock.lock();
      reaping = false;
    }
    Lock& lock;
    bool& reaping;
  } done_reaping{lock, reaping_};
  for (size_t q = 0; q < queues_.size();) {
    bool newest = true;  // query the newest fence first: it covers most of the others
    while (queues_[q].head) {
      Reader* asked = newest ? queues_[q].tail : queues_[q].head;
      newest = false;
      lock.unlock();
      const bool done = device_.query(asked->fence);
      lock.lock();
      if (!done) {
        if (asked == queues_[q].head) break;
        continue;
      }
      const uint64_t ticket = asked->ticket;
      for (Reader* reader; (reader = queues_[q].head) && reader->ticket <= ticket;) {
        queues_[q].head = reader->next;
        retire(reader);
      }
    }
    if (queues_[q].head) {
      ++q;
    } else {  // remove the queue of an idle stream, because streams come and go
      queues_[q] = queues_.back();
      queues_.pop_back();
    }
  }
}

// Like reap(), for callers that could do nothing about an error. Returns false after an error. If
// the device is lost, its fences will never be done: the slots stay in flight, and their segments
// are not freed before the process ends.
bool Pool::try_reap(Lock& lock) noexcept {
  try {
    reap(lock);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

// --- Pool: segments ----------------------------------------------------------------------------

bool Pool::grow(Lock& lock, size_t need) {
  need = round_up(need, kPage);
  if (options_.capacity_bytes - reserved_bytes_ < need && !release_idle_for(lock, need))
    return false;
  const size_t room = options_.capacity_bytes - reserved_bytes_;
  if (room < need) return false;
  allocate_segment(lock, std::min(room, std::max(need, kGrow)));
  finish_if_closed(lock);  // close() may have run meanwhile, without this segment
  return true;
}

void Pool::allocate_segment(Lock& lock, size_t bytes) {
  std::list<Segment> fresh(1);
  Segment& segment = fresh.front();
  Slot* slot = spare_slot();
  std::string why;
  reserved_bytes_ += bytes;
  ++allocating_;
  lock.unlock();
  try {
    segment.memory = device_.allocate(bytes, &why);
  } catch (...) {
    lock.lock();
    --allocating_;
    reserved_bytes_ -= bytes;
    put_by(slot);
    slot_freed_.notify_all();  // others may be waiting for the room
    throw;
  }
  if (guards_) std::memset(segment.memory.host, kFreeByte, bytes);
  lock.lock();
  --allocating_;
  ++allocations_;
  if (segment.memory.fallback) pageable_bytes_ += bytes;
  if (!why.empty()) why_pageable_.swap(why);
  segment.id = next_segment_id_++;
  segment.first = slot;
  segments_.splice(segments_.end(), fresh);
  slot->segment = &segment;
  slot->offset = 0;
  slot->bytes = bytes;
  slot->before = slot->after = nullptr;
  free_.insert(std::move(slot->node));
  slot_freed_.notify_all();
}

// Other sizes may have left idle segments that use up the capacity. Frees them all, if that makes
// enough room.
bool Pool::release_idle_for(Lock& lock, size_t need) {
  size_t room = options_.capacity_bytes - reserved_bytes_;
  for (const Segment& segment : segments_)
    if (!segment.used_slots) room += segment.memory.bytes;
  if (room < need) return false;
  free_segments(lock, detach_idle_segments());
  return true;
}

std::list<Segment> Pool::detach_idle_segments() noexcept {
  std::list<Segment> idle;
  for (auto it = segments_.begin(); it != segments_.end();) {
    const auto segment = it++;
    if (segment->used_slots) continue;
    Slot* slot = segment->first;
    slot->node = free_.extract(slot);
    put_by(slot);
    idle.splice(idle.end(), segments_, segment);
  }
  return idle;
}

// Counts the memory as reserved until the device has freed it. Returns the bytes freed.
size_t Pool::free_segments(Lock& lock, const std::list<Segment>& segments) noexcept {
  if (segments.empty()) return 0;
  ++freeing_;
  lock.unlock();
  for (const Segment& segment : segments) {
    if (guards_) check_poison(segment, 0, segment.memory.bytes);
    device_.free(segment.memory);
  }
  lock.lock();
  --freeing_;
  size_t bytes = 0;
  for (const Segment& segment : segments) {
    bytes += segment.memory.bytes;
    if (segment.memory.fallback) pageable_bytes_ -= segment.memory.bytes;
    ++frees_;
  }
  reserved_bytes_ -= bytes;
  slot_freed_.notify_all();  // there is room for new segments
  return bytes;
}

size_t Pool::trim() {
  check_process();
  reap_orphans();
  Lock lock(mutex_);
  reap(lock);
  return free_segments(lock, detach_idle_segments());
}

// --- Pool: canaries ----------------------------------------------------------------------------

// Puts guards around the first `bytes` of a slot.
void Pool::arm(const Slot& slot, size_t bytes) const noexcept {
  check_poison(*slot.segment, slot.offset, slot.bytes);
  char* start = slot.segment->memory.host + slot.offset;
  std::memset(start, kGuardByte, kGuard);
  std::memset(start + kGuard + bytes, kGuardByte, slot.bytes - kGuard - bytes);
}

void Pool::check_guards(const Lease& lease) const noexcept {
  const Slot& slot = *lease.slot_;
  const char* start = slot.segment->memory.host + slot.offset;
  if (const char* at = first_other(start, kGuard, kGuardByte))
    overwritten(*slot.segment, lease.offset_, lease.bytes_, "in front of a slot", at);
  const char* end = start + kGuard + lease.bytes_;
  if (const char* at = first_other(end, slot.bytes - kGuard - lease.bytes_, kGuardByte))
    overwritten(*slot.segment, lease.offset_, lease.bytes_, "behind a slot", at);
}

void Pool::check_poison(const Segment& segment, size_t offset, size_t bytes) const noexcept {
  if (const char* at = first_other(segment.memory.host + offset, bytes, kFreeByte))
    overwritten(segment, offset, bytes, "in free memory", at);
}

void Pool::overwritten(const Segment& segment, size_t offset, size_t bytes, const char* where,
                       const char* at) const noexcept {
  std::fprintf(stderr,
               "pystage: StagingPool (%s): something wrote %s, which has %zu bytes at offset %zu "
               "of segment %llu: the byte at offset %td from its start is 0x%02x "
               "(PYSTAGE_DEBUG_CANARIES). Look for a write through a stale pointer or past the "
               "ids; the ids of other slots may be wrong already\n",
               device_.name().c_str(), where, bytes, offset,
               static_cast<unsigned long long>(segment.id), at - segment.memory.host - offset,
               static_cast<unsigned char>(*at));
  std::abort();
}

// --- Pool: figures -----------------------------------------------------------------------------

std::string Pool::figures() const {
  return "capacity " + std::to_string(options_.capacity_bytes) + " bytes, reserved " +
         std::to_string(reserved_bytes_) + ", in use " + std::to_string(in_use_bytes_) + " (" +
         std::to_string(leased_slots_) + " slots leased, " + std::to_string(in_flight_slots_) +
         " in flight, " + std::to_string(quarantined_slots_) + " quarantined) on " + device_.name();
}

void Pool::raise_exhausted(size_t bytes, double waited_s) {
  ++exhausted_;
  throw PoolExhaustedError(
      "no slot of " + std::to_string(bytes) + " bytes" +
      (waited_s > 0 ? " after waiting " + std::to_string(waited_s) + " s" : std::string()) + ": " +
      figures() +
      "; drop staged tokens sooner, raise capacity_bytes or timeout_s, or use "
      "at_capacity=\"fallback\"");
}

PoolStats Pool::stats() {
  check_process();
  reap_orphans();
  PoolStats s;
  s.stages = counters_.stages;
  s.tokens = counters_.tokens;
  s.range_errors = counters_.range_errors;
  s.fallbacks = counters_.fallbacks;
  s.wire_bytes = counters_.wire_bytes;
  s.kernel_transfers = counters_.kernel_transfers;
  s.copy_engine_transfers = counters_.copy_engine_transfers;
  s.eager_transfers = counters_.eager_transfers;
  s.fallback_transfers = counters_.fallback_transfers;
  Lock lock(mutex_);
  try_reap(lock);
  s.capacity_bytes = options_.capacity_bytes;
  s.reserved_bytes = reserved_bytes_;
  s.in_use_bytes = in_use_bytes_;
  s.high_water_bytes = high_water_bytes_;
  s.pageable_bytes = pageable_bytes_;
  s.leased_slots = leased_slots_;
  s.in_flight_slots = in_flight_slots_;
  s.quarantined_slots = quarantined_slots_;
  s.waits = waits_;
  s.wait_seconds = wait_seconds_;
  s.exhausted = exhausted_;
  s.allocations = allocations_;
  s.frees = frees_;
  return s;
}

uint64_t Pool::allocations() const {
  Lock lock(mutex_);
  return allocations_;
}

std::string Pool::why_pageable() const {
  check_process();
  Lock lock(mutex_);
  return why_pageable_;
}

}  // namespace pystage
