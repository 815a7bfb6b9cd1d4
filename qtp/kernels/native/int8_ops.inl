// How elements of W meet those of x, for int8.inl: `step` of a row at a time, of which lanes of A get one product or the sum of some.
//
// weight(w): `step` elements; weight(w, n): the first n < step of them, then zeros, so that what x has there does not count.
// put(to, x, scale, offset): kLanes elements of x as they are multiplied. kRows x kTokens sums stay in registers; kReaders: rows for
// one or two of at most kFewTokens tokens.

constexpr int kReaders = 4;
constexpr size_t kFewTokens = 8;
constexpr int kRows = QTP_AVX512 ? 4 : 2;
constexpr int kTokens = QTP_AVX512 ? 6 : 5;

typedef int8_t B __attribute__((vector_size(kLanes)));
typedef uint8_t UB __attribute__((vector_size(kLanes)));
typedef int8_t Bytes __attribute__((vector_size(4 * kLanes)));
typedef int16_t HalfWords __attribute__((vector_size(2 * kLanes)));
typedef int16_t Words __attribute__((vector_size(4 * kLanes)));
typedef int8_t WordBytes __attribute__((vector_size(2 * kLanes)));

QTP_INLINE F magnitude(F x) { return (F)((U)x & 0x7FFFFFFFu); }

QTP_INLINE U ints_up_to(const int32_t* x, size_t n) {
  if (n >= kLanes) return read<U>(x);
  int32_t y[kLanes] = {};
  for (size_t i = 0; i < n; ++i) y[i] = x[i];
  return read<U>(y);
}

QTP_INLINE void store_ints(int32_t* to, U x, size_t n) {
  int32_t y[kLanes];
  __builtin_memcpy(y, &x, sizeof y);
  if (n >= kLanes) return void(__builtin_memcpy(to, y, sizeof y));
  for (size_t i = 0; i < n; ++i) to[i] = y[i];
}

// clamp(round(x / scale + offset)), half to even: adding 1.5 x 2^23 leaves the nearest integer in the low bits of a float.
QTP_INLINE I quantized(F x, F scale, float offset) {
  F y = x / scale + offset;
  y = y < all(127.0f) ? y : all(127.0f);
  y = y > all(-128.0f) ? y : all(-128.0f);
  return (I)(y + 12582912.0f) - 0x4B400000;
}

template <class V>
QTP_INLINE V padded(const int8_t* w, size_t n) {
  int8_t y[sizeof(V)] = {};
  for (size_t i = 0; i < n; ++i) y[i] = w[i];
  return read<V>(y);
}

#if QTP_AVX2
QTP_INLINE __m256i eight(I x) {
#if QTP_AVX512
  return _mm256_add_epi32(_mm512_castsi512_si256((__m512i)x), _mm512_extracti64x4_epi64((__m512i)x, 1));
#else
  return (__m256i)x;
#endif
}
#endif

// out[i] = the sum of the lanes of x[i].
template <int N>
QTP_INLINE void all_sums(const I* x, int32_t* out) {
#if QTP_AVX2
  const auto at = [&](int i) __attribute__((always_inline)) { return i < N ? eight(x[i]) : _mm256_setzero_si256(); };
#pragma GCC unroll 8
  for (int i = 0; i < N; i += 4) {
    const __m256i four = _mm256_hadd_epi32(_mm256_hadd_epi32(at(i), at(i + 1)), _mm256_hadd_epi32(at(i + 2), at(i + 3)));
    const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
    __builtin_memcpy(out + i, &sums, sizeof(int32_t) * (N - i < 4 ? N - i : 4));
  }
#else
  for (int i = 0; i < N; ++i) out[i] = int32_t(uint32_t(x[i][0]) + uint32_t(x[i][1]) + uint32_t(x[i][2]) + uint32_t(x[i][3]));
#endif
}

struct Exact {
  using A = I;
  using Sum = int32_t;
  static constexpr bool integer = true;
  static QTP_INLINE Sum plus(Sum a, Sum b) { return Sum(uint32_t(a) + uint32_t(b)); }
};

#if QTP_VNNI
// x + 128 as unsigned bytes, times w as signed ones, four products a lane, added without saturation. 128 times the sum of a row of W
// is too much, and is taken off at the end: `shifted`.
struct Integers : Exact {
  using X = uint8_t;
  using V = Bytes;
  static constexpr size_t step = 4 * kLanes;
  static constexpr bool shifted = true;
  static QTP_INLINE V weight(const int8_t* w) { return read<V>(w); }
  static QTP_INLINE V weight(const int8_t* w, size_t n) { return padded<V>(w, n); }
  static QTP_INLINE V token(const X* x) { return read<V>(x); }
  static QTP_INLINE I dot(I acc, V w, V x) {
#if QTP_AVX512
    return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)x, (__m512i)w);
#else
    return (I)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)x, (__m256i)w);
#endif
  }
  static QTP_INLINE void put(X* to, F x, F scale, float offset) {
    const UB y = __builtin_convertvector(quantized(x, scale, offset) + 128, UB);
    __builtin_memcpy(to, &y, sizeof y);
  }
};
#else
// Both as int16, two products a lane: their sum is below 2^31, so nothing saturates.
struct Integers : Exact {
  using X = int16_t;
  using V = Words;
  static constexpr size_t step = 2 * kLanes;
  static constexpr bool shifted = false;
  static QTP_INLINE V weight(const int8_t* w) {
#if QTP_AVX512
    return (V)_mm512_cvtepi8_epi16(read<__m256i>(w));
#elif QTP_AVX2
    return (V)_mm256_cvtepi8_epi16(read<__m128i>(w));
#else
    return __builtin_convertvector(read<WordBytes>(w), V);
#endif
  }
  static QTP_INLINE V weight(const int8_t* w, size_t n) { return __builtin_convertvector(padded<WordBytes>(w, n), V); }
  static QTP_INLINE V token(const X* x) { return read<V>(x); }
  static QTP_INLINE I dot(I acc, V w, V x) {
#if QTP_AVX512
    return (I)_mm512_add_epi32((__m512i)acc, _mm512_madd_epi16((__m512i)w, (__m512i)x));
#elif QTP_AVX2
    return (I)_mm256_add_epi32((__m256i)acc, _mm256_madd_epi16((__m256i)w, (__m256i)x));
#else
    const I both = (I)(w * x);  // each product is at most 2^14
    return acc + (both >> 16) + ((both << 16) >> 16);
#endif
  }
  static QTP_INLINE void put(X* to, F x, F scale, float offset) {
    const HalfWords y = __builtin_convertvector(quantized(x, scale, offset), HalfWords);
    __builtin_memcpy(to, &y, sizeof y);
  }
};
#endif

// x as it meets the codes of compressed weights.
struct Codes : Exact {
  using X = int8_t;
  static constexpr bool shifted = false;
  static QTP_INLINE void put(X* to, F x, F scale, float offset) {
    const B y = __builtin_convertvector(quantized(x, scale, offset), B);
    __builtin_memcpy(to, &y, sizeof y);
  }
};

// W brought to floats in registers, times x in floats.
struct Floats {
  using A = F;
  using Sum = float;
  using X = float;
  using V = F;
  static constexpr size_t step = kLanes;
  static constexpr bool integer = false, shifted = false;
  static QTP_INLINE Sum plus(Sum a, Sum b) { return a + b; }
  static QTP_INLINE V weight(const int8_t* w) {
#if QTP_AVX512
    return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(read<__m128i>(w)));
#elif QTP_AVX2
    return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w))));
#else
    return __builtin_convertvector(read<B>(w), F);
#endif
  }
  static QTP_INLINE V weight(const int8_t* w, size_t n) { return __builtin_convertvector(padded<B>(w, n), F); }
  static QTP_INLINE V token(const X* x) { return read<F>(x); }
  static QTP_INLINE F dot(F acc, V w, V x) { return fma(w, x, acc); }
  static QTP_INLINE void put(X* to, F x, F, float) { write(to, x); }
};
