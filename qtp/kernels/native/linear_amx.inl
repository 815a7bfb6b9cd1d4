// Linear layers in bfloat16 by matrix tiles (AMX). W is read in tiles of 16 rows and 32 elements, where it lies; x is laid out in
// pairs, [step of 32][pair][token]. A sum goes through the steps in order, whatever the number of tokens.
struct Tiles {
  using W = uint16_t;
  using X = uint32_t;
  static constexpr size_t kSide = 16, kStep = 32;
  static constexpr size_t kBlock = 2 * kSide;
  static constexpr size_t kUnit = 96;
  static constexpr size_t kTile = kSide * kSide;
  static constexpr size_t kFetched = 64 * 1024;  // bytes of 16 rows; longer ones the processor fetches better by itself

  const Linear& linear;
  const X* x;
  size_t x_stride, tokens;

  static QTP_INLINE size_t width(size_t) { return kBlock; }
  static QTP_INLINE size_t floats(size_t tokens) { return 2 * tokens * kBlock; }

  static QTP_INLINE size_t steps(const Linear& linear) { return prepared_length<Pairs>(linear) / kStep; }

  static QTP_INLINE size_t room(const Linear& linear, size_t tokens) {
    return steps(linear) * kTile * ((tokens + kSide - 1) / kSide);
  }

  static QTP_INLINE bool ready(const Linear&) { return false; }

  static QTP_INLINE void lay(const Linear& linear, const uint16_t* x, size_t count, size_t x_stride, X* to) {
    const size_t group = steps(linear) * kTile;
    for (size_t t = 0; t < count; ++t) {
      X* column = to + t / kSide * group + t % kSide;
      prepare<Pairs, BF16>(linear, x + t * x_stride, [&](size_t i, F y) {
        uint16_t halves[kLanes];
        BF16::store(halves, y);
        for (size_t pair = 0; pair < kLanes / 2; ++pair) column[(i / 2 + pair) * kSide] = read<uint32_t>(halves + 2 * pair);
      });
    }
  }

  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };

  // Tiles 0 to 3: sums, [row tile][token tile]. 4, 5: W. 6, 7: x.
  static QTP_INLINE void configure(const size_t* rows, const size_t* columns) {
    Config config;
    const auto shape = [&](int tile, size_t rows, size_t bytes) {
      config.rows[tile] = uint8_t(bytes != 0 ? rows : 0);
      config.row_bytes[tile] = uint16_t(rows != 0 ? bytes : 0);
    };
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) shape(2 * i + j, rows[i], columns[j] * 4);
      shape(4 + i, rows[i], kStep * sizeof(W));
      shape(6 + i, kSide, columns[i] * 4);
    }
    _tile_loadconfig(&config);
  }

  // One step: the sums of R x T tiles. w: the first row of this step; ahead: lines to be fetched from memory meanwhile.
  template <int R, int T>
  static QTP_INLINE void step(const W* w, size_t stride, const X* pairs, size_t group) {
    _tile_loadd(6, pairs, 64);
    if constexpr (T > 1) _tile_loadd(7, pairs + group, 64);
    _tile_loadd(4, w, stride * sizeof(W));
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (T > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (R > 1) {
      _tile_loadd(5, w + kSide * stride, stride * sizeof(W));
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (T > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }

  template <int R, int T>
  QTP_INLINE void leaf(const W* w, size_t count, size_t length, const X* pairs, size_t group, const W* next, float* sums_) const {
    const size_t stride = linear.stride;
    // The next rows, from front to back where nothing lies between them.
    const bool packed = linear.stride == linear.k;
    const size_t apart = packed ? kStep : stride, step_apart = packed ? kSide : 1;
    _tile_zero(0);
    if constexpr (T > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && T > 1) _tile_zero(3);
    size_t i = 0;
    for (; i + kStep <= length; i += kStep) {
      if (next != nullptr)
        for (size_t r = 0; r < kSide; ++r) __builtin_prefetch(next + r * apart + i * step_apart, 0, 2);
      step<R, T>(w + i, stride, pairs, group);
      pairs += kTile;
    }
    if (i < length) {
      alignas(64) W rest[kBlock * kStep] = {};
      for (size_t r = 0; r < count; ++r)
        for (size_t j = i; j < length; ++j) rest[r * kStep + j - i] = w[r * stride + j];
      asm volatile("" ::: "memory");
      step<R, T>(rest, kStep, pairs, group);
    }
    _tile_stored(0, sums_, 64);
    if constexpr (T > 1) _tile_stored(1, sums_ + kTile, 64);
    if constexpr (R > 1) _tile_stored(2, sums_ + 2 * kTile, 64);
    if constexpr (R > 1 && T > 1) _tile_stored(3, sums_ + 3 * kTile, 64);
    asm volatile("" ::: "memory");
  }

  template <int R, int T>
  QTP_INLINE void block(const W* w, size_t count, size_t first, const W* next, float* into, size_t pitch) const {
    alignas(64) float parts[kMostLeaves * 4 * kTile];
    const size_t group = steps(linear) * kTile;
    const X* pairs = x + first / kSide * group;
    for (int i = 0; i < linear.leaves; ++i) {
      const size_t cut = linear.cuts[i], length = linear.cuts[i + 1] - cut;
      leaf<R, T>(w + cut, count, length, pairs, group, next != nullptr ? next + cut : nullptr, parts + size_t(i) * 4 * kTile);
      pairs += padded<Pairs>(length) / kStep * kTile;
    }
    if (linear.leaves > 1) add_leaves(parts, linear.leaves, 4 * kTile);
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) {
        const size_t start = first + size_t(t) * kSide;
        turn_over(parts + size_t(2 * r + t) * kTile, tokens - start, into + start * pitch + size_t(r) * kSide, pitch);
      }
  }

  // A tile of sums, [row][token], to rows of 16 for each of the first `count` tokens.
  static QTP_INLINE void turn_over(const float* from, size_t count, float* into, size_t pitch) {
    if (count < 6) {
      const __m512i lanes = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
      for (size_t t = 0; t < count; ++t) write(into + t * pitch, (F)_mm512_i32gather_ps(lanes, from + t, 4));
      return;
    }
    __m512 a[kSide], b[kSide];
#pragma GCC unroll 16
    for (size_t i = 0; i < kSide; ++i) a[i] = _mm512_load_ps(from + i * kSide);
#pragma GCC unroll 4
    for (size_t i = 0; i < kSide; i += 4) {  // squares of 4 x 4, in each quarter of the vectors
      const __m512 low01 = _mm512_unpacklo_ps(a[i], a[i + 1]), low23 = _mm512_unpacklo_ps(a[i + 2], a[i + 3]);
      const __m512 high01 = _mm512_unpackhi_ps(a[i], a[i + 1]), high23 = _mm512_unpackhi_ps(a[i + 2], a[i + 3]);
      b[i] = _mm512_shuffle_ps(low01, low23, 0x44);
      b[i + 1] = _mm512_shuffle_ps(low01, low23, 0xEE);
      b[i + 2] = _mm512_shuffle_ps(high01, high23, 0x44);
      b[i + 3] = _mm512_shuffle_ps(high01, high23, 0xEE);
    }
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) {  // then the quarters: b[i + 4 j] has tokens i, i + 4, i + 8, i + 12 of rows 4 j ... 4 j + 3
      const __m512 even01 = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), even23 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
      const __m512 odd01 = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xDD), odd23 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xDD);
      a[i] = _mm512_shuffle_f32x4(even01, even23, 0x88);
      a[i + 8] = _mm512_shuffle_f32x4(even01, even23, 0xDD);
      a[i + 4] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
      a[i + 12] = _mm512_shuffle_f32x4(odd01, odd23, 0xDD);
    }
#pragma GCC unroll 16
    for (size_t t = 0; t < kSide; ++t)
      if (t < count) write(into + t * pitch, (F)a[t]);
  }

  // A core reads 16 rows at a time faster than 32 (16.5 and 12 to 14 GB/s here), so only where there is more to multiply do two
  // rows of tiles go together. The order of the sums is the same.
  void rows(size_t first, size_t count, float* into, size_t pitch, float*) const {
    const size_t together = tokens > kSide ? 2 * kSide : kSide;
    size_t shape = 0;
    for (size_t r = 0; r < count; r += together)
      some_rows(first + r, count - r < together ? count - r : together, into + r, pitch, shape);
    _tile_release();
  }

  // shape: what the tiles are configured for.
  QTP_INLINE void some_rows(size_t first, size_t count, float* into, size_t pitch, size_t& shape) const {
    const W* w = static_cast<const W*>(linear.weight) + first * linear.stride;
    const size_t rows[2] = {count < kSide ? count : kSide, count < kSide ? 0 : count - kSide};
    for (size_t t = 0; t < tokens; t += 2 * kSide) {
      const size_t left = tokens - t;
      const size_t columns[2] = {left < kSide ? left : kSide, left < kSide ? 0 : left < 2 * kSide ? left - kSide : kSide};
      const bool fetch = t == 0 && first + count + kSide <= linear.rows && kSide * linear.stride * sizeof(W) <= kFetched;
      const W* next = fetch ? w + count * linear.stride : nullptr;
      const size_t needed = count << 8 | (left < 2 * kSide ? left : 2 * kSide);
      if (shape != needed) configure(rows, columns), shape = needed;
      if (rows[1] != 0)
        columns[1] != 0 ? block<2, 2>(w, count, t, next, into, pitch) : block<2, 1>(w, count, t, next, into, pitch);
      else
        columns[1] != 0 ? block<1, 2>(w, count, t, next, into, pitch) : block<1, 1>(w, count, t, next, into, pitch);
    }
  }
};
