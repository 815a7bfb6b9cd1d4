// Attention in bfloat16 by matrix tiles (AMX). Scores are K Q^T, 16 keys x W rows a tile, with K as it lies in the cache; results
// are P V, with the powers P rounded to bfloat16. Keys i and i + 16 of each 32 are a pair.
struct Tiles {
  using E = BF16;
  using Cached = BF16;
  using Stored = uint16_t;
  static constexpr size_t kStep = 32;                           // elements that a tile instruction adds up
  static constexpr size_t kSteps = kPartition / kStep;
  static constexpr size_t kGroups = kPartition / kLanes;
  static constexpr size_t kTileWords = kLanes * kLanes;

  const Call& call;
  const Unit& unit;
  Ahead& ahead;
  const size_t own, width;  // elements of a head, and what they are padded to
  uint16_t* copied;         // keys: [key][element]
  uint32_t *values;         // [step][32 elements][even, odd elements][pair]
  uint32_t *queries;        // [tile][step][pair of elements][row]
  uint32_t *powers;         // [step][row][pair]
  float* scores;            // [key][row]
  size_t* offsets;
  const uint16_t* groups[kGroups];  // each 16 keys, and their distance in bytes
  size_t distances[kGroups];
  size_t begin;

  static size_t padded(size_t width) { return round_up(width, kStep); }
  static size_t room(size_t width) {
    return (2 * kPartition + kMostTiles * kTile) * padded(width) * sizeof(uint16_t) +
           (kSteps * kTileWords + kPartition * kLanes) * sizeof(float) + kPartition * sizeof(size_t);
  }

  Tiles(const Call& call, const Unit& unit, Memory cut, Ahead& ahead)
      : call(call), unit(unit), ahead(ahead), own(call.attention.width), width(padded(own)) {
    copied = cut.take<uint16_t>(kPartition * width);
    values = cut.take<uint32_t>(kPartition * width / 2);
    queries = cut.take<uint32_t>(kMostTiles * kTile * width / 2);
    powers = cut.take<uint32_t>(kSteps * kTileWords);
    scores = cut.take<float>(kPartition * kLanes);
    offsets = cut.take<size_t>(kPartition);
    for (size_t first = 0; first < unit.rows; first += kTile)
      for (size_t i = 0; i < width; i += kStep) {
        __m512i x[kTile];
        Place place(unit, first);
        for (size_t r = 0; r < kTile; ++r, place.next())
          x[r] = first + r < unit.rows ? load_pairs(query<BF16>(call, unit, place) + i, own - i) : _mm512_setzero_si512();
        turn_words<16>(x);
        uint32_t* to = queries + first * width / 2 + i / kStep * kTileWords;
        for (size_t pair = 0; pair < kLanes; ++pair) _mm512_store_si512(to + pair * kLanes, x[pair]);
      }
  }

  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;

  void prepare(size_t partition) {
    begin = partition * kPartition;
    const Attention& a = call.attention;
    const size_t count = smaller_of(last_position(unit) + 1 - begin, kPartition);
    find(a, unit, begin, count, offsets);
    const bool lie_well = unit.rows <= 2 * kTile && a.block % kLanes == 0 && own == width;
    const uint16_t* k = static_cast<const uint16_t*>(call.keys);
    for (size_t first = 0; first < count; first += kLanes) {
      const bool here = lie_well && first + kLanes <= count;
      groups[first / kLanes] = here ? k + offsets[first] : copied + first * width;
      distances[first / kLanes] = (here ? a.kv_heads * own : width) * sizeof(uint16_t);
      for (size_t j = first; j < first + kLanes && !here; ++j)
        for (size_t i = 0; i < width; i += kStep)
          _mm512_store_si512(copied + j * width + i, j < count ? load_pairs(k + offsets[j] + i, own - i) : _mm512_setzero_si512());
    }
    const uint16_t* v = static_cast<const uint16_t*>(call.values);
    for (size_t step = 0; step * kStep < count; ++step)
      for (size_t pair = 0; pair < kLanes; ++pair) {
        const size_t j = step * kStep + pair;
        if (pair % 4 == 0) ahead.go(ahead.share / 64);
        for (size_t i = 0; i < width; i += kStep) {
          const __m512i x = j < count ? load_pairs(v + offsets[j] + i, own - i) : _mm512_setzero_si512();
          const __m512i y = j + kLanes < count ? load_pairs(v + offsets[j + kLanes] + i, own - i) : _mm512_setzero_si512();
          uint32_t* to = values + (step * width + i) * kLanes + pair * kLanes;
          pair_up(x, y, to, to + kTileWords);
        }
      }
  }

  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };

  // Tiles 0 to 3: sums. 4, 5 and 6, 7: the two factors; for the results 4, and 5, 6, 7.
  static QTP_INLINE void configure(size_t sum_rows, size_t sum_columns, int left, size_t left_rows, size_t right_columns) {
    Config config;
    for (int i = 0; i < 8; ++i) {
      config.rows[i] = uint8_t(i < 4 ? sum_rows : i < left ? left_rows : kLanes);
      config.row_bytes[i] = uint16_t(4 * (i < 4 ? sum_columns : i < left ? kLanes : right_columns));
    }
    _tile_loadconfig(&config);
  }

  // Scores of N times 16 keys.
  template <int N, int W>
  QTP_INLINE void score(const uint32_t* query, size_t group) const {
    ahead.go(ahead.share / 16);
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (N > 2) _tile_zero(2);
    if constexpr (N > 3) _tile_zero(3);
    const uint16_t* const* at = groups + group;
    const size_t* distance = distances + group;
    for (size_t i = 0; i < width; i += kStep) {
      _tile_loadd(6, query + i / kStep * kTileWords, 64);
      _tile_loadd(4, at[0] + i, distance[0]);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (N > 1) {
        _tile_loadd(5, at[1] + i, distance[1]);
        _tile_dpbf16ps(1, 5, 6);
      }
      if constexpr (N > 2) {
        _tile_loadd(4, at[2] + i, distance[2]);
        _tile_dpbf16ps(2, 4, 6);
      }
      if constexpr (N > 3) {
        _tile_loadd(5, at[3] + i, distance[3]);
        _tile_dpbf16ps(3, 5, 6);
      }
    }
    float* to = scores + group * kLanes * W;
    _tile_stored(0, to, 4 * W);
    if constexpr (N > 1) _tile_stored(1, to + kLanes * W, 4 * W);
    if constexpr (N > 2) _tile_stored(2, to + 2 * kLanes * W, 4 * W);
    if constexpr (N > 3) _tile_stored(3, to + 3 * kLanes * W, 4 * W);
  }

  // Results of `steps` times 32 keys, N times 16 columns of `values`.
  template <int N>
  QTP_INLINE void result(const uint32_t* value, size_t steps, float* out) const {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (N > 2) _tile_zero(2);
    if constexpr (N > 2) _tile_zero(3);
    for (size_t step = 0; step < steps; ++step, value += width * kLanes) {
      _tile_loadd(4, powers + step * kTileWords, 64);
      _tile_loadd(5, value, 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, value + kTileWords, 64);
      _tile_dpbf16ps(1, 4, 6);
      if constexpr (N > 2) {
        _tile_loadd(7, value + 2 * kTileWords, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, value + 3 * kTileWords, 64);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
    _tile_stored(0, out, width * 4);
    _tile_stored(1, out + kLanes, width * 4);
    if constexpr (N > 2) _tile_stored(2, out + 2 * kLanes, width * 4);
    if constexpr (N > 2) _tile_stored(3, out + 3 * kLanes, width * 4);
  }

  // The scores of `room` keys become powers, as the left factor of the results wants them. A vector holds W rows of 16 / W keys.
  template <int W>
  QTP_INLINE void soften(const Sight& sight, size_t rows, size_t room, float* most, float* total) const {
    constexpr size_t keys = kLanes / W, vectors = kLanes / keys;  // of a vector; of 16 keys
    I low, high, own_key;
    for (size_t i = 0; i < kLanes; ++i) low[i] = sight.low[i % W], high[i] = sight.high[i % W], own_key[i] = int32_t(i / W);
    const size_t sure = smaller_of(sight.sure() / kStep * kStep + (sight.sure() % kStep ? kStep : 0), room);
    const size_t unsure = smaller_of(sight.unsure() / kStep * kStep, room);
    const auto hide = [&](size_t from, size_t to) __attribute__((always_inline)) {
      for (size_t key = from; key < to; key += keys) {
        const I at = own_key + int32_t(key);
        const F x = read<F>(scores + key * W);
        write(scores + key * W, (at < low) | (at > high) ? all(kMasked) : x);
      }
    };
    hide(0, sure);
    hide(unsure > sure ? unsure : sure, room);
    F large[4] = {all(kMasked), all(kMasked), all(kMasked), all(kMasked)};
    for (size_t i = 0; i < room * W; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (size_t j = 0; j < 4; ++j) large[j] = larger(large[j], read<F>(scores + i + j * kLanes));
    }
    const F scale = all(kLog2E / __builtin_sqrtf(float(own)));
    F top = larger(larger(large[0], large[1]), larger(large[2], large[3]));
    top = spread<W>(top, [](F a, F b) __attribute__((always_inline)) { return larger(a, b); }) * scale;
    F sums[4] = {};  // of keys 0, 1, 2, 3 of each four
    constexpr size_t apart = 4 / keys;
    for (size_t step = 0; step * kStep < room; ++step) {
      ahead.go(ahead.share / 32);
      const float* from = scores + step * kStep * W;
      __m512i x[vectors];
#pragma GCC unroll 16
      for (size_t i = 0; i < vectors; ++i) {
        const F a = power<false>(fma(read<F>(from + i * kLanes), scale, -top));
        const F b = power<false>(fma(read<F>(from + kLanes * W + i * kLanes), scale, -top));
        const __m512i half = _mm512_set1_epi32(0x8000);  // of a bfloat16's last place
        const __m512i left = _mm512_add_epi32((__m512i)a, half), right = _mm512_add_epi32((__m512i)b, half);
        const __m512i high_halves = _mm512_set1_epi32(int32_t(0xFFFF0000u));
        sums[i % apart] += (F)_mm512_and_si512(left, high_halves) + (F)_mm512_and_si512(right, high_halves);
        x[i] = _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(left, 16), right);
      }
      turn_words<W>(x);
#pragma GCC unroll 16
      for (size_t r = 0; r < W; ++r) _mm512_store_si512(powers + step * kTileWords + r * kLanes, x[r]);
    }
    F sum = apart == 4 ? (sums[0] + sums[2]) + (sums[1] + sums[3]) : apart == 2 ? sums[0] + sums[1] : sums[0];
    sum = spread<W>(sum, [](F a, F b) __attribute__((always_inline)) { return a + b; });
    for (size_t r = 0; r < rows; ++r) {
      most[r] = top[r];
      total[r] = sight.none(r) ? 0.0f : sum[r];
    }
  }

  // Each row's keys put together, the further ones first.
  template <int W, class Op>
  static QTP_INLINE F spread(F x, const Op& op) {
    if constexpr (W <= 8) x = op(x, __builtin_shuffle(x, I{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
    if constexpr (W <= 4) x = op(x, __builtin_shuffle(x, I{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
    return x;
  }

  template <int W>
  void run_rows(size_t first, size_t rows, float* most, float* total, float* out) const {
    const Sight sight(call, unit, first, rows, begin);
    const size_t stop = sight.stop(), room = round_up(stop, kStep), found = (stop + kLanes - 1) / kLanes;
    const uint32_t* query = queries + first * width / 2;
    asm volatile("" ::: "memory");
    configure(kLanes, W, 6, kLanes, W);
    size_t group = 0;
    for (; group + 4 <= found; group += 4) score<4, W>(query, group);
    for (; group + 1 <= found; ++group) score<1, W>(query, group);
    asm volatile("" ::: "memory");
    for (size_t i = found * kLanes * W; i < room * W; i += kLanes) write(scores + i, F{});
    soften<W>(sight, rows, room, most, total);
    asm volatile("" ::: "memory");
    configure(rows, kLanes, 5, rows, kLanes);
    for (size_t i = 0; i < width; i += 64)
      if (i + 64 <= width)
        result<4>(values + i * kLanes, room / kStep, out + i);
      else
        result<2>(values + i * kLanes, room / kStep, out + i);
    asm volatile("" ::: "memory");
  }

  void run(size_t first, float* most, float* total, float* out) const {
    const size_t rows = smaller_of(kTile, unit.rows - first);
    if (rows > 8)
      run_rows<16>(first, rows, most, total, out);
    else if (rows > 4)
      run_rows<8>(first, rows, most, total, out);
    else
      run_rows<4>(first, rows, most, total, out);
  }

  static QTP_INLINE void put(const Call& call, size_t, const float* out, float scale, uint16_t* to) {
    put_split(out, scale, call.attention.width, to);
  }
};
