// Collectives over a shared memory segment among the ranks of one host. Knows nothing of Python.
//
// The segment: a page that belongs to the one who made it (collectives/shm.py), a `Line` a rank, and two slots a rank.
//
// Every collective is a sequence of steps. In step k a rank writes what it has to say into its slot k % 2, publishes k, waits
// until all ranks have published k, and reads the others' slots k % 2. Two slots are enough, and no second barrier is
// needed: a rank that writes slot k % 2 again, in step k + 2, has seen all ranks publish k + 1, and a rank publishes k + 1 only
// after it has read all that it wants of step k. This holds because in every step every rank waits for every rank.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "sum.hpp"

namespace qtp {

enum State : uint32_t { kOpen, kClosed, kAborted, kFailed };

// What a rank tells the others. Two pieces, so that those who go to sleep do not disturb those who spin.
struct alignas(128) Line {
  std::atomic<uint64_t> step;    // written by its rank: how many steps it has published
  std::atomic<uint64_t> tag[2];  // which operation step k belongs to, at k % 2
  alignas(128) std::atomic<uint32_t> bell;  // changes when its rank publishes and someone sleeps; a futex
  std::atomic<uint32_t> sleepers;           // written by the others: how many wait for the bell
  std::atomic<uint32_t> state;
};
static_assert(sizeof(Line) == 256 && std::atomic<uint64_t>::is_always_lock_free, "laid out alike by every process");

constexpr size_t kPage = 4096;

size_t segment_bytes(int size, size_t slot_bytes);

// How a wait treats the thread that calls: `before_long` once before it lasts, `interrupted` now and then while it lasts.
struct Caller {
  void (*before_long)(void* self);
  bool (*interrupted)(void* self);
  void* self;
};

class Group {
 public:
  struct Shape {
    int rank, size;
    size_t slot_bytes;  // a multiple of kPage
    size_t one_step_bytes;
    double timeout;   // seconds
    double spin;      // seconds
    const int* pids;  // size of them
  };

  // Maps `segment_bytes` of the descriptor, which stays the caller's. Check `error()`.
  Group(int descriptor, const Shape& shape);
  ~Group();
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  // Each returns false when it failed; then `error()` says why, unless the caller was interrupted, and the group is of no more
  // use. Sizes are those that all ranks pass; tensors are contiguous.
  bool all_reduce(char* x, size_t count, DType dtype, const Caller& caller);
  bool all_gather(const char* x, char* out, size_t rows, const size_t* row_bytes, const Caller& caller);
  bool reduce_scatter(const char* x, char* out, size_t part, DType dtype, const Caller& caller);
  bool broadcast(char* x, size_t bytes, int source, const Caller& caller);
  bool all_to_all(const char* x, char* out, size_t part_bytes, const Caller& caller);
  bool barrier(const Caller& caller);

  // From any thread: the wait that runs, and every later one, fails.
  void leave(State state);
  bool left() const { return left_.load(std::memory_order_relaxed) != kOpen; }

  int size() const { return shape_.size; }
  const char* error() const { return error_; }

 private:
  enum Op : uint64_t { kAllReduce = 1, kAllGather, kReduceScatter, kBroadcast, kAllToAll, kBarrier };

  char* mine() const { return slot(shape_.rank, step_ + 1); }        // to be written before the next `meet`
  const char* of(int rank) const { return slot(rank, step_); }       // to be read after it
  char* slot(int rank, uint64_t step) const {
    return slots_ + (size_t(rank) * 2 + (step & 1)) * shape_.slot_bytes;
  }
  bool enter();
  bool meet(uint64_t tag, const Caller& caller);
  bool wait_long(int rank, const Caller& caller);
  bool healthy(double deadline, const Caller& caller);
  bool late(int rank) const { return lines_[rank].step.load(std::memory_order_acquire) < step_; }
  bool disagree(uint64_t tag);
  bool fail(const char* format, ...) __attribute__((format(printf, 2, 3)));
  bool fail_late(double timeout);
  void announce(State state);

  Shape shape_;
  char* base_ = nullptr;
  size_t bytes_ = 0;
  Line* lines_ = nullptr;
  char* slots_ = nullptr;
  uint64_t step_ = 0;
  std::atomic<uint32_t> left_{kOpen};
  int* pids_;
  int* watched_;          // pidfds; -1 where there is none
  const void** inputs_;   // room for the inputs of a sum
  char error_[400] = "";
};

}  // namespace qtp
