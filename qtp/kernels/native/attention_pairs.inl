// Attention in bfloat16 by dot products of pairs (AVX512-BF16). A word is a pair: of elements in queries and keys, of keys i and
// i + 16 of each 32 in powers and values. Lanes are keys for the scores and elements of a head for the results; powers are rounded
// to bfloat16. A score is added up in order of elements, a result in order of pairs of keys.

constexpr size_t kPairs = 32;  // elements of a vector

// 32 elements, or the first n < 32 and zeros.
QTP_INLINE __m512i load_pairs(const uint16_t* x, size_t n) {
  return n >= kPairs ? read<__m512i>(x) : _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), x);
}

// W vectors of [16 / W columns][W rows] become W rows of 16 columns.
template <int W>
QTP_INLINE void turn_words(__m512i* x) {
  if constexpr (W > 1) {
    static constexpr struct Lanes {
      int at[2][16] = {};
      constexpr Lanes() {
        for (int half = 0; half < 2; ++half)
          for (int i = 0; i < 16; ++i) {
            const int column = i / (W / 2), row = i % (W / 2) + half * (W / 2), columns = 16 / W;
            at[half][i] = column % columns * W + row + (column < columns ? 0 : 16);
          }
      }
    } lanes;
    const __m512i low = _mm512_loadu_si512(lanes.at[0]), high = _mm512_loadu_si512(lanes.at[1]);
    __m512i y[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      y[i] = _mm512_permutex2var_epi32(x[2 * i], low, x[2 * i + 1]);
      y[W / 2 + i] = _mm512_permutex2var_epi32(x[2 * i], high, x[2 * i + 1]);
    }
    turn_words<W / 2>(y);
    turn_words<W / 2>(y + W / 2);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = y[i];
  }
}

// The elements of two keys as words: even ones, then odd ones.
QTP_INLINE void pair_up(__m512i x, __m512i y, uint32_t* even, uint32_t* odd) {
  _mm512_store_si512(even, _mm512_mask_blend_epi16(0xAAAAAAAAu, x, _mm512_slli_epi32(y, 16)));
  _mm512_store_si512(odd, _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(x, 16), y));
}

// Of each 32 elements the even ones come first.
QTP_INLINE void put_split(const float* out, float scale, size_t width, uint16_t* to) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (size_t i = 0; i < width; i += kPairs) {
    const __m512 even = _mm512_loadu_ps(out + i), odd = _mm512_loadu_ps(out + i + kLanes);
    store_up_to<BF16>(to + i, (F)_mm512_permutex2var_ps(even, low, odd) * scale, width - i);
    if (width - i > kLanes)
      store_up_to<BF16>(to + i + kLanes, (F)_mm512_permutex2var_ps(even, high, odd) * scale, width - i - kLanes);
  }
}

struct Pairs {
  using E = BF16;
  using Cached = BF16;
  using Stored = uint16_t;
  using Word = uint32_t;
  using Sum = F;
  static QTP_INLINE F add(F acc, uint32_t left, F right) {
    return (F)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(int32_t(left)), (__m512bh)right);
  }

  const Call& call;
  const Unit& unit;
  Ahead& ahead;
  const size_t own, width;  // elements of a head, and what they are padded to
  uint32_t* keys;           // [16 keys][pair of elements][key]
  uint32_t* values;         // [pair of keys][32 elements][even, odd elements]
  uint32_t* queries;        // [row][pair of elements]
  uint32_t* powers;         // [row][pair of keys]
  float* scores;            // [row][key]
  size_t* offsets;
  size_t begin;

  static size_t padded(size_t width) { return round_up(width, kPairs); }
  static size_t room(size_t width) {
    return (2 * kPartition + kMostTiles * kTile) * padded(width) * sizeof(uint16_t) +
           kTile * kPartition * (sizeof(float) + sizeof(uint16_t)) + kPartition * sizeof(size_t);
  }

  Pairs(const Call& call, const Unit& unit, Memory cut, Ahead& ahead)
      : call(call), unit(unit), ahead(ahead), own(call.attention.width), width(padded(own)) {
    keys = cut.take<uint32_t>(kPartition * width / 2);
    values = cut.take<uint32_t>(kPartition * width / 2);
    queries = cut.take<uint32_t>(kMostTiles * kTile * width / 2);
    powers = cut.take<uint32_t>(kTile * kPartition / 2);
    scores = cut.take<float>(kTile * kPartition);
    offsets = cut.take<size_t>(kPartition);
    Place place(unit, 0);
    for (size_t r = 0; r < unit.rows; ++r, place.next())
      for (size_t i = 0; i < width; i += kPairs)
        _mm512_store_si512(queries + (r * width + i) / 2, load_pairs(query<BF16>(call, unit, place) + i, own - i));
  }

  // What is behind the last key that any row sees is 0, up to whole vectors of pairs.
  void prepare(size_t partition) {
    begin = partition * kPartition;
    const size_t count = smaller_of(last_position(unit) + 1 - begin, kPartition), room = round_up(count, kPairs);
    find(call.attention, unit, begin, count, offsets);
    const uint16_t *k = static_cast<const uint16_t*>(call.keys), *v = static_cast<const uint16_t*>(call.values);
    const auto load = [&](const uint16_t* from, size_t key, size_t i) __attribute__((always_inline)) {
      return key < count ? load_pairs(from + offsets[key] + i, own - i) : _mm512_setzero_si512();
    };
    for (size_t first = 0; first < room; first += kLanes) {
      ahead.go(ahead.share / 16);
      for (size_t i = 0; i < width; i += kPairs) {
        __m512i x[kLanes];
#pragma GCC unroll 16
        for (size_t j = 0; j < kLanes; ++j) x[j] = load(k, first + j, i);
        turn_words<16>(x);
        uint32_t* to = keys + (first * width + i * kLanes) / 2;
#pragma GCC unroll 16
        for (size_t j = 0; j < kLanes; ++j) _mm512_store_si512(to + j * kLanes, x[j]);
      }
    }
    for (size_t first = 0; first < room; first += kPairs) {
      ahead.go(ahead.share / 16);
      for (size_t pair = 0; pair < kLanes; ++pair)
        for (size_t i = 0; i < width; i += kPairs) {
          uint32_t* to = values + (first / 2 + pair) * width + i;
          pair_up(load(v, first + pair, i), load(v, first + pair + kLanes, i), to, to + kLanes);
        }
    }
  }

  void run(size_t first, float* most, float* total, float* out) const {
    const size_t rows = smaller_of(kTile, unit.rows - first);
    const Sight sight(call, unit, first, rows, begin);
    const size_t room = round_up(sight.stop(), kPairs), half = width / 2;
    products<Pairs>(queries + first * half, half, {keys, kLanes, kLanes * half}, half, scores, kPartition, rows, room / kLanes);
    ahead.go(ahead.share / 8);
    const size_t sure = smaller_of(round_up(sight.sure(), kLanes), room), unsure = smaller_of(sight.unsure() / kLanes * kLanes, room);
    const F scale = all(kLog2E / __builtin_sqrtf(float(own)));
    const I lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (size_t r = 0; r < rows; ++r) {
      float* row = scores + r * kPartition;
      const auto hide = [&](size_t from, size_t to) __attribute__((always_inline)) {
        for (size_t i = from; i < to; i += kLanes) {
          const I at = lanes + int32_t(i);
          write(row + i, (at < sight.low[r]) | (at > sight.high[r]) ? all(kMasked) : read<F>(row + i));
        }
      };
      hide(0, sure);
      hide(unsure > sure ? unsure : sure, room);
      F left = all(kMasked), right = left;
      for (size_t i = 0; i < room; i += kPairs) {
        left = larger(left, read<F>(row + i));
        right = larger(right, read<F>(row + i + kLanes));
      }
      const F top = all(largest(larger(left, right))) * scale;
      F sums = {};
      for (size_t i = 0; i < room; i += kPairs) {
        const __m512i half_place = _mm512_set1_epi32(0x8000), high = _mm512_set1_epi32(int32_t(0xFFFF0000u));
        const F a = power<false>(fma(read<F>(row + i), scale, -top)), b = power<false>(fma(read<F>(row + i + kLanes), scale, -top));
        const __m512i x = _mm512_add_epi32((__m512i)a, half_place), y = _mm512_and_si512(_mm512_add_epi32((__m512i)b, half_place), high);
        sums += (F)_mm512_and_si512(x, high) + (F)y;
        _mm512_store_si512(powers + (r * kPartition + i) / 2, _mm512_or_si512(_mm512_srli_epi32(x, 16), y));
      }
      most[r] = top[0];
      total[r] = sight.none(r) ? 0.0f : sum(sums);
    }
    ahead.go(ahead.share / 8);
    products<Pairs>(powers, kPartition / 2, {values, width, kLanes}, room / 2, out, width, rows, width / kLanes);
  }

  static QTP_INLINE void put(const Call& call, size_t, const float* out, float scale, uint16_t* to) {
    put_split(out, scale, call.attention.width, to);
  }
};
