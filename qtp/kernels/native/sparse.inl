// Products with compressed weights, for int8.inl: see sparse.hpp, and docs/w8a8sc.md for every byte.
//
// A code is its value + 8, 0 ... 15, and meets int8 x without a loss: y = sum of code * x, less 8 * sum of x; then each of the
// outliers adds its difference * x. A wide block has two codes for a value, the value + 128 being 16 * the first + the second.

constexpr size_t kCodes = kSparseGroup / 2;     // bytes of a group
constexpr size_t kTurned = 8;                   // tokens whose values in a column lie side by side
constexpr size_t kAhead = 4096;                 // bytes that memory is asked for before they are needed

// A tile's code rows and most tokens; for up to kFew tokens there are registers for kManyRows.
constexpr int kTokens = 4, kFew = 1, kManyRows = 4, kRows = QTP_AVX512 ? 4 : 2;

#if QTP_AVX2

#if QTP_AVX512
using V = __m512i;
QTP_INLINE V zero() { return _mm512_setzero_si512(); }
QTP_INLINE V load(const void* at) { return _mm512_loadu_si512(at); }
QTP_INLINE V low(V codes) { return _mm512_and_si512(codes, _mm512_set1_epi8(15)); }
QTP_INLINE V high(V codes) { return low(_mm512_srli_epi16(codes, 4)); }
QTP_INLINE V add32(V a, V b) { return _mm512_add_epi32(a, b); }
QTP_INLINE __m256i half(V x) { return _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1)); }
#else
using V = __m256i;
QTP_INLINE V zero() { return _mm256_setzero_si256(); }
QTP_INLINE V load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
QTP_INLINE V low(V codes) { return _mm256_and_si256(codes, _mm256_set1_epi8(15)); }
QTP_INLINE V high(V codes) { return low(_mm256_srli_epi16(codes, 4)); }
QTP_INLINE V add32(V a, V b) { return _mm256_add_epi32(a, b); }
QTP_INLINE __m256i half(V x) { return x; }
#endif

// acc + the products of codes, which are unsigned, with x. Sums are int32 with VNNI. Otherwise they are int16, which holds 8 sums of
// two products (8 * 2 * 15 * 128 = 30720), until `settled` adds them to the int32 ones.
#if QTP_VNNI
#if QTP_AVX512
QTP_INLINE V add(V acc, V codes, V x) { return _mm512_dpbusd_epi32(acc, codes, x); }
#else
QTP_INLINE V add(V acc, V codes, V x) { return _mm256_dpbusd_avx_epi32(acc, codes, x); }
#endif
QTP_INLINE V settled(V, V acc) { return acc; }
QTP_INLINE V rest(V acc) { return acc; }
#elif QTP_AVX512
QTP_INLINE V add(V acc, V codes, V x) {
  V sum = _mm512_add_epi16(acc, _mm512_maddubs_epi16(codes, x));
  asm("" : "+v"(sum));
  return sum;
}
QTP_INLINE V settled(V sum, V acc) { return _mm512_add_epi32(sum, _mm512_madd_epi16(acc, _mm512_set1_epi16(1))); }
QTP_INLINE V rest(V) { return zero(); }
#else
QTP_INLINE V add(V acc, V codes, V x) {
  V sum = _mm256_add_epi16(acc, _mm256_maddubs_epi16(codes, x));
  asm("" : "+x"(sum));  // gcc would first make all products of two groups, for which there are no registers
  return sum;
}
QTP_INLINE V settled(V sum, V acc) { return _mm256_add_epi32(sum, _mm256_madd_epi16(acc, _mm256_set1_epi16(1))); }
QTP_INLINE V rest(V) { return zero(); }
#endif

// The sums over the lanes of four.
QTP_INLINE __m128i sums(V a, V b, V c, V d) {
  const __m256i each = _mm256_hadd_epi32(_mm256_hadd_epi32(half(a), half(b)), _mm256_hadd_epi32(half(c), half(d)));
  return _mm_add_epi32(_mm256_castsi256_si128(each), _mm256_extracti128_si256(each, 1));
}

// into[t * kSparseBlock + r] = the products of row r's codes with token t's x, for R rows and T tokens. Ahead: memory is asked for
// what lies kAhead behind these rows.
template <int R, int T, bool Ahead>
QTP_INLINE void tile(const uint8_t* const* rows, const int8_t* x, size_t pitch, size_t groups, int32_t* into) {
  V sum[R * T], acc[R * T];
#pragma GCC unroll 16
  for (int i = 0; i < R * T; ++i) sum[i] = acc[i] = zero();
  const auto group = [&](size_t g) __attribute__((always_inline)) {
    if constexpr (Ahead) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) __builtin_prefetch(rows[0] + kAhead + (R * g + size_t(r)) * kCodes, 0, 2);
    }
#pragma GCC unroll 2
    for (size_t i = 0; i < kCodes; i += sizeof(V)) {
      const int8_t* y = x + g * kSparseGroup + i;
      if constexpr (T <= kFew && !QTP_AVX512) {
        V first[T], second[T];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) first[t] = load(y + t * pitch), second[t] = load(y + t * pitch + kCodes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const V codes = load(rows[r] + g * kCodes + i), a = low(codes), b = high(codes);
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) acc[t * R + r] = add(add(acc[t * R + r], a, first[t]), b, second[t]);
        }
      } else {
        V a[R], b[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const V codes = load(rows[r] + g * kCodes + i);
          a[r] = low(codes), b[r] = high(codes);
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const V first = load(y + t * pitch), second = load(y + t * pitch + kCodes);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) acc[t * R + r] = add(add(acc[t * R + r], a[r], first), b[r], second);
        }
      }
    }
  };
  const auto settle = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < R * T; ++i) sum[i] = settled(sum[i], acc[i]), acc[i] = rest(acc[i]);
  };
  static_assert(2 * 2 * kCodes / 32 <= 8, "two groups are as many products as int16 holds");
  size_t g = 0;
  for (; g + 2 <= groups; g += 2) {
    group(g);
    group(g + 1);
    settle();
  }
  if (g < groups) {
    group(g);
    settle();
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    const V* of = sum + t * R;
    const __m128i four = sums(of[0], of[1], of[R - 2], of[R - 1]);
    __builtin_memcpy(into + t * int(kSparseBlock), &four, R * sizeof(int32_t));
  }
}

#else

template <int R, int T, bool>
QTP_INLINE void tile(const uint8_t* const* rows, const int8_t* x, size_t pitch, size_t groups, int32_t* into) {
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) {
      int32_t sum = 0;
      for (size_t g = 0; g < groups; ++g) {
        const uint8_t* codes = rows[r] + g * kCodes;
        const int8_t* y = x + t * pitch + g * kSparseGroup;
        for (size_t i = 0; i < kCodes; ++i) sum += int16_t(codes[i] & 15) * y[i] + int16_t(codes[i] >> 4) * y[kCodes + i];
      }
      into[t * int(kSparseBlock) + r] = sum;
    }
  }
}

#endif

typedef int8_t Eight8 __attribute__((vector_size(8)));
typedef int16_t Eight16 __attribute__((vector_size(16)));
typedef int32_t Eight32 __attribute__((vector_size(32)));

// A column's part of the sum of an outlier: of one token, or of kTurned. A product is within +-120 * 128, which int16 holds.
QTP_INLINE int32_t product(int8_t difference, const int8_t* x, int32_t) { return int32_t(difference) * *x; }
QTP_INLINE Eight32 product(int8_t difference, const int8_t* x, Eight32) {
  Eight8 y;
  __builtin_memcpy(&y, x, sizeof y);
  return __builtin_convertvector(__builtin_convertvector(y, Eight16) * int16_t(difference), Eight32);
}

// sums[r] = the products of row r's outliers with x, in which columns are `apart`. The sums run through all rows of a block, and
// each row's is a difference of two: a loop over the few outliers of a row would end in a mispredicted branch. running: memory for
// one more than the outliers of a block.
template <class Item, class Sum>
QTP_INLINE void outliers(const uint8_t* counts, size_t rows, const int8_t* x, size_t apart, Sum* running, Sum* sums) {
  size_t ends[kSparseBlock], total = 0;
  for (size_t r = 0; r < rows; ++r) {
    Item count;
    __builtin_memcpy(&count, counts + r * sizeof count, sizeof count);
    ends[r] = total += count;
  }
  const uint8_t* columns = counts + rows * sizeof(Item);
  const int8_t* differences = reinterpret_cast<const int8_t*>(columns + total * sizeof(Item));
  Sum sum{};
  running[0] = sum;
  for (size_t i = 0; i < total; ++i) {
    Item column;
    __builtin_memcpy(&column, columns + i * sizeof column, sizeof column);
    sum += product(differences[i], x + column * apart, Sum{});
    running[i + 1] = sum;
  }
  for (size_t r = 0; r < rows; ++r) sums[r] = running[ends[r]] - running[r > 0 ? ends[r - 1] : 0];
}

QTP_INLINE size_t padded(size_t k) { return (k + kSparseGroup - 1) / kSparseGroup * kSparseGroup; }

// Tokens that lie ready in memory of `bytes`, 64 of which are aligned. total[t] = the sum of a token's x; laid: rows of groups, the
// last one's halves apart as those of its codes are, and padded with zeros; turned: x for the outliers, of one token [k], of more
// [kTurned tokens at a time][k][kTurned].
struct Tokens {
  static constexpr size_t kApart = 64;  // bytes; keeps rows off the same sets of a cache

  size_t count, k, room, pitch;
  int32_t* total;
  int8_t *laid, *turned;

  Tokens(const Sparse& sparse, size_t count, void* memory)
      : count(count), k(sparse.k), room(count > 1 ? (count + kTurned - 1) / kTurned * kTurned : 1), pitch(padded(k) + kApart),
        total(static_cast<int32_t*>(memory)), laid(reinterpret_cast<int8_t*>(total + (room + 15) / 16 * 16)),
        turned(laid + count * pitch) {}

  size_t bytes() const { return (size_t(turned + room * k - reinterpret_cast<int8_t*>(total)) + 63) / 64 * 64; }

  // Of token t there is x, one number after the other.
  QTP_INLINE void finish(size_t t) const {
    int8_t* row = laid + t * pitch;
    int32_t sum = 0;
    for (size_t i = 0; i < k; ++i) sum += row[i];
    total[t] = sum;
    if (count == 1)
      __builtin_memcpy(turned, row, k);
    else
      for (size_t i = 0; i < k; ++i) turned[(t / kTurned * k + i) * kTurned + t % kTurned] = row[i];
    const size_t whole = k / kSparseGroup * kSparseGroup, rest = k - whole, half = (k - whole + 1) / 2;
    if (rest == 0) return;
    __builtin_memset(row + k, 0, kSparseGroup - rest);
    __builtin_memmove(row + whole + kCodes, row + whole + half, rest - half);
    __builtin_memset(row + whole + half, 0, kCodes - half);
  }
};

// What a thread needs for itself. running: sums of outliers; got, more: kSparseBlock sums a token.
struct Work {
  int32_t *running, *got, *more;
  size_t bytes;

  Work(const Sparse& sparse, const Tokens& tokens, void* memory) {
    const size_t sums = (kSparseBlock * sparse.code_row() / 3 + 1) * (tokens.count > 1 ? kTurned : 1);
    running = static_cast<int32_t*>(memory);  // aligned vectors
    got = running + (sums + 15) / 16 * 16;
    more = got + tokens.room * kSparseBlock;
    bytes = size_t(more + tokens.room * kSparseBlock - running) * sizeof(int32_t);
  }
};

template <int R, int T, bool Ahead>
QTP_INLINE void tile_of(size_t here, const uint8_t* const* rows, const int8_t* x, size_t pitch, size_t groups, int32_t* into) {
  if constexpr (T > 0) {
    if (here == T) return tile<R, T, Ahead>(rows, x, pitch, groups, into);
    tile_of<R, T - 1, Ahead>(here, rows, x, pitch, groups, into);
  }
}

// into[t * kSparseBlock + r] = the products of the codes of some code rows, which follow each other, with all tokens.
template <int R, int T>
QTP_INLINE void products(const uint8_t* codes, size_t rows, const Sparse& sparse, const Tokens& tokens, int32_t* into) {
  const size_t groups = padded(sparse.k) / kSparseGroup, tiles = (tokens.count + T - 1) / T;
  for (size_t r = 0; r < rows; r += R) {
    const uint8_t* each[R];
#pragma GCC unroll 4
    for (size_t i = 0; i < R; ++i) each[i] = codes + (r + i < rows ? r + i : rows - 1) * sparse.code_row();
    for (size_t tile = 0, t = 0; tile < tiles; ++tile) {
      const size_t here = tokens.count / tiles + (tile < tokens.count % tiles);
      const int8_t* x = tokens.laid + t * tokens.pitch;
      if (tile == 0)
        tile_of<R, T, true>(here, each, x, tokens.pitch, groups, into + t * kSparseBlock + r);
      else
        tile_of<R, T, false>(here, each, x, tokens.pitch, groups, into + t * kSparseBlock + r);
      t += here;
    }
  }
}

QTP_INLINE void all_products(const uint8_t* codes, size_t rows, const Sparse& sparse, const Tokens& tokens, int32_t* into) {
  if (tokens.count <= size_t(kFew))
    products<kManyRows, kFew>(codes, rows, sparse, tokens, into);
  else
    products<kRows, kTokens>(codes, rows, sparse, tokens, into);
}

// work.got[t * kSparseBlock + r] = row r of a block with token t, modulo 2^32.
template <class Item>
void block_of(const Sparse& sparse, size_t block, const Tokens& tokens, const Work& work) {
  const size_t rows = sparse.rows_in(block), code_bytes = rows * sparse.code_row();
  const uint8_t* codes = sparse.block(block);
  const bool wide = sparse.wide(block);
  int32_t *got = work.got, *more = work.more;
  all_products(codes, rows, sparse, tokens, got);
  if (wide) {
    all_products(codes + code_bytes, rows, sparse, tokens, more);
    for (size_t i = 0; i < tokens.count * kSparseBlock; ++i) got[i] = 16 * got[i] + more[i];
  }
  for (size_t first = 0; first < tokens.count; first += kTurned) {
    const size_t count = tokens.count - first < kTurned ? tokens.count - first : kTurned;
    Eight32 added[kSparseBlock];
    if (wide) {
      for (size_t r = 0; r < rows; ++r) added[r] = Eight32{};
    } else if (tokens.count == 1) {
      int32_t one[kSparseBlock];
      outliers<Item, int32_t>(codes + code_bytes, rows, tokens.turned, 1, work.running, one);
      for (size_t r = 0; r < rows; ++r) added[r] = Eight32{one[r]};
    } else {
      const int8_t* x = tokens.turned + first * sparse.k;
      outliers<Item, Eight32>(codes + code_bytes, rows, x, kTurned, reinterpret_cast<Eight32*>(work.running), added);
    }
    for (size_t t = 0; t < count; ++t) {
      const int32_t less = (wide ? 128 : 8) * tokens.total[first + t];
      int32_t* to = got + (first + t) * kSparseBlock;
      for (size_t r = 0; r < rows; ++r) to[r] = to[r] - less + added[r][t];
    }
  }
}

QTP_INLINE void block_rows(const Sparse& sparse, size_t block, const Tokens& tokens, const Work& work) {
  sparse.item() == 2 ? block_of<uint16_t>(sparse, block, tokens, work) : block_of<uint32_t>(sparse, block, tokens, work);
}
