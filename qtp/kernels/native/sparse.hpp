// y = x W^T in exact integers, computed from the compressed W of W8A8SC. docs/w8a8sc.md describes every byte.
#pragma once

#include <cstddef>
#include <cstdint>

#include "parallel.hpp"

namespace qtp {

constexpr size_t kSparseBlock = 16;   // rows
constexpr size_t kSparseGroup = 128;  // columns, whose codes are 64 bytes
constexpr size_t kSparseAlign = 64;   // of blocks; and so many bytes may be read behind the last one

// `rows` rows of k values. data, index: as `compress` of qtp/weights/codec.py makes them.
struct Sparse {
  size_t rows, k;
  const uint8_t* data;
  const uint8_t* index;

  size_t blocks() const { return (rows + kSparseBlock - 1) / kSparseBlock; }
  size_t rows_in(size_t block) const {
    const size_t rest = rows - block * kSparseBlock;
    return rest < kSparseBlock ? rest : kSparseBlock;
  }
  size_t code_row() const { return (k + 1) / 2; }
  size_t item() const { return k <= 65536 ? 2 : 4; }
  uint64_t entry(size_t block) const {
    uint64_t entry;
    __builtin_memcpy(&entry, index + 8 * block, 8);
    return entry;
  }
  const uint8_t* block(size_t block) const { return data + entry(block) / kSparseAlign * kSparseAlign; }
  bool wide(size_t block) const { return (entry(block) & 1) != 0; }
};

// Null, or what is wrong with a stream of so many bytes: if nothing is, no computation from it leaves it.
const char* problem(const Sparse& sparse, size_t data_bytes, size_t index_bytes);

// x: tokens rows of k values; out: tokens rows of `rows` sums, modulo 2^32. Strides are in elements.
void run_sparse(const Sparse& sparse, const int8_t* x, size_t tokens, size_t x_stride, int32_t* out, size_t out_stride);

}  // namespace qtp
