// Attention in float32, whatever the cache's dtype, for vectors of 16 lanes; for others see attention_narrow.inl. Lanes are keys for
// the scores and elements of a head for the results. Keys are turned over and both are made floats once a partition; a score is
// added up in order of elements, a result in order of keys.
template <class E_, class Cached_ = E_>
struct Floats {
  using E = E_;
  using Cached = Cached_;
  using Stored = typename Cached::stored;
  using Word = float;
  using Sum = F;
  static QTP_INLINE F add(F acc, float left, F right) { return fma(all(left), right, acc); }

  const Call& call;
  const Unit& unit;
  const size_t width;
  float *keys, *values, *queries, *scores;
  size_t* offsets;
  size_t begin;

  static size_t padded(size_t width) { return round_up(width, kLanes); }
  static size_t room(size_t width) {
    const size_t floats = (2 * kPartition + kMostTiles * kTile) * padded(width) + kTile * kPartition;
    return floats * sizeof(float) + kPartition * sizeof(size_t);
  }

  Floats(const Call& call, const Unit& unit, Memory cut, Ahead&) : call(call), unit(unit), width(padded(call.attention.width)) {
    keys = cut.take<float>(kPartition * width);
    values = cut.take<float>(kPartition * width);
    queries = cut.take<float>(kMostTiles * kTile * width);
    scores = cut.take<float>(kTile * kPartition);
    offsets = cut.take<size_t>(kPartition);
    const size_t own = call.attention.width;
    Place place(unit, 0);
    for (size_t r = 0; r < unit.rows; ++r, place.next())
      for (size_t i = 0; i < width; i += kLanes)
        if constexpr (kIsInt8<Cached>)
          write(queries + r * width + i, scaled_query<E>(call, unit, place, i));
        else
          write(queries + r * width + i, load_up_to<E>(query<E>(call, unit, place) + i, own - i));
  }

  // x[i][j] becomes x[j][i].
  static QTP_INLINE void turn_over(F* x) {
    const auto swap = [&](int distance, const int* low) __attribute__((always_inline)) {
      const __m512i from = _mm512_loadu_si512(low), other = _mm512_add_epi32(from, _mm512_set1_epi32(distance));
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (i & distance) continue;
        const __m512 a = (__m512)x[i], b = (__m512)x[i + distance];
        x[i] = (F)_mm512_permutex2var_ps(a, from, b);
        x[i + distance] = (F)_mm512_permutex2var_ps(a, other, b);
      }
    };
    static constexpr int k8[] = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    static constexpr int k4[] = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
    static constexpr int k2[] = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
    static constexpr int k1[] = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
    swap(8, k8);
    swap(4, k4);
    swap(2, k2);
    swap(1, k1);
  }

  // keys: [kLanes keys][element][key]; values: [key][element]. What is behind the last that any row sees is 0.
  void prepare(size_t partition) {
    begin = partition * kPartition;
    const size_t count = smaller_of(last_position(unit) + 1 - begin, kPartition), own = call.attention.width;
    find(call.attention, unit, begin, count, offsets);
    const Stored *k = static_cast<const Stored*>(call.keys), *v = static_cast<const Stored*>(call.values);
    for (size_t first = 0; first < count; first += kLanes)
      for (size_t i = 0; i < width; i += kLanes) {
        F x[kLanes];
        for (size_t j = 0; j < kLanes; ++j) x[j] = first + j < count ? load_up_to<Cached>(k + offsets[first + j] + i, own - i) : F{};
        turn_over(x);
        for (size_t j = 0; j < kLanes; ++j) write(keys + first * width + (i + j) * kLanes, x[j]);
      }
    const size_t room = round_up(count, kLanes);
    for (size_t j = 0; j < room; ++j)
      for (size_t i = 0; i < width; i += kLanes)
        write(values + j * width + i, j < count ? load_up_to<Cached>(v + offsets[j] + i, own - i) : F{});
  }

  void run(size_t first, float* most, float* total, float* out) const {
    const size_t rows = smaller_of(kTile, unit.rows - first);
    const Sight sight(call, unit, first, rows, begin);
    const size_t room = round_up(sight.stop(), kLanes);
    products<Floats>(queries + first * width, width, {keys, kLanes, kLanes * width}, width, scores, kPartition, rows, room / kLanes);
    const float scale = kLog2E / __builtin_sqrtf(float(call.attention.width));
    I lanes;
    for (size_t i = 0; i < kLanes; ++i) lanes[i] = int32_t(i);
    for (size_t r = 0; r < rows; ++r) {
      float* row = scores + r * kPartition;
      F large = all(kMasked), sums = {};
      for (size_t i = 0; i < room; i += kLanes) {
        const I at = lanes + int32_t(i);
        F x = read<F>(row + i) * scale;
        x = (at < sight.low[r]) | (at > sight.high[r]) ? all(kMasked) : x;
        write(row + i, x);
        large = larger(large, x);
      }
      most[r] = largest(large);
      for (size_t i = 0; i < room; i += kLanes) {
        const F x = power<true>(read<F>(row + i) - most[r]);
        write(row + i, x);
        sums += x;
      }
      total[r] = sight.none(r) ? 0.0f : sum(sums);
    }
    products<Floats>(scores, kPartition, {values, width, kLanes}, room, out, width, rows, width / kLanes);
  }

  static QTP_INLINE void put(const Call& call, size_t kv_head, const float* out, float scale, typename E::stored* to) {
    if constexpr (kIsInt8<Cached>) return put_codes<E>(call, kv_head, out, scale, to);
    const size_t width = call.attention.width;
    for (size_t i = 0; i < width; i += kLanes) store_up_to<E>(to + i, read<F>(out + i) * scale, width - i);
  }
};
