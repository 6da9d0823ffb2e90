#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <cstdint>

namespace pystage {
namespace {

constexpr size_t kMinSlot = 64;            // a cache line: slots of two threads share none
constexpr size_t kPage = 4096;             // granularity of segments
constexpr size_t kGrow = size_t{1} << 20;  // the largest step that pins in well under 1 ms
constexpr auto kPollEvery = std::chrono::milliseconds(50);

size_t round_up(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Calls `poll` without the lock, once in kPollEvery of a wait.
class Polling {
 public:
  Polling(std::unique_lock<std::mutex>& lock, const Poll& poll) : lock_(lock), poll_(poll) {}
  void look() {
    if (!poll_ || Clock::now() < next_) return;
    struct Relock {  // also when it throws
      ~Relock() { lock.lock(); }
      std::unique_lock<std::mutex>& lock;
    } relock{lock_};
    lock_.unlock();
    poll_();
    next_ = Clock::now() + kPollEvery;
  }

 private:
  using Clock = std::chrono::steady_clock;
  std::unique_lock<std::mutex>& lock_;
  const Poll& poll_;
  Clock::time_point next_ = Clock::now() + kPollEvery;
};

std::atomic<uint64_t> g_fork_generation{0};

// Closed pools that slots in flight keep alive. Leaked on purpose: at process exit the memory is
// the system's to take back, and the device may be gone.
struct Orphans {
  std::mutex mutex;
  std::vector<std::shared_ptr<Pool>> pools;
  std::atomic<size_t> count{0};
};
std::atomic<Orphans*> g_orphans{nullptr};

Orphans& orphans() {
  Orphans* current = g_orphans.load(std::memory_order_acquire);
  if (!current) {
    auto* fresh = new Orphans;
    if (g_orphans.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
  }
  return *current;
}

void after_fork_in_child() {
  g_fork_generation.fetch_add(1, std::memory_order_relaxed);
  g_orphans.store(nullptr, std::memory_order_release);  // the parent's; its mutex may be locked
}

[[maybe_unused]] const int g_fork_handler = pthread_atfork(nullptr, nullptr, after_fork_in_child);

}  // namespace

uint64_t fork_generation() { return g_fork_generation.load(std::memory_order_relaxed); }

size_t size_class(size_t bytes) {
  size_t power = kMinSlot;
  while (power <= bytes / 2) power *= 2;
  const size_t step = std::max(kMinSlot, power / 8);
  if (bytes > SIZE_MAX - step) return bytes;  // rounding up would wrap; nothing is this large
  return round_up(std::max(bytes, kMinSlot), step);
}

// --- Lease -------------------------------------------------------------------------------------

Lease::~Lease() { pool_->end_lease(*this); }

FenceHandle Lease::launch_transfer(const Transfer& transfer, StreamHandle stream) {
  pool_->check_process();
  const uint64_t id = pool_->device_.stream_id(stream);
  std::lock_guard<std::mutex> guard(mutex_);
  Reader* reader = readers_;
  while (reader && reader->stream != id) reader = reader->next;
  const bool is_new = reader == nullptr;
  if (is_new) reader = pool_->take_reader();
  try {
    pool_->device_.launch(transfer, stream);
  } catch (...) {
    if (is_new) {
      std::lock_guard<std::mutex> pool_guard(pool_->mutex_);
      pool_->spare_readers_.push_back(reader);
    }
    throw;
  }
  if (is_new) {
    reader->stream = id;
    reader->slot = slot_;
    reader->next = readers_;
    readers_ = reader;
  }
  try {
    reader->before = pool_->draw_ticket();
    pool_->device_.record(reader->fence, stream);
    reader->after = pool_->draw_ticket();
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
    : device_(device), options_(options), fork_generation_(pystage::fork_generation()) {
  // Whole pages, so that the segments' sum is what the device really holds.
  options_.capacity_bytes = options.capacity_bytes / kPage * kPage;
  if (!options_.capacity_bytes) throw Error("capacity_bytes must be at least one page (4096)");
}

// Only reached without leases and without slots in flight: both hold the pool.
Pool::~Pool() {
  if (forked()) return;
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

// A forked child cannot even destroy the pool: the condition variable may count waiting threads
// of the parent, and its destructor would wait for them.
void Pool::abandon(std::shared_ptr<Pool> pool) noexcept {
  new std::shared_ptr<Pool>(std::move(pool));
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
    struct Finish {  // also when `poll` throws
      ~Finish() { pool.finish_if_closed(lock); }
      Pool& pool;
      Lock& lock;
    } finish{*this, lock};
    Polling polling(lock, poll);
    const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                             std::chrono::duration<double>(options_.timeout_s));
    auto pause = std::chrono::microseconds(20);
    try {
      for (reap(lock); in_flight_slots_ && Clock::now() < deadline; reap(lock)) {
        slot_freed_.wait_for(lock, pause);
        pause = std::min(pause * 2, std::chrono::microseconds(1000));
        polling.look();
      }
    } catch (const DeviceError&) {
      // The device is lost. Its fences will never be done: the slots stay in flight, and their
      // segments are left to the end of the process.
    }
  }
  reap_orphans();
}

// Called with the lock held after anything that can leave a closed pool idle.
void Pool::finish_if_closed(Lock& lock) noexcept {
  if (!closed_) return;
  if (in_flight_slots_ && !orphaned_) {
    orphaned_ = true;
    Orphans& o = orphans();
    std::lock_guard<std::mutex> guard(o.mutex);
    o.pools.push_back(shared_from_this());
    o.count = o.pools.size();
  }
  free_segments(lock, detach_idle_segments());
}

bool Pool::have_orphans() { return orphans().count.load(std::memory_order_relaxed) > 0; }

void Pool::reap_orphans() noexcept {
  if (!have_orphans()) return;
  Orphans& o = orphans();
  std::vector<std::shared_ptr<Pool>> pools;
  {
    std::lock_guard<std::mutex> guard(o.mutex);
    pools.swap(o.pools);
    o.count = 0;
  }
  for (auto& pool : pools) {
    Lock lock(pool->mutex_);
    try {
      pool->reap(lock);
    } catch (const DeviceError&) {
      // As in close(): a lost device's fences are never done. The next call looks again.
    }
    pool->orphaned_ = false;
    pool->finish_if_closed(lock);  // puts it back if slots are still in flight
  }
}

// --- Pool: slots -------------------------------------------------------------------------------

std::shared_ptr<Lease> Pool::try_acquire(size_t bytes) {
  check_process();
  if (have_orphans()) return nullptr;
  Lock lock(mutex_);
  check_open();
  if (bytes > options_.capacity_bytes || worth_reaping()) return nullptr;
  Slot* slot = take(std::min(size_class(bytes), options_.capacity_bytes));
  return slot ? make_lease(slot) : nullptr;
}

std::shared_ptr<Lease> Pool::acquire(size_t bytes, const Poll& poll) {
  check_process();
  reap_orphans();
  const bool fits = bytes <= options_.capacity_bytes;
  const size_t need = std::min(size_class(bytes), options_.capacity_bytes);
  Lock lock(mutex_);
  check_open();
  if (!fits) {
    if (options_.at_capacity == AtCapacity::kFallback) return nullptr;
    ++exhausted_;
    throw RequestTooLargeError("a batch of " + std::to_string(bytes) +
                               " bytes can never fit: " + figures() +
                               "; raise capacity_bytes, stage less at once, or use "
                               "at_capacity=\"fallback\"");
  }
  struct Wait {  // counted however it ends
    ~Wait() {
      if (waiting) total += seconds();
    }
    double seconds() const { return std::chrono::duration<double>(Clock::now() - start).count(); }
    double& total;
    Clock::time_point start = Clock::now();
    bool waiting = false;
  } wait{wait_seconds_};
  Polling polling(lock, poll);
  auto pause = std::chrono::microseconds(20);
  for (;;) {
    reap(lock);
    if (closed_) {
      finish_if_closed(lock);  // close() came while grow() held no lock: its segment is new
      check_open();
    }
    if (Slot* slot = take(need)) return make_lease(slot);
    if (grow(lock, need)) continue;
    const double so_far = wait.seconds();
    const bool give_up = options_.at_capacity != AtCapacity::kWait || so_far >= options_.timeout_s;
    if (give_up && reaping_) {
      // Another thread is looking through the queues: what it finds may be enough.
      slot_freed_.wait_for(lock, std::chrono::microseconds(20));
      polling.look();
      continue;
    }
    if (options_.at_capacity == AtCapacity::kFallback) return nullptr;
    if (give_up) raise_exhausted(bytes, wait.waiting ? so_far : 0);
    if (!wait.waiting) ++waits_;
    wait.waiting = true;
    // The end of a lease notifies; the end of a transfer does not, so look again and again.
    const auto left = std::chrono::duration<double>(options_.timeout_s - so_far);
    slot_freed_.wait_for(lock, std::min<std::chrono::duration<double>>(pause, left));
    pause = std::min(pause * 2, std::chrono::microseconds(1000));
    polling.look();
  }
}

std::shared_ptr<Lease> Pool::make_lease(Slot* slot) {
  return std::make_shared<Lease>(shared_from_this(), slot);
}

Slot* Pool::spare_slot() {
  if (spare_slots_.empty()) return &slots_.emplace_back();
  Slot* slot = spare_slots_.back();
  spare_slots_.pop_back();
  return slot;
}

Slot* Pool::take(size_t bytes) {
  Slot probe;
  probe.bytes = bytes;
  auto it = free_.lower_bound(&probe);
  if (it == free_.end()) return nullptr;
  auto node = free_.extract(it);
  Slot* slot = node.value();
  if (slot->bytes > bytes) {
    Slot* rest = spare_slot();
    *rest = Slot{slot->segment, slot->offset + bytes, slot->bytes - bytes, slot, slot->after};
    if (rest->after) rest->after->before = rest;
    slot->after = rest;
    slot->bytes = bytes;
    node.value() = rest;
    free_.insert(std::move(node));
  } else {
    spare_nodes_.push_back(std::move(node));
  }
  slot->state = Slot::State::kLeased;
  ++slot->segment->used_slots;
  ++leased_slots_;
  in_use_bytes_ += bytes;
  high_water_bytes_ = std::max(high_water_bytes_, in_use_bytes_);
  return slot;
}

// Makes a slot free, merged with its free neighbours.
void Pool::give(Slot* slot) {
  in_use_bytes_ -= slot->bytes;
  --slot->segment->used_slots;
  slot->state = Slot::State::kFree;
  FreeSlots::node_type node;
  auto absorb = [&](Slot* left, Slot* right) {  // right goes away
    left->bytes += right->bytes;
    left->after = right->after;
    if (left->after) left->after->before = left;
    spare_slots_.push_back(right);
  };
  auto unlist = [&](Slot* neighbour) {
    if (!node.empty()) spare_nodes_.push_back(std::move(node));
    node = free_.extract(neighbour);
  };
  if (Slot* after = slot->after; after && after->state == Slot::State::kFree) {
    unlist(after);
    absorb(slot, after);
  }
  if (Slot* before = slot->before; before && before->state == Slot::State::kFree) {
    unlist(before);
    absorb(before, slot);
    slot = before;
  }
  if (node.empty() && !spare_nodes_.empty()) {
    node = std::move(spare_nodes_.back());
    spare_nodes_.pop_back();
  }
  if (node.empty()) {
    free_.insert(slot);
  } else {
    node.value() = slot;
    free_.insert(std::move(node));
  }
  slot_freed_.notify_all();
}

Reader* Pool::take_reader() {
  {
    std::lock_guard<std::mutex> guard(mutex_);
    if (!spare_readers_.empty()) {
      Reader* reader = spare_readers_.back();
      spare_readers_.pop_back();
      return reader;
    }
  }
  const FenceHandle fence = device_.create_fence();
  std::lock_guard<std::mutex> guard(mutex_);
  Reader* reader = &readers_.emplace_back();
  reader->fence = fence;
  return reader;
}

void Pool::end_lease(Lease& lease) noexcept {
  if (forked()) return abandon(std::move(lease.pool_));
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
    slot_freed_.notify_one();  // a waiting thread may look for the fence sooner
  }
  finish_if_closed(lock);
}

// Takes a reader whose fence is done off its slot, and frees the slot if it was the last.
void Pool::retire(Reader* reader) {
  Slot* slot = reader->slot;
  reader->next = nullptr;
  spare_readers_.push_back(reader);
  if (--slot->pending > 0) return;
  --in_flight_slots_;
  in_flight_bytes_ -= slot->bytes;
  give(slot);
}

// Frees the slots in flight whose fences are done. Drops the lock around each query.
void Pool::reap(Lock& lock) {
  if (reaping_ || !in_flight_slots_) return;
  reaping_ = true;
  struct Done {  // also when a query throws
    ~Done() {
      if (!lock.owns_lock()) lock.lock();
      reaping = false;
    }
    Lock& lock;
    bool& reaping;
  } done_reaping{lock, reaping_};
  for (size_t q = 0; q < queues_.size();) {
    bool newest = true;  // first ask the newest fence, which vouches for most of the others
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
      Reader* reader = queues_[q].head;
      while (reader && (reader == asked || reader->after < asked->before)) {
        const bool last = reader == asked;
        queues_[q].head = reader->next;
        retire(reader);
        reader = last ? nullptr : queues_[q].head;
      }
    }
    if (queues_[q].head) {
      ++q;
    } else {  // streams come and go: keep no queue for one that is idle
      queues_[q] = queues_.back();
      queues_.pop_back();
    }
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
  return true;
}

void Pool::allocate_segment(Lock& lock, size_t bytes) {
  reserved_bytes_ += bytes;
  HostMemory memory;
  std::string why;
  lock.unlock();
  try {
    memory = device_.allocate(bytes, &why);
  } catch (...) {
    lock.lock();
    reserved_bytes_ -= bytes;
    throw;
  }
  lock.lock();
  ++allocations_;
  if (memory.fallback) pageable_bytes_ += bytes;
  if (!why.empty()) why_pageable_ = why;
  Segment& segment = segments_.emplace_back();
  segment.memory = memory;
  segment.id = next_segment_id_++;
  Slot* slot = spare_slot();
  *slot = Slot{&segment, 0, bytes};
  segment.first = slot;
  free_.insert(slot);
  slot_freed_.notify_all();
}

// Other sizes have left idle segments that use up the capacity: gives them back, if that helps.
bool Pool::release_idle_for(Lock& lock, size_t need) {
  size_t room = options_.capacity_bytes - reserved_bytes_;
  for (const Segment& segment : segments_)
    if (!segment.used_slots) room += segment.memory.bytes;
  if (room < need) return false;
  free_segments(lock, detach_idle_segments());
  return true;
}

std::vector<HostMemory> Pool::detach_idle_segments() {
  std::vector<HostMemory> memory;
  for (auto it = segments_.begin(); it != segments_.end();) {
    if (it->used_slots) {
      ++it;
      continue;
    }
    memory.push_back(it->memory);
    free_.erase(it->first);
    spare_slots_.push_back(it->first);
    it = segments_.erase(it);
  }
  return memory;
}

// The memory counts as reserved until the device has it back.
void Pool::free_segments(Lock& lock, const std::vector<HostMemory>& memory) {
  if (memory.empty()) return;
  lock.unlock();
  for (const HostMemory& m : memory) device_.free(m);
  lock.lock();
  for (const HostMemory& m : memory) {
    reserved_bytes_ -= m.bytes;
    if (m.fallback) pageable_bytes_ -= m.bytes;
    ++frees_;
  }
}

size_t Pool::trim() {
  check_process();
  reap_orphans();
  Lock lock(mutex_);
  reap(lock);
  const auto memory = detach_idle_segments();
  free_segments(lock, memory);
  size_t bytes = 0;
  for (const HostMemory& m : memory) bytes += m.bytes;
  return bytes;
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
  try {
    reap(lock);
  } catch (const DeviceError&) {
    // Figures must be had of a pool whose device is lost: its slots are in flight for good.
  }
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

std::string Pool::why_pageable() const {
  check_process();
  Lock lock(mutex_);
  return why_pageable_;
}

}  // namespace pystage
