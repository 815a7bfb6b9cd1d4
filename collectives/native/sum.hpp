// Sums of tensors of several ranks, element by element, in rank order.
#pragma once

#include <cstddef>

namespace qtp {

// The numbers are those of `_SUMMED` in collectives/shm.py.
enum DType { kFloat32, kBFloat16, kFloat16, kFloat64, kInt8, kInt16, kInt32, kInt64, kUInt8, kDTypes };

// out[i] = in[0][i] + in[1][i] + ... + in[n - 1][i], added from the left. n >= 2. Halves are added in float32 and rounded once,
// to the nearest even; integers wrap. out may be one of the inputs; none needs to be aligned.
using Sum = void (*)(void* out, const void* const* in, int n, size_t count);

struct Kernels {
  const char* isa;  // the instruction set that was chosen
  Sum sum[kDTypes];
};

constexpr size_t kItemBytes[kDTypes] = {4, 2, 2, 8, 1, 2, 4, 8, 1};

// Those that this processor can run, the plainest first.
int supported(const Kernels** into, int room);

// The best of them; the same on every call.
const Kernels& kernels();

}  // namespace qtp
