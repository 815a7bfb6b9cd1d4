// Compiled once for each instruction set: see each_isa.inl and linear.hpp.
namespace qtp {
namespace QTP_ISA {
namespace {

#include "vectors.inl"

constexpr size_t kCacheBytes = 768 * 1024;    // of prepared tokens, to stay in a core's second cache
constexpr size_t kMostTokens = 288;

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
  static QTP_INLINE F add(F acc, V w, V x) { return added(acc, w, x); }
  static QTP_INLINE void store(X* to, F x, size_t n) { store_up_to<F32>(to, x, n); }
  static QTP_INLINE void arrange(X*, size_t) {}
};

// bfloat16 as words of two: the elements with even index are a shift away from floats, the odd ones a mask.
struct Halves : Floats<BF16> {
  static constexpr size_t step = 2 * kLanes;
  static constexpr int parts = 2;
  static QTP_INLINE F weight(const W* w, int part) {
#if QTP_AVX2 && !QTP_AVX512
    // Words are read once for each part: GCC would keep them, for which it has no registers.
    typedef uint32_t Anywhere __attribute__((vector_size(4 * kLanes), may_alias, aligned(2)));
    const Anywhere& words = *reinterpret_cast<const Anywhere*>(w);
    U x;
    if (part == 0)
      asm("vmovdqu %1, %0\n\tvpslld $16, %0, %0" : "=x"(x) : "m"(words));
    else
      asm("vpand %2, %1, %0" : "=x"(x) : "x"(U{} + 0xFFFF0000u), "m"(words));
#else
    const U words = read<U>(w), x = part == 0 ? words << 16 : words & 0xFFFF0000u;
#endif
    return (F)x;
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

// ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)), each of `width` numbers; the result is in the first.
QTP_INLINE void add_leaves(float* parts, int leaves, size_t width) {
  for (int step = 1; step < leaves; step *= 2)
    for (int leaf = 0; leaf + step < leaves; leaf += 2 * step)
      for (size_t i = 0; i < width; ++i) parts[size_t(leaf) * width + i] += parts[size_t(leaf + step) * width + i];
}

#if QTP_AVX512
#include "linear_together.inl"
#else
#include "linear_streams.inl"
#endif

// Outputs first .. first + count - 1 of all the runner's tokens, in float32, to got[t * width ...]; what for_tokens has got as
// memory begins there.
template <class Runner, class E>
QTP_INLINE void outputs(const Runner& runner, size_t first, size_t count, float* got) {
  const size_t pitch = Runner::width(runner.tokens);
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

// Calls each(runner, first token, memory of Runner::floats) for blocks of tokens that lie ready.
template <class Runner, class E, class Each>
QTP_INLINE void for_tokens(const Linear& linear, const void* x_, size_t tokens, size_t x_stride, const Each& each) {
  using X = typename Runner::X;
  const typename E::stored* x = static_cast<const typename E::stored*>(x_);
  const bool ready = Runner::ready(linear);
  constexpr size_t kUnit = Runner::kUnit;
  size_t block = kCacheBytes / (linear.k * sizeof(X) + 1) / kUnit * kUnit;
  block = block > kMostTokens ? kMostTokens : block < kUnit ? kUnit : block;
  block = block > tokens ? tokens : block;
  const size_t floats = Runner::floats(block);
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
  for_tokens<Runner, E>(linear, x, tokens, x_stride, [&](const Runner& runner, size_t first, float* got) {
    const size_t block = Runner::width(runner.tokens);
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
  for (size_t i = 0; i < tokens * most; ++i) {
    values[i] = -__builtin_inff();
    indices[i] = -1;
  }
  for_tokens<Runner, E>(linear, x, tokens, x_stride, [&](const Runner& runner, size_t first, float* got) {
    const size_t block = Runner::width(runner.tokens);
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
