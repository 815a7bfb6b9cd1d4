// What attention over a cache of any dtype is made of, for the bodies of each_isa.inl. A kernel has: E, the dtype of the run; Cached,
// that of the cache; padded and room, of a head's width; prepare(partition), of what all its rows need; run(first, ...), the results
// of up to kTile rows over that partition; put, which makes a row of the run's dtype of them.

constexpr float kMasked = -1e30f;  // finite, so that differences of two are
constexpr float kLog2E = 1.44269504088896341f;

QTP_INLINE size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }
QTP_INLINE size_t smaller_of(size_t a, size_t b) { return a < b ? a : b; }

// 2 to the x; 0 far below. To about 1 unit in the last place of a float, or to 3e-6 where that is enough.
template <bool exact>
QTP_INLINE F power(F x) {
  const auto polynomial = [](F r) __attribute__((always_inline)) {
    if constexpr (exact) {
      F p = fma(r, all(0.0013264715671539307f), all(0.009671513922512531f));
      p = fma(p, r, all(0.05550733953714371f));
      p = fma(p, r, all(0.24022242426872253f));
      p = fma(p, r, all(0.6931470036506653f));
      return fma(p, r, all(1.0f));
    } else {
      F p = fma(r, all(0.00958284456282854f), all(0.055906444787979126f));
      p = fma(p, r, all(0.24024099111557007f));
      p = fma(p, r, all(0.6931241750717163f));
      return fma(p, r, all(1.0f));
    }
  };
#if QTP_AVX512
  const __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (F)_mm512_scalef_ps((__m512)polynomial(x - (F)n), n);
#else
  const U flushed = (U)(x < all(-126.0f));
  x = x < all(-126.0f) ? all(-126.0f) : x;
  const F shifted = x + 12582912.0f;  // 1.5 x 2^23: the nearest integer, in the low bits
  const U scaled = (U)polynomial(x - (shifted - 12582912.0f)) + ((U)shifted << 23);
  return (F)(~flushed & scaled);
#endif
}

template <bool exact>
QTP_INLINE float power_of(float x) {
  const F y = power<exact>(all(x));
  return y[0];
}

// A vector full of stored elements, or the first n and zeros; load_up_to makes floats of them.
template <class V, class Stored>
QTP_INLINE V words_up_to(const Stored* x, size_t n) {
  if (n >= sizeof(V) / sizeof *x) return read<V>(x);
  V y{};
  __builtin_memcpy(&y, x, n * sizeof *x);
  return y;
}

QTP_INLINE size_t last_position(const Unit& unit) { return unit.position + (unit.first + unit.rows - 1) / unit.group; }

// Where the keys and values of a partition's first `count` positions lie: offsets of elements from the start of the cache.
QTP_INLINE void find(const Attention& a, const Unit& unit, size_t begin, size_t count, size_t* offsets) {
  const size_t row = a.kv_heads * a.width;
  for (size_t i = 0; i < count;) {
    const size_t inside = (begin + i) % a.block;
    const size_t stop = smaller_of(count, i + a.block - inside);
    size_t offset = (size_t(unit.table[(begin + i) / a.block]) * a.block + inside) * row + unit.kv_head * a.width;
    for (; i < stop; ++i, offset += row) offsets[i] = offset;
  }
}

// The token, counted from the sequence's first in this step, and the head, from the group's first, of a unit's row.
struct Place {
  size_t token, head, group;
  QTP_INLINE Place(const Unit& unit, size_t row)
      : token((unit.first + row) / unit.group), head((unit.first + row) % unit.group), group(unit.group) {}
  QTP_INLINE void next() {
    if (++head == group) head = 0, ++token;
  }
};

// Which of a partition's keys the rows of a tile see: row r those from low[r] to high[r], counted from the partition's begin.
// Rows from `rows` on are like the last.
struct Sight {
  int32_t low[kTile], high[kTile];

  QTP_INLINE Sight(const Call& call, const Unit& unit, size_t first, size_t rows, size_t begin) {
    constexpr int64_t far = 1 << 30;
    Place place(unit, first);
    for (size_t r = 0; r < kTile; ++r) {
      if (r > 0 && r < rows) place.next();
      const int64_t at = int64_t(unit.position + place.token) - int64_t(begin);
      const int64_t from = call.window < size_t(far) ? at - int64_t(call.window) + 1 : -far;
      high[r] = int32_t(at < far ? at : far);
      low[r] = int32_t(from > far ? far : from < -far ? -far : from);
    }
  }

  QTP_INLINE bool none(size_t r) const { return high[r] < 0 || low[r] >= int32_t(kPartition); }
  // Keys [0, stop) are all that any row sees; keys [sure, unsure) are seen by all rows.
  QTP_INLINE size_t stop() const { return high[kTile - 1] < 0 ? 0 : smaller_of(size_t(high[kTile - 1]) + 1, kPartition); }
  QTP_INLINE size_t sure() const { return low[kTile - 1] < 0 ? 0 : size_t(low[kTile - 1]); }
  QTP_INLINE size_t unsure() const { return high[0] < 0 ? 0 : size_t(high[0]) + 1; }
};

// A row's results over some partitions: the largest score in units of log2, the sum of the powers and of the powers times values.
struct Row {
  float *most, *total, *out;
};

// Adds the results of the partition that comes next. total is 0 where a row has seen nothing.
__attribute__((noinline)) void merge(Row row, const Row& next, size_t padded) {
  if (*next.total == 0.0f) return;
  if (*row.total == 0.0f) {
    *row.most = *next.most;
    *row.total = *next.total;
    for (size_t i = 0; i < padded; i += kLanes) write(row.out + i, read<F>(next.out + i));
    return;
  }
  const float most = *row.most > *next.most ? *row.most : *next.most;
  const F old = power<true>(all(*row.most - most)), fresh = power<true>(all(*next.most - most));
  const F total = fma(all(*row.total), old, all(*next.total) * fresh);
  *row.most = most;
  *row.total = total[0];
  for (size_t i = 0; i < padded; i += kLanes) write(row.out + i, fma(read<F>(row.out + i), old, read<F>(next.out + i) * fresh));
}

// Turns a head's vector: halves are first and second.
template <class E>
QTP_INLINE void turn(const typename E::stored* x, const float* cos, const float* sin, size_t half, typename E::stored* to) {
  for (size_t i = 0; i < half; i += kLanes) {
    const size_t n = half - i;
    const F first = load_up_to<E>(x + i, n), second = load_up_to<E>(x + half + i, n);
    const F c = load_up_to<F32>(cos + i, n), s = load_up_to<F32>(sin + i, n);
    store_up_to<E>(to + i, fma(first, c, -(second * s)), n);
    store_up_to<E>(to + half + i, fma(second, c, first * s), n);
  }
}

// The dtype of an int8 cache.
struct I8 {
  using stored = int8_t;
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  static QTP_INLINE F load(const int8_t* x) { return __builtin_convertvector(read<Bytes>(x), F); }
};

template <class Cached>
constexpr bool kIsInt8 = sizeof(typename Cached::stored) == 1;

constexpr float kToInteger = 12582912.0f;  // 1.5 x 2^23: once it is added, the low bits are the nearest integer, of ties the even one

// clamp(x / scale + offset), to be rounded.
QTP_INLINE F in_steps(F x, F scale, F offset) {
  const F y = x / scale + offset, low = all(-128.0f), high = all(127.0f);
  return larger(y < high ? y : high, low);
}

template <class E>
QTP_INLINE void to_int8(const typename E::stored* x, const float* scale, const float* offset, size_t width, int8_t* to) {
  for (size_t i = 0; i < width; i += kLanes) {
    const size_t n = width - i;
    const U bits = (U)(in_steps(load_up_to<E>(x + i, n), load_up_to<F32>(scale + i, n), load_up_to<F32>(offset + i, n)) + kToInteger);
    const I8::Bytes bytes = __builtin_convertvector((I)bits, I8::Bytes);
    __builtin_memcpy(to + i, &bytes, n < kLanes ? n : kLanes);
  }
}

template <class E, class Cached>
void rope(const Call& call, Range range) {
  using Stored = typename E::stored;
  const Attention& a = call.attention;
  const size_t all_heads = a.heads + 2 * a.kv_heads, half = a.width / 2;
  size_t token = range.begin / all_heads, head = range.begin % all_heads;
  for (size_t i = range.begin; i < range.end; ++i) {
    Stored* x = static_cast<Stored*>(call.qkv) + token * call.stride + head * a.width;
    const float *cos = call.step.cos + token * half, *sin = call.step.sin + token * half;
    if (head < a.heads) {
      turn<E>(x, cos, sin, half, x);
    } else {
      const bool key = head < a.heads + a.kv_heads;
      const size_t kv_head = head - a.heads - (key ? 0 : a.kv_heads);
      const size_t place = (size_t(call.step.slots[token]) * a.kv_heads + kv_head) * a.width;
      if constexpr (kIsInt8<Cached>) {
        const Scales& s = *call.scales;
        const size_t channel = kv_head * a.width;
        int8_t* to = static_cast<int8_t*>(key ? call.keys : call.values) + place;
        if (key) turn<E>(x, cos, sin, half, x);
        to_int8<E>(x, (key ? s.key_scale : s.value_scale) + channel, (key ? s.key_offset : s.value_offset) + channel, a.width, to);
      } else if (key)
        turn<E>(x, cos, sin, half, static_cast<Stored*>(call.keys) + place);
      else
        __builtin_memcpy(static_cast<Stored*>(call.values) + place, x, a.width * sizeof(Stored));
    }
    if (++head == all_heads) head = 0, ++token;
  }
}

template <class E>
QTP_INLINE const typename E::stored* query(const Call& call, const Unit& unit, const Place& place) {
  return static_cast<const typename E::stored*>(call.qkv) + (unit.token + place.token) * call.stride +
         (unit.head + place.head) * call.attention.width;
}

// Elements i, i + 1, ... of a query as the codes of an int8 cache are to meet it: rounded if queries are, times the scales of keys.
// What the offsets of keys add to a score is the same for all keys and left out.
template <class E>
QTP_INLINE F scaled_query(const Call& call, const Unit& unit, const Place& place, size_t i) {
  const Scales& s = *call.scales;
  const size_t n = call.attention.width - i, head = unit.head + place.head;
  F x = load_up_to<E>(query<E>(call, unit, place) + i, n);
  if (s.query_scale != nullptr) {
    const F scale = all(s.query_scale[head]), offset = all(s.query_offset[head]);
    x = ((in_steps(x, scale, offset) + kToInteger) - kToInteger - offset) * scale;
  }
  return x * load_up_to<F32>(s.key_scale + unit.kv_head * call.attention.width + i, n);
}

// Results over codes of values, times `scale`, become a vector of the run's dtype.
template <class E>
QTP_INLINE void put_codes(const Call& call, size_t kv_head, const float* out, float scale, typename E::stored* to) {
  const size_t width = call.attention.width;
  const float *by = call.scales->value_scale + kv_head * width, *offset = call.scales->value_offset + kv_head * width;
  for (size_t i = 0; i < width; i += kLanes) {
    const size_t n = width - i;
    const F code = read<F>(out + i) * scale - load_up_to<F32>(offset + i, n);
    store_up_to<E>(to + i, code * load_up_to<F32>(by + i, n), n);
  }
}

// Asks memory, while something else is computed, for the keys and values that will be read next. On one thread whose plain read
// was 13 to 16 GB/s, decoding read 8.2 without and 10.4 with it (heads of 64, 16,384 positions).
struct Ahead {
  const char *keys, *values;
  const size_t* offsets;       // bytes, of each position
  size_t at, lines, share;     // lines of keys: those asked for, all, and what to ask for while one unit is computed
  size_t line, row, of_a_row;  // the next one, and how many of a position

  // The next `count` lines of keys, and of values.
  QTP_INLINE void go(size_t count) {
    const size_t stop = smaller_of(at + count, lines);
    while (at < stop) {
      const size_t part = smaller_of(of_a_row - line, stop - at);
      const char *key = keys + offsets[row] + line * 64, *value = values + offsets[row] + line * 64;
      for (size_t i = 0; i < part; ++i, key += 64, value += 64) {
        __builtin_prefetch(key, 0, 2);
        __builtin_prefetch(value, 0, 2);
      }
      at += part;
      line += part;
      if (line == of_a_row) line = 0, ++row;
    }
  }
};

// What any kernel needs of a thread's memory, cut from it piece by piece.
struct Memory {
  char* at;

  template <class T>
  QTP_INLINE T* take(size_t count) {
    T* taken = reinterpret_cast<T*>(at);
    at += round_up(count * sizeof(T), 64);
    return taken;
  }
};

// The right factor of a product, in vectors of words: that of index i in column c is at [i * stride + c * apart].
template <class Word>
struct Right {
  const Word* at;
  size_t stride, apart;
};

// Of R rows x with C columns: to[r * to_stride + kLanes c ...] is the sum over i < count of x[r * x_stride + i] * y[i], in order.
// Kernel::add multiplies a word of x with the words of a vector and adds to a vector of Kernel::Sum.
template <class Kernel, int R, int C>
QTP_INLINE void product(const typename Kernel::Word* x, size_t x_stride, Right<typename Kernel::Word> y, size_t count, float* to,
                        size_t to_stride) {
  using Sum = typename Kernel::Sum;
  Sum acc[R * C] = {};
  for (size_t i = 0; i < count; ++i) {
    Sum other[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) other[c] = read<Sum>(y.at + size_t(c) * y.apart + i * y.stride);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r * C + c] = Kernel::add(acc[r * C + c], x[size_t(r) * x_stride + i], other[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) __builtin_memcpy(to + size_t(r) * to_stride + size_t(c) * kLanes, &acc[r * C + c], sizeof(Sum));
}

constexpr int kProductRows = QTP_AVX2 ? 6 : 4;  // with so many columns their sums stay in registers
constexpr int kProductColumns = QTP_AVX512 ? 4 : 2;

template <class Kernel, int R, int C>
QTP_INLINE void product_of(size_t rows, const typename Kernel::Word* x, size_t x_stride, Right<typename Kernel::Word> y, size_t count,
                           float* to, size_t to_stride) {
  if constexpr (R > 0) {
    if (rows == R) return product<Kernel, R, C>(x, x_stride, y, count, to, to_stride);
    product_of<Kernel, R - 1, C>(rows, x, x_stride, y, count, to, to_stride);
  }
}

template <class Kernel, int C>
QTP_INLINE void products_of(const typename Kernel::Word* x, size_t x_stride, Right<typename Kernel::Word>& y, size_t count, float*& to,
                            size_t to_stride, size_t rows, size_t& columns) {
  const size_t parts = (rows + kProductRows - 1) / kProductRows;
  for (; columns >= C; columns -= C, y.at += C * y.apart, to += C * kLanes)
    for (size_t part = 0, r = 0; part < parts; ++part) {
      const size_t here = rows / parts + (part < rows % parts);
      product_of<Kernel, kProductRows, C>(here, x + r * x_stride, x_stride, y, count, to + r * to_stride, to_stride);
      r += here;
    }
}

// As `product`, of any number of rows and columns.
template <class Kernel>
void products(const typename Kernel::Word* x, size_t x_stride, Right<typename Kernel::Word> y, size_t count, float* to,
              size_t to_stride, size_t rows, size_t columns) {
  products_of<Kernel, kProductColumns>(x, x_stride, y, count, to, to_stride, rows, columns);
  if constexpr (kProductColumns > 2) products_of<Kernel, 2>(x, x_stride, y, count, to, to_stride, rows, columns);
  if constexpr (kProductColumns > 1) products_of<Kernel, 1>(x, x_stride, y, count, to, to_stride, rows, columns);
}

template <class Kernel>
size_t padded(const Attention& a) {
  return Kernel::padded(a.width);
}

template <class Kernel>
size_t room(const Attention& a) {
  constexpr size_t rows = kMostTiles * kTile;
  const size_t results = (rows + kTile) * (Kernel::padded(a.width) + 2);
  return Kernel::room(a.width) + results * sizeof(float) + kPartition * sizeof(size_t) + 1024;
}

template <class Kernel>
QTP_INLINE void finish(const Call& call, const Unit& unit, const Place& place, const Row& result) {
  using Stored = typename Kernel::E::stored;
  const Attention& a = call.attention;
  const size_t vector = (unit.token + place.token) * a.heads + unit.head + place.head;
  Kernel::put(call, unit.kv_head, result.out, 1.0f / *result.total, static_cast<Stored*>(call.out) + vector * a.width);
}

// unit.parts holds for each partition the maxima, the sums and the rows of results.
QTP_INLINE Row part_of(const Unit& unit, size_t partition, size_t row, size_t padded) {
  float* part = unit.parts + (partition - unit.begin) * unit.rows * (padded + 2);
  return {part + row, part + unit.rows + row, part + 2 * unit.rows + row * padded};
}

// All partitions of a unit, to the end.
template <class Kernel>
void whole(const Call& call, const Unit& unit, Memory cut, Ahead& ahead) {
  const size_t padded = Kernel::padded(call.attention.width);
  float *most = cut.take<float>(unit.rows), *total = cut.take<float>(unit.rows), *out = cut.take<float>(unit.rows * padded);
  float *next_most = cut.take<float>(kTile), *next_total = cut.take<float>(kTile), *next_out = cut.take<float>(kTile * padded);
  Kernel kernel(call, unit, cut, ahead);
  for (size_t partition = unit.begin; partition < unit.end; ++partition) {
    kernel.prepare(partition);
    for (size_t first = 0; first < unit.rows; first += kTile) {
      if (partition == unit.begin) {
        kernel.run(first, most + first, total + first, out + first * padded);
        continue;
      }
      kernel.run(first, next_most, next_total, next_out);
      for (size_t r = 0; r < smaller_of(kTile, unit.rows - first); ++r)
        merge({most + first + r, total + first + r, out + (first + r) * padded},
              {next_most + r, next_total + r, next_out + r * padded}, padded);
    }
  }
  Place place(unit, 0);
  for (size_t r = 0; r < unit.rows; ++r, place.next()) finish<Kernel>(call, unit, place, {most + r, total + r, out + r * padded});
}

template <class Kernel>
void attend(const Call& call, const Item& item, const Item* next, void* memory) {
  using Stored = typename Kernel::Cached::stored;
  const size_t padded = Kernel::padded(call.attention.width);
  Memory cut{static_cast<char*>(memory)};
  Ahead ahead{};
  if (next != nullptr) {
    const Unit& unit = *next->units;
    const size_t begin = next->partition * kPartition, count = smaller_of(last_position(unit) + 1 - begin, kPartition);
    size_t* offsets = cut.take<size_t>(kPartition);
    find(call.attention, unit, begin, count, offsets);
    for (size_t i = 0; i < count; ++i) offsets[i] *= sizeof(Stored);
    ahead.keys = static_cast<const char*>(call.keys);
    ahead.values = static_cast<const char*>(call.values);
    ahead.offsets = offsets;
    ahead.of_a_row = (next->count * call.attention.width * sizeof(Stored) + 63) / 64;
    ahead.lines = ahead.of_a_row * count;
    ahead.share = ahead.lines / item.count;
  }
  for (size_t i = 0; i < item.count; ++i) {
    const Unit& unit = item.units[i];
    if (unit.parts == nullptr) {
      whole<Kernel>(call, unit, cut, ahead);
      continue;
    }
    Kernel kernel(call, unit, cut, ahead);
    kernel.prepare(item.partition);
    for (size_t first = 0; first < unit.rows; first += kTile) {
      const Row to = part_of(unit, item.partition, first, padded);
      kernel.run(first, to.most, to.total, to.out);
    }
  }
}

template <class Kernel>
void join(const Call& call, const Unit& unit, Range rows, void* memory) {
  const size_t padded = Kernel::padded(call.attention.width);
  Memory cut{static_cast<char*>(memory)};
  float* out = cut.take<float>(padded);
  Place place(unit, rows.begin);
  for (size_t r = rows.begin; r < rows.end; ++r, place.next()) {
    float most = 0.0f, total = 0.0f;
    const Row row{&most, &total, out};
    for (size_t partition = unit.begin; partition < unit.end; ++partition)
      merge(row, part_of(unit, partition, r, padded), padded);
    finish<Kernel>(call, unit, place, row);
  }
}

template <class Kernel>
constexpr AttentionTable table() {
  return {room<Kernel>, padded<Kernel>, rope<typename Kernel::E, typename Kernel::Cached>, attend<Kernel>, join<Kernel>};
}
