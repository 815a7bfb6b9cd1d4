// Attention in float32, whatever the cache's dtype, for vectors of up to 8 lanes. Lanes are keys for the scores and elements of a
// head for the results. A partition is made ready once for all its rows, in columns of vectors that a product reads one after the
// other: two vectors at a time, still in 16 bits where that halves what is moved and is undone by an instruction or two. Only keys
// have to be turned over for that; for a single tile values are read where they lie. A score is added up in order of elements, a
// result in order of keys.

constexpr size_t kPair = 2 * kLanes;  // lanes of a column: keys, or elements of a head
constexpr size_t kNear = 64;          // keys whose values stay in the first cache until all rows and elements have had them
constexpr size_t kStretch = 32;       // vectors of a column, after which memory is asked for a few lines of what comes next

struct Two {
  F low, high;
};

// Of 4 vectors x[i][j] becomes x[j][i]: lanes of 32 bits, in each 128 bits by themselves.
template <class V>
QTP_INLINE void turn_quarters(V* x) {
#if QTP_AVX2
  const __m256 a = _mm256_unpacklo_ps((__m256)x[0], (__m256)x[1]), b = _mm256_unpackhi_ps((__m256)x[0], (__m256)x[1]);
  const __m256 c = _mm256_unpacklo_ps((__m256)x[2], (__m256)x[3]), d = _mm256_unpackhi_ps((__m256)x[2], (__m256)x[3]);
  x[0] = (V)_mm256_unpacklo_pd((__m256d)a, (__m256d)c), x[1] = (V)_mm256_unpackhi_pd((__m256d)a, (__m256d)c);
  x[2] = (V)_mm256_unpacklo_pd((__m256d)b, (__m256d)d), x[3] = (V)_mm256_unpackhi_pd((__m256d)b, (__m256d)d);
#else
  const V a = __builtin_shuffle(x[0], x[1], I{0, 4, 1, 5}), b = __builtin_shuffle(x[2], x[3], I{0, 4, 1, 5});
  const V c = __builtin_shuffle(x[0], x[1], I{2, 6, 3, 7}), d = __builtin_shuffle(x[2], x[3], I{2, 6, 3, 7});
  x[0] = __builtin_shuffle(a, b, I{0, 1, 4, 5}), x[1] = __builtin_shuffle(a, b, I{2, 3, 6, 7});
  x[2] = __builtin_shuffle(c, d, I{0, 1, 4, 5}), x[3] = __builtin_shuffle(c, d, I{2, 3, 6, 7});
#endif
}

// Of kLanes vectors x[i][j] becomes x[j][i].
template <class V>
QTP_INLINE void turn_over(V* x) {
  turn_quarters(x);
#if QTP_AVX2
  turn_quarters(x + 4);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 low = (__m256)x[i], high = (__m256)x[i + 4];
    x[i] = (V)_mm256_permute2f128_ps(low, high, 0x20);
    x[i + 4] = (V)_mm256_permute2f128_ps(low, high, 0x31);
  }
#endif
}

// As all(*x), without the addition that this may need for the sake of a zero's sign.
QTP_INLINE F spread(const float* x) {
#if QTP_AVX2
  return (F)_mm256_broadcast_ss(x);
#else
  return F{*x, *x, *x, *x};
#endif
}

// What a column keeps of a dtype: kWords words for kPair elements, which `get` makes floats. `keys` writes, for kPair keys, elements
// i to i + kStep, one after the other; `values` kPair elements of one key, with kAsStored as the cache has them; `own` is how many
// elements there are, zeros are behind them. `put` writes elements in the order in which `values` has had them.
template <class Cached>
struct Kept {
  using Word = float;
  using Stored = typename Cached::stored;
  static constexpr size_t kWords = kPair, kStep = kLanes;
  static constexpr bool kAsStored = sizeof(Stored) == sizeof(Word);

  static QTP_INLINE Two get(const Word* x) { return {read<F>(x), read<F>(x + kLanes)}; }

  static QTP_INLINE void keys(const Stored* const* from, size_t i, size_t own, Word* to) {
#pragma GCC unroll 2
    for (size_t half = 0; half < kPair; half += kLanes) {
      F x[kLanes];
#pragma GCC unroll 8
      for (size_t j = 0; j < kLanes; ++j) x[j] = load_up_to<Cached>(from[half + j] + i, own - i);
      turn_over(x);
#pragma GCC unroll 8
      for (size_t j = 0; j < kLanes; ++j) write(to + j * kWords + half, x[j]);
    }
  }

  static QTP_INLINE void values(const Stored* x, size_t own, Word* to) {
    write(to, load_up_to<Cached>(x, own));
    write(to + kLanes, own > kLanes ? load_up_to<Cached>(x + kLanes, own - kLanes) : F{});
  }

  template <class E>
  static QTP_INLINE void put(typename E::stored* to, Two x, size_t own) {
    store_up_to<E>(to, x.low, own);
    if (own > kLanes) store_up_to<E>(to + kLanes, x.high, own - kLanes);
  }
};

// Elements of 16 bits, two in a word.
struct Halves {
  using Word = uint32_t;
  using Stored = uint16_t;
  static constexpr size_t kWords = kLanes, kStep = 8;
  static constexpr bool kAsStored = true;

  static QTP_INLINE void values(const Stored* x, size_t own, Word* to) {
    const U y = words_up_to<U>(x, own);
    __builtin_memcpy(to, &y, sizeof y);
  }

  // 8 elements, of two keys that are 4 apart where a vector has room for them.
  static QTP_INLINE U load(const Stored* const* from, size_t i, size_t own) {
#if QTP_AVX2
    const __m128i low = words_up_to<__m128i>(from[0] + i, own), high = words_up_to<__m128i>(from[4] + i, own);
    return (U)_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
#else
    return words_up_to<U>(from[0] + i, own);
#endif
  }

  // Of a lane the low half belongs to a key and the high half to the one kLanes behind it, until `last` has changed that.
  template <class Last>
  static QTP_INLINE void keys(const Stored* const* from, size_t i, size_t own, Word* to, const Last& last) {
    U first[4], second[4];  // elements 0 to 3 and 4 to 7
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) {
      const U a = load(from + j, i, own - i), b = load(from + j + kLanes, i, own - i);
      first[j] = interleaved<0>(a, b);
      second[j] = interleaved<4>(a, b);
    }
    const auto put = [&](U* x, size_t element) __attribute__((always_inline)) {
      turn_quarters(x);
#pragma GCC unroll 4
      for (size_t j = 0; j < 4; ++j) {
        const U y = last(x[j]);
        __builtin_memcpy(to + (element + j) * kWords, &y, sizeof y);
      }
    };
    put(first, 0);
    put(second, 4);
  }

  // Elements from, from + 1, ... of each 8 of a, and after each of them the one of b; 4 of 8.
  template <uint16_t from>
  static QTP_INLINE U interleaved(U a, U b) {
    typedef uint16_t Pairs __attribute__((vector_size(4 * kLanes)));
    Pairs mask;
    for (size_t i = 0; i < kPair; ++i) mask[i] = uint16_t(i / 8 * 8 + i % 8 / 2 + from + (i % 2) * kPair);
    return (U)__builtin_shuffle((Pairs)a, (Pairs)b, mask);
  }
};

// Low and high halves of words; of values these are the even and the odd elements.
template <>
struct Kept<BF16> : Halves {
  static QTP_INLINE Two get(const Word* x) {
    const U words = read<U>(x);
    return {(F)(words << 16), (F)(words & 0xFFFF0000u)};
  }

  static QTP_INLINE void keys(const Stored* const* from, size_t i, size_t own, Word* to) {
    Halves::keys(from, i, own, to, [](U x) __attribute__((always_inline)) { return x; });
  }

  template <class E>
  static QTP_INLINE void put(Stored* to, Two x, size_t own) {
    Stored even[kLanes], odd[kLanes], both[kPair];
    BF16::store(even, x.low);
    BF16::store(odd, x.high);
    for (size_t i = 0; i < kLanes; ++i) both[2 * i] = even[i], both[2 * i + 1] = odd[i];
    __builtin_memcpy(to, both, (own < kPair ? own : kPair) * sizeof *to);
  }
};

#if QTP_AVX2
// The first and the last 8 of 16 elements.
template <>
struct Kept<F16> : Halves {
  static QTP_INLINE Two get(const Word* x) {
    const Stored* halves = reinterpret_cast<const Stored*>(x);
    return {F16::load(halves), F16::load(halves + kLanes)};
  }

  static QTP_INLINE void keys(const Stored* const* from, size_t i, size_t own, Word* to) {
    const __m256i low_first = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                               0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    Halves::keys(from, i, own, to, [&](U x) __attribute__((always_inline)) {
      return (U)_mm256_permute4x64_epi64(_mm256_shuffle_epi8((__m256i)x, low_first), 0xD8);
    });
  }

  template <class E>
  static QTP_INLINE void put(Stored* to, Two x, size_t own) {
    Kept<F32>::put<F16>(to, x, own);
  }
};
#endif

template <class E_, class Cached_ = E_>
struct Floats {
  using E = E_;
  using Cached = Cached_;
  using Stored = typename Cached::stored;
  using Keeper = Kept<Cached>;
  using Word = typename Keeper::Word;
  static constexpr size_t kWords = Keeper::kWords;

  const Call& call;
  const Unit& unit;
  Ahead& ahead;
  const size_t own, width;  // elements of a head, and what they are padded to
  const bool in_cache;      // values are read where they lie
  Word* keys;               // [kPair keys][element][key]
  Word* values;             // [kPair elements][key][element]
  float* queries;           // [row][element]
  float* scores;            // [row][key]; then powers
  size_t* offsets;
  size_t begin;

  static size_t padded(size_t width) { return round_up(width, kPair); }
  static size_t room(size_t width) {
    return (2 * kPartition * sizeof(Word) * kWords / kPair + kMostTiles * kTile * sizeof(float)) * padded(width) +
           kTile * kPartition * sizeof(float) + kPartition * sizeof(size_t);
  }

  Floats(const Call& call, const Unit& unit, Memory cut, Ahead& ahead)
      : call(call), unit(unit), ahead(ahead), own(call.attention.width), width(padded(own)),
        in_cache(Keeper::kAsStored && unit.rows <= kTile && own % kPair == 0) {
    keys = cut.take<Word>(kPartition / kPair * width * kWords);
    values = cut.take<Word>(kPartition / kPair * width * kWords);
    queries = cut.take<float>(kMostTiles * kTile * width);
    scores = cut.take<float>(kTile * kPartition);
    offsets = cut.take<size_t>(kPartition);
    Place place(unit, 0);
    for (size_t r = 0; r < unit.rows; ++r, place.next())
      for (size_t i = 0; i < own; i += kLanes)
        if constexpr (kIsInt8<Cached>)
          write(queries + r * width + i, scaled_query<E>(call, unit, place, i));
        else
          write(queries + r * width + i, load_up_to<E>(query<E>(call, unit, place) + i, own - i));
  }

  // In place of the keys behind the last that any row sees, up to whole vectors, there is that one.
  void prepare(size_t partition) {
    begin = partition * kPartition;
    const size_t count = smaller_of(last_position(unit) + 1 - begin, kPartition);
    find(call.attention, unit, begin, count, offsets);
    const Stored *k = static_cast<const Stored*>(call.keys), *v = static_cast<const Stored*>(call.values);
    for (size_t first = 0; first < count; first += kPair) {
      const Stored* from[kPair];
      for (size_t j = 0; j < kPair; ++j) from[j] = k + offsets[smaller_of(first + j, count - 1)];
      Word* to = keys + first / kPair * width * kWords;
      size_t i = 0;
      for (; i + Keeper::kStep <= own; i += Keeper::kStep) Keeper::keys(from, i, i + Keeper::kStep, to + i * kWords);  // no test inside
      if (i < own) Keeper::keys(from, i, own, to + i * kWords);
    }
    if (in_cache) return;
    for (size_t first = 0; first < count; first += kPair) {
      const size_t stop = smaller_of(first + kPair, count);
      for (size_t i = 0; i < width; i += kPair) {
        Word* to = values + i / kPair * kPartition * kWords;
        if (own - i >= kPair)
          for (size_t j = first; j < stop; ++j) Keeper::values(v + offsets[j] + i, kPair, to + j * kWords);
        else
          for (size_t j = first; j < stop; ++j) Keeper::values(v + offsets[j] + i, own - i, to + j * kWords);
      }
    }
  }

  // Where the vectors of columns are: one after the other, or, of values, where they lie in the cache.
  struct Laid {
    const Word* at;
    size_t apart;
    QTP_INLINE const Word* operator()(size_t i, size_t c) const { return at + c * apart + i * kWords; }
    QTP_INLINE Laid from(size_t c) const { return {at + c * apart, apart}; }
  };
  struct InCache {
    const Stored* at;
    const size_t* offsets;
    QTP_INLINE const Word* operator()(size_t i, size_t c) const { return reinterpret_cast<const Word*>(at + offsets[i] + c * kPair); }
    QTP_INLINE InCache from(size_t c) const { return {at + c * kPair, offsets}; }
  };

  // to[r * to_stride + lane] is the sum over i < count of x[r * x_stride + i] times vector i of a column, in order, of R rows and C
  // columns; with `more` it is added to what is there. A function of its own, for then the compiler keeps all sums in registers.
  template <int R, int C, class Columns>
  __attribute__((noinline)) void product(const float* x, size_t x_stride, Columns columns, size_t count, bool more, float* to,
                                         size_t to_stride, size_t lines) const {
    F low[R * C] = {}, high[R * C] = {};
    const auto each = [&](const auto& act) __attribute__((always_inline)) {
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) act(to + size_t(r) * to_stride + size_t(c) * kPair, low[r * C + c], high[r * C + c]);
    };
    if (more) each([](const float* from, F& l, F& h) __attribute__((always_inline)) { l = read<F>(from), h = read<F>(from + kLanes); });
    for (size_t i = 0; i < count;) {
      ahead.go(C * lines);
      for (const size_t stop = smaller_of(i + kStretch, count); i < stop; ++i) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          const Two y = Keeper::get(columns(i, size_t(c)));
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r) {
            const F left = spread(x + size_t(r) * x_stride + i);
            low[r * C + c] = fma(left, y.low, low[r * C + c]);
            high[r * C + c] = fma(left, y.high, high[r * C + c]);
          }
        }
      }
    }
    each([](float* to, F l, F h) __attribute__((always_inline)) { write(to, l), write(to + kLanes, h); });
  }

  // As `product`, of any number of rows up to R and some columns: so many at a time that there are sums enough to wait for none.
  template <int R, class Columns>
  QTP_INLINE void product_of(size_t rows, const float* x, size_t x_stride, Columns columns, size_t count, bool more, float* to,
                             size_t to_stride, size_t wide, size_t lines) const {
    if constexpr (R > 0) {
      if (rows < R) return product_of<R - 1>(rows, x, x_stride, columns, count, more, to, to_stride, wide, lines);
      constexpr int some = R == 1 ? 4 : R == 2 ? 2 : 1;
      size_t c = 0;
      for (; c + some <= wide; c += some) product<R, some>(x, x_stride, columns.from(c), count, more, to + c * kPair, to_stride, lines);
      if constexpr (some > 1)
        for (; c < wide; ++c) product<R, 1>(x, x_stride, columns.from(c), count, more, to + c * kPair, to_stride, lines);
    }
  }

  // As `product`, of any number of rows and of `wide` columns. Memory is asked for `share` lines meanwhile.
  template <class Columns>
  void products(const float* x, size_t x_stride, Columns columns, size_t count, bool more, float* to, size_t to_stride, size_t rows,
                size_t wide, size_t share) const {
    const size_t parts = (rows + kProductRows - 1) / kProductRows, together = rows == 1 ? 4 : 2;
    const size_t lines = share / (parts * wide * (round_up(count, kStretch) / kStretch) + 1) + 1;
    for (size_t c = 0; c < wide; c += together)
      for (size_t part = 0, r = 0; part < parts; ++part) {
        const bool seven = kProductRows > 4 && rows == 7;  // 4 and 3 would be slower: 3 rows have too few sums to wait for none
        const size_t here = seven ? 5 - 3 * part : rows / parts + (part < rows % parts);
        product_of<kProductRows>(here, x + r * x_stride, x_stride, columns.from(c), count, more, to + r * to_stride + c * kPair,
                                 to_stride, smaller_of(together, wide - c), lines);
        r += here;
      }
  }

  void run(size_t first, float* most, float* total, float* out) const {
    const size_t rows = smaller_of(kTile, unit.rows - first);
    const Sight sight(call, unit, first, rows, begin);
    const size_t stop = sight.stop(), room = round_up(stop, kPair);
    const size_t wide = width / kPair, share = ahead.share / 2;
    products(queries + first * width, width, Laid{keys, width * kWords}, own, false, scores, kPartition, rows, room / kPair, share);
    const size_t sure = smaller_of(round_up(sight.sure(), kLanes), room), unsure = smaller_of(sight.unsure() / kLanes * kLanes, room);
    const F scale = all(kLog2E / __builtin_sqrtf(float(own)));
    I lanes;
    for (size_t i = 0; i < kLanes; ++i) lanes[i] = int32_t(i);
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
      F large = all(kMasked), other = large, sums = {};
      for (size_t i = 0; i < room; i += kPair) {
        large = larger(large, read<F>(row + i));
        other = larger(other, read<F>(row + i + kLanes));
      }
      const F top = all(largest(larger(large, other))) * scale;
      for (size_t i = 0; i < room; i += kLanes) {
        const F x = power<true>(fma(read<F>(row + i), scale, -top));
        write(row + i, x);
        sums += x;
      }
      most[r] = top[0];
      total[r] = sight.none(r) ? 0.0f : sum(sums);
    }
    if constexpr (Keeper::kAsStored)
      if (in_cache) {
        for (size_t i = 0; i < stop; i += kNear) {
          const InCache columns{static_cast<const Stored*>(call.values), offsets + i};
          const size_t count = smaller_of(kNear, stop - i);
          products(scores + i, kPartition, columns, count, i > 0, out, width, rows, wide, share * kNear / kPartition);
        }
        return;
      }
    products(scores, kPartition, Laid{values, kPartition * kWords}, stop, false, out, width, rows, wide, share);
  }

  static QTP_INLINE void put(const Call& call, size_t kv_head, const float* out, float scale, typename E::stored* to) {
    if constexpr (kIsInt8<Cached>) return put_codes<E>(call, kv_head, out, scale, to);
    const size_t own = call.attention.width;
    for (size_t i = 0; i < own; i += kPair)
      Keeper::template put<E>(to + i, {read<F>(out + i) * scale, read<F>(out + i + kLanes) * scale}, own - i);
  }
};
