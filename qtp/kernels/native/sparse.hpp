// The compressed weights of W8A8SC, from which int8.inl computes as they lie. docs/w8a8sc.md describes every byte.
#pragma once

#include <cstddef>
#include <cstdint>

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
  // That are laid out at once, to stay in a core's second cache.
  size_t most_tokens() const {
    const size_t fit = 384 * 1024 / (2 * k + kSparseGroup) / 8 * 8;
    return fit < 8 ? 8 : fit < 256 ? fit : 256;
  }
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

}  // namespace qtp
