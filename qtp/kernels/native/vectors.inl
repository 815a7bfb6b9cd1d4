// Vectors of floats, as wide as the instruction set has them, for the bodies of each_isa.inl. Sums over lanes always add the upper
// half to the lower one, again and again: with 16 lanes lane i + 8 to lane i, then + 4, + 2, + 1.

#define QTP_INLINE inline __attribute__((always_inline))

constexpr size_t kLanes = QTP_AVX512 ? 16 : QTP_AVX2 ? 8 : 4;

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));

template <class To, class From>
QTP_INLINE To read(const From* from) {
  To to;
  __builtin_memcpy(&to, from, sizeof to);
  return to;
}

QTP_INLINE void write(float* to, F x) { __builtin_memcpy(to, &x, sizeof x); }

QTP_INLINE F all(float x) { return F{} + x; }

QTP_INLINE F fma(F a, F b, F c) {
#if QTP_AVX512
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif QTP_AVX2
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// acc + w * x as fma has it, in the register of acc: GCC likes to put it in that of w or x, and then moves sums about.
QTP_INLINE F added(F acc, F w, F x) {
#if QTP_AVX2 && !QTP_AVX512
  asm("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(w), "x"(x));
  return acc;
#else
  return fma(w, x, acc);
#endif
}

// Keeps what was loaded in a register: GCC would rather load it again for each of its uses, and two loads a cycle are the limit.
template <class V>
QTP_INLINE void hold([[maybe_unused]] V& x) {
#if QTP_AVX2 && !QTP_AVX512
  asm("" : "+x"(x));
#endif
}

QTP_INLINE F larger(F a, F b) { return a > b ? a : b; }  // b where one is not a number

QTP_INLINE float sum(F x) {
#if QTP_AVX512
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
#elif QTP_AVX2
  const __m256 eight = (__m256)x;
#endif
#if QTP_AVX2
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// out[i] = sum(x[i]) for i < N; N is 16 (with AVX512), 8 (with AVX512 or AVX2), 4, 2 or 1.
template <int N>
QTP_INLINE void sums_of(const F* x, float* out) {
  if constexpr (N < 4) {
    for (int i = 0; i < N; ++i) out[i] = sum(x[i]);
    return;
  }
#if QTP_AVX512
  // Two vectors become one, with the sums of lanes that are 8 apart of both, then 4, 2 and 1. So the first of 16 come to be in
  // lanes 0, 4, 8 and 12, the next four in lanes 1, 5, 9 and 13, ...: they are taken in such an order that lane i has the sum of x[i].
  constexpr int side = N / 4;
  __m512 y[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) y[i] = (__m512)x[side * (i % 4) + i / 4];
#pragma GCC unroll 8
  for (int i = 0; i < N / 2; ++i)
    y[i] = _mm512_add_ps(_mm512_shuffle_f32x4(y[2 * i], y[2 * i + 1], 0x44), _mm512_shuffle_f32x4(y[2 * i], y[2 * i + 1], 0xEE));
#pragma GCC unroll 4
  for (int i = 0; i < N / 4; ++i)
    y[i] = _mm512_add_ps(_mm512_shuffle_f32x4(y[2 * i], y[2 * i + 1], 0x88), _mm512_shuffle_f32x4(y[2 * i], y[2 * i + 1], 0xDD));
  const auto next = [&](int i) __attribute__((always_inline)) { return (__m512d)y[N >= 8 ? i + 1 : i]; };
#pragma GCC unroll 2
  for (int i = 0; i < (N + 7) / 8; ++i)
    y[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd((__m512d)y[2 * i], next(2 * i)), (__m512)_mm512_unpackhi_pd((__m512d)y[2 * i], next(2 * i)));
  const __m512 last = y[N >= 16 ? 1 : 0];
  y[0] = _mm512_add_ps(_mm512_shuffle_ps(y[0], last, 0x88), _mm512_shuffle_ps(y[0], last, 0xDD));
  if constexpr (N == 8) y[0] = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 0, 0, 0, 0, 0, 0, 0, 0), y[0]);
  if constexpr (N == 4) y[0] = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), y[0]);
  __builtin_memcpy(out, &y[0], N * sizeof(float));
#elif QTP_AVX2
  // Likewise, with lanes that are 4 apart first: the first half of the vectors come to be in the lower lanes, the others in the upper.
  __m256 y[N];
#pragma GCC unroll 4
  for (int i = 0; i < N / 2; ++i) {
    const __m256 a = (__m256)x[i], b = (__m256)x[i + N / 2];
    y[i] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
#pragma GCC unroll 2
  for (int i = 0; i < N / 4; ++i) {
    const __m256d a = (__m256d)y[2 * i], b = (__m256d)y[2 * i + 1];
    y[i] = _mm256_add_ps((__m256)_mm256_unpacklo_pd(a, b), (__m256)_mm256_unpackhi_pd(a, b));
  }
  const __m256 last = y[N / 8];
  y[0] = _mm256_add_ps(_mm256_shuffle_ps(y[0], last, 0x88), _mm256_shuffle_ps(y[0], last, 0xDD));
  if constexpr (N == 4) y[0] = (__m256)_mm256_permute4x64_pd((__m256d)y[0], 0x08);
  __builtin_memcpy(out, &y[0], N * sizeof(float));
#else
  typedef int32_t Index __attribute__((vector_size(16)));
  const F a = __builtin_shuffle(x[0], x[1], Index{0, 1, 4, 5}) + __builtin_shuffle(x[0], x[1], Index{2, 3, 6, 7});
  const F b = __builtin_shuffle(x[2], x[3], Index{0, 1, 4, 5}) + __builtin_shuffle(x[2], x[3], Index{2, 3, 6, 7});
  write(out, __builtin_shuffle(a, b, Index{0, 2, 4, 6}) + __builtin_shuffle(a, b, Index{1, 3, 5, 7}));
#endif
}

// As sums_of, of any number.
template <int N>
QTP_INLINE void all_sums(const F* x, float* out) {
  if constexpr (N > 0) {
    constexpr int some = N >= 16 && kLanes >= 16 ? 16 : N >= 8 && kLanes >= 8 ? 8 : N >= 4 ? 4 : N >= 2 ? 2 : 1;
    sums_of<some>(x, out);
    all_sums<N - some>(x + some, out + some);
  }
}

QTP_INLINE float largest(F x) {
  float y[kLanes];
  __builtin_memcpy(y, &x, sizeof y);
  for (size_t width = kLanes / 2; width; width /= 2)
    for (size_t i = 0; i < width; ++i) y[i] = y[i] > y[i + width] ? y[i] : y[i + width];
  return y[0];
}

// The three dtypes: load and store kLanes elements, or the first n < kLanes of them (the rest is 0, or is left alone).
struct F32 {
  using stored = float;
  static QTP_INLINE F load(const float* x) { return read<F>(x); }
  static QTP_INLINE void store(float* to, F x) { __builtin_memcpy(to, &x, sizeof x); }
};

struct BF16 {
  using stored = uint16_t;
  static QTP_INLINE F load(const uint16_t* x) { return (F)(__builtin_convertvector(read<H>(x), U) << 16); }
  static QTP_INLINE void store(uint16_t* to, F x) {  // to the nearest, ties to even
    const U u = (U)x;
    const U rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    const U nan = (U)(x != x);
    const H half = __builtin_convertvector((nan & 0x7FC0u) | (~nan & rounded), H);
    __builtin_memcpy(to, &half, sizeof half);
  }
};

struct F16 {
  using stored = uint16_t;
  static QTP_INLINE F load(const uint16_t* x) {
#if QTP_AVX512
    return (F)_mm512_cvtph_ps(read<__m256i>(x));
#elif QTP_AVX2
    return (F)_mm256_cvtph_ps(read<__m128i>(x));
#else
    const U u = __builtin_convertvector(read<H>(x), U), rest = u & 0x7FFFu, sign = (u & 0x8000u) << 16;
    const U special = (U)(rest >= 0x7C00u), small = (U)(rest < 0x0400u);
    const U normal = ((rest << 13) + (112u << 23)) | (special & 0x7F800000u);
    const U tiny = (U)(__builtin_convertvector((I)rest, F) * 5.9604644775390625e-8f);  // 2^-24
    return (F)(sign | (small & tiny) | (~small & normal));
#endif
  }
  static QTP_INLINE void store(uint16_t* to, F x) {
#if QTP_AVX512
    const __m256i half = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(to, &half, sizeof half);
#elif QTP_AVX2
    const __m128i half = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
    __builtin_memcpy(to, &half, sizeof half);
#else
    const U u = (U)x, sign = (u >> 16) & 0x8000u, rest = u & 0x7FFFFFFFu;
    const U nan = (U)(rest > 0x7F800000u), big = (U)(rest >= 0x477FF000u), small = (U)(rest < 0x38800000u);
    const U tiny = (U)((F)rest + 0.5f) - 0x3F000000u;  // the float adder rounds to multiples of 2^-24
    const U normal = (rest - (112u << 23) + 0xFFFu + ((rest >> 13) & 1u)) >> 13;
    const U half = (nan & 0x7E00u) | (~nan & ((big & 0x7C00u) | (~big & ((small & tiny) | (~small & normal)))));
    const H stored = __builtin_convertvector(sign | half, H);
    __builtin_memcpy(to, &stored, sizeof stored);
#endif
  }
};

template <class E>
QTP_INLINE F load_some(const typename E::stored* x, size_t n) {
  typename E::stored y[kLanes] = {};
  for (size_t i = 0; i < n; ++i) y[i] = x[i];
  return E::load(y);
}

template <class E>
QTP_INLINE void store_some(typename E::stored* to, F x, size_t n) {
  typename E::stored y[kLanes];
  E::store(y, x);
  for (size_t i = 0; i < n; ++i) to[i] = y[i];
}

template <class E>
QTP_INLINE F load_up_to(const typename E::stored* x, size_t n) {
  return n >= kLanes ? E::load(x) : load_some<E>(x, n);
}

template <class E>
QTP_INLINE void store_up_to(typename E::stored* to, F x, size_t n) {
  if (n >= kLanes)
    E::store(to, x);
  else
    store_some<E>(to, x, n);
}

template <class E>
QTP_INLINE float get(const typename E::stored* x) {
  const F y = load_some<E>(x, 1);
  return y[0];
}

template <class E>
QTP_INLINE void put(typename E::stored* to, float x) {
  store_some<E>(to, all(x), 1);
}

// e to the x, to about 2 units in the last place of a float; 0 below -87.3, and for x up to 88.
QTP_INLINE F exponential(F x) {
  const F low = all(-87.33654f), high = all(88.0f);
  const U flushed = (U)(x < low);
  x = x > high ? high : x;
  x = x < low ? low : x;
  const F shifted = fma(x, all(1.44269504f), all(12582912.0f));  // 1.5 x 2^23: the nearest integer, in the low bits
  const F n = shifted - 12582912.0f;
  F r = fma(n, all(-0.693145751953125f), x);
  r = fma(n, all(-1.428606765330187e-6f), r);
  F p = fma(r, all(1.9875691500e-4f), all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  const U scaled = (U)p + ((U)shifted << 23);
  return (F)(~flushed & scaled);
}

QTP_INLINE F silu(F x) { return x / (1.0f + exponential(-x)); }

template <class E>
QTP_INLINE F rounded(F x) {
  typename E::stored y[kLanes];
  E::store(y, x);
  return E::load(y);
}

template <class E>
QTP_INLINE float inverse_root_mean_square(const typename E::stored* x, size_t width, float eps) {
  F squares = {};
  for (size_t i = 0; i < width; i += kLanes) {
    const F y = load_up_to<E>(x + i, width - i);
    squares = fma(y, y, squares);
  }
  return 1.0f / __builtin_sqrtf(sum(squares) / float(width) + eps);
}
