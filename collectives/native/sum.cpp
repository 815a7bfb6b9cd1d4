// One loop, compiled once for each instruction set, and the choice among them at run time.
//
// The instruction for float32 to bfloat16 (AVX512-BF16) is not used: it flushes denormal numbers to zero, so its results would
// differ from those of torch, and the loop waits for memory, not for the rounding.
#include "sum.hpp"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define QTP_X86 1
#endif

#define QTP_INLINE inline __attribute__((always_inline))

namespace qtp {
namespace {

template <class To, class From>
QTP_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// stored: as in memory. wide: what is added.
template <class T>
struct Plain {
  using stored = T;
  using wide = T;
  static QTP_INLINE T widen(T x) { return x; }
  static QTP_INLINE T narrow(T x) { return x; }
};

struct BFloat16 {
  using stored = uint16_t;
  using wide = float;
  static QTP_INLINE float widen(uint16_t x) { return bits<float>(uint32_t(x) << 16); }
  static QTP_INLINE uint16_t narrow(float x) {
    const uint32_t u = bits<uint32_t>(x);
    const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    return uint16_t((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
  }
};

struct Float16 {
  using stored = uint16_t;
  using wide = float;
  static QTP_INLINE float widen(uint16_t x) {
    const uint32_t sign = uint32_t(x & 0x8000u) << 16, rest = x & 0x7FFFu;
    if (rest >= 0x7C00u) return bits<float>(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
    if (rest >= 0x0400u) return bits<float>(sign | ((rest << 13) + (112u << 23)));
    return bits<float>(sign | bits<uint32_t>(float(rest) * 5.9604644775390625e-8f));  // 2^-24
  }
  static QTP_INLINE uint16_t narrow(float x) {
    const uint32_t u = bits<uint32_t>(x), sign = u >> 16 & 0x8000u, rest = u & 0x7FFFFFFFu;
    if (rest > 0x7F800000u) return uint16_t(sign | 0x7E00u);
    if (rest >= 0x477FF000u) return uint16_t(sign | 0x7C00u);  // rounds to 65536 or more
    if (rest < 0x38800000u) {                                  // below 2^-14: the float adder rounds to multiples of 2^-24
      const float magic = 0.5f;
      return uint16_t(sign | (bits<uint32_t>(bits<float>(rest) + magic) - bits<uint32_t>(magic)));
    }
    return uint16_t(sign | (rest - (112u << 23) + 0xFFFu + (rest >> 13 & 1u)) >> 13);
  }
};

constexpr size_t kBlock = 512;

template <class E>
QTP_INLINE void sum(void* out_, const void* const* in, int n, size_t count) {
  using S = typename E::stored;
  S* out = static_cast<S*>(out_);
  const S* first = static_cast<const S*>(in[0]);
  const S* last = static_cast<const S*>(in[n - 1]);
  if (n == 2) {
#pragma GCC ivdep
    for (size_t i = 0; i < count; ++i) out[i] = E::narrow(E::widen(first[i]) + E::widen(last[i]));
    return;
  }
  typename E::wide total[kBlock];
  for (size_t start = 0; start < count; start += kBlock) {
    const size_t length = count - start < kBlock ? count - start : kBlock;
    for (size_t i = 0; i < length; ++i) total[i] = E::widen(first[start + i]);
    for (int r = 1; r < n - 1; ++r) {
      const S* x = static_cast<const S*>(in[r]) + start;
      for (size_t i = 0; i < length; ++i) total[i] += E::widen(x[i]);
    }
#pragma GCC ivdep
    for (size_t i = 0; i < length; ++i) out[start + i] = E::narrow(total[i] + E::widen(last[start + i]));
  }
}

#define QTP_SUMS(isa, how)                                                                                                 \
  how void f32_##isa(void* out, const void* const* in, int n, size_t count) { sum<Plain<float>>(out, in, n, count); }      \
  how void bf16_##isa(void* out, const void* const* in, int n, size_t count) { sum<BFloat16>(out, in, n, count); }         \
  how void f64_##isa(void* out, const void* const* in, int n, size_t count) { sum<Plain<double>>(out, in, n, count); }     \
  how void i8_##isa(void* out, const void* const* in, int n, size_t count) { sum<Plain<uint8_t>>(out, in, n, count); }     \
  how void i16_##isa(void* out, const void* const* in, int n, size_t count) { sum<Plain<uint16_t>>(out, in, n, count); }   \
  how void i32_##isa(void* out, const void* const* in, int n, size_t count) { sum<Plain<uint32_t>>(out, in, n, count); }   \
  how void i64_##isa(void* out, const void* const* in, int n, size_t count) { sum<Plain<uint64_t>>(out, in, n, count); }
#define QTP_TABLE(isa) \
  {#isa, {f32_##isa, bf16_##isa, f16_##isa, f64_##isa, i8_##isa, i16_##isa, i32_##isa, i64_##isa, i8_##isa}}

QTP_SUMS(baseline, )

void f16_baseline(void* out, const void* const* in, int n, size_t count) { sum<Float16>(out, in, n, count); }

const Kernels kBaseline = QTP_TABLE(baseline);

#if QTP_X86

#define QTP_AVX2 __attribute__((target("avx2,f16c")))
#define QTP_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c,prefer-vector-width=512")))

QTP_SUMS(avx2, QTP_AVX2)
QTP_SUMS(avx512, QTP_AVX512)

const uint16_t* at(const void* const* in, int r, size_t i) { return static_cast<const uint16_t*>(in[r]) + i; }

void rest(void* out, const void* const* in, int n, size_t done, size_t count) {
  uint16_t* to = static_cast<uint16_t*>(out);
  for (size_t i = done; i < count; ++i) {
    float total = Float16::widen(*at(in, 0, i));
    for (int r = 1; r < n; ++r) total += Float16::widen(*at(in, r, i));
    to[i] = Float16::narrow(total);
  }
}

QTP_AVX2 void f16_avx2(void* out, const void* const* in, int n, size_t count) {
  size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __m256 total = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at(in, 0, i))));
    for (int r = 1; r < n; ++r)
      total = _mm256_add_ps(total, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at(in, r, i)))));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(out) + i), _mm256_cvtps_ph(total, 0));
  }
  rest(out, in, n, i, count);
}

QTP_AVX512 void f16_avx512(void* out, const void* const* in, int n, size_t count) {
  size_t i = 0;
  for (; i + 16 <= count; i += 16) {
    __m512 total = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at(in, 0, i))));
    for (int r = 1; r < n; ++r)
      total = _mm512_add_ps(total, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at(in, r, i)))));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(out) + i), _mm512_cvtps_ph(total, 0));
  }
  rest(out, in, n, i, count);
}

const Kernels kAvx2 = QTP_TABLE(avx2);
const Kernels kAvx512 = QTP_TABLE(avx512);

#endif

}  // namespace

int supported(const Kernels** into, int room) {
  int count = 0;
  const auto add = [&](const Kernels& kernels) {
    if (count < room) into[count++] = &kernels;
  };
  add(kBaseline);
#if QTP_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (avx2) add(kAvx2);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    add(kAvx512);
#endif
  return count;
}

const Kernels& kernels() {
  static const Kernels& best = [] () -> const Kernels& {
    const Kernels* all[8];
    return *all[supported(all, 8) - 1];
  }();
  return best;
}

}  // namespace qtp
