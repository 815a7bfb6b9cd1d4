#include "experts.hpp"

#include <cstdlib>
#include <cstring>

#include "rows.hpp"

namespace qtp {
namespace {

constexpr size_t kUnit = 32;

// A token's choice of an expert that is here.
struct Choice {
  size_t token;
  const void* weight;
};

// Memory that ends with the call.
template <class T>
class Array {
 public:
  explicit Array(size_t count) : at_(static_cast<T*>(std::malloc(count * sizeof(T) + 64))) {}
  ~Array() { std::free(at_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* get() const { return at_; }

 private:
  T* at_;
};

}  // namespace

bool run_experts(const Expert* const* experts, size_t count, const void* x, size_t tokens, size_t x_stride, const void* weights,
                 const int64_t* chosen, size_t choices, void* partial, bool wide) {
  Array<size_t> firsts(count + 2);
  Array<Choice> order(tokens * choices);
  if (firsts.get() == nullptr || order.get() == nullptr) return false;
  size_t* first = firsts.get();
  std::memset(first, 0, (count + 2) * sizeof(size_t));
  const Expert* some = nullptr;
  for (size_t i = 0; i < tokens * choices; ++i) {
    const size_t expert = size_t(chosen[i]);
    if (expert >= count || experts[expert] == nullptr) continue;
    some = experts[expert];
    ++first[expert + 2];
  }
  if (some == nullptr) return true;
  for (size_t i = 2; i < count + 2; ++i) first[i] += first[i - 1];
  const DType dtype = some->gate_up.dtype;
  const size_t item = kItemBytes[int(dtype)], width = some->gate_up.k;
  for (size_t i = 0; i < tokens * choices; ++i) {
    const size_t expert = size_t(chosen[i]);
    if (expert >= count || experts[expert] == nullptr) continue;
    order.get()[first[expert + 1]++] = {i / choices, static_cast<const char*>(weights) + i * item};
  }
  // Now the choices of expert e are first[e] .. first[e + 1] - 1.
  const size_t total = first[count], inner = some->gate_up.outputs();
  Array<char> gathered(total * width * item), hidden(total * inner * item);
  Array<float> out(total * width), sums(tokens * width);
  if (gathered.get() == nullptr || hidden.get() == nullptr || out.get() == nullptr || sums.get() == nullptr) return false;
  std::memset(sums.get(), 0, tokens * width * sizeof(float));
  for (size_t i = 0; i < total; ++i)
    std::memcpy(gathered.get() + i * width * item, static_cast<const char*>(x) + order.get()[i].token * x_stride * item, width * item);

  const LinearTable& linear = linear_table(dtype);
  const RowsTable& rows = rows_table(dtype);
  parallel(threads(), [&](int thread, int all) {
    const Range inside = share(inner, thread, all, kUnit), columns = share(width, thread, all, kUnit);
    const auto each = [&](const auto& run) {
      for (size_t e = 0; e < count; ++e)
        if (first[e + 1] > first[e]) run(*experts[e], first[e], first[e + 1] - first[e]);
    };
    each([&](const Expert& expert, size_t at, size_t n) {
      linear.run(expert.gate_up, gathered.get() + at * width * item, n, width, hidden.get() + at * inner * item, inner, inside);
    });
    if (all > 1) meet();
    each([&](const Expert& expert, size_t at, size_t n) {
      linear.run(expert.down, hidden.get() + at * inner * item, n, inner, out.get() + at * width, width, columns);
      for (size_t i = at; i < at + n; ++i)
        rows.add(sums.get() + order.get()[i].token * width, order.get()[i].weight, out.get() + i * width, columns);
    });
    const DType kind = wide ? DType::kF32 : dtype;
    for (size_t t = 0; t < tokens; ++t)
      rows_table(kind).finish(static_cast<char*>(partial) + t * width * kItemBytes[int(kind)], sums.get() + t * width, columns);
  });
  return true;
}

}  // namespace qtp
