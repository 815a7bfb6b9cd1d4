// Attention over an int8 cache by dot products of pairs of 16 bits; sums of 32 bits are exact, in any order. A row of queries, times
// the scales of keys, is rounded to the largest 16 bits that it fits, which is not more than its rounding to float16 was; powers are
// rounded to 1 / 32767 of the largest of a partition, and their sum is that of the rounded ones. A word is a pair: of elements 4 i
// and 4 i + 2, or 4 i + 1 and 4 i + 3, in queries and keys; of keys i and i + kLanes of each 2 kLanes in powers and values. Lanes
// are keys for the scores and elements of a head for the results.

typedef int16_t Shorts __attribute__((vector_size(2 * kLanes)));

constexpr float kOne = 32767.0f, kLogOfOne = 14.99995597f;  // what a power of 1 is; log2 of it

// Of each lane's two pairs: the sum of their products.
QTP_INLINE I dot(I a, I b) {
#if QTP_AVX512
  return (I)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif QTP_AVX2
  return (I)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (I)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// x[i][j] becomes x[j][i]; lanes of 32 bits.
QTP_INLINE void turn_words_over(I* x) {
#if QTP_AVX512
  F y[kLanes];
#pragma GCC unroll 16
  for (size_t i = 0; i < kLanes; ++i) y[i] = (F)x[i];
  Floats<F32>::turn_over(y);
#pragma GCC unroll 16
  for (size_t i = 0; i < kLanes; ++i) x[i] = (I)y[i];
#else
  turn_over(x);
#endif
}

// 16 elements of two keys, or own_x and own_y of them and zeros, as words.
QTP_INLINE void pair_up(const int8_t* x, size_t own_x, const int8_t* y, size_t own_y, uint32_t* to) {
#if QTP_AVX2
  const __m128i a = words_up_to<__m128i>(x, own_x), b = words_up_to<__m128i>(y, own_y);
  const __m128i low = _mm_unpacklo_epi8(a, b), high = _mm_unpackhi_epi8(a, b);
#if QTP_AVX512
  _mm512_storeu_si512(to, _mm512_cvtepi8_epi16(_mm256_set_m128i(high, low)));
#else
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_cvtepi8_epi16(low));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), _mm256_cvtepi8_epi16(high));
#endif
#else
  const auto word = [](const int8_t* from, size_t own, size_t i) __attribute__((always_inline)) {
    return uint32_t(i < own ? from[i] : 0);
  };
  for (size_t i = 0; i < 16; ++i) to[i] = (word(x, own_x, i) & 0xFFFFu) | word(y, own_y, i) << 16;
#endif
}

template <class E_>
struct Integers {
  using E = E_;
  using Cached = I8;
  using Word = uint32_t;
  using Sum = I;
  static QTP_INLINE I add(I acc, uint32_t left, I right) { return acc + dot(I{} + int32_t(left), right); }
  static constexpr size_t kPair = 2 * kLanes;  // keys of a vector of words

  const Call& call;
  const Unit& unit;
  Ahead& ahead;
  const size_t own, width, half;  // elements of a head; as columns of values; as words of a key
  uint32_t* keys;                 // [kLanes keys][pair of elements][key]
  uint32_t* values;               // [pair of keys][element]
  uint32_t* queries;              // [row][pair of elements]
  uint32_t* powers;               // [row][pair of keys]
  float* scores;                  // [row][key], int32
  float* scales;                  // [row]: of a score, in units of log2
  size_t* offsets;
  size_t begin;

  static size_t padded(size_t width) { return round_up(width, 16); }
  static size_t room(size_t width) {
    const size_t words = kPartition * padded(width) + kMostTiles * kTile * (padded(width) / 2 + 1) + 3 * kTile * kPartition / 2;
    return words * sizeof(uint32_t) + kPartition * sizeof(size_t);
  }

  Integers(const Call& call, const Unit& unit, Memory cut, Ahead& ahead)
      : call(call), unit(unit), ahead(ahead), own(call.attention.width), width(padded(own)), half(round_up(own, 4) / 2) {
    keys = cut.take<uint32_t>(kPartition * half);
    values = cut.take<uint32_t>(kPartition / 2 * width);
    queries = cut.take<uint32_t>(kMostTiles * kTile * width / 2);
    powers = cut.take<uint32_t>(kTile * kPartition / 2);
    scores = cut.take<float>(kTile * kPartition);
    scales = cut.take<float>(kMostTiles * kTile);
    offsets = cut.take<size_t>(kPartition);
    constexpr float kMost = float(1 << 30);  // of a score: differences of two have 32 bits
    const float most = kMost / (128.0f * float(own)), levels = most < kOne ? most : kOne;
    const float unit_of_score = kLog2E / __builtin_sqrtf(float(own)) / levels;
    Place place(unit, 0);
    for (size_t r = 0; r < unit.rows; ++r, place.next()) {
      F large = {}, finite = {};  // the latter 0, or not a number: then powers and their sum are 0 and 0 / 0 comes out
      for (size_t i = 0; i < own; i += kLanes) {
        const F x = scaled_query<E>(call, unit, place, i);
        write(scores + i, x);
        large = larger(x, larger(-x, large));
        finite = fma(x, all(0.0f), finite);
      }
      const float top = largest(large), to_levels = top > 1e-30f ? levels / top : 0.0f;
      scales[r] = top * unit_of_score + sum(finite);
      int16_t* to = reinterpret_cast<int16_t*>(queries + r * half);
      for (size_t i = 0; i < own; i += kLanes) {
        const Shorts codes = __builtin_convertvector((I)(fma(read<F>(scores + i), all(to_levels), all(kToInteger))), Shorts);
        int16_t code[kLanes];
        __builtin_memcpy(code, &codes, sizeof code);
        for (size_t j = 0; j < kLanes && i + j < 2 * half; j += 4) {
          const int16_t four[4] = {code[j], code[j + 2], code[j + 1], code[j + 3]};
          __builtin_memcpy(to + i + j, four, sizeof four);
        }
      }
    }
  }

  // The next kLanes keys from `first` on, elements i to i + 4 kLanes; `whole`: all of these are there.
  template <bool whole>
  QTP_INLINE void prepare_keys(const int8_t* k, size_t first, size_t count, size_t i) const {
    I x[kLanes];
#pragma GCC unroll 16
    for (size_t j = 0; j < kLanes; ++j) {
      if constexpr (whole)
        x[j] = read<I>(k + offsets[first + j] + i);
      else
        x[j] = first + j < count ? words_up_to<I>(k + offsets[first + j] + i, own - i) : I{};
    }
    turn_words_over(x);
    uint32_t* to = keys + first * half + i / 2 * kLanes;
    const auto split = [&](size_t j) __attribute__((always_inline)) {
      typedef int16_t Pairs __attribute__((vector_size(4 * kLanes)));
      const Pairs four = (Pairs)x[j], even = four << 8 >> 8, odd = four >> 8;
      __builtin_memcpy(to + 2 * j * kLanes, &even, sizeof even);
      __builtin_memcpy(to + (2 * j + 1) * kLanes, &odd, sizeof odd);
    };
    if constexpr (whole) {
#pragma GCC unroll 16
      for (size_t j = 0; j < kLanes; ++j) split(j);
    } else {
      for (size_t j = 0; j < smaller_of((own - i + 3) / 4, kLanes); ++j) split(j);
    }
  }

  // What is behind the last key that any row sees is 0, up to whole vectors of pairs.
  void prepare(size_t partition) {
    begin = partition * kPartition;
    const size_t count = smaller_of(last_position(unit) + 1 - begin, kPartition), room = round_up(count, kPair);
    const size_t some = ahead.share / (2 * kPartition / kLanes);
    find(call.attention, unit, begin, count, offsets);
    const int8_t *k = static_cast<const int8_t*>(call.keys), *v = static_cast<const int8_t*>(call.values);
    for (size_t first = 0; first < room; first += kLanes) {
      ahead.go(some);
      size_t i = 0;
      for (; i + 4 * kLanes <= own && first + kLanes <= count; i += 4 * kLanes) prepare_keys<true>(k, first, count, i);
      for (; i < own; i += 4 * kLanes) prepare_keys<false>(k, first, count, i);
    }
    for (size_t first = 0; first < room; first += kPair) {
      ahead.go(some);
      for (size_t j = first; j < first + kLanes; ++j) {
        const int8_t *x = v + offsets[smaller_of(j, count - 1)], *y = v + offsets[smaller_of(j + kLanes, count - 1)];
        uint32_t* to = values + (first / 2 + j - first) * width;
        size_t i = 0;
        for (; i + 16 <= own && j + kLanes < count; i += 16) pair_up(x + i, 16, y + i, 16, to + i);
        for (; i < width; i += 16) pair_up(x + i, j < count ? own - i : 0, y + i, j + kLanes < count ? own - i : 0, to + i);
      }
    }
  }

  // Which of the keys i, i + 1, ... a row does not see.
  QTP_INLINE I hidden(const Sight& sight, size_t r, size_t i) const {
    I at;
    for (size_t j = 0; j < kLanes; ++j) at[j] = int32_t(j);
    at += int32_t(i);
    return (at < sight.low[r]) | (at > sight.high[r]);
  }

  template <bool all_seen>
  QTP_INLINE I most_of(const Sight& sight, size_t r, size_t from, size_t to, I most) const {
    const float* row = scores + r * kPartition;
    for (size_t i = from; i < to; i += kLanes) {
      I x = read<I>(row + i);
      if constexpr (!all_seen) x = hidden(sight, r, i) ? I{} + INT32_MIN : x;
      most = x > most ? x : most;
    }
    return most;
  }

  // 2 to the x times kOne, as the low bits of a float's; x is up to 0.
  static QTP_INLINE U power_code(F x) {
    x = larger(x + kLogOfOne, all(-4.0f));  // what is less than half is 0
#if QTP_AVX512
    return (U)(power<false>(x) + kToInteger);
#else
    const F shifted = x + kToInteger, r = x - (shifted - kToInteger);
    F p = fma(r, all(0.00958284456282854f), all(0.055906444787979126f));
    p = fma(p, r, all(0.24024099111557007f));
    p = fma(p, r, all(0.6931241750717163f));
    p = fma(p, r, all(1.0f));
    return (U)((F)((U)p + ((U)shifted << 23)) + kToInteger);
#endif
  }

  template <bool all_seen>
  QTP_INLINE I soften(const Sight& sight, size_t r, size_t from, size_t to, int32_t most, F scale, I sums) const {
    const float* row = scores + r * kPartition;
    for (size_t i = from; i < to; i += kPair) {
      U x = power_code(__builtin_convertvector(read<I>(row + i) - most, F) * scale);
      U y = power_code(__builtin_convertvector(read<I>(row + i + kLanes) - most, F) * scale);
      if constexpr (!all_seen) {
        x &= (U)~hidden(sight, r, i);
        y &= (U)~hidden(sight, r, i + kLanes);
      }
      const I pair = (I)((x & 0xFFFFu) | (y << 16));
      sums += dot(pair, I{} + 0x00010001);
      __builtin_memcpy(powers + (r * kPartition + i) / 2, &pair, sizeof pair);
    }
    return sums;
  }

  void run(size_t first, float* most, float* total, float* out) const {
    const size_t rows = smaller_of(kTile, unit.rows - first);
    const Sight sight(call, unit, first, rows, begin);
    const size_t room = round_up(sight.stop(), kPair);
    products<Integers>(queries + first * half, half, {keys, kLanes, kLanes * half}, half, scores, kPartition, rows, room / kLanes);
    const size_t sure = smaller_of(round_up(sight.sure(), kPair), room);
    const size_t seen = smaller_of(sight.unsure() / kPair * kPair, room), unsure = seen > sure ? seen : sure;
    for (size_t r = 0; r < rows; ++r) {
      ahead.go(ahead.share / 4 / rows + 1);  // few at a time, all along: 10 % faster than all while keys are prepared
      I large = I{} + INT32_MIN;
      large = most_of<false>(sight, r, 0, sure, large);
      large = most_of<true>(sight, r, sure, unsure, large);
      large = most_of<false>(sight, r, unsure, room, large);
      int32_t top = large[0];
      for (size_t i = 1; i < kLanes; ++i) top = large[i] > top ? large[i] : top;
      const float scale = scales[first + r];
      I sums = {};
      sums = soften<false>(sight, r, 0, sure, top, all(scale), sums);
      sums = soften<true>(sight, r, sure, unsure, top, all(scale), sums);
      sums = soften<false>(sight, r, unsure, room, top, all(scale), sums);
      int32_t whole = 0;
      for (size_t i = 0; i < kLanes; ++i) whole += sums[i];
      most[r] = float(top) * scale;
      total[r] = sight.none(r) ? 0.0f : float(whole);
    }
    products<Integers>(powers, kPartition / 2, {values, width, kLanes}, room / 2, out, width, rows, width / kLanes);
    for (size_t i = 0; i < rows * width; i += kLanes) write(out + i, __builtin_convertvector(read<I>(out + i), F));
  }

  static QTP_INLINE void put(const Call& call, size_t kv_head, const float* out, float scale, typename E::stored* to) {
    put_codes<E>(call, kv_head, out, scale, to);
  }
};
