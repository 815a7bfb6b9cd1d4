#include "sparse.hpp"

namespace qtp {
namespace {

uint64_t number(const uint8_t* at, size_t item) {
  uint64_t number = 0;
  __builtin_memcpy(&number, at, item);
  return number;
}

constexpr size_t aligned(size_t bytes) { return (bytes + kSparseAlign - 1) / kSparseAlign * kSparseAlign; }

// As `problem`, of a narrow block of so many rows and bytes.
const char* narrow_problem(const Sparse& sparse, const uint8_t* block, size_t rows, size_t bytes) {
  const size_t item = sparse.item(), head = rows * (sparse.code_row() + item);
  if (bytes < head) return "a block has another size than its rows";
  const uint8_t* counts = block + rows * sparse.code_row();
  size_t outliers = 0;
  for (size_t r = 0; r < rows; ++r) outliers += number(counts + r * item, item);
  const size_t used = head + outliers * (item + 1);
  if (aligned(used) != bytes) return "a block has another size than its outliers";
  if (used > 2 * rows * sparse.code_row()) return "a block is narrow and larger than if it were wide";
  for (size_t i = 0; i < outliers; ++i)
    if (number(block + head + i * item, item) >= sparse.k) return "an outlier is in a column that is not there";
  return nullptr;
}

}  // namespace

const char* problem(const Sparse& sparse, size_t data_bytes, size_t index_bytes) {
  constexpr size_t kLimit = size_t(1) << 31;
  if (sparse.rows >= kLimit || sparse.k >= kLimit) return "too many rows or columns";
  if (index_bytes != 8 * (sparse.blocks() + 1)) return "the index has another length than the rows";
  if (data_bytes < kSparseAlign) return "the data are too short";
  const size_t end = data_bytes - kSparseAlign;
  if (sparse.entry(0) / 2 != 0 || sparse.entry(sparse.blocks()) != end) return "the index does not end with the data";
  for (size_t b = 0; b < sparse.blocks(); ++b) {
    const uint64_t begin = sparse.entry(b) & ~uint64_t(1), next = sparse.entry(b + 1) & ~uint64_t(1);
    if (begin % kSparseAlign != 0 || next % kSparseAlign != 0 || begin > next || next > end) return "the index is not in order";
    const size_t rows = sparse.rows_in(b), bytes = next - begin;
    if (sparse.wide(b)) {
      if (bytes != aligned(2 * rows * sparse.code_row())) return "a block has another size than its rows";
    } else if (const char* wrong = narrow_problem(sparse, sparse.data + begin, rows, bytes)) {
      return wrong;
    }
  }
  return nullptr;
}

}  // namespace qtp
