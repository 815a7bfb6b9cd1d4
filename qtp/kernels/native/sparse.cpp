#include "sparse.hpp"

#include "isa.hpp"
#include "linear.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define QTP_ISA baseline
#define QTP_AVX512 0
#define QTP_AVX2 0
#define QTP_VNNI 0
#include "sparse.inl"
#undef QTP_ISA
#undef QTP_AVX2

#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,bmi2")
#define QTP_ISA avx2
#define QTP_AVX2 1
#include "sparse.inl"
#undef QTP_ISA
#undef QTP_AVX512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,bmi2,prefer-vector-width=512")
#define QTP_ISA avx512
#define QTP_AVX512 1
#include "sparse.inl"
#undef QTP_ISA
#undef QTP_VNNI
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,bmi2,prefer-vector-width=512")
#define QTP_ISA avx512vnni
#define QTP_VNNI 1
#include "sparse.inl"
#undef QTP_ISA
#pragma GCC pop_options
#endif

namespace qtp {
namespace {

constexpr size_t kWorthAThread = 48 * 1024;  // bytes of weights that a thread reads while another is being woken

using Run = void (*)(const Sparse&, const int8_t*, size_t, size_t, int32_t*, size_t, Range);

// There are processors with VNNI at the level of AVX512 and at those above it. A test that asks for AVX512 on a processor that has
// more gets AVX512 without VNNI.
Run chosen() {
#if defined(__x86_64__) && !defined(__clang__)
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni") != 0;
  if (isa() > Isa::kAvx512 || (isa() == Isa::kAvx512 && isa() == best_isa())) return has_vnni ? avx512vnni::run : avx512::run;
  if (isa() == Isa::kAvx512) return avx512::run;
  if (isa() == Isa::kAvx2) return avx2::run;
#endif
  return baseline::run;
}

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

void run_sparse(const Sparse& sparse, const int8_t* x, size_t tokens, size_t x_stride, int32_t* out, size_t out_stride) {
  if (tokens == 0 || sparse.rows == 0) return;
  const Run run = chosen();
  const size_t most = sparse.rows * sparse.code_row() * (1 + tokens / 8) / kWorthAThread + 1;
  const int workers = most < size_t(threads()) ? int(most) : threads();
  parallel(workers, [&](int thread, int all) {
    run(sparse, x, tokens, x_stride, out, out_stride, share(sparse.blocks(), thread, all));
  });
}

}  // namespace qtp
