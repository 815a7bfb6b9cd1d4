// y = x W^T + b for few or many tokens, straight from row-major weights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "isa.hpp"
#include "parallel.hpp"

namespace qtp {

constexpr int kMostLeaves = 8;

// A linear layer. Addresses are of elements of `dtype`; strides are in elements.
//
// weight: `rows` rows of k elements. gated: the first half of the rows is a gate, outputs are silu(gate) * up, rows / 2 of them.
// bias: one element a row, or null. norm: k weights of an RMSNorm (eps) that x goes through first, or null.
// cuts: leaves + 1 offsets 0 ... k. Each leaf of a dot product is added up for itself; then the leaves are added along a binary
// tree. wide: outputs are float32, not rounded to dtype.
struct Linear {
  DType dtype;
  size_t rows, k;
  const void* weight;
  size_t stride;
  const void* bias;
  const void* norm;
  float eps;
  bool gated;
  bool wide;
  int leaves;
  size_t cuts[kMostLeaves + 1];

  size_t outputs() const { return gated ? rows / 2 : rows; }
};

// x: tokens rows of k elements; out: tokens rows of outputs() elements. Every dot product is added up in an order that depends
// on k and the cuts alone.
void run_linear(const Linear& linear, const void* x, size_t tokens, size_t x_stride, void* out, size_t out_stride);

// The `count` best of each token's first `allowed` outputs, best first and the lower index first among equals: values and
// indices, tokens x count each. The outputs are not written anywhere. False: out of memory.
bool best_outputs(const Linear& linear, const void* x, size_t tokens, size_t x_stride, size_t count, size_t allowed, float* values,
                  int64_t* indices);

// What each instruction set has: run the outputs of `range` for all tokens.
struct LinearTable {
  void (*run)(const Linear& linear, const void* x, size_t tokens, size_t x_stride, void* out, size_t out_stride, Range range);
  void (*best)(const Linear& linear, const void* x, size_t tokens, size_t x_stride, size_t count, float* values, int64_t* indices,
               Range range);
};

const LinearTable& linear_table(DType dtype);

// Memory that is kept, but not what is in it, for as long as no more is wanted.
class Memory {
 public:
  ~Memory() { std::free(at_); }
  void* of(size_t bytes) {
    if (bytes_ < bytes) {
      std::free(at_);
      bytes_ = (bytes + 4095) / 4096 * 4096;
      at_ = std::aligned_alloc(4096, bytes_);
      if (at_ == nullptr) std::abort();
    }
    return at_;
  }

 private:
  void* at_ = nullptr;
  size_t bytes_ = 0;
};

// Memory of this thread, until the next call.
void* scratch(size_t bytes);

}  // namespace qtp
