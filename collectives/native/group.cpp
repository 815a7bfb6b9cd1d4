#include "group.hpp"

#include <cerrno>
#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <linux/futex.h>
#include <new>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434  // the same number on all architectures
#endif

namespace qtp {
namespace {

constexpr int kBriefSpins = 200;
constexpr double kSlice = 0.05;  // seconds of sleep between two looks at the peers
constexpr size_t kSumAlign = 64;  // elements
constexpr size_t kChunks = 4;     // at least, so that ranks copy and add while others do

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Not the private kind of futex: the ranks are processes.
void futex_wait(std::atomic<uint32_t>* word, uint32_t expected, double seconds) {
  timespec t;
  t.tv_sec = time_t(seconds);
  t.tv_nsec = long((seconds - double(t.tv_sec)) * 1e9);
  syscall(SYS_futex, word, FUTEX_WAIT, expected, &t, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>* word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

bool ended(int watched, int pid) {
  if (watched >= 0) {
    pollfd p{watched, POLLIN, 0};
    return poll(&p, 1, 0) > 0;
  }
  return kill(pid, 0) != 0 && errno == ESRCH;
}

size_t least(size_t a, size_t b) { return a < b ? a : b; }

const char* name_of(uint64_t op) {
  static const char* const names[] = {"?", "all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "barrier"};
  return names[op < sizeof names / sizeof *names ? op : 0];
}

// Which operation, on what and how much: what all ranks must agree on. Without it, ranks that disagree would read nonsense.
uint64_t tag_of(uint64_t op, uint64_t detail, uint64_t amount) {
  return op << 56 | (detail & 0xFFFF) << 40 | (amount & 0xFFFFFFFFFFull);
}

}  // namespace

size_t segment_bytes(int size, size_t slot_bytes) {
  const size_t lines = (size_t(size) * sizeof(Line) + kPage - 1) / kPage * kPage;
  return kPage + lines + size_t(size) * 2 * slot_bytes;
}

Group::Group(int descriptor, const Shape& shape) : shape_(shape), bytes_(segment_bytes(shape.size, shape.slot_bytes)) {
  const size_t n = size_t(shape.size);
  pids_ = new int[n];
  watched_ = new int[n];
  inputs_ = new const void*[n];
  for (size_t i = 0; i < n; ++i) {
    pids_[i] = shape.pids[i];
    watched_[i] = pids_[i] == getpid() ? -1 : int(syscall(SYS_pidfd_open, pids_[i], 0));
  }
  void* base = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor, 0);
  if (base == MAP_FAILED) {
    fail("cannot map %zu bytes: %s", bytes_, std::strerror(errno));
    return;
  }
  base_ = static_cast<char*>(base);
  lines_ = reinterpret_cast<Line*>(base_ + kPage);  // zeros, as a new segment is, are its first state
  slots_ = base_ + bytes_ - n * 2 * shape.slot_bytes;
}

Group::~Group() {
  if (base_ != nullptr) munmap(base_, bytes_);
  for (int i = 0; i < shape_.size; ++i)
    if (watched_[i] >= 0) close(watched_[i]);
  delete[] pids_;
  delete[] watched_;
  delete[] inputs_;
}

bool Group::all_reduce(char* x, size_t count, DType dtype, const Caller& caller) {
  if (!enter()) return false;
  const size_t item = kItemBytes[dtype], n = size_t(shape_.size), me = size_t(shape_.rank);
  const Sum sum = kernels().sum[dtype];
  const uint64_t tag = tag_of(kAllReduce, dtype, count);
  if (count == 0) return true;
  if (count * item <= shape_.one_step_bytes) {
    std::memcpy(mine(), x, count * item);
    if (!meet(tag, caller)) return false;
    for (size_t r = 0; r < n; ++r) inputs_[r] = r == me ? x : of(int(r));
    sum(x, inputs_, int(n), count);
    return true;
  }
  // In chunks: each rank sums its piece of a chunk, then all copy all pieces. The pieces of a chunk travel with the inputs of
  // the next one, in the second part of the slot.
  const size_t most = shape_.slot_bytes / (n + 1) / item / kSumAlign * kSumAlign;
  const size_t piece = least(most, (count / (kChunks * n) + kSumAlign) / kSumAlign * kSumAlign), chunk = piece * n;
  for (size_t start = 0, before = 0;; before = start, start += chunk) {
    const bool first = start == 0, last = start >= count;
    if (!last) {
      const size_t length = least(chunk, count - start);
      const size_t low = least(me * piece, length), high = least(low + piece, length);
      std::memcpy(mine(), x + start * item, low * item);
      std::memcpy(mine() + high * item, x + (start + high) * item, (length - high) * item);
    }
    if (!meet(tag, caller)) return false;
    if (!first) {
      const size_t length = least(chunk, count - before);
      for (size_t r = 0; r < n; ++r) {
        const size_t low = least(r * piece, length), high = least(low + piece, length);
        if (r != me) std::memcpy(x + (before + low) * item, of(int(r)) + chunk * item, (high - low) * item);
      }
    }
    if (last) return true;
    const size_t length = least(chunk, count - start);
    const size_t low = least(me * piece, length), high = least(low + piece, length);
    char* own = x + (start + low) * item;
    for (size_t r = 0; r < n; ++r) inputs_[r] = r == me ? own : of(int(r)) + low * item;
    sum(own, inputs_, int(n), high - low);
    std::memcpy(mine() + chunk * item, own, (high - low) * item);
  }
}

bool Group::all_gather(const char* x, char* out, size_t rows, const size_t* row_bytes, const Caller& caller) {
  if (!enter()) return false;
  const int n = shape_.size, me = shape_.rank;
  size_t whole = 0, most = 0;
  for (int r = 0; r < n; ++r) {
    whole += row_bytes[r];
    if (row_bytes[r] > most) most = row_bytes[r];
  }
  for (size_t start = 0; start < rows * most; start += shape_.slot_bytes) {
    const size_t own = rows * row_bytes[me];
    if (start < own) std::memcpy(mine(), x + start, least(shape_.slot_bytes, own - start));
    if (!meet(tag_of(kAllGather, rows, rows * whole), caller)) return false;
    char* column = out;
    for (int r = 0; r < n; column += row_bytes[r++]) {
      const size_t width = row_bytes[r], end = least(start + shape_.slot_bytes, rows * width);
      const char* from = r == me ? x + start : of(r);
      for (size_t at = start; at < end;) {
        const size_t row = at / width, offset = at % width, length = least(width - offset, end - at);
        std::memcpy(column + row * whole + offset, from + (at - start), length);
        at += length;
      }
    }
  }
  return true;
}

bool Group::reduce_scatter(const char* x, char* out, size_t part, DType dtype, const Caller& caller) {
  if (!enter()) return false;
  const size_t item = kItemBytes[dtype], n = size_t(shape_.size), me = size_t(shape_.rank);
  const size_t chunk = shape_.slot_bytes / n / item;
  for (size_t start = 0; start < part; start += chunk) {
    const size_t length = least(chunk, part - start);
    for (size_t r = 0; r < n; ++r)
      if (r != me) std::memcpy(mine() + r * chunk * item, x + (r * part + start) * item, length * item);
    if (!meet(tag_of(kReduceScatter, dtype, part), caller)) return false;
    for (size_t r = 0; r < n; ++r) inputs_[r] = r == me ? x + (me * part + start) * item : of(int(r)) + me * chunk * item;
    kernels().sum[dtype](out + start * item, inputs_, int(n), length);
  }
  return true;
}

bool Group::broadcast(char* x, size_t bytes, int source, const Caller& caller) {
  if (!enter()) return false;
  for (size_t start = 0; start < bytes; start += shape_.slot_bytes) {
    const size_t length = least(shape_.slot_bytes, bytes - start);
    if (shape_.rank == source) std::memcpy(mine(), x + start, length);
    if (!meet(tag_of(kBroadcast, uint64_t(source), bytes), caller)) return false;
    if (shape_.rank != source) std::memcpy(x + start, of(source), length);
  }
  return true;
}

bool Group::all_to_all(const char* x, char* out, size_t part_bytes, const Caller& caller) {
  if (!enter()) return false;
  const size_t n = size_t(shape_.size), me = size_t(shape_.rank), chunk = shape_.slot_bytes / n;
  for (size_t start = 0; start < part_bytes; start += chunk) {
    const size_t length = least(chunk, part_bytes - start);
    for (size_t r = 0; r < n; ++r)
      if (r != me) std::memcpy(mine() + r * chunk, x + r * part_bytes + start, length);
    if (!meet(tag_of(kAllToAll, 0, part_bytes), caller)) return false;
    for (size_t r = 0; r < n; ++r)
      std::memcpy(out + r * part_bytes + start, r == me ? x + me * part_bytes + start : of(int(r)) + me * chunk, length);
  }
  return true;
}

bool Group::barrier(const Caller& caller) { return enter() && meet(tag_of(kBarrier, 0, 0), caller); }

void Group::leave(State state) {
  uint32_t open = kOpen;
  left_.compare_exchange_strong(open, state);
  announce(state);
}

void Group::announce(State state) {
  if (lines_ == nullptr) return;
  Line& line = lines_[shape_.rank];
  uint32_t open = kOpen;
  line.state.compare_exchange_strong(open, state);
  line.bell.fetch_add(1);
  futex_wake(&line.bell);
}

bool Group::enter() {
  const uint32_t left = left_.load(std::memory_order_relaxed);
  if (left == kOpen) return true;
  return fail("the communicator %s", left == kClosed ? "is closed" : left == kAborted ? "was aborted" : "failed before");
}

bool Group::meet(uint64_t tag, const Caller& caller) {
  Line& line = lines_[shape_.rank];
  ++step_;
  line.tag[step_ & 1].store(tag, std::memory_order_relaxed);
  // Sequentially consistent, as is what a sleeper does: either it sees the step, or it is seen here and woken.
  line.step.store(step_, std::memory_order_seq_cst);
  if (line.sleepers.load(std::memory_order_seq_cst) != 0) {
    line.bell.fetch_add(1, std::memory_order_seq_cst);
    futex_wake(&line.bell);
  }
  const int spins = shape_.spin > 0 ? kBriefSpins : 1;
  for (int r = 0; r < shape_.size; ++r) {
    if (r == shape_.rank) continue;
    int left = spins;
    while (late(r) && left > 0) {
      pause();
      --left;
    }
    if (left == 0 && late(r) && !wait_long(r, caller)) return false;
    if (lines_[r].tag[step_ & 1].load(std::memory_order_relaxed) != tag) return disagree(tag);
  }
  return true;
}

bool Group::wait_long(int rank, const Caller& caller) {
  caller.before_long(caller.self);
  const double start = now();
  double time = start;
  while (time - start < shape_.spin) {
    for (int i = 0; i < 64; ++i) {
      if (!late(rank)) return true;
      pause();
    }
    time = now();
  }
  Line& line = lines_[rank];
  for (;;) {
    line.sleepers.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t bell = line.bell.load(std::memory_order_seq_cst);
    const bool sleeps = line.step.load(std::memory_order_seq_cst) < step_;
    if (sleeps) futex_wait(&line.bell, bell, kSlice);
    line.sleepers.fetch_sub(1, std::memory_order_seq_cst);
    if (!late(rank)) return true;
    if (!healthy(start + shape_.timeout, caller)) return false;
  }
}

bool Group::healthy(double deadline, const Caller& caller) {
  if (!enter()) return false;
  for (int r = 0; r < shape_.size; ++r) {
    if (r == shape_.rank || !late(r)) continue;
    const uint32_t state = lines_[r].state.load(std::memory_order_acquire);
    const bool dead = pids_[r] != getpid() && ended(watched_[r], pids_[r]);
    if ((state == kOpen && !dead) || !late(r)) continue;  // it may have published before it went
    const char* how = state == kClosed ? "closed its communicator" : state == kAborted ? "aborted its communicator"
                    : state == kFailed ? "failed in a collective" : "has ended";
    return fail("rank %d (pid %d) %s", r, pids_[r], how);
  }
  if (now() >= deadline) return fail_late(shape_.timeout);
  if (caller.interrupted(caller.self)) {
    leave(kFailed);
    error_[0] = '\0';
    return false;
  }
  return true;
}

bool Group::disagree(uint64_t tag) {
  char told[300];
  size_t used = 0;
  for (int r = 0; r < shape_.size && used < sizeof told - 60; ++r) {
    const uint64_t other = r == shape_.rank ? tag : lines_[r].tag[step_ & 1].load(std::memory_order_relaxed);
    if (r != shape_.rank && late(r)) continue;
    used += size_t(snprintf(told + used, sizeof told - used, "%srank %d: %s of %llu", used ? "; " : "", r, name_of(other >> 56),
                            static_cast<unsigned long long>(other & 0xFFFFFFFFFFull)));
  }
  return fail("ranks disagree: %s", told);
}

bool Group::fail_late(double timeout) {
  char told[200];
  size_t used = 0;
  for (int r = 0; r < shape_.size && used < sizeof told - 40; ++r)
    if (r != shape_.rank && late(r))
      used += size_t(snprintf(told + used, sizeof told - used, "%s%d", used ? ", " : "", r));
  return fail("ranks [%s] did not come within %g s", told, timeout);
}

bool Group::fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error_, sizeof error_, format, arguments);
  va_end(arguments);
  leave(kFailed);
  return false;
}

}  // namespace qtp
