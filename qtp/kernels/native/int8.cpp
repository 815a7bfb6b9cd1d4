#include "int8.hpp"

#include "linear.hpp"
#include "rows.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace qtp {

constexpr size_t kMostInt8Tokens = 256;  // that are laid out at once

}  // namespace qtp

// Instruction sets by width, each without VNNI and with it: there are processors of all four kinds.
#define QTP_ISA baseline
#define QTP_AVX512 0
#define QTP_AVX2 0
#define QTP_VNNI 0
#include "int8.inl"
#undef QTP_ISA
#undef QTP_AVX2

#if defined(__x86_64__) && !defined(__clang__)
#define QTP_WIDER 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#define QTP_ISA avx2
#define QTP_AVX2 1
#include "int8.inl"
#undef QTP_ISA
#undef QTP_AVX512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#define QTP_ISA avx512
#define QTP_AVX512 1
#include "int8.inl"
#undef QTP_ISA
#undef QTP_VNNI
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#define QTP_ISA avx512vnni
#define QTP_VNNI 1
#include "int8.inl"
#undef QTP_ISA
#undef QTP_AVX512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avxvnni,avx2,fma,f16c,bmi2")
#define QTP_ISA avxvnni
#define QTP_AVX512 0
#include "int8.inl"
#pragma GCC pop_options
#endif

namespace qtp {
namespace {

constexpr size_t kWorthAThread = 48 * 1024;  // bytes of weights that a thread reads while another is being woken
constexpr size_t kUnit = 32;
constexpr size_t kTurned = 8;  // tokens that are laid out together for compressed weights

#if defined(QTP_WIDER)
bool wide_vnni() {
  static const bool has = best_isa() >= Isa::kAvx512 && __builtin_cpu_supports("avx512vnni");
  return has;
}

bool narrow_vnni() {
  static const bool has = best_isa() >= Isa::kAvx2 && __builtin_cpu_supports("avxvnni");
  return has;
}
#endif

const Int8Table& table() {
#if defined(QTP_WIDER)
  if (isa() >= Isa::kAvx512) return wide_vnni() ? avx512vnni::kInt8 : avx512::kInt8;
  if (isa() == Isa::kAvx2) return narrow_vnni() ? avxvnni::kInt8 : avx2::kInt8;
#endif
  return baseline::kInt8;
}

int threads_for(const Int8Linear& linear, size_t tokens) {
  const size_t bytes = linear.rows * (linear.compressed() ? linear.sparse.code_row() : linear.k);
  const size_t most = bytes * (1 + tokens / 8) / kWorthAThread + 1;
  const int all = threads();
  return most < size_t(all) ? int(most) : all;
}

}  // namespace

bool has_vnni() {
#if defined(QTP_WIDER)
  return wide_vnni() || narrow_vnni();
#else
  return false;
#endif
}

void sum_rows(const Int8Linear& linear, int32_t* to) {
  parallel(threads_for(linear, 1), [&](int thread, int count) {
    const Range range = share(linear.rows, thread, count, kUnit);
    for (size_t r = range.begin; r < range.end; ++r) {
      const int8_t* row = linear.weight + r * linear.stride;
      int32_t sum = 0;
      for (size_t i = 0; i < linear.k; ++i) sum += row[i];
      to[r] = sum;
    }
  });
}

void run_int8(const Int8Linear& linear, const void* x, size_t tokens, size_t x_stride, const float* maxima, void* out, size_t out_stride,
              Form form) {
  const Int8Table& kernels = table();
  const bool gated = form == Form::kGated;
  const size_t in_item = kItemBytes[int(linear.dtype)], out_item = form == Form::kFloat || form == Form::kInteger ? 4 : in_item;
  const size_t most_tokens = linear.compressed() ? linear.sparse.most_tokens() : kMostInt8Tokens;
  for (size_t first = 0; first < tokens; first += most_tokens) {
    const size_t count = tokens - first < most_tokens ? tokens - first : most_tokens;
    const int most = threads_for(linear, count);
    const size_t bytes = (kernels.bytes(linear, count, most) + 63) / 64 * 64;
    void* memory = scratch(bytes + (gated ? count * linear.rows * in_item : 0));
    void* to = static_cast<char*>(out) + first * out_stride * out_item;
    void* both = static_cast<char*>(memory) + bytes;
    parallel(most, [&](int thread, int all) {
      kernels.lay(linear, static_cast<const char*>(x) + first * x_stride * in_item, count, x_stride,
                  maxima == nullptr ? nullptr : maxima + first, memory, share(count, thread, all, linear.compressed() ? kTurned : 1));
      if (all > 1) meet();
      kernels.run(linear, count, memory, thread, gated ? both : to, gated ? linear.rows : out_stride, gated ? Form::kDType : form,
                  share(linear.rows, thread, all, kUnit));
      if (!gated) return;
      if (all > 1) meet();
      const size_t width = linear.rows / 2;
      rows_table(linear.dtype).gate(both, width, to, out_stride, {0, count}, share(width, thread, all, kUnit));
    });
  }
}

void scale_sums(DType dtype, const int32_t* total, size_t rows, size_t width, const float* scale, size_t scale_stride, void* out) {
  const size_t most = rows * width / kWorthAThread + 1;
  parallel(most < size_t(threads()) ? int(most) : threads(), [&](int thread, int all) {
    const Range range = share(rows, thread, all);
    for (size_t i = range.begin; i < range.end; ++i)
      table().scale(dtype, total + i * width, scale + i * scale_stride, width, static_cast<char*>(out) + i * width * kItemBytes[int(dtype)]);
  });
}

}  // namespace qtp
