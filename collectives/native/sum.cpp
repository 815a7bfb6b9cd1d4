// One loop, compiled once for each instruction set, and the choice among them at run time.
//
// The instruction for float32 to bfloat16 (AVX512-BF16) is not used: it takes denormal numbers for zero, so its results
// would differ from those of torch.
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
  how void f64_##isa(void* out, const void* const* in, int n, size_t count) { sum<Plain<double>>(out, in, n, count); }     \
  how void i8_##isa(void* out, const void* const* in, int n, size_t count) { sum<Plain<uint8_t>>(out, in, n, count); }     \
  how void i16_##isa(void* out, const void* const* in, int n, size_t count) { sum<Plain<uint16_t>>(out, in, n, count); }   \
  how void i32_##isa(void* out, const void* const* in, int n, size_t count) { sum<Plain<uint32_t>>(out, in, n, count); }   \
  how void i64_##isa(void* out, const void* const* in, int n, size_t count) { sum<Plain<uint64_t>>(out, in, n, count); }
#define QTP_TABLE(isa) \
  {#isa, {f32_##isa, bf16_##isa, f16_##isa, f64_##isa, i8_##isa, i16_##isa, i32_##isa, i64_##isa, i8_##isa}}

QTP_SUMS(baseline, )

void bf16_baseline(void* out, const void* const* in, int n, size_t count) { sum<BFloat16>(out, in, n, count); }
void f16_baseline(void* out, const void* const* in, int n, size_t count) { sum<Float16>(out, in, n, count); }

const Kernels kBaseline = QTP_TABLE(baseline);

#if QTP_X86

#define QTP_AVX2 __attribute__((target("avx2,f16c")))
#define QTP_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c,prefer-vector-width=512")))

QTP_SUMS(avx2, QTP_AVX2)
QTP_SUMS(avx512, QTP_AVX512)

// Halves by hand: 8 or 16 at a time are read as floats, added over the ranks, rounded and written.
const uint16_t* at(const void* const* in, int r, size_t i) { return static_cast<const uint16_t*>(in[r]) + i; }

template <class E>
void rest(void* out, const void* const* in, int n, size_t done, size_t count) {
  for (size_t i = done; i < count; ++i) {
    float total = E::widen(*at(in, 0, i));
    for (int r = 1; r < n; ++r) total += E::widen(*at(in, r, i));
    static_cast<uint16_t*>(out)[i] = E::narrow(total);
  }
}

struct Narrow8 {  // AVX2
  using wide = __m256;
  static constexpr size_t kWidth = 8;
  static QTP_AVX2 inline __m128i load(const uint16_t* x) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)); }
  static QTP_AVX2 inline void store(uint16_t* x, __m128i y) { _mm_storeu_si128(reinterpret_cast<__m128i*>(x), y); }
  static QTP_AVX2 inline __m256 add(__m256 x, __m256 y) { return _mm256_add_ps(x, y); }
};

struct F16x8 : Narrow8 {
  using one = Float16;
  static QTP_AVX2 inline __m256 get(const uint16_t* x) { return _mm256_cvtph_ps(load(x)); }
  static QTP_AVX2 inline void put(uint16_t* x, __m256 y) { store(x, _mm256_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT)); }
};

struct BF16x8 : Narrow8 {
  using one = BFloat16;
  static QTP_AVX2 inline __m256 get(const uint16_t* x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load(x)), 16));
  }
  static QTP_AVX2 inline void put(uint16_t* x, __m256 y) {
    const __m256i u = _mm256_castps_si256(y);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(even, _mm256_set1_epi32(0x7FFF))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(y, y, _CMP_UNORD_Q));
    const __m256i all = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(all, all), 0x08);
    store(x, _mm256_castsi256_si128(packed));
  }
};

struct Narrow16 {  // AVX-512
  using wide = __m512;
  static constexpr size_t kWidth = 16;
  static QTP_AVX512 inline __m256i load(const uint16_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
  static QTP_AVX512 inline void store(uint16_t* x, __m256i y) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), y); }
  static QTP_AVX512 inline __m512 add(__m512 x, __m512 y) { return _mm512_add_ps(x, y); }
};

struct F16x16 : Narrow16 {
  using one = Float16;
  static QTP_AVX512 inline __m512 get(const uint16_t* x) { return _mm512_cvtph_ps(load(x)); }
  static QTP_AVX512 inline void put(uint16_t* x, __m512 y) { store(x, _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT)); }
};

struct BF16x16 : Narrow16 {
  using one = BFloat16;
  static QTP_AVX512 inline __m512 get(const uint16_t* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load(x)), 16));
  }
  static QTP_AVX512 inline void put(uint16_t* x, __m512 y) {
    const __m512i u = _mm512_castps_si512(y);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(even, _mm512_set1_epi32(0x7FFF))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
    store(x, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0))));
  }
};

// A line of a peer's slot comes from the peer's cache, and there are too many instructions a line for the processor to look far
// ahead by itself: without this, 32 KB of bfloat16 at 2 ranks take 11 us instead of 7.
constexpr size_t kAhead = 512;

#define QTP_HALVES(name, how, V)                                                                 \
  how void name(void* out, const void* const* in, int n, size_t count) {                         \
    constexpr size_t w = V::kWidth;                                                              \
    uint16_t* to = static_cast<uint16_t*>(out);                                                  \
    size_t i = 0;                                                                                \
    if (n == 2) {                                                                                \
      for (; i + 2 * w <= count; i += 2 * w) {                                                   \
        __builtin_prefetch(at(in, 0, i + kAhead));                                               \
        __builtin_prefetch(at(in, 1, i + kAhead));                                               \
        const V::wide low = V::add(V::get(at(in, 0, i)), V::get(at(in, 1, i)));                  \
        const V::wide high = V::add(V::get(at(in, 0, i + w)), V::get(at(in, 1, i + w)));         \
        V::put(to + i, low);                                                                     \
        V::put(to + i + w, high);                                                                \
      }                                                                                          \
    }                                                                                            \
    for (; i + w <= count; i += w) {                                                             \
      V::wide total = V::get(at(in, 0, i));                                                      \
      for (int r = 1; r < n; ++r) {                                                              \
        __builtin_prefetch(at(in, r, i + kAhead));                                               \
        total = V::add(total, V::get(at(in, r, i)));                                             \
      }                                                                                          \
      V::put(to + i, total);                                                                     \
    }                                                                                            \
    rest<V::one>(out, in, n, i, count);                                                          \
  }

QTP_HALVES(f16_avx2, QTP_AVX2, F16x8)
QTP_HALVES(bf16_avx2, QTP_AVX2, BF16x8)
QTP_HALVES(f16_avx512, QTP_AVX512, F16x16)
QTP_HALVES(bf16_avx512, QTP_AVX512, BF16x16)

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
