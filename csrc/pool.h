// A bounded pool of pinned staging memory. Plain C++: no torch, no CUDA, no Python.
//
// Note [Who may touch a slot, and when]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// A slot is written by one thread, then read by any number of streams and threads, then handed out
// again. The hazard is that the readers run later than the code that started them: a transfer is
// queued on a stream, and the Python object that staged the ids may be gone long before the
// device reads them. So a slot has two kinds of owner, and both must let go:
//
//   the lease    held by the staged tokens and every slice of them. While it lives, the host may
//                read the slot, and further transfers may be launched from it.
//   the readers  one per stream that a transfer was launched on, each with a fence recorded on
//                that stream right after the launch. Another transfer on the same stream records
//                the same fence again, for streams are ordered: the last point covers the others.
//
//   free --acquire--> leased --last lease gone--> in flight --every fence done--> free
//                        \--no reader----------------------------------------------/
//
// 1. Only the holder of a fresh lease writes a slot, before it shares the lease or launches
//    anything. From then on the slot is read-only until it is free.
// 2. A fence is recorded before launch_transfer() returns, on the stream of the launch: whatever
//    reads the slot is ahead of the fence, and no later caller can slip a transfer past it, since
//    that takes the lease. (A transfer may read before what is ahead of it on the stream is done:
//    the slot is complete from the launch on. What it writes waits for its turn.) If recording
//    fails, nobody can tell when the slot is read last, so it is quarantined: never handed out
//    again.
// 3. Slots in flight wait in one queue per stream. A fence that is not done stops the look through
//    its own queue only, so a stuck stream keeps its own slots and no others. Order within a
//    queue is the order of the leases' ends, not of the fences; that can delay a slot behind
//    another of the same stream, never free it early. A fence that is done vouches for the other
//    readers of its stream whose launch() had returned before its own record() began: tickets
//    drawn between the two calls tell.
// 4. Device calls are made without the pool's mutex (a launch or a query may take long, an
//    allocation takes milliseconds). One thread at a time looks through the queues; launches on
//    one lease are serialised by that lease's own mutex.
// 5. Memory goes back to the device only when its whole segment is free. A pool that is closed,
//    or dropped, with leases out or slots in flight lives on until the last of them is done; it is
//    then looked at by the next call on any pool. At process exit it is left to the system.
//    Whatever ends or frees runs in destructors, so it neither throws nor allocates: room for what
//    it has to keep is made by the calls that may fail.
// 6. After fork the child shares neither streams nor worker threads with the parent, and may have
//    inherited a locked mutex: every entry point checks the fork generation first and touches
//    nothing; so does a wait whose `poll` forked.
//
// csrc/tests/test_schedules.cpp runs all this under every interleaving of a few threads and
// streams, and schedule_mutants.sh breaks it in one place after another to see that it notices.
//
// Note [Slots out of segments]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// Pinning costs from 60 us (1 MiB) to 45 ms (64 MiB) and unpinning stalls the device, so the pool
// takes few large segments and cuts slots out of them: best fit, lowest address first (the slot
// handed back last is the one in the CPU's cache), neighbours merged when they come free. After
// warm-up no call allocates or frees pinned memory, whatever sizes come.
// The capacity bounds the segments' sum, so all waste is inside it. Sizes are rounded up to eight
// classes per doubling, at least a cache line apart: the rounding wastes at most 12.5 % of a
// request of 512 bytes or more, and at most 63 bytes of a smaller one. Gaps between slots are not
// waste: the next request that fits takes them.
//
// Note [Debug canaries]
// ~~~~~~~~~~~~~~~~~~~~~
// With PYSTAGE_DEBUG_CANARIES=1 in the environment when a pool is made, 64 bytes in front of each
// leased range and at least as many behind it, from the first byte that was not asked for, hold
// 0xCA; free memory holds 0xDB: negative ids, of either width. The guards are checked when the
// lease ends, free memory when it is handed out or goes back to the device. A byte that differs
// ends the process, with a message that names the slot and the side: memory is corrupt, so other
// slots may bring wrong ids already, and the core file shows the state closest to the stray write.
// Each slot takes 128 bytes more, so the largest request is the capacity less 128 bytes, and each
// byte of a slot is written and read once more. Without the variable one branch per hand-out and
// return is all.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "device.h"
#include "errors.h"
#include "sync.h"

namespace pystage {

// What acquire() does when no slot is free and the capacity is reached.
enum class AtCapacity : uint8_t { kWait, kFallback, kRaise };

struct PoolOptions {
  size_t capacity_bytes = size_t{64} << 20;
  size_t reserve_bytes = size_t{8} << 20;  // pinned at construction; at most the capacity
  AtCapacity at_capacity = AtCapacity::kWait;
  double timeout_s = 1.0;
};

struct PoolStats {
  size_t capacity_bytes = 0;
  size_t reserved_bytes = 0;    // held from the device now
  size_t in_use_bytes = 0;      // slots leased, in flight or quarantined
  size_t high_water_bytes = 0;  // the most in_use_bytes ever was
  size_t pageable_bytes = 0;    // the part of reserved_bytes that could not be pinned
  size_t leased_slots = 0;
  size_t in_flight_slots = 0;
  size_t quarantined_slots = 0;
  uint64_t stages = 0;
  uint64_t tokens = 0;
  uint64_t range_errors = 0;
  uint64_t waits = 0;
  double wait_seconds = 0;
  uint64_t exhausted = 0;  // PoolExhaustedError raised
  uint64_t fallbacks = 0;  // stages that left the pool for torch's own allocator
  uint64_t allocations = 0;
  uint64_t frees = 0;
  uint64_t wire_bytes = 0;
  uint64_t kernel_transfers = 0;
  uint64_t copy_engine_transfers = 0;
  uint64_t eager_transfers = 0;  // of the two above, launched at stage time
  uint64_t fallback_transfers = 0;
};

// Counters that are bumped outside the pool's mutex.
struct PoolCounters {
  std::atomic<uint64_t> stages{0}, tokens{0}, range_errors{0}, fallbacks{0}, wire_bytes{0},
      kernel_transfers{0}, copy_engine_transfers{0}, eager_transfers{0}, fallback_transfers{0};
};

// Bytes that a request of `bytes` takes from a pool. See Note [Slots out of segments].
size_t size_class(size_t bytes);

// What a waiting call does about every 50 ms, without the pool's mutex: looks for Ctrl-C, say. What
// it throws ends the wait.
using Poll = std::function<void()>;

class Pool;
struct Segment;
struct Slot;

// A stream that reads a slot, and the fence after its last transfer. Kept for reuse with its fence.
struct Reader {
  uint64_t stream = 0;  // Device::stream_id
  FenceHandle fence = nullptr;
  Slot* slot = nullptr;
  Reader* next = nullptr;  // of the slot while leased, of its stream's queue while in flight
  uint64_t ticket = 0;     // drawn between the last launch() and its record()
};

struct BySizeThenAddress {
  bool operator()(const Slot* a, const Slot* b) const;
};
using FreeSlots = std::set<Slot*, BySizeThenAddress>;

// A range of a segment, free or not.
struct Slot {
  enum class State : uint8_t { kFree, kLeased, kInFlight, kQuarantined };
  Segment* segment = nullptr;
  size_t offset = 0;
  size_t bytes = 0;
  Slot* before = nullptr;  // neighbours in the segment
  Slot* after = nullptr;   // or the next of the spare ones
  State state = State::kFree;
  size_t pending = 0;         // readers in flight
  FreeSlots::node_type node;  // of this slot, while it is not among the free ones
};

struct Segment {
  HostMemory memory;
  uint64_t id = 0;  // order of allocation
  Slot* first = nullptr;
  size_t used_slots = 0;
};

// Keeps a slot from being handed out again. Shared by the staged tokens and all their slices.
class Lease {
 public:
  Lease(std::shared_ptr<Pool> pool, Slot* slot, size_t offset, size_t bytes)
      : pool_(std::move(pool)), slot_(slot), offset_(offset), bytes_(bytes) {}
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  char* data() const { return slot_->segment->memory.host + offset_; }
  // The address a kernel reads; null where the memory is not mapped.
  const char* device_data() const {
    const char* base = slot_->segment->memory.device;
    return base ? base + offset_ : nullptr;
  }
  size_t bytes() const { return bytes_; }
  bool pinned() const { return slot_->segment->memory.pinned; }
  Pool& pool() const { return *pool_; }

  // Launches a transfer from this slot and fences the slot on the stream. The returned fence is
  // this slot's on that stream, valid as long as the lease.
  FenceHandle launch_transfer(const Transfer& transfer, StreamHandle stream);

 private:
  friend class Pool;
  std::shared_ptr<Pool> pool_;
  Slot* slot_;
  const size_t offset_;  // in the segment
  const size_t bytes_;
  sync::Mutex mutex_;  // serialises launches; guards readers_ and quarantined_
  Reader* readers_ = nullptr;
  bool quarantined_ = false;
};

class Pool : public std::enable_shared_from_this<Pool> {
 public:
  // The owner must end with close() or drop(): slots in flight keep the pool alive only then.
  static std::shared_ptr<Pool> create(Device& device, const PoolOptions& options);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // A slot if one is free now: never waits, never allocates. Null otherwise. Without `ask_device`
  // it makes no device call: null too where slots in flight should be looked at first.
  std::shared_ptr<Lease> try_acquire(size_t bytes, bool ask_device = true);
  // A slot, after growing, waiting or failing as the policy says. Null only under kFallback.
  std::shared_ptr<Lease> acquire(size_t bytes, const Poll& poll = {});

  // Gives segments without a slot in use back to the device. Returns the bytes.
  size_t trim();
  // No more slots are handed out; waiting threads fail. Waits up to timeout_s for slots in flight;
  // leases that are out stay valid, and what they hold is freed after them. Where `poll` ends the
  // wait the pool is closed all the same.
  void close(const Poll& poll = {});
  bool closed() const;
  // The owner is gone: as close(), without waiting.
  static void drop(std::shared_ptr<Pool> pool) noexcept;

  PoolStats stats();
  uint64_t allocations() const;  // that of stats(), at the cost of a lock
  PoolCounters& counters() { return counters_; }
  Device& device() const { return device_; }
  const PoolOptions& options() const { return options_; }
  // Why some memory could not be pinned; empty if all is, or none need be.
  std::string why_pageable() const;
  // Throws ForkedProcessError in a child of the process that made the pool.
  void check_process() const;
  // Throws PoolClosedError, or ForkedProcessError.
  void check_usable() const;

 private:
  friend class Lease;
  using Lock = std::unique_lock<sync::Mutex>;
  using Clock = sync::Clock;

  struct StreamQueue {
    uint64_t stream;  // Device::stream_id
    Reader* head;
    Reader* tail;
  };

  Pool(Device& device, const PoolOptions& options);

  bool forked() const;
  void check_open() const;
  uint64_t draw_ticket() { return tickets_.fetch_add(1); }
  bool fits(size_t bytes) const { return bytes <= options_.capacity_bytes - guards_; }
  // What a request takes of a segment.
  size_t with_guards(size_t bytes) const {
    return std::min(size_class(bytes) + guards_, options_.capacity_bytes);
  }
  void arm(const Slot& slot, size_t bytes) const noexcept;
  void check_guards(const Lease& lease) const noexcept;
  void check_poison(const Segment& segment, size_t offset, size_t bytes) const noexcept;
  [[noreturn]] void overwritten(const Segment& segment, size_t offset, size_t bytes,
                                const char* where, const char* at) const noexcept;
  Slot* spare_slot();
  void put_by(Slot* slot) noexcept;
  Slot* take(size_t bytes);
  void give(Slot* slot) noexcept;
  bool release_idle_for(Lock& lock, size_t bytes);
  bool grow(Lock& lock, size_t bytes);
  void allocate_segment(Lock& lock, size_t bytes);
  std::list<Segment> detach_idle_segments() noexcept;
  size_t free_segments(Lock& lock, const std::list<Segment>& segments) noexcept;
  // Free slots are handed out without a look at those in flight, until these are so many that
  // they push the rest out of the CPU's cache. One query (1.4 us on an H100's host when it is not
  // in the cache itself) then serves them all.
  bool worth_reaping() const {
    return in_flight_slots_ >= 16 || in_flight_bytes_ >= size_t{256} << 10;
  }
  void reap(Lock& lock);
  bool try_reap(Lock& lock) noexcept;
  void retire(Reader* reader) noexcept;
  void end_lease(Lease& lease) noexcept;
  void finish_if_closed(Lock& lock) noexcept;
  std::shared_ptr<Lease> make_lease(Slot* slot, size_t bytes);
  Reader* take_reader();
  void put_by(Reader* reader) noexcept;
  std::string figures() const;
  [[noreturn]] void raise_exhausted(size_t bytes, double waited_s);
  static void abandon(std::shared_ptr<Pool> pool) noexcept;
  static bool have_orphans();
  static void reap_orphans() noexcept;

  Device& device_;
  PoolOptions options_;
  const uint64_t fork_generation_;
  const size_t guards_;  // bytes around what is leased of a slot
  PoolCounters counters_;
  sync::Atomic<uint64_t> tickets_{1};

  // While the pool is an orphan it keeps itself alive; both belong to who put it among the orphans,
  // or took it out.
  std::shared_ptr<Pool> self_;
  Pool* next_orphan_ = nullptr;

  mutable sync::Mutex mutex_;  // guards everything below; never held during a device call
  sync::ConditionVariable slot_freed_;
  bool closed_ = false;
  bool reaping_ = false;
  bool orphaned_ = false;
  std::string why_pageable_;
  std::list<Segment> segments_;
  uint64_t next_segment_id_ = 1;
  std::deque<Slot> slots_;  // storage; unused ones, each with its node, in spare_slots_
  Slot* spare_slots_ = nullptr;
  FreeSlots free_;
  std::deque<Reader> readers_;  // storage; unused ones, each with its fence, in spare_readers_
  Reader* spare_readers_ = nullptr;
  std::vector<StreamQueue> queues_;  // room for one a reader
  size_t reserved_bytes_ = 0;        // counts an allocation from before it is made
  size_t pageable_bytes_ = 0;
  size_t in_use_bytes_ = 0;
  size_t in_flight_bytes_ = 0;
  size_t high_water_bytes_ = 0;
  size_t leased_slots_ = 0;
  size_t in_flight_slots_ = 0;
  size_t quarantined_slots_ = 0;
  uint64_t waits_ = 0;
  double wait_seconds_ = 0;
  uint64_t exhausted_ = 0;
  uint64_t allocations_ = 0;
  uint64_t frees_ = 0;
};

// Bumped in every child of fork.
uint64_t fork_generation();

}  // namespace pystage
