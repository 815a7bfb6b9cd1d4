// Compiled once for each instruction set: see sparse.cpp and sparse.hpp. No standard header may be included here (each_isa.inl).
//
// A code is its value + 8, 0 ... 15, and meets int8 x without a loss: y = sum of code * x, less 8 * sum of x; then each of the
// outliers adds its difference * x. A wide block has two codes for a value, the value + 128 being 16 * the first + the second.
#define QTP_INLINE inline __attribute__((always_inline))

namespace qtp {
namespace QTP_ISA {
namespace {

constexpr size_t kCodes = kSparseGroup / 2;     // bytes of a group
constexpr size_t kCacheBytes = 384 * 1024;      // of prepared tokens, to stay in a core's second cache
constexpr size_t kMostTokens = 256;
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
QTP_INLINE V add(V acc, V codes, V x) { return _mm512_dpbusd_epi32(acc, codes, x); }
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

// Tokens that lie ready: `laid` in groups, the last one's halves apart as those of its codes are, and padded with zeros; `turned`
// [kTurned tokens at a time][k][kTurned]; total[t] = the sum of a token's x.
struct Tokens {
  size_t count;
  const int8_t* laid;
  size_t pitch;
  int8_t* turned;
  int32_t* total;
};

QTP_INLINE size_t padded(size_t k) { return (k + kSparseGroup - 1) / kSparseGroup * kSparseGroup; }

QTP_INLINE void lay(const int8_t* x, size_t k, int8_t* to) {
  const size_t whole = k / kSparseGroup * kSparseGroup, half = (k - whole + 1) / 2;
  __builtin_memcpy(to, x, whole);
  if (whole == k) return;
  __builtin_memset(to + whole, 0, kSparseGroup);
  __builtin_memcpy(to + whole, x + whole, half);
  __builtin_memcpy(to + whole + kCodes, x + whole + half, k - whole - half);
}

QTP_INLINE void turn(const int8_t* x, size_t x_stride, size_t count, size_t k, int8_t* to) {
  for (size_t t = 0; t < kTurned; ++t) {
    if (t < count)
      for (size_t i = 0; i < k; ++i) to[i * kTurned + t] = x[t * x_stride + i];
    else
      for (size_t i = 0; i < k; ++i) to[i * kTurned + t] = 0;
  }
}

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

// A block's rows of all tokens. got, more: memory for kSparseBlock sums a token; running: for those of the outliers.
template <class Item>
QTP_INLINE void block_rows(const Sparse& sparse, size_t block, const Tokens& tokens, int32_t* got, int32_t* more,
                           int32_t* running, int32_t* out, size_t out_stride) {
  const size_t rows = sparse.rows_in(block), code_bytes = rows * sparse.code_row();
  const uint8_t* codes = sparse.block(block);
  const bool wide = sparse.wide(block);
  all_products(codes, rows, sparse, tokens, got);
  if (wide) {
    all_products(codes + code_bytes, rows, sparse, tokens, more);
    for (size_t i = 0; i < tokens.count * kSparseBlock; ++i) got[i] = 16 * got[i] + more[i];
  }
  out += block * kSparseBlock;
  for (size_t first = 0; first < tokens.count; first += kTurned) {
    const size_t count = tokens.count - first < kTurned ? tokens.count - first : kTurned;
    Eight32 added[kSparseBlock];
    if (wide) {
      for (size_t r = 0; r < rows; ++r) added[r] = Eight32{};
    } else if (tokens.count == 1) {
      int32_t one[kSparseBlock];
      outliers<Item, int32_t>(codes + code_bytes, rows, tokens.turned, 1, running, one);
      for (size_t r = 0; r < rows; ++r) added[r] = Eight32{one[r]};
    } else {
      const int8_t* x = tokens.turned + first * sparse.k;
      outliers<Item, Eight32>(codes + code_bytes, rows, x, kTurned, reinterpret_cast<Eight32*>(running), added);
    }
    for (size_t t = 0; t < count; ++t) {
      const int32_t less = (wide ? 128 : 8) * tokens.total[first + t];
      const int32_t* from = got + (first + t) * kSparseBlock;
      int32_t* to = out + (first + t) * out_stride;
      for (size_t r = 0; r < rows; ++r) to[r] = from[r] - less + added[r][t];
    }
  }
}

}  // namespace

void run(const Sparse& sparse, const int8_t* x, size_t tokens, size_t x_stride, int32_t* out, size_t out_stride, Range blocks) {
  const size_t k = sparse.k, pitch = padded(k);
  const bool ready = pitch == k;
  size_t most = kCacheBytes / (pitch + k + 1) / kTurned * kTurned;
  most = most > kMostTokens ? kMostTokens : most < kTurned ? kTurned : most;
  most = most > tokens ? tokens : most;
  const size_t lanes = most > 1 ? kTurned : 1, room = (most + lanes - 1) / lanes * lanes;
  const size_t running = (kSparseBlock * sparse.code_row() / 3 + 1) * lanes;
  const size_t numbers = room * (2 * kSparseBlock + 1) + running;
  int32_t* sums = static_cast<int32_t*>(scratch(numbers * sizeof(int32_t) + most * pitch + room * k + 64));  // first: of aligned vectors
  int32_t *got = sums + running, *more = got + room * kSparseBlock, *total = more + room * kSparseBlock;
  int8_t *laid = reinterpret_cast<int8_t*>(total + room), *turned = laid + most * pitch;
  for (size_t first = 0; first < tokens; first += most) {
    const size_t count = tokens - first < most ? tokens - first : most;
    const int8_t* here = x + first * x_stride;
    for (size_t t = 0; t < count; ++t) {
      int32_t sum = 0;
      for (size_t i = 0; i < k; ++i) sum += here[t * x_stride + i];
      total[t] = sum;
      if (!ready) lay(here + t * x_stride, k, laid + t * pitch);
    }
    Tokens ready_tokens{count, ready ? here : laid, ready ? x_stride : pitch, turned, total};
    if (count == 1)
      __builtin_memcpy(turned, here, k);
    else
      for (size_t t = 0; t < count; t += kTurned)
        turn(here + t * x_stride, x_stride, count - t < kTurned ? count - t : kTurned, k, turned + t * k);
    for (size_t block = blocks.begin; block < blocks.end; ++block) {
      int32_t* to = out + first * out_stride;
      if (sparse.item() == 2)
        block_rows<uint16_t>(sparse, block, ready_tokens, got, more, sums, to, out_stride);
      else
        block_rows<uint32_t>(sparse, block, ready_tokens, got, more, sums, to, out_stride);
    }
  }
}

}  // namespace QTP_ISA
}  // namespace qtp
#undef QTP_INLINE
