// A bounded pool of pinned staging memory. Plain C++: no torch, no CUDA, no Python.
//
// Note [Who may touch a slot, and when]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// A slot is written by one thread, then read by any number of streams and threads, then handed out
// again. The hazard is that the readers run later than the code that started them: a transfer is
// queued on a stream, and the Python object that staged the ids may be gone long before the
// device reads them. So a slot has two kinds of owner, and it is free only when both are done:
//
//   the lease    held by the staged tokens and every slice of them. While it lives, the host may
//                read the slot, and further transfers may be launched from it.
//   the readers  one per stream that a transfer was launched on, each with a fence recorded on
//                that stream right after the launch. A further transfer on the same stream records
//                the same fence again. A stream works in order, so the last point covers the
//                earlier ones.
//
//   free --acquire--> leased --last lease gone--> in flight --every fence done--> free
//                        \--no reader----------------------------------------------/
//
// 1. Only the holder of a fresh lease writes a slot, before it shares the lease or launches
//    anything. From then on the slot is read-only until it is free.
// 2. launch_transfer() records the fence on the stream of the launch before it returns. So all
//    reads of the slot come before the fence on their stream, and no transfer can be launched
//    after the last fence, because a launch needs the lease. (A transfer may read the slot before
//    earlier work on its stream has finished, because the slot is complete at the launch. It
//    writes its output only after that work.) If recording fails, the pool cannot know when the
//    slot is last read, so it quarantines the slot: the slot is never handed out again.
// 3. Slots in flight wait in one queue per stream. A fence that is not done ends the pass through
//    its own queue only, so a stuck stream keeps its own slots and no others. A queue is in the
//    order in which the leases ended, not in the order of the fences. This can delay a slot
//    behind another slot of the same stream, but never frees a slot early. A fence that is done
//    also proves that other readers of its stream are done: those whose launch() had returned
//    before the fence's record() began. Each transfer draws a ticket between its two calls, so
//    every reader in the queue with a lower ticket is one of them.
// 4. The pool makes no device call while it holds its mutex: a launch or a query may take long,
//    and an allocation takes milliseconds. One thread at a time goes through the queues. Each
//    lease has its own mutex, which serialises the launches from that lease.
// 5. Memory goes back to the device only when its whole segment is free. A pool that is closed or
//    dropped while leases are out or slots are in flight stays alive until the last of them is
//    done. The next call on any pool checks the slots in flight of such a pool. At process exit
//    it is left to the operating system. The code that ends a lease or frees memory runs in
//    destructors, so it neither throws nor allocates: the calls that may fail have already
//    reserved the room that it needs.
// 6. After fork, the child shares neither streams nor worker threads with the parent, and it may
//    have inherited a locked mutex. So every entry point first checks the fork generation, and
//    touches nothing in a child. A wait checks it too after a call of `poll`, which may fork.
//
// csrc/tests/test_schedules.cpp runs this code under every interleaving of a few threads and
// streams. schedule_mutants.sh breaks the code in one place at a time and checks that these tests
// notice.
//
// Note [Slots out of segments]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// Pinning costs from 60 us (1 MiB) to 45 ms (64 MiB), and unpinning stalls the device. So the pool
// takes few large segments from the device and cuts slots out of them. It takes the best fit, and
// the lowest address among equals, to reuse the slot that was handed back last, which is still in
// the CPU's cache. Free neighbours are merged. After warm-up, no call allocates or frees pinned
// memory, whatever the sizes of the requests.
// The capacity limits the sum of the segments, so it includes all waste. Sizes are rounded up to
// eight classes per doubling, which are at least a cache line apart. The rounding wastes at most
// 12.5 % of a request of 512 bytes or more, and at most 63 bytes of a smaller one. Gaps between
// slots are not waste: the next request that fits takes them.
//
// Note [Debug canaries]
// ~~~~~~~~~~~~~~~~~~~~~
// If PYSTAGE_DEBUG_CANARIES=1 is in the environment when a pool is made, the pool puts guard bytes
// of 0xCA around each leased range: 64 bytes in front, and at least 64 bytes behind, beginning
// with the first byte that was not requested. It fills free memory with 0xDB. Both read as
// negative ids, as int32 and as int64. The pool checks the guards when the lease ends, and free
// memory when it hands it out or gives it back to the device. If a byte differs, the pool aborts
// the process, with a message that names the slot and the side. It aborts because memory is
// corrupt, so other slots may already have delivered wrong ids, and because the core file then
// shows the state closest to the stray write.
// Each slot takes 128 bytes more, so the largest request is the capacity less 128 bytes, and each
// byte of a slot is written and read once more. Without the variable, the cost is one branch each
// time a slot is handed out or returned.
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
  size_t reserved_bytes = 0;    // allocated from the device now
  size_t in_use_bytes = 0;      // slots leased, in flight or quarantined
  size_t high_water_bytes = 0;  // the highest in_use_bytes so far
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
  uint64_t fallbacks = 0;  // stages that used torch's own allocator instead
  uint64_t allocations = 0;
  uint64_t frees = 0;
  uint64_t wire_bytes = 0;
  uint64_t kernel_transfers = 0;
  uint64_t copy_engine_transfers = 0;
  uint64_t eager_transfers = 0;  // those of the two above that stage() launched
  uint64_t fallback_transfers = 0;
};

// Counters that are incremented without the pool's mutex.
struct PoolCounters {
  std::atomic<uint64_t> stages{0}, tokens{0}, range_errors{0}, fallbacks{0}, wire_bytes{0},
      kernel_transfers{0}, copy_engine_transfers{0}, eager_transfers{0}, fallback_transfers{0};
};

// The bytes that a request of `bytes` takes from a pool. See Note [Slots out of segments].
size_t size_class(size_t bytes);

// A waiting call runs this about every 50 ms, without the pool's mutex, for example to check for
// Ctrl-C. An exception that it throws ends the wait.
using Poll = std::function<void()>;

class Pool;
struct Segment;
struct Slot;

// A stream that reads a slot, and the fence after its last transfer. The pool reuses the object
// together with its fence.
struct Reader {
  uint64_t stream = 0;  // Device::stream_id
  FenceHandle fence = nullptr;
  Slot* slot = nullptr;
  Reader* next = nullptr;  // in the slot's list while leased, in its stream's queue in flight
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
  Slot* before = nullptr;  // neighbour in the segment
  Slot* after = nullptr;   // neighbour in the segment, or the next spare slot
  State state = State::kFree;
  size_t pending = 0;         // readers in flight
  FreeSlots::node_type node;  // this slot's node of the free set, while not in that set
};

struct Segment {
  HostMemory memory;
  uint64_t id = 0;  // order of allocation
  Slot* first = nullptr;
  size_t used_slots = 0;
};

// A slot is not handed out again while its lease lives. The staged tokens and all their slices
// share the lease.
class Lease {
 public:
  Lease(std::shared_ptr<Pool> pool, Slot* slot, size_t offset, size_t bytes)
      : pool_(std::move(pool)), slot_(slot), offset_(offset), bytes_(bytes) {}
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  char* data() const { return slot_->segment->memory.host + offset_; }
  // The address that a kernel reads; null if the memory is not mapped.
  const char* device_data() const {
    const char* base = slot_->segment->memory.device;
    return base ? base + offset_ : nullptr;
  }
  size_t bytes() const { return bytes_; }
  bool pinned() const { return slot_->segment->memory.pinned; }
  Pool& pool() const { return *pool_; }

  // Launches a transfer from this slot and then records the slot's fence for that stream. Returns
  // this fence, which is valid as long as the lease.
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
  // The owner must call close() or drop() at the end: only then do slots in flight keep the pool
  // alive.
  static std::shared_ptr<Pool> create(Device& device, const PoolOptions& options);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Returns a slot if one is free now, else null. Never waits for a slot, never grows the pool.
  // With `ask_device` false it makes no device call, and also returns null if slots in flight
  // should be checked first.
  std::shared_ptr<Lease> try_acquire(size_t bytes, bool ask_device = true);
  // Returns a slot. If none is free it grows the pool, waits or throws, as the policy says. Null
  // only under kFallback.
  std::shared_ptr<Lease> acquire(size_t bytes, const Poll& poll = {});

  // Gives segments without a slot in use back to the device. Returns their size in bytes.
  size_t trim();
  // Ends the handing out of slots: waiting threads fail. Waits up to timeout_s for slots in flight.
  // Leases that are out stay valid, and their memory is freed after they end. If `poll` ends the
  // wait, the pool is closed nevertheless.
  void close(const Poll& poll = {});
  bool closed() const;
  // For the end of the owner: like close(), but without waiting.
  static void drop(std::shared_ptr<Pool> pool) noexcept;

  PoolStats stats();
  uint64_t allocations() const;  // as in stats(), but takes only the mutex
  PoolCounters& counters() { return counters_; }
  Device& device() const { return device_; }
  const PoolOptions& options() const { return options_; }
  // Why some memory could not be pinned. Empty if all memory is pinned or the device does not pin.
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
  // The bytes that a request takes from a segment.
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
  // The pool hands out free slots without checking those in flight, until there are so many in
  // flight that they push the rest out of the CPU's cache. Then one query serves them all. (A query
  // takes 1.4 us on an H100's host when its own code and data are not in the cache.)
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
  const size_t guards_;  // bytes of the two guards around a leased range; 0 without canaries
  PoolCounters counters_;
  sync::Atomic<uint64_t> tickets_{1};

  // An orphan (a closed pool with slots in flight) keeps itself alive through self_. Only the
  // thread that adds the pool to the list of orphans, or removes it, touches these two.
  std::shared_ptr<Pool> self_;
  Pool* next_orphan_ = nullptr;

  mutable sync::Mutex mutex_;  // guards everything below; never held during a device call
  sync::ConditionVariable slot_freed_;
  bool closed_ = false;
  bool reaping_ = false;
  size_t allocating_ = 0;  // threads that take a segment from the device
  size_t freeing_ = 0;     // threads that give segments back to the device
  bool orphaned_ = false;
  std::string why_pageable_;
  std::list<Segment> segments_;
  uint64_t next_segment_id_ = 1;
  std::deque<Slot> slots_;  // storage; unused slots, with their nodes, are in spare_slots_
  Slot* spare_slots_ = nullptr;
  FreeSlots free_;
  std::deque<Reader> readers_;  // storage; unused readers, with their fences, are in spare_readers_
  Reader* spare_readers_ = nullptr;
  std::vector<StreamQueue> queues_;  // has capacity for one queue per reader
  size_t reserved_bytes_ = 0;        // includes an allocation before it is made
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

// Incremented in every child of fork.
uint64_t fork_generation();

}  // namespace pystage
