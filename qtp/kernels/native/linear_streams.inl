// Linear layers without AVX512, whose vectors have 8 or 4 floats.
//
// For few tokens, where reading W takes longer than multiplying: rows that are far apart, each followed by the one behind it. For more
// of them: a block of rows by pieces that stay in the first cache, with all tokens.
// x lies by tiles of tokens, and in a tile by turns: [tile][step][token][element]. Tiles of rows and tokens are such that the sums stay
// in the 16 registers, and are enough to keep a core busy while each of them waits for its last addition.

// One step of elements: acc[t * R + r] += the products of what weight(r, part) gives with those of T tokens.
template <class Op, int R, int T, class Weight>
QTP_INLINE void one_step(const Weight& weight, const float* x, F* acc) {
#pragma GCC unroll 2
  for (int part = 0; part < Op::parts; ++part) {
    const auto token = [&](int t) __attribute__((always_inline)) { return read<F>(x + size_t(t) * Op::step + size_t(part) * kLanes); };
    F held[R < T ? R : T];
#pragma GCC unroll 4
    for (int i = 0; i < (R < T ? R : T); ++i) {
      held[i] = R < T ? weight(i, part) : token(i);
      hold(held[i]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < (R < T ? T : R); ++j) {
      F y = R < T ? token(j) : weight(j, part);
      hold(y);
#pragma GCC unroll 4
      for (int i = 0; i < (R < T ? R : T); ++i) {
        F& sum = R < T ? acc[j * R + i] : acc[i * R + j];
        sum = R < T ? added(sum, held[i], y) : added(sum, y, held[i]);
      }
    }
  }
}

// acc[t * R + r] += the products of `length` elements of R rows with those of T tokens.
template <class Op, int R, int T>
QTP_INLINE void multiply(const typename Op::W* const* rows, const float* x, size_t length, F* acc) {
  const auto step = [&](size_t i) __attribute__((always_inline)) {
    one_step<Op, R, T>([&](int r, int part) __attribute__((always_inline)) { return Op::weight(rows[r] + i, part); }, x + i * T, acc);
  };
  size_t i = 0;
  for (; i + 2 * Op::step <= length; i += 2 * Op::step) {
    step(i);
    step(i + Op::step);
  }
  for (; i + Op::step <= length; i += Op::step) step(i);
  if (i == length) return;
  one_step<Op, R, T>([&](int r, int part) __attribute__((always_inline)) { return Op::weight(rows[r] + i, part, length - i); }, x + i * T, acc);
}

#if QTP_AVX2
#include "linear_tile.inl"
#endif

// One linear layer over tokens that lie ready, each leaf padded with zeros to whole steps.
template <class Op, class E>
struct Runner {
  using W = typename Op::W;
  using X = float;
  static constexpr size_t kFew = 4;      // tokens
  static constexpr size_t kFar = 192;    // rows that are taken together with few tokens: long enough for streams
  static constexpr size_t kBlock = 24;   // and with more
  static constexpr size_t kPiece = 448;  // elements of a row, of which a block and a tile of tokens stay in the first cache
  static constexpr int kRows = 3, kTokens = QTP_AVX2 ? 4 : 3;  // of a tile
  static constexpr size_t kUnit = kTokens;

  const Linear& linear;
  const X* x;
  size_t length, tokens;  // length: elements of a token

  // Most tokens of a tile; in how many tiles they are dealt; and how many are in one of them.
  static QTP_INLINE size_t most(size_t tokens) { return tokens == 3 ? 3 : tokens <= kFew ? 2 : kTokens; }
  static QTP_INLINE size_t tiles(size_t tokens) { return (tokens + most(tokens) - 1) / most(tokens); }
  static QTP_INLINE size_t dealt(size_t tokens, size_t tile) { return tokens / tiles(tokens) + (tile < tokens % tiles(tokens)); }

  // Outputs that are finished together.
  static QTP_INLINE size_t width(size_t tokens) { return tokens <= kFew ? kFar : kBlock; }
  // Floats for twice as many outputs of up to so many tokens, and for what `rows` needs besides.
  static QTP_INLINE size_t floats(size_t tokens) {
    const size_t few = 2 * (tokens < kFew ? tokens : kFew) * kFar;
    return tokens <= kFew ? few : few + tokens * kBlock * (2 + kLanes + kMostLeaves);
  }

  // Rows first .. first + count - 1 (count <= width) with all tokens: into[t * pitch + r]; more may be written, up to the width.
  void rows(size_t first, size_t count, float* into, size_t pitch, float* spare) const {
    if (tokens == 3) return streams<3, 3>(first, count, into, pitch);
    if (tokens <= kFew) return streams<4, 2>(first, count, into, pitch);
    pieces(first, count, into, spare);
  }

  QTP_INLINE const W* row(size_t at) const { return static_cast<const W*>(linear.weight) + at * linear.stride; }

  // Each of R readers goes through memory from row to row without a break. The processor fetches ahead of them by itself, faster than
  // it follows prefetches and than where a stream ends with each row.
  template <int R, int T>
  QTP_INLINE void streams(size_t first, size_t count, float* into, size_t pitch) const {
    static_assert(kFar % R == 0);
    const size_t apart = (count + R - 1) / R;
    for (size_t r = 0; r < apart; ++r) {
      const W* each[R];
#pragma GCC unroll 4
      for (size_t i = 0; i < R; ++i) each[i] = row(first + (r + i * apart < count ? r + i * apart : count - 1));
      for (size_t tile = 0, t = 0; tile < tiles(tokens); ++tile) {
        const size_t here = dealt(tokens, tile);
        float sums[R * T];
        whole<R, T>(here, each, x + t * length, sums);
        for (size_t j = 0; j < here; ++j)
          for (size_t i = 0; i < R; ++i) into[(t + j) * pitch + r + i * apart] = sums[j * R + i];
        t += here;
      }
    }
  }

  // to[t * R + r]: whole rows with a tile of `here` <= T tokens.
  template <int R, int T>
  QTP_INLINE void whole(size_t here, const W* const* rows, const X* x, float* to) const {
    if constexpr (T > 0) {
      if (here < T) return whole<R, T - 1>(here, rows, x, to);
      float parts[kMostLeaves * R * T];
      for (int leaf = 0; leaf < linear.leaves; ++leaf) {
        const size_t cut = linear.cuts[leaf], count = linear.cuts[leaf + 1] - cut;
        const W* begins[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) begins[r] = rows[r] + cut;
        F acc[R * T] = {};
        multiply<Op, R, T>(begins, x, count, acc);
        all_sums<R * T>(acc, parts + leaf * R * T);
        x += padded<Op>(count) * T;
      }
      if (linear.leaves > 1) add_leaves(parts, linear.leaves, R * T);
      __builtin_memcpy(to, parts, R * T * sizeof(float));
    }
  }

  // A part of a leaf; whether it is the leaf's first, and its last; where it begins in a token.
  struct Piece {
    size_t at, count;
    bool first, last;
    size_t laid;
  };

  // What memory is asked for while something else is computed: the next block, front to back, some lines at each of `turns`.
  struct Coming {
    const char *at, *end;
    size_t lines;

    Coming(const void* from, size_t bytes, size_t turns)
        : at(static_cast<const char*>(from)), end(at + bytes), lines((bytes / 64 + turns - 1) / turns) {}
    QTP_INLINE void go() {
      for (size_t i = 0; i < lines && at < end; ++i, at += 64) __builtin_prefetch(at, 0, 2);
    }
  };

  // A block of rows by one piece of a leaf after the other, with all tokens: into[t * kBlock + r]. The sums of a leaf that has several
  // wait in memory: so the order of additions is that of `whole`.
  void pieces(size_t first, size_t count, float* into, float* spare) const {
    const W* each[kBlock];
    for (size_t r = 0; r < kBlock; ++r) each[r] = row(first + (r < count ? r : count - 1));
    const size_t after = linear.rows - first > kBlock && linear.stride == linear.k ? kBlock * linear.stride : 0;
    Coming coming(each[0] + after, after * sizeof(W), (linear.k / kPiece + 1) * tiles(tokens) * kBlock / kRows);
    float* const parts = linear.leaves == 1 ? into : spare + tokens * kBlock * kLanes;  // [leaf][token][row]
    size_t laid = 0;  // elements of a token before this leaf
    for (int leaf = 0; leaf < linear.leaves; ++leaf) {
      const size_t cut = linear.cuts[leaf], whole = linear.cuts[leaf + 1] - cut;
      float* to = parts + size_t(leaf) * tokens * kBlock;
      size_t begin = 0;
      do {
        const size_t end = begin + kPiece < whole ? begin + kPiece : whole;
        const Piece piece{cut + begin, end - begin, begin == 0, end == whole, laid + begin};
        for (size_t tile = 0, t = 0; tile < tiles(tokens); ++tile) {
          const size_t here = dealt(tokens, tile);
          float* waiting = piece.first && piece.last ? spare : spare + t * kBlock * kLanes;
          one_tile<kTokens>(here, piece, each, count, x + t * length + piece.laid * here, waiting, to + t * kBlock, coming);
          t += here;
        }
        begin = end;
      } while (begin < whole);
      laid += padded<Op>(whole);
    }
    if (linear.leaves == 1) return;
    add_leaves(parts, linear.leaves, tokens * kBlock);
    __builtin_memcpy(into, parts, tokens * kBlock * sizeof(float));
  }

  // A piece of a block of rows with a tile of `here` <= T tokens. Sums wait in vectors: [row / kRows][token][row % kRows]; once they
  // are done they are added up to to[t * kBlock + r].
  template <int T>
  QTP_INLINE void one_tile(size_t here, const Piece& piece, const W* const* rows, size_t count, const X* from, float* waiting, float* to,
                           Coming& coming) const {
    if constexpr (T > 0) {
      if (here < T) return one_tile<T - 1>(here, piece, rows, count, from, waiting, to, coming);
      for (size_t r = 0; r < count; r += kRows) {
        coming.go();
        const W* begins[kRows];
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) begins[i] = rows[r + i] + piece.at;
        add_piece<T>(begins, from, piece, r, waiting + r * T * kLanes);
      }
      if (!piece.last) return;
      for (size_t t = 0; t < T; ++t) {
        F sums[kBlock];
#pragma GCC unroll 24
        for (size_t r = 0; r < kBlock; ++r) sums[r] = read<F>(waiting + ((r / kRows * T + t) * kRows + r % kRows) * kLanes);
        all_sums<kBlock>(sums, to + t * kBlock);
      }
    }
  }

  // sums, kRows x T vectors, += a piece of rows r ... r + kRows - 1 of a block with a tile of T tokens.
  template <int T>
  QTP_INLINE void add_piece(const W* const* rows, const X* from, const Piece& piece, [[maybe_unused]] size_t r, float* sums) const {
    size_t done = 0;
#if QTP_AVX2
    if constexpr (Op::parts == 2 && T == 4) {
      done = piece.count / Op::step * Op::step;
      if (done > 0) {
        const char* next = reinterpret_cast<const char*>(from + T * length);  // tile of tokens: its rows / kRows turns ask for all of it
        three_rows_four_tokens(rows, from, done / Op::step, piece.first, sums, next + r / kRows * 2 * done);
        if (done == piece.count) return;
      }
    }
#endif
    F acc[kRows * T];
#pragma GCC unroll 12
    for (int i = 0; i < kRows * T; ++i) acc[i] = piece.first && done == 0 ? F{} : read<F>(sums + i * int(kLanes));
    const W* begins[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) begins[i] = rows[i] + done;
    multiply<Op, kRows, T>(begins, from + done * T, piece.count - done, acc);
#pragma GCC unroll 12
    for (int i = 0; i < kRows * T; ++i) write(sums + i * int(kLanes), acc[i]);
  }

  // Memory for a block of tokens that lie ready, in elements of X, and how they are laid there.
  static QTP_INLINE size_t room(const Linear& linear, size_t tokens) { return prepared_length<Op>(linear) * tokens; }
  static QTP_INLINE bool ready(const Linear&) { return false; }
  static QTP_INLINE void lay(const Linear& linear, const typename E::stored* x, size_t count, size_t x_stride, X* to) {
    const size_t length = prepared_length<Op>(linear);
    for (size_t tile = 0, t = 0; t < count; ++tile) {
      const size_t here = dealt(count, tile);
      for (size_t j = 0; j < here; ++j)
        prepare<Op, E>(linear, x + (t + j) * x_stride, [&](size_t i, F y) {
          write(to + t * length + (i / Op::step * here + j) * Op::step + i % Op::step, y);
        });
      t += here;
    }
    Op::arrange(to, count * length);
  }
};
