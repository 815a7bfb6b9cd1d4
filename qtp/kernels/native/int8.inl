// Compiled once for each instruction set: see int8.cpp and int8.hpp.
namespace qtp {
namespace QTP_ISA {
namespace {

#include "vectors.inl"
#include "normed.inl"
#include "int8_ops.inl"

constexpr size_t kBlock = 32;    // outputs that are finished together
constexpr size_t kPiece = 1024;  // columns that are added up by themselves: a tile of tokens stays in the first cache

// A place among the columns of a row: pieces are cut into segments where groups meet.
struct Walk {
  size_t at, segment, group, boundary;  // boundary: where the next group begins

  QTP_INLINE explicit Walk(const Int8Linear& linear)
      : at(0), segment(0), group(0), boundary(linear.group != 0 ? linear.group - linear.phase : size_t(-1)) {}

  QTP_INLINE size_t end(size_t limit) const { return boundary < limit ? boundary : limit; }
  QTP_INLINE void move(const Int8Linear& linear, size_t to) {
    at = to;
    ++segment;
    if (to == boundary) ++group, boundary += linear.group;
  }
};

QTP_INLINE size_t piece_end(const Int8Linear& linear, size_t begin) { return begin + kPiece < linear.k ? begin + kPiece : linear.k; }

QTP_INLINE size_t segments(const Int8Linear& linear) {
  if (linear.offset == nullptr) return 0;
  Walk walk(linear);
  for (size_t begin = 0; begin < linear.k; begin += kPiece)
    while (walk.at < piece_end(linear, begin)) walk.move(linear, walk.end(piece_end(linear, begin)));
  return walk.segment;
}

// Tokens as Op multiplies with them, each `pitch` elements from the one before, with zeros or at least numbers behind its k. lanes:
// for each token and segment the sums of x in the lanes in which a product of the segment is added up.
template <class Op>
struct Prepared {
  using X = typename Op::X;
  static constexpr size_t kApart = 64;  // bytes; keeps rows off the same sets of a cache

  size_t tokens, pitch, segments;
  float* scales;
  float* lanes;
  X* x;

  Prepared(const Int8Linear& linear, size_t tokens, void* memory)
      : tokens(tokens), pitch((linear.k + Op::step - 1) / Op::step * Op::step + Op::step + kApart / sizeof(X)),
        segments(qtp::QTP_ISA::segments(linear)), scales(static_cast<float*>(memory)), lanes(scales + (tokens + 15) / 16 * 16),
        x(reinterpret_cast<X*>(lanes + tokens * segments * kLanes)) {}

  size_t bytes() const { return size_t(reinterpret_cast<char*>(x + tokens * pitch) - reinterpret_cast<char*>(scales)); }
};

template <class Op, class E>
void lay_token(const Int8Linear& linear, const typename E::stored* x, const float* maximum, const Prepared<Op>& to, size_t t) {
  using S = typename E::stored;
  const S *norm = static_cast<const S*>(linear.norm), *bias = static_cast<const S*>(linear.norm_bias);
  const size_t k = linear.k;
  const F root = all(norm != nullptr ? inverse_root_mean_square<E>(x, k, linear.eps) : 1.0f);
  const auto element = [&](size_t i) __attribute__((always_inline)) {
    return norm != nullptr ? normed<E>(x, root, norm, bias, i, k - i) : load_up_to<E>(x + i, k - i);
  };
  typename Op::X* row = to.x + t * to.pitch;
  F scale = all(linear.input_scale);
  if (linear.input == Input::kPerToken) {
    F most = {};
    if (maximum == nullptr)
      for (size_t i = 0; i < k; i += kLanes) most = larger(magnitude(element(i)), most);
    const float largest_x = maximum != nullptr ? *maximum : largest(most);
    scale = all(largest_x > 0.0f ? largest_x / 127.0f : 1.0f);
  }
  to.scales[t] = scale[0];
  size_t i = 0;
  for (; i < k; i += kLanes) Op::put(row + i, element(i), scale, linear.input_offset);
  for (; i < to.pitch; ++i) row[i] = 0;
  if constexpr (!Op::integer) {
    if (to.segments == 0) return;
    Walk walk(linear);
    for (size_t begin = 0; begin < k; begin += kPiece) {
      const size_t end = piece_end(linear, begin);
      while (walk.at < end) {
        const size_t stop = walk.end(end);
        F sums = {};
        for (size_t at = walk.at; at < stop; at += kLanes) sums += load_up_to<F32>(row + at, stop - at);
        write(to.lanes + (t * to.segments + walk.segment) * kLanes, sums);
        walk.move(linear, stop);
      }
    }
  }
}

// What memory is asked for while something else is computed: from `at` to `end`, front to back, some lines a step.
template <int Lines>
struct Ahead {
  const int8_t *at, *end;

  QTP_INLINE void go() {
    if (at >= end) return;
#pragma GCC unroll 8
    for (int i = 0; i < Lines; ++i) __builtin_prefetch(at + 64 * i, 0, 2);
    at += 64 * Lines;
  }
};

// acc[t * R + r] += the products of columns begin ... end - 1 of R rows with those of T tokens.
template <class Op, int R, int T, class Ahead>
QTP_INLINE void multiply(const int8_t* const* rows, const typename Op::X* x, size_t pitch, size_t begin, size_t end, typename Op::A* acc,
                         Ahead& ahead) {
  const auto step = [&](size_t i, const auto& weight) __attribute__((always_inline)) {
    typename Op::V w[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) w[r] = weight(rows[r] + i);
    ahead.go();
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const typename Op::V y = Op::token(x + size_t(t) * pitch + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[t * R + r] = Op::dot(acc[t * R + r], w[r], y);
    }
  };
  size_t i = begin;
  for (; i + Op::step <= end; i += Op::step) step(i, [](const int8_t* w) __attribute__((always_inline)) { return Op::weight(w); });
  if (i < end) step(i, [&](const int8_t* w) __attribute__((always_inline)) { return Op::weight(w, end - i); });
}

// All outputs of a few rows, before quant_bias, scale of integers, and bias.
template <class Op>
struct Rows {
  using X = typename Op::X;
  using Sum = typename Op::Sum;

  const Int8Linear& linear;
  const Prepared<Op>& input;
  size_t first, count;  // count <= kBlock
  Sum* into;            // [token][kBlock]

  QTP_INLINE size_t row(size_t r) const { return first + (r < count ? r : count - 1); }

  void all() const {
    if (input.tokens == 1) return whole_rows<Op::kAlone, 1>();
    if (input.tokens == 2) return whole_rows<Op::kFew, 2>();
    tiles();
  }

  // R rows at a time, whole.
  template <int R, int T>
  QTP_INLINE void whole_rows() const {
    constexpr int kLines = R * Op::step >= 64 ? R * Op::step / 64 : 1;
    const size_t fits = linear.stride == linear.k ? R * linear.stride : 0;
    for (size_t r = 0; r < count; r += R) {
      const size_t after = linear.rows - first - r >= 2 * R ? fits : 0;
      const int8_t* next = linear.weight + (first + r) * linear.stride + after;
      Ahead<kLines> ahead{next, next + after};
      Walk walk(linear);
      size_t begin = 0;
      do {
        const size_t end = piece_end(linear, begin);
        block<R, T>(walk, end, r, 0, ahead);
        pass(walk, end);
        begin = end;
      } while (begin < linear.k);
    }
  }

  // Piece after piece, tile of tokens after tile.
  void tiles() const {
    const size_t after = linear.rows - first >= 2 * kBlock && linear.stride == linear.k ? kBlock * linear.stride : 0;
    const int8_t* next = linear.weight + first * linear.stride + after;
    Ahead<1> ahead{next, next + after};
    const size_t tiles = (input.tokens + kTokens - 1) / kTokens;
    Walk walk(linear);
    size_t begin = 0;
    do {
      const size_t end = piece_end(linear, begin);
      for (size_t tile = 0, t = 0; tile < tiles; ++tile) {
        const size_t here = input.tokens / tiles + (tile < input.tokens % tiles);
        for (size_t r = 0; r < count; r += kRows) block_of<kTokens>(here, walk, end, r, t, ahead);
        t += here;
      }
      pass(walk, end);
      begin = end;
    } while (begin < linear.k);
  }

  QTP_INLINE void pass(Walk& walk, size_t end) const {
    while (walk.at < end) walk.move(linear, walk.end(end));
  }

  template <int T, class Ahead>
  QTP_INLINE void block_of(size_t here, const Walk& walk, size_t end, size_t r, size_t t, Ahead& ahead) const {
    if constexpr (T > 0) {
      if (here == T) return block<kRows, T>(walk, end, r, t, ahead);
      block_of<T - 1>(here, walk, end, r, t, ahead);
    }
  }

  // Adds the piece from walk.at to end of rows r ... r + R - 1 to those of tokens t ... t + T - 1; the first piece is set.
  template <int R, int T, class Ahead>
  QTP_INLINE void block(Walk walk, size_t end, size_t r, size_t t, Ahead& ahead) const {
    const bool begins = walk.at == 0;
    const int8_t* rows[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) rows[i] = linear.weight + row(r + size_t(i)) * linear.stride;
    const X* x = input.x + t * input.pitch;
    typename Op::A total[R * T] = {};
    if constexpr (Op::integer) {
      multiply<Op, R, T>(rows, x, input.pitch, walk.at, end, total, ahead);
    } else {
      while (walk.at < end) {
        const size_t stop = walk.end(end);
        F acc[R * T] = {};
        if (linear.offset != nullptr) {
          for (int j = 0; j < T; ++j) {
            const F sums = read<F>(input.lanes + ((t + size_t(j)) * input.segments + walk.segment) * kLanes);
            for (int i = 0; i < R; ++i) acc[j * R + i] = sums * -linear.offset[row(r + size_t(i)) * linear.scale_stride + walk.group];
          }
        }
        multiply<Op, R, T>(rows, x, input.pitch, walk.at, stop, acc, ahead);
        for (int i = 0; i < R; ++i) {
          const F scale = qtp::QTP_ISA::all(linear.scale[row(r + size_t(i)) * linear.scale_stride + walk.group]);
          for (int j = 0; j < T; ++j) total[j * R + i] = fma(scale, acc[j * R + i], total[j * R + i]);
        }
        walk.move(linear, stop);
      }
    }
    Sum sums[R * T];
    all_sums<R * T>(total, sums);
    for (int j = 0; j < T; ++j) {
      Sum* to = into + (t + size_t(j)) * kBlock + r;
      for (int i = 0; i < R; ++i) to[i] = begins ? sums[j * R + i] : Op::plus(to[i], sums[j * R + i]);
    }
  }
};

// Outputs row ... row + count - 1 of token t from what Rows has got for it.
template <class Op, class E>
QTP_INLINE void finish(const Int8Linear& linear, const Prepared<Op>& input, const typename Op::Sum* got, size_t t, size_t row, size_t count,
                       void* out, Form form) {
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
      if (linear.input == Input::kPerToken) scale = scale * input.scales[t];
      y = __builtin_convertvector((I)total, F);
      y = bias != nullptr ? fma(y, scale, load_up_to<E>(bias + at, n)) : y * scale;
    } else {
      y = read<F>(got + i);
      if (bias != nullptr) y += load_up_to<E>(bias + at, n);
    }
    if (form == Form::kFloat)
      store_up_to<F32>(static_cast<float*>(out) + i, y, n);
    else
      store_up_to<E>(static_cast<typename E::stored*>(out) + i, y, n);
  }
}

template <class Call>
QTP_INLINE void by_type(const Int8Linear& linear, const Call& call) {
  const auto typed = [&](auto e) __attribute__((always_inline)) {
    if (linear.input == Input::kFloat)
      call(Floats(), e);
    else
      call(Integers(), e);
  };
  if (linear.dtype == DType::kF32) return typed(F32());
  if (linear.dtype == DType::kBF16) return typed(BF16());
  typed(F16());
}

size_t bytes(const Int8Linear& linear, size_t tokens) {
  return linear.input == Input::kFloat ? Prepared<Floats>(linear, tokens, nullptr).bytes() : Prepared<Integers>(linear, tokens, nullptr).bytes();
}

void lay(const Int8Linear& linear, const void* x, size_t tokens, size_t x_stride, const float* maxima, void* memory, Range range) {
  by_type(linear, [&](auto op, auto e) {
    const Prepared<decltype(op)> to(linear, tokens, memory);
    for (size_t t = range.begin; t < range.end; ++t)
      lay_token<decltype(op), decltype(e)>(linear, static_cast<const typename decltype(e)::stored*>(x) + t * x_stride,
                                           maxima == nullptr ? nullptr : maxima + t, to, t);
  });
}

void run(const Int8Linear& linear, size_t tokens, void* memory, void* out, size_t out_stride, Form form, Range range) {
  by_type(linear, [&](auto op, auto e) {
    using Op = decltype(op);
    using E = decltype(e);
    const size_t item = form == Form::kDType ? sizeof(typename E::stored) : 4;
    const Prepared<Op> input(linear, tokens, memory);
    typename Op::Sum got[kMostInt8Tokens * kBlock];
    for (size_t row = range.begin; row < range.end; row += kBlock) {
      const size_t count = range.end - row < kBlock ? range.end - row : kBlock;
      Rows<Op>{linear, input, row, count, got}.all();
      for (size_t t = 0; t < tokens; ++t)
        finish<Op, E>(linear, input, got + t * kBlock, t, row, count, static_cast<char*>(out) + (t * out_stride + row) * item, form);
    }
  });
}

}  // namespace

extern const Int8Table kInt8 = {bytes, lay, run};

}  // namespace QTP_ISA
}  // namespace qtp
