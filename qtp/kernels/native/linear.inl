// Compiled once for each instruction set: see each_isa.inl and linear.hpp.
namespace qtp {
namespace QTP_ISA {
namespace {

#include "vectors.inl"

constexpr size_t kCacheBytes = 768 * 1024;    // of prepared tokens, to stay in a core's second cache
constexpr size_t kMostTokens = 288;

// A tile's rows of W and most tokens: the sums stay in registers, and are enough to keep a core busy while each of them waits for
// its last addition. kFew: rows for one or two tokens, where registers are few.
constexpr int kRows = QTP_AVX512 ? 4 : 2;
constexpr int kTokens = QTP_AVX512 ? 6 : 5;
constexpr int kFew = 4;

// How elements of W meet those of x: `step` elements of a row at a time, of which each part of kLanes x gives one product to each
// lane of `acc` (or two). `arrange` brings `length` elements of x, a multiple of `step`, into the order in which parts want them.
template <class E>
struct Floats {
  using W = typename E::stored;
  using X = float;
  using V = F;
  static constexpr size_t step = kLanes;
  static constexpr int parts = 1;
  static QTP_INLINE V weight(const W* w, int) { return E::load(w); }
  static QTP_INLINE V weight(const W* w, int, size_t n) { return load_some<E>(w, n); }
  static QTP_INLINE V token(const X* x) { return read<F>(x); }
  static QTP_INLINE F add(F acc, V w, V x) { return fma(w, x, acc); }
  static QTP_INLINE void store(X* to, F x, size_t n) { store_up_to<F32>(to, x, n); }
  static QTP_INLINE void arrange(X*, size_t) {}
};

// bfloat16 as words of two: the elements with even index are a shift away from floats, the odd ones a mask.
struct Halves : Floats<BF16> {
  static constexpr size_t step = 2 * kLanes;
  static constexpr int parts = 2;
  static QTP_INLINE F weight(const W* w, int part) {
    const U words = read<U>(w);
    return (F)(part == 0 ? words << 16 : words & 0xFFFF0000u);
  }
  static QTP_INLINE F weight(const W* w, int part, size_t n) {
    W y[step] = {};
    for (size_t i = 0; i < n; ++i) y[i] = w[i];
    return weight(y, part);
  }
  static QTP_INLINE void arrange(X* x, size_t length) {
    I even, odd;
    for (size_t i = 0; i < kLanes; ++i) even[i] = int32_t(2 * i), odd[i] = int32_t(2 * i + 1);
    for (size_t i = 0; i < length; i += step) {
      const F a = read<F>(x + i), b = read<F>(x + i + kLanes);
      write(x + i, __builtin_shuffle(a, b, even));
      write(x + i + kLanes, __builtin_shuffle(a, b, odd));
    }
  }
};

#if QTP_BF16
// bfloat16 for instructions that multiply and add two at a time.
struct Pairs {
  using W = uint16_t;
  using X = uint16_t;
  using V = __m512i;
  static constexpr size_t step = 2 * kLanes;
  static constexpr int parts = 1;
  static QTP_INLINE V weight(const W* w, int) { return read<__m512i>(w); }
  static QTP_INLINE V weight(const W* w, int, size_t n) { return _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), w); }
  static QTP_INLINE V token(const X* x) { return read<__m512i>(x); }
  static QTP_INLINE F add(F acc, V w, V x) { return (F)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x); }
  static QTP_INLINE void store(X* to, F x, size_t n) { store_up_to<BF16>(to, x, n); }
  static QTP_INLINE void arrange(X*, size_t) {}
};
#endif

template <class Op>
constexpr size_t padded(size_t n) {
  return (n + Op::step - 1) / Op::step * Op::step;
}

template <class Op>
QTP_INLINE size_t prepared_length(const Linear& linear) {
  size_t length = 0;
  for (int leaf = 0; leaf < linear.leaves; ++leaf) length += padded<Op>(linear.cuts[leaf + 1] - linear.cuts[leaf]);
  return length;
}

// A token's x, or norm(x): x / sqrt(mean(x^2) + eps), rounded, times the weight, rounded. Calls put(i, kLanes elements from i on) in the
// order of the leaves, each padded with zeros.
template <class Op, class E, class Put>
QTP_INLINE void prepare(const Linear& linear, const typename E::stored* x, const Put& put) {
  const typename E::stored* norm = static_cast<const typename E::stored*>(linear.norm);
  const F scale = all(norm != nullptr ? inverse_root_mean_square<E>(x, linear.k, linear.eps) : 1.0f);
  size_t at = 0;
  for (int leaf = 0; leaf < linear.leaves; ++leaf) {
    const size_t cut = linear.cuts[leaf], length = linear.cuts[leaf + 1] - cut, room = padded<Op>(length);
    for (size_t i = 0; i < room; i += kLanes) {
      F y = {};
      if (i < length) {
        y = load_up_to<E>(x + cut + i, length - i);
        if (norm != nullptr) y = rounded<E>(rounded<E>(y * scale) * load_up_to<E>(norm + cut + i, length - i));
      }
      put(at + i, y);
    }
    at += room;
  }
}

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

// ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)), each of `width` numbers; the result is in the first.
QTP_INLINE void add_leaves(float* parts, int leaves, size_t width) {
  for (int step = 1; step < leaves; step *= 2)
    for (int leaf = 0; leaf + step < leaves; leaf += 2 * step)
      for (size_t i = 0; i < width; ++i) parts[size_t(leaf) * width + i] += parts[size_t(leaf + step) * width + i];
}

// One linear layer over tokens that lie ready: in what Op multiplies with, each leaf padded with zeros to whole steps.
template <class Op, class E>
struct Runner {
  using W = typename Op::W;
  using X = typename Op::X;
  static constexpr size_t kBlock = 16;      // outputs that are finished together
  static constexpr size_t kUnit = kTokens;  // tokens: a multiple of what is taken at once
  static constexpr size_t kShort = 8192;    // bytes of a row, up to which a core reads rows one by one faster than some together
  static constexpr size_t kPiece = 1024;    // elements of a row, of which a tile of tokens stays in the first cache
  static constexpr size_t kSpare = QTP_AVX512 ? 0 : kBlock * (kLanes + kMostLeaves);  // floats a token that `rows` needs besides

  const Linear& linear;
  const X* x;
  size_t x_stride, tokens;

  // Rows first .. first + count - 1 (count <= kBlock) with all tokens: into[t * pitch + r]; more may be written, up to kBlock.
  void rows(size_t first, size_t count, float* into, size_t pitch, [[maybe_unused]] float* spare) const {
    const size_t tiles = (tokens + kTokens - 1) / kTokens;
#if QTP_AVX512
    if (tokens == 1 && linear.k * sizeof(W) <= kShort) return one_by_one(first, count, into);
    if (tiles == 1) return together<kRows, kTokens, kRows>(first, count, into, pitch, tiles);
    if (tiles <= 3) return together<kRows, kTokens, kRows / 2>(first, count, into, pitch, tiles);
    together<kRows, kTokens, 1>(first, count, into, pitch, tiles);
#else
    if (tokens <= 2) return together<kFew, 2, kFew / 2>(first, count, into, pitch, tiles);
    if (tiles == 1) return together<kRows, kTokens, kRows / 2>(first, count, into, pitch, tiles);
    by_pieces(first, count, into, pitch, tiles, spare);
#endif
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

  // A part of a leaf; whether it is the leaf's first, and its last.
  struct Piece {
    size_t at, length;
    bool first, last;
  };

  // All rows with one tile of tokens after the other, and of a leaf one piece after the other. The sums of a leaf that has several
  // wait in memory. So the order of additions is that of `together`.
  void by_pieces(size_t first, size_t count, float* into, size_t pitch, size_t tiles, float* spare) const {
    const W* each[kBlock];
    for (size_t r = 0; r < kBlock; ++r)
      each[r] = static_cast<const W*>(linear.weight) + (first + (r < count ? r : count - 1)) * linear.stride;
    const size_t after = linear.rows - first > kBlock && linear.stride == linear.k ? kBlock * linear.stride : 0;
    const W* next = each[0] + after;
    Coming<1> coming{reinterpret_cast<const char*>(next), reinterpret_cast<const char*>(next + after)};
    float* const parts = spare + tokens * kBlock * kLanes;  // [leaf][token][row]
    const X* from = x;
    for (int leaf = 0; leaf < linear.leaves; ++leaf) {
      const size_t cut = linear.cuts[leaf], length = linear.cuts[leaf + 1] - cut;
      float* to = parts + size_t(leaf) * tokens * kBlock;
      size_t begin = 0;
      do {
        const size_t end = begin + kPiece < length ? begin + kPiece : length;
        const Piece piece{cut + begin, end - begin, begin == 0, end == length};
        for (size_t tile = 0, t = 0; tile < tiles; ++tile) {
          const size_t here = dealt(tile, tiles);
          for (size_t r = 0; r < count; r += kRows)
            piece_of<kRows, kTokens>(here, piece, each + r, from + t * x_stride + begin, spare + (t * kBlock + r * here) * kLanes,
                                 to + t * kBlock + r, coming);
          t += here;
        }
        begin = end;
      } while (begin < length);
      from += padded<Op>(length);
    }
    if (linear.leaves > 1) add_leaves(parts, linear.leaves, tokens * kBlock);
    for (size_t t = 0; t < tokens; ++t) __builtin_memcpy(into + t * pitch, parts + t * kBlock, kBlock * sizeof(float));
  }

  template <int R, int T, class Coming>
  QTP_INLINE void piece_of(size_t here, const Piece& piece, const W* const* rows, const X* from, float* waiting, float* to,
                           Coming& coming) const {
    if constexpr (T > 0) {
      if (here < T) return piece_of<R, T - 1>(here, piece, rows, from, waiting, to, coming);
      const W* starts[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) starts[r] = rows[r] + piece.at;
      F acc[R * T] = {};
      if (!piece.first) __builtin_memcpy(acc, waiting, sizeof acc);
      multiply<Op, R, T>(starts, from, x_stride, piece.length, acc, [&]() __attribute__((always_inline)) { coming.go(); });
      if (!piece.last) {
        __builtin_memcpy(waiting, acc, sizeof acc);
        return;
      }
      float sums[R * T];
      all_sums<R * T>(acc, sums);
#pragma GCC unroll 8
      for (size_t i = 0; i < T; ++i) __builtin_memcpy(to + i * kBlock, sums + i * R, R * sizeof(float));
    }
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

// Outputs first .. first + count - 1 of all the runner's tokens, in float32, to got[t * kBlock ...]; what for_tokens has got as
// memory begins there.
template <class Runner, class E>
QTP_INLINE void outputs(const Runner& runner, size_t first, size_t count, float* got) {
  constexpr size_t pitch = Runner::kBlock;
  const Linear& linear = runner.linear;
  float *other = got + runner.tokens * pitch, *spare = other + runner.tokens * pitch;
  runner.rows(first, count, got, pitch, spare);
  const typename E::stored* bias = static_cast<const typename E::stored*>(linear.bias);
  for (size_t i = 0; bias != nullptr && i < count; i += kLanes) {
    const F b = load_up_to<E>(bias + first + i, count - i);
    for (size_t t = 0; t < runner.tokens; ++t) write(got + t * pitch + i, read<F>(got + t * pitch + i) + b);
  }
  if (!linear.gated) return;
  runner.rows(first + linear.rows / 2, count, other, pitch, spare);
  for (size_t t = 0; t < runner.tokens; ++t)
    for (size_t i = t * pitch; i < t * pitch + count; i += kLanes) write(got + i, silu(read<F>(got + i)) * read<F>(other + i));
}

// Calls each(runner, first token, memory for twice kBlock and kSpare floats a token) for blocks of tokens that lie ready.
template <class Runner, class E, class Each>
QTP_INLINE void for_tokens(const Linear& linear, const void* x_, size_t tokens, size_t x_stride, const Each& each) {
  using X = typename Runner::X;
  const typename E::stored* x = static_cast<const typename E::stored*>(x_);
  const bool ready = Runner::ready(linear);
  constexpr size_t kUnit = Runner::kUnit;
  size_t block = kCacheBytes / (linear.k * sizeof(X) + 1) / kUnit * kUnit;
  block = block > kMostTokens ? kMostTokens : block < kUnit ? kUnit : block;
  block = block > tokens ? tokens : block;
  const size_t floats = (2 * Runner::kBlock + Runner::kSpare) * block;
  char* memory = static_cast<char*>(scratch(floats * sizeof(float) + (ready ? 0 : Runner::room(linear, block) * sizeof(X)) + 64));
  float* spare = reinterpret_cast<float*>(memory);
  X* laid = reinterpret_cast<X*>(spare + floats);
  for (size_t first = 0; first < tokens; first += block) {
    const size_t count = tokens - first < block ? tokens - first : block;
    if (ready) {
      each(Runner{linear, reinterpret_cast<const X*>(x + first * x_stride), x_stride, count}, first, spare);
    } else {
      Runner::lay(linear, x + first * x_stride, count, x_stride, laid);
      each(Runner{linear, laid, Runner::room(linear, 1), count}, first, spare);
    }
  }
}

template <class Runner, class E>
void run(const Linear& linear, const void* x, size_t tokens, size_t x_stride, void* out, size_t out_stride, Range range) {
  constexpr size_t block = Runner::kBlock;
  for_tokens<Runner, E>(linear, x, tokens, x_stride, [&](const Runner& runner, size_t first, float* got) {
    for (size_t row = range.begin; row < range.end; row += block) {
      const size_t count = range.end - row < block ? range.end - row : block;
      outputs<Runner, E>(runner, row, count, got);
      for (size_t t = 0; t < runner.tokens; ++t) {
        for (size_t i = 0; i < count; i += kLanes) {
          const F y = read<F>(got + t * block + i);
          const size_t place = (first + t) * out_stride + row + i;
          if (linear.wide)
            store_up_to<F32>(static_cast<float*>(out) + place, y, count - i);
          else
            store_up_to<E>(static_cast<typename E::stored*>(out) + place, y, count - i);
        }
      }
    }
  });
}

// Puts y, which has index i, into its place among the `most` best, if it has one.
QTP_INLINE void insert(float y, int64_t i, size_t most, float* value, int64_t* index) {
  if (index[most - 1] >= 0 && !(y > value[most - 1])) return;
  size_t place = most - 1;
  for (; place > 0 && (index[place - 1] < 0 || y > value[place - 1]); --place) {
    value[place] = value[place - 1];
    index[place] = index[place - 1];
  }
  value[place] = y;
  index[place] = i;
}

template <class Runner, class E>
void best(const Linear& linear, const void* x, size_t tokens, size_t x_stride, size_t most, float* values, int64_t* indices,
          Range range) {
  constexpr size_t block = Runner::kBlock;
  for (size_t i = 0; i < tokens * most; ++i) {
    values[i] = -__builtin_inff();
    indices[i] = -1;
  }
  for_tokens<Runner, E>(linear, x, tokens, x_stride, [&](const Runner& runner, size_t first, float* got) {
    for (size_t row = range.begin; row < range.end; row += block) {
      const size_t count = range.end - row < block ? range.end - row : block;
      outputs<Runner, E>(runner, row, count, got);
      for (size_t t = 0; t < runner.tokens; ++t) {
        float* value = values + (first + t) * most;
        int64_t* index = indices + (first + t) * most;
        for (size_t i = 0; i < count; i += kLanes) {
          const float* y = got + t * block + i;
          const size_t here = count - i < kLanes ? count - i : kLanes;
          if (here == kLanes && index[most - 1] >= 0 && !(largest(read<F>(y)) > value[most - 1])) continue;
          for (size_t j = 0; j < here; ++j) insert(y[j], int64_t(row + i + j), most, value, index);
        }
      }
    }
  });
}

template <class Runner, class E>
constexpr LinearTable table() {
  return {run<Runner, E>, best<Runner, E>};
}

#if QTP_AMX
#include "linear_amx.inl"
using BF16Runner = Tiles;
#elif QTP_BF16
using BF16Runner = Runner<Pairs, BF16>;
#elif QTP_AVX512
using BF16Runner = Runner<Floats<BF16>, BF16>;
#else
using BF16Runner = Runner<Halves, BF16>;
#endif

}  // namespace

extern const LinearTable kLinear[kDTypes] = {table<Runner<Floats<F32>, F32>, F32>(), table<BF16Runner, BF16>(),
                                             table<Runner<Floats<F16>, F16>, F16>()};

}  // namespace QTP_ISA
}  // namespace qtp
