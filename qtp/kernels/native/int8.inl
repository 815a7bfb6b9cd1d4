// Compiled once for each instruction set: see int8.cpp and int8.hpp.
namespace qtp {
namespace QTP_ISA {
namespace {

#include "vectors.inl"
#include "normed.inl"
#include "int8_ops.inl"

namespace compressed {
#include "sparse.inl"
}  // namespace compressed

constexpr size_t kBlock = 32;    // outputs that are finished together
constexpr size_t kFar = 256;     // the same with few tokens: long enough for streams
constexpr size_t kWorthUnpacking = 8, kGroupsWorthUnpacking = 3;  // tiles of tokens, measured with AVX2 on 896 x 9728
constexpr size_t kPiece = 1024;  // columns that are added up by themselves: a tile of tokens stays in the first cache

// Whether weights are brought to their values before they are multiplied; else `scale` belongs to sums.
QTP_INLINE bool grouped(const Int8Linear& linear) {
  return linear.input == Input::kFloat && (linear.group != 0 || linear.offset != nullptr);
}

// Whether no vector of columns lies in two groups.
QTP_INLINE bool even_groups(const Int8Linear& linear) { return linear.group % kLanes == 0 && linear.phase % kLanes == 0; }

// Whether reading W takes longer than multiplying.
QTP_INLINE bool few(const Int8Linear& linear, size_t tokens) { return tokens <= kFewTokens && (!grouped(linear) || even_groups(linear)); }

// A place among the columns of a row, and the group it is in.
struct Walk {
  size_t at, group, boundary;  // boundary: where the next group begins

  QTP_INLINE explicit Walk(const Int8Linear& linear)
      : at(0), group(0), boundary(linear.group != 0 ? linear.group - linear.phase : size_t(-1)) {}

  QTP_INLINE size_t end(size_t limit) const { return boundary < limit ? boundary : limit; }
  QTP_INLINE void move(const Int8Linear& linear, size_t to) {
    at = to;
    if (to == boundary) ++group, boundary += linear.group;
  }
};

QTP_INLINE size_t piece_end(const Int8Linear& linear, size_t begin) { return begin + kPiece < linear.k ? begin + kPiece : linear.k; }

// w * scale + shift are the values of a group of a row.
struct Affine {
  F scale, shift;

  QTP_INLINE Affine() : scale(all(1.0f)), shift(all(0.0f)) {}
  QTP_INLINE Affine(const Int8Linear& linear, size_t row, size_t group) {
    const size_t at = row * linear.scale_stride + group;
    scale = all(linear.scale[at]);
    shift = linear.offset != nullptr ? scale * -linear.offset[at] : all(0.0f);
  }
};

// Tokens as Op multiplies with them, each `pitch` elements from the one before, with zeros or at least numbers behind its k.
template <class Op>
struct Prepared {
  using X = typename Op::X;
  static constexpr size_t kApart = 64;  // bytes; keeps rows off the same sets of a cache

  size_t tokens, pitch;
  float* scales;
  X* x;

  Prepared(const Int8Linear& linear, size_t tokens, void* memory)
      : tokens(tokens), pitch((linear.k + Op::step - 1) / Op::step * Op::step + Op::step + kApart / sizeof(X)),
        scales(static_cast<float*>(memory)), x(reinterpret_cast<X*>(scales + (tokens + 15) / 16 * 16)) {}

  size_t bytes() const { return (size_t(reinterpret_cast<char*>(x + tokens * pitch) - reinterpret_cast<char*>(scales)) + 63) / 64 * 64; }
};

constexpr size_t kPitch = kPiece + 16;  // floats; keeps rows off the same sets of a cache

// What a thread needs for itself.
template <class Op>
struct Work {
  static_assert(kFewTokens * kFar <= kMostInt8Tokens * kBlock);
  typename Op::Sum got[kMostInt8Tokens * kBlock];
  float values[Op::integer ? 1 : kBlock * kPitch];
};

// One token as Op multiplies with it, at least k elements and zeros up to `pitch`; returns its scale.
template <class Op, class E>
float lay_token(const Int8Linear& linear, const typename E::stored* x, const float* maximum, typename Op::X* row, size_t pitch) {
  using S = typename E::stored;
  const S *norm = static_cast<const S*>(linear.norm), *bias = static_cast<const S*>(linear.norm_bias);
  const size_t k = linear.k;
  const F root = all(norm != nullptr ? inverse_root_mean_square<E>(x, k, linear.eps) : 1.0f);
  const auto element = [&](size_t i) __attribute__((always_inline)) {
    return norm != nullptr ? normed<E>(x, root, norm, bias, i, k - i) : load_up_to<E>(x + i, k - i);
  };
  F scale = all(linear.input_scale);
  if (linear.input == Input::kPerToken) {
    F most = {};
    if (maximum == nullptr)
      for (size_t i = 0; i < k; i += kLanes) most = larger(magnitude(element(i)), most);
    const float largest_x = maximum != nullptr ? *maximum : largest(most);
    scale = all(largest_x > 0.0f ? largest_x / 127.0f : 1.0f);
  }
  size_t i = 0;
  for (; i < k; i += kLanes) Op::put(row + i, element(i), scale, linear.input_offset);
  for (; i < pitch; ++i) row[i] = 0;
  return scale[0];
}

struct Nothing {
  QTP_INLINE void go() {}
};

// What memory is asked for while something else is computed: from `at` to `end`, front to back, a line a step.
struct Ahead {
  const int8_t *at, *end;

  QTP_INLINE void go() {
    if (at >= end) return;
    __builtin_prefetch(at, 0, 2);
    at += 64;
  }
};

// acc[t * R + r] += the products of whole steps of columns begin ... of R rows with those of T tokens; returns where it ended.
template <class Op, int R, int T, class Weight, class Ahead>
QTP_INLINE size_t multiply(const Weight& weight, const typename Op::X* x, size_t pitch, size_t begin, size_t end, typename Op::A* acc,
                           Ahead& ahead) {
  size_t i = begin;
  for (; i + Op::step <= end; i += Op::step) {
    typename Op::V w[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) w[r] = weight(r, i);
    ahead.go();
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      typename Op::V y = Op::token(x + size_t(t) * pitch + i);
      hold(y);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[t * R + r] = Op::dot(acc[t * R + r], w[r], y);
    }
  }
  return i;
}

// All outputs of a few rows: of integers before quant_bias and scale, of floats before bias, and scale unless `grouped`.
template <class Op>
struct Rows {
  using X = typename Op::X;
  using Sum = typename Op::Sum;

  const Int8Linear& linear;
  const Prepared<Op>& input;
  size_t first, count, width;  // count <= width: outputs that are finished together
  Work<Op>& work;
  size_t apart;  // rows that go together are so far from each other

  QTP_INLINE Rows(const Int8Linear& linear, const Prepared<Op>& input, size_t first, size_t count, size_t width, Work<Op>& work)
      : linear(linear), input(input), first(first), count(count), width(width), work(work),
        apart(few(linear, input.tokens) ? (count + kReaders - 1) / kReaders : 1) {}

  // The i-th of the rows that go together with row r.
  QTP_INLINE size_t row(size_t r, size_t i = 0) const { return first + (r + i * apart < count ? r + i * apart : count - 1); }

  void all() const {
    if (!few(linear, input.tokens)) return tiles();
    grouped(linear) ? streams<true>() : streams<false>();
  }

  // Whole rows, some at a time, far apart, each followed by the one behind it: so each of kReaders goes through memory without a
  // break, and the processor fetches ahead of them by itself.
  template <bool Values>
  QTP_INLINE void streams() const {
    for (size_t r = 0; r < apart; ++r)
      for (size_t t = 0; t < input.tokens; t += 2) input.tokens - t == 1 ? whole_rows<1, Values>(r, t) : whole_rows<2, Values>(r, t);
  }

  template <int T, bool Values>
  QTP_INLINE void whole_rows(size_t r, size_t t) const {
    constexpr int R = kReaders;
    Nothing nothing;
    Walk walk(linear);
    do {
      const size_t end = piece_end(linear, walk.at);
      typename Op::A acc[R * T] = {};
      const bool begins = walk.at == 0;
      if constexpr (Op::integer) {
        exact<R, T>(walk.at, end, r, t, acc, nothing);
        walk.at = end;
      } else {
        walk = piece<R, T, Values>(walk, end, r, t, acc, nothing);
      }
      add<R, T>(acc, r, t, begins);
    } while (walk.at < linear.k);
  }

  // Piece after piece, tile of tokens after tile.
  void tiles() const {
    const size_t after = linear.rows - first >= 2 * kBlock && linear.stride == linear.k ? kBlock * linear.stride : 0;
    const int8_t* next = linear.weight + first * linear.stride + after;
    Ahead ahead{next, next + after};
    const size_t tiles = (input.tokens + kTokens - 1) / kTokens;
    const bool unpacked = grouped(linear) ? tiles >= kGroupsWorthUnpacking || !even_groups(linear) : tiles >= kWorthUnpacking;
    Walk walk(linear);
    do {
      const size_t end = piece_end(linear, walk.at);
      if constexpr (!Op::integer)
        if (unpacked) unpack(walk, end);
      for (size_t tile = 0, t = 0; tile < tiles; ++tile) {
        const size_t here = input.tokens / tiles + (tile < input.tokens % tiles);
        for (size_t r = 0; r < count; r += kRows) tile_of<kTokens>(here, walk, unpacked, end, r, t, ahead);
        t += here;
      }
      while (walk.at < end) walk.move(linear, walk.end(end));
    } while (walk.at < linear.k);
  }

  // All rows' values in floats, each `kPitch` from the one before, with zeros behind to whole steps.
  void unpack(const Walk& start, size_t end) const {
    for (size_t r = 0; r < (count + kRows - 1) / kRows * kRows; ++r) {
      const int8_t* from = linear.weight + row(r) * linear.stride;
      float* to = work.values + r * kPitch;
      Walk walk = start;
      while (walk.at < end) {
        const size_t stop = walk.end(end);
        const Affine affine = grouped(linear) ? Affine(linear, row(r), walk.group) : Affine();
        size_t i = walk.at;
        for (; i + kLanes <= stop; i += kLanes) write(to + i - start.at, fma(Op::weight(from + i), affine.scale, affine.shift));
        if (i < stop) store_some<F32>(to + i - start.at, fma(Op::weight(from + i, stop - i), affine.scale, affine.shift), stop - i);
        walk.move(linear, stop);
      }
      for (size_t i = end - start.at; i % kLanes != 0; ++i) to[i] = 0.0f;
    }
  }

  template <int T, class Ahead>
  QTP_INLINE void tile_of(size_t here, const Walk& walk, bool unpacked, size_t end, size_t r, size_t t, Ahead& ahead) const {
    if constexpr (T > 0) {
      if (here < T) return tile_of<T - 1>(here, walk, unpacked, end, r, t, ahead);
      typename Op::A acc[kRows * T] = {};
      if constexpr (Op::integer) {
        exact<kRows, T>(walk.at, end, r, t, acc, ahead);
      } else if (unpacked) {
        const float* values = work.values + r * kPitch;
        const auto value = [&](int i, size_t at) __attribute__((always_inline)) { return read<F>(values + size_t(i) * kPitch + at); };
        const size_t whole = (end - walk.at + kLanes - 1) / kLanes * kLanes;
        multiply<Op, kRows, T>(value, input.x + t * input.pitch + walk.at, input.pitch, 0, whole, acc, ahead);
      } else {
        grouped(linear) ? piece<kRows, T, true>(walk, end, r, t, acc, ahead) : piece<kRows, T, false>(walk, end, r, t, acc, ahead);
      }
      add<kRows, T>(acc, r, t, walk.at == 0);
    }
  }

  // What is left over comes first: behind the loop it would cost sums their registers in it.
  template <int R, int T, class Ahead>
  QTP_INLINE void exact(size_t begin, size_t end, size_t r, size_t t, typename Op::A* acc, Ahead& ahead) const {
    const int8_t* rows[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) rows[i] = linear.weight + row(r, size_t(i)) * linear.stride;
    const X* x = input.x + t * input.pitch;
    const size_t whole = begin + (end - begin) / Op::step * Op::step;
    if (whole < end) {
      const auto rest = [&](int i, size_t at) __attribute__((always_inline)) { return Op::weight(rows[i] + at, end - whole); };
      multiply<Op, R, T>(rest, x, input.pitch, whole, whole + Op::step, acc, ahead);
    }
    multiply<Op, R, T>([&](int i, size_t at) __attribute__((always_inline)) { return Op::weight(rows[i] + at); }, x, input.pitch, begin, whole,
                       acc, ahead);
  }

  // From walk.at to `end`, where it then is; vectors of columns lie in one group.
  template <int R, int T, bool Values, class Ahead>
  QTP_INLINE Walk piece(Walk walk, size_t end, size_t r, size_t t, F* acc, Ahead& ahead) const {
    while (walk.at < end) {
      const size_t stop = walk.end(end);
      floats<R, T, Values>(walk, stop, r, t, acc, ahead);
      walk.move(linear, stop);
    }
    return walk;
  }

  // The columns from walk.at to `end`, all of one group and, but for the last ones, whole steps.
  template <int R, int T, bool Values, class Ahead>
  QTP_INLINE void floats(const Walk& walk, size_t end, size_t r, size_t t, F* acc, Ahead& ahead) const {
    const X* x = input.x + t * input.pitch;
    const int8_t* rows[R];
    Affine affine[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      rows[i] = linear.weight + row(r, size_t(i)) * linear.stride;
      if (Values) affine[i] = Affine(linear, row(r, size_t(i)), walk.group);
    }
    const auto value = [&](int i, F w) __attribute__((always_inline)) { return Values ? fma(w, affine[i].scale, affine[i].shift) : w; };
    const auto whole = [&](int i, size_t at) __attribute__((always_inline)) { return value(i, Op::weight(rows[i] + at)); };
    const size_t at = multiply<Op, R, T>(whole, x, input.pitch, walk.at, end, acc, ahead);
    if (at == end) return;
    const auto rest = [&](int i, size_t at) __attribute__((always_inline)) {
      float y[kLanes] = {};
      store_some<F32>(y, value(i, Op::weight(rows[i] + at, end - at)), end - at);
      return read<F>(y);
    };
    multiply<Op, R, T>(rest, x, input.pitch, at, at + kLanes, acc, ahead);
  }

  // Adds a piece's sums, of which the first one is set.
  template <int R, int T>
  QTP_INLINE void add(const typename Op::A* acc, size_t r, size_t t, bool begins) const {
    Sum sums[R * T];
    all_sums<R * T>(acc, sums);
    for (int j = 0; j < T; ++j) {
      Sum* to = work.got + (t + size_t(j)) * width + r;
      for (int i = 0; i < R; ++i, to += apart) *to = begins ? sums[j * R + i] : Op::plus(*to, sums[j * R + i]);
    }
  }
};

// The scales of n rows of floats with one group.
QTP_INLINE F scales(const Int8Linear& linear, size_t row, size_t n) {
  float y[kLanes] = {};
  for (size_t i = 0; i < n && i < kLanes; ++i) y[i] = linear.scale[(row + i) * linear.scale_stride];
  return read<F>(y);
}

// Outputs row ... row + count - 1 of a token from what Rows has got for it. token_scale: of Input::kPerToken.
template <class Op, class E>
QTP_INLINE void finish(const Int8Linear& linear, const float* token_scale, const typename Op::Sum* got, size_t row, size_t count, void* out,
                       Form form) {
  const typename E::stored* bias = static_cast<const typename E::stored*>(linear.bias);
  for (size_t i = 0; i < count; i += kLanes) {
    const size_t n = count - i, at = row + i;
    F y;
    if constexpr (Op::integer) {
      U total = read<U>(got + i);
      if (linear.quant_bias != nullptr) total += ints_up_to(linear.quant_bias + at, n);
      if (Op::shifted) total -= ints_up_to(linear.sums + at, n) << 7;
      if (form == Form::kInteger) {
        store_ints(static_cast<int32_t*>(out) + i, total, n);
        continue;
      }
      F scale = load_up_to<F32>(linear.scale + at, n);
      if (linear.input == Input::kPerToken) scale = scale * *token_scale;
      y = __builtin_convertvector((I)total, F);
      y = bias != nullptr ? fma(y, scale, load_up_to<E>(bias + at, n)) : y * scale;
    } else {
      y = read<F>(got + i);
      if (!grouped(linear)) y = y * scales(linear, at, n);
      if (bias != nullptr) y += load_up_to<E>(bias + at, n);
    }
    if (form == Form::kFloat)
      store_up_to<F32>(static_cast<float*>(out) + i, y, n);
    else
      store_up_to<E>(static_cast<typename E::stored*>(out) + i, y, n);
  }
}

template <class E>
void run_compressed(const Int8Linear& linear, size_t tokens, void* memory, int thread, void* out, size_t out_stride, Form form, Range range) {
  const Sparse& sparse = linear.sparse;
  const size_t item = form == Form::kDType ? sizeof(typename E::stored) : 4;
  const compressed::Tokens input(sparse, tokens, memory);
  char* own = static_cast<char*>(memory) + input.bytes();
  const compressed::Work work(sparse, input, own + size_t(thread) * compressed::Work(sparse, input, own).bytes);
  for (size_t row = range.begin; row < range.end; row += kSparseBlock) {
    compressed::block_rows(sparse, row / kSparseBlock, input, work);
    for (size_t t = 0; t < tokens; ++t)
      finish<Codes, E>(linear, nullptr, work.got + t * kSparseBlock, row, sparse.rows_in(row / kSparseBlock),
                       static_cast<char*>(out) + (t * out_stride + row) * item, form);
  }
}

template <class Call>
QTP_INLINE void by_dtype(DType dtype, const Call& call) {
  if (dtype == DType::kF32) return call(F32());
  if (dtype == DType::kBF16) return call(BF16());
  call(F16());
}

template <class Call>
QTP_INLINE void by_type(const Int8Linear& linear, const Call& call) {
  by_dtype(linear.dtype, [&](auto e) __attribute__((always_inline)) {
    if (linear.input == Input::kFloat)
      call(Floats(), e);
    else
      call(Integers(), e);
  });
}

// Prepared tokens, then the Work of each thread.
size_t bytes(const Int8Linear& linear, size_t tokens, int threads) {
  if (linear.compressed()) {
    const compressed::Tokens input(linear.sparse, tokens, nullptr);
    return input.bytes() + size_t(threads) * compressed::Work(linear.sparse, input, nullptr).bytes;
  }
  size_t all = 0;
  by_type(linear, [&](auto op, auto) {
    all = Prepared<decltype(op)>(linear, tokens, nullptr).bytes() + size_t(threads) * sizeof(Work<decltype(op)>);
  });
  return all;
}

void lay(const Int8Linear& linear, const void* x, size_t tokens, size_t x_stride, const float* maxima, void* memory, Range range) {
  if (linear.compressed()) {
    const compressed::Tokens to(linear.sparse, tokens, memory);
    return by_dtype(linear.dtype, [&](auto e) {
      for (size_t t = range.begin; t < range.end; ++t) {
        const auto* from = static_cast<const typename decltype(e)::stored*>(x) + t * x_stride;
        lay_token<Codes, decltype(e)>(linear, from, nullptr, to.laid + t * to.pitch, to.pitch);
        to.finish(t);
      }
    });
  }
  by_type(linear, [&](auto op, auto e) {
    const Prepared<decltype(op)> to(linear, tokens, memory);
    for (size_t t = range.begin; t < range.end; ++t)
      to.scales[t] = lay_token<decltype(op), decltype(e)>(linear, static_cast<const typename decltype(e)::stored*>(x) + t * x_stride,
                                                          maxima == nullptr ? nullptr : maxima + t, to.x + t * to.pitch, to.pitch);
  });
}

void run(const Int8Linear& linear, size_t tokens, void* memory, int thread, void* out, size_t out_stride, Form form, Range range) {
  if (linear.compressed())
    return by_dtype(linear.dtype, [&](auto e) {
      run_compressed<decltype(e)>(linear, tokens, memory, thread, out, out_stride, form, range);
    });
  by_type(linear, [&](auto op, auto e) {
    using Op = decltype(op);
    using E = decltype(e);
    const size_t item = form == Form::kDType ? sizeof(typename E::stored) : 4;
    const Prepared<Op> input(linear, tokens, memory);
    Work<Op>& work = reinterpret_cast<Work<Op>*>(static_cast<char*>(memory) + input.bytes())[thread];
    const size_t width = few(linear, tokens) ? kFar : kBlock;
    for (size_t row = range.begin; row < range.end; row += width) {
      const size_t count = range.end - row < width ? range.end - row : width;
      Rows<Op>(linear, input, row, count, width, work).all();
      for (size_t t = 0; t < tokens; ++t)
        finish<Op, E>(linear, input.scales + t, work.got + t * width, row, count, static_cast<char*>(out) + (t * out_stride + row) * item,
                      form);
    }
  });
}

void scale(DType dtype, const int32_t* total, const float* scale, size_t width, void* out) {
  by_dtype(dtype, [&](auto e) {
    for (size_t i = 0; i < width; i += kLanes) {
      const F y = __builtin_convertvector((I)ints_up_to(total + i, width - i), F) * load_up_to<F32>(scale + i, width - i);
      store_up_to<decltype(e)>(static_cast<typename decltype(e)::stored*>(out) + i, y, width - i);
    }
  });
}

}  // namespace

extern const Int8Table kInt8 = {bytes, lay, run, scale};

}  // namespace QTP_ISA
}  // namespace qtp
