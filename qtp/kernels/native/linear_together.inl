// Linear layers with AVX512: some rows at a time and a tile of tokens, while memory is asked for the rows behind them.

// A tile's rows of W and most tokens: the sums stay in registers, and are enough to keep a core busy while each of them waits for
// its last addition.
constexpr int kRows = 4, kTokens = 6;

// What memory is asked for while something else is computed: from `at` to `end`, front to back, some lines a step.
template <int Lines>
struct Coming {
  const char *at, *end;

  QTP_INLINE void go() {
    if (at >= end) return;
#pragma GCC unroll 4
    for (int i = 0; i < Lines; ++i) __builtin_prefetch(at + 64 * i, 0, 2);
    at += 64 * Lines;
  }
};

// acc[t * R + r] += the products of `length` elements of R rows with those of T tokens. meanwhile() is called at each step.
template <class Op, int R, int T, class Meanwhile>
QTP_INLINE void multiply(const typename Op::W* const* rows, const typename Op::X* x, size_t x_stride, size_t length, F* acc,
                         const Meanwhile& meanwhile) {
  const auto step = [&](size_t i, const auto& weight) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int part = 0; part < Op::parts; ++part) {
      typename Op::V w[R];
      if (part > 0) asm("" : "+r"(i));  // words are read again, for the sums need the registers
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) w[r] = weight(rows[r] + i, part);
      if (part == 0) meanwhile();
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const typename Op::V y = Op::token(x + size_t(t) * x_stride + i + size_t(part) * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[t * R + r] = Op::add(acc[t * R + r], w[r], y);
      }
    }
  };
  using W = typename Op::W;
  size_t i = 0;
  for (; i + Op::step <= length; i += Op::step)
    step(i, [](const W* w, int part) __attribute__((always_inline)) { return Op::weight(w, part); });
  if (i < length) step(i, [&](const W* w, int part) __attribute__((always_inline)) { return Op::weight(w, part, length - i); });
}

// One linear layer over tokens that lie ready: in what Op multiplies with, each leaf padded with zeros to whole steps.
template <class Op, class E>
struct Runner {
  using W = typename Op::W;
  using X = typename Op::X;
  static constexpr size_t kBlock = 16;      // outputs that are finished together
  static constexpr size_t kUnit = kTokens;  // tokens: a multiple of what is taken at once
  static constexpr size_t kShort = 8192;    // bytes of a row, up to which a core reads rows one by one faster than some together

  const Linear& linear;
  const X* x;
  size_t x_stride, tokens;

  // Outputs that are finished together; floats for twice as many of so many tokens.
  static QTP_INLINE size_t width(size_t) { return kBlock; }
  static QTP_INLINE size_t floats(size_t tokens) { return 2 * tokens * kBlock; }

  // Rows first .. first + count - 1 (count <= width) with all tokens: into[t * pitch + r]; more may be written, up to the width.
  void rows(size_t first, size_t count, float* into, size_t pitch, float*) const {
    const size_t tiles = (tokens + kTokens - 1) / kTokens;
    if (tokens == 1 && linear.k * sizeof(W) <= kShort) return one_by_one(first, count, into);
    if (tiles == 1) return together<kRows, kTokens, kRows>(first, count, into, pitch, tiles);
    if (tiles <= 3) return together<kRows, kTokens, kRows / 2>(first, count, into, pitch, tiles);
    together<kRows, kTokens, 1>(first, count, into, pitch, tiles);
  }

  // One token: row after row, so that memory sees a single stream.
  QTP_INLINE void one_by_one(size_t first, size_t count, float* into) const {
    F acc[kMostLeaves * kBlock];  // [leaf][row]
    for (size_t r = 0; r < kBlock; ++r) {
      const W* row = static_cast<const W*>(linear.weight) + (first + (r < count ? r : count - 1)) * linear.stride;
      const X* from = x;
      for (int leaf = 0; leaf < linear.leaves; ++leaf) {
        const size_t cut = linear.cuts[leaf], length = linear.cuts[leaf + 1] - cut;
        const W* here = row + cut;
        F sum = {};
        if (r < count) multiply<Op, 1, 1>(&here, from, 0, length, &sum, [] {});
        acc[size_t(leaf) * kBlock + r] = sum;
        from += padded<Op>(length);
      }
    }
    float parts[kMostLeaves * kBlock];
    for (int leaf = 0; leaf < linear.leaves; ++leaf) all_sums<kBlock>(acc + size_t(leaf) * kBlock, parts + size_t(leaf) * kBlock);
    if (linear.leaves > 1) add_leaves(parts, linear.leaves, kBlock);
    __builtin_memcpy(into, parts, kBlock * sizeof(float));
  }

  // So many of the tokens are in this one of some tiles.
  QTP_INLINE size_t dealt(size_t tile, size_t tiles) const { return tokens / tiles + (tile < tokens % tiles); }

  // R rows at a time with about as many tokens, at most T, in each of some tiles, while memory is asked for the next rows: so many
  // lines a step.
  template <int R, int T, int Lines>
  QTP_INLINE void together(size_t first, size_t count, float* into, size_t pitch, size_t tiles) const {
    const W* weight = static_cast<const W*>(linear.weight);
    for (size_t r = 0; r < count; r += R) {
      const W* each[R];
#pragma GCC unroll 8
      for (size_t i = 0; i < R; ++i) each[i] = weight + (first + (r + i < count ? r + i : count - 1)) * linear.stride;
      // Only where nothing lies between rows: else they are few, or parts of rows that the processor fetches well by itself.
      const size_t after = linear.rows - first - r > R && linear.stride == linear.k ? R * linear.stride : 0;
      const W* next = each[0] + after;
      Coming<Lines> coming{reinterpret_cast<const char*>(next), reinterpret_cast<const char*>(next + after)};
      for (size_t tile = 0, t = 0; tile < tiles; ++tile) {
        const size_t here = dealt(tile, tiles);
        block_of<R, T>(here, each, t, into + r, pitch, coming);
        t += here;
      }
    }
  }

  template <int R, int T, class Coming>
  QTP_INLINE void block_of(size_t here, const W* const* rows, size_t t, float* into, size_t pitch, Coming& coming) const {
    if constexpr (T > 0) {
      if (here == T) return block<R, T>(rows, t, into, pitch, coming);
      block_of<R, T - 1>(here, rows, t, into, pitch, coming);
    }
  }

  template <int R, int T, class Coming>
  QTP_INLINE void block(const W* const* rows, size_t t, float* into, size_t pitch, Coming& coming) const {
    float parts[kMostLeaves * R * T];
    const X* from = x + t * x_stride;
    for (int leaf = 0; leaf < linear.leaves; ++leaf) {
      const size_t cut = linear.cuts[leaf], length = linear.cuts[leaf + 1] - cut;
      const W* here[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) here[r] = rows[r] + cut;
      F acc[R * T] = {};
      multiply<Op, R, T>(here, from, x_stride, length, acc, [&]() __attribute__((always_inline)) { coming.go(); });
      all_sums<R * T>(acc, parts + leaf * R * T);
      from += padded<Op>(length);
    }
    if (linear.leaves > 1) add_leaves(parts, linear.leaves, R * T);
#pragma GCC unroll 8
    for (size_t i = 0; i < T; ++i) __builtin_memcpy(into + (t + i) * pitch, parts + i * R, R * sizeof(float));
  }

  // Memory for a block of tokens that lie ready, in elements of X, and how one of them is laid there.
  static QTP_INLINE size_t room(const Linear& linear, size_t tokens) { return prepared_length<Op>(linear) * tokens; }
  static QTP_INLINE bool ready(const Linear& linear) {
    return sizeof(typename E::stored) == sizeof(X) && linear.norm == nullptr && linear.leaves == 1 && linear.k % Op::step == 0;
  }
  static QTP_INLINE void lay(const Linear& linear, const typename E::stored* x, size_t count, size_t x_stride, X* to) {
    const size_t length = prepared_length<Op>(linear);
    for (size_t t = 0; t < count; ++t)
      prepare<Op, E>(linear, x + t * x_stride, [&](size_t i, F y) { Op::store(to + t * length + i, y, kLanes); });
    Op::arrange(to, count * length);
  }
};
