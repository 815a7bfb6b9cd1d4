#include "linear.hpp"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define QTP_BODY "linear.inl"
#include "each_isa.inl"

namespace qtp {
namespace {

constexpr size_t kWorthAThread = 48 * 1024;  // bytes of weights that a thread reads while another is being woken
constexpr size_t kUnit = 32;

int threads_for(const Linear& linear, size_t tokens) {
  const size_t work = linear.rows * linear.k * kItemBytes[int(linear.dtype)] * (1 + tokens / 8);
  const size_t most = work / kWorthAThread + 1;
  const int all = threads();
  return most < size_t(all) ? int(most) : all;
}

}  // namespace

const LinearTable& linear_table(DType dtype) { return QTP_CHOOSE(kLinear)[int(dtype)]; }

void* scratch(size_t bytes) {
  thread_local Memory memory;
  return memory.of(bytes);
}

void run_linear(const Linear& linear, const void* x, size_t tokens, size_t x_stride, void* out, size_t out_stride) {
  const LinearTable& table = linear_table(linear.dtype);
  parallel(threads_for(linear, tokens), [&](int thread, int count) {
    table.run(linear, x, tokens, x_stride, out, out_stride, share(linear.outputs(), thread, count, kUnit));
  });
}

bool best_outputs(const Linear& linear, const void* x, size_t tokens, size_t x_stride, size_t count, size_t allowed, float* values,
                  int64_t* indices) {
  const LinearTable& table = linear_table(linear.dtype);
  const int workers = threads_for(linear, tokens);
  const size_t each = tokens * count;
  float* found = static_cast<float*>(std::malloc(size_t(workers) * each * (sizeof(float) + sizeof(int64_t)) + 16));
  if (found == nullptr) return false;
  int64_t* where = reinterpret_cast<int64_t*>(found + (size_t(workers) * each + 1) / 2 * 2);
  int used = 1;
  parallel(workers, [&](int thread, int threads) {
    if (thread == 0) used = threads;
    table.best(linear, x, tokens, x_stride, count, found + size_t(thread) * each, where + size_t(thread) * each,
               share(allowed, thread, threads, kUnit));
  });
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t i = 0; i < count; ++i) {  // the threads' outputs are in order, so the first of equals has the lowest index
      float* best = nullptr;
      int64_t* index = nullptr;
      for (int thread = 0; thread < used; ++thread) {
        float* value = found + size_t(thread) * each + t * count;
        int64_t* at = where + size_t(thread) * each + t * count;
        size_t next = 0;
        while (next < count && at[next] == -2) ++next;
        if (next == count || at[next] < 0) continue;
        if (best == nullptr || value[next] > *best) best = value + next, index = at + next;
      }
      values[t * count + i] = best != nullptr ? *best : -__builtin_inff();
      indices[t * count + i] = index != nullptr ? *index : -1;
      if (index != nullptr) *index = -2;
    }
  }
  std::free(found);
  return true;
}

}  // namespace qtp
