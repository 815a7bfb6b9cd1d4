// Work shared among the threads of the OpenMP runtime that torch has already loaded: one pool of threads in the process, whose
// number is what torch.set_num_threads says. Without such a runtime all work is done by the caller.
#pragma once

#include <cstddef>

namespace qtp {

// The number of threads that a parallel region of this thread would get.
int threads();

// Calls work(data, thread, threads) on that many threads (or fewer) and returns when all are done.
void fork(int threads, void (*work)(void* data, int thread, int threads), void* data);

// To be called by all threads inside `fork`: returns when all have.
void meet();

template <class Work>
void parallel(int threads, const Work& work) {
  if (threads <= 1) {
    work(0, 1);
    return;
  }
  fork(threads, [](void* data, int thread, int count) { (*static_cast<const Work*>(data))(thread, count); },
       const_cast<void*>(static_cast<const void*>(&work)));
}

struct Range {
  size_t begin, end;
};

// Part number `part` of `total` items cut into `parts` ranges of whole units.
inline Range share(size_t total, int part, int parts, size_t unit = 1) {
  const size_t units = (total + unit - 1) / unit;
  const size_t begin = units * size_t(part) / size_t(parts) * unit, end = units * size_t(part + 1) / size_t(parts) * unit;
  return {begin < total ? begin : total, end < total ? end : total};
}

}  // namespace qtp
