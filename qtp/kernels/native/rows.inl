// Compiled once for each instruction set: see each_isa.inl and rows.hpp.
namespace qtp {
namespace QTP_ISA {
namespace {

#include "vectors.inl"
#include "normed.inl"

template <class E>
void norm(const void* x_, size_t width, const void* weight_, const void* bias_, float eps, void* out_, Range rows) {
  using S = typename E::stored;
  const S *weight = static_cast<const S*>(weight_), *bias = static_cast<const S*>(bias_);
  for (size_t row = rows.begin; row < rows.end; ++row) {
    const S* x = static_cast<const S*>(x_) + row * width;
    S* out = static_cast<S*>(out_) + row * width;
    const F scale = all(inverse_root_mean_square<E>(x, width, eps));
    for (size_t i = 0; i < width; i += kLanes)
      store_up_to<E>(out + i, normed<E>(x, scale, weight, bias, i, width - i), width - i);
  }
}

template <class E>
void gate(const void* x_, size_t width, void* out_, size_t out_stride, Range rows, Range columns) {
  using S = typename E::stored;
  for (size_t row = rows.begin; row < rows.end; ++row) {
    const S* x = static_cast<const S*>(x_) + 2 * row * width;
    S* out = static_cast<S*>(out_) + row * out_stride;
    for (size_t i = columns.begin; i < columns.end; i += kLanes) {
      const size_t n = columns.end - i;
      store_up_to<E>(out + i, silu(load_up_to<E>(x + i, n)) * load_up_to<E>(x + width + i, n), n);
    }
  }
}

template <class X>
void scale_by(float factor, void* x_, size_t width) {
  typename X::stored* x = static_cast<typename X::stored*>(x_);
  for (size_t i = 0; i < width; i += kLanes) store_up_to<X>(x + i, load_up_to<X>(x + i, width - i) * factor, width - i);
}

template <class E>
void scale(const void* gate, DType dtype, void* x, size_t width) {
  const F sigmoid = 1.0f / (1.0f + exponential(all(-get<E>(static_cast<const typename E::stored*>(gate)))));
  if (dtype == DType::kF32) return scale_by<F32>(sigmoid[0], x, width);
  if (dtype == DType::kBF16) return scale_by<BF16>(sigmoid[0], x, width);
  scale_by<F16>(sigmoid[0], x, width);
}

template <class E>
void choose(const void* logits_, size_t experts, size_t choices, bool normalize, void* weights_, int64_t* chosen) {
  const typename E::stored* logits = static_cast<const typename E::stored*>(logits_);
  typename E::stored* weights = static_cast<typename E::stored*>(weights_);
  const auto beats = [&](size_t a, size_t b) {  // b == experts: nothing yet
    return b == experts || get<E>(logits + a) > get<E>(logits + b);
  };
  for (size_t k = 0; k < choices; ++k) {
    size_t best = experts;
    for (size_t e = 0; e < experts; ++e) {
      bool taken = false;
      for (size_t i = 0; i < k; ++i) taken |= chosen[i] == int64_t(e);
      if (!taken && beats(e, best)) best = e;
    }
    chosen[k] = int64_t(best);
  }
  const F top = all(get<E>(logits + chosen[0]));
  F total = {};
  for (size_t i = 0; i < experts; i += kLanes) {
    F y = exponential(load_up_to<E>(logits + i, experts - i) - top);
    for (size_t lane = experts - i; lane < kLanes; ++lane) y[lane] = 0.0f;
    total += y;
  }
  float of = sum(total), picked = 0.0f;
  for (size_t k = 0; k < choices; ++k) picked += exponential(all(get<E>(logits + chosen[k])) - top)[0];
  if (normalize) of = picked;
  for (size_t k = 0; k < choices; ++k) put<E>(weights + k, exponential(all(get<E>(logits + chosen[k])) - top)[0] / of);
}

template <class E>
void add(float* sum, const void* weight, const float* y, Range columns) {
  const F factor = all(get<E>(static_cast<const typename E::stored*>(weight)));
  for (size_t i = columns.begin; i < columns.end; i += kLanes) {
    const size_t n = columns.end - i;
    store_up_to<F32>(sum + i, fma(factor, load_up_to<F32>(y + i, n), load_up_to<F32>(sum + i, n)), n);
  }
}

template <class E>
void finish(void* out_, const float* sum, Range columns) {
  typename E::stored* out = static_cast<typename E::stored*>(out_);
  for (size_t i = columns.begin; i < columns.end; i += kLanes) {
    const size_t n = columns.end - i;
    store_up_to<E>(out + i, load_up_to<E>(out + i, n) + load_up_to<F32>(sum + i, n), n);
  }
}

template <class E>
void join(void* x_, const void* y_, Range columns) {
  typename E::stored* x = static_cast<typename E::stored*>(x_);
  const typename E::stored* y = static_cast<const typename E::stored*>(y_);
  for (size_t i = columns.begin; i < columns.end; i += kLanes) {
    const size_t n = columns.end - i;
    store_up_to<E>(x + i, load_up_to<E>(x + i, n) + load_up_to<E>(y + i, n), n);
  }
}

template <class E>
void join_wide(void* x_, const float* y, Range columns) {
  typename E::stored *x = static_cast<typename E::stored*>(x_), rounded[kLanes];
  for (size_t i = columns.begin; i < columns.end; i += kLanes) {
    const size_t n = columns.end - i;
    E::store(rounded, load_up_to<F32>(y + i, n));
    store_up_to<E>(x + i, load_up_to<E>(x + i, n) + E::load(rounded), n);
  }
}

template <class E>
constexpr RowsTable table() {
  return {norm<E>, gate<E>, scale<E>, choose<E>, add<E>, finish<E>, join<E>, join_wide<E>};
}

}  // namespace

extern const RowsTable kRowsTables[kDTypes] = {table<F32>(), table<BF16>(), table<F16>()};

}  // namespace QTP_ISA
}  // namespace qtp
