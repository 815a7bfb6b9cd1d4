// The Python face of paged attention: see qtp/attention/native_backend.py for what the arguments mean.
#include "attention.hpp"
#include "binding.hpp"

namespace qtp {
namespace {

// attend(attention, step, keys, values, qkv, stride of qkv, window, out, scales): as in binding.hpp
PyObject* attend_one(PyObject*, PyObject* const* args, Py_ssize_t given) {
  size_t a[9];
  if (!read_sizes(args, given, 9, a)) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  attend(address(a[0]), address(a[1]), address(a[2]), address(a[3]), address(a[4]), a[5], a[6], address(a[7]), address(a[8]));
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

}  // namespace

void attend(const void* spec_, const void* step_, void* keys, void* values, void* qkv, size_t stride, size_t window, void* out,
            const void* scales_) {
  const int64_t *spec = static_cast<const int64_t*>(spec_), *step = static_cast<const int64_t*>(step_);
  const Attention attention{DType(spec[0]), size_t(spec[1]), size_t(spec[2]), size_t(spec[3]), size_t(spec[4]), spec + 5};
  const size_t sequences = size_t(step[1]);
  const int64_t* lens = step + 5;
  const Step steps{size_t(step[0]),
                   sequences,
                   static_cast<const int64_t*>(address(size_t(step[2]))),
                   lens,
                   lens + sequences,
                   lens + 2 * sequences,
                   static_cast<const float*>(address(size_t(step[3]))),
                   static_cast<const float*>(address(size_t(step[4])))};
  Scales scales{};
  if (scales_ != nullptr) {
    const size_t* at = static_cast<const size_t*>(scales_);
    const auto floats = [&](size_t i) { return static_cast<const float*>(address(at[i])); };
    scales = {floats(0), floats(1), floats(2), floats(3), floats(4), floats(5)};
  }
  run_attention({attention, steps, keys, values, qkv, out, stride, window, scales_ != nullptr ? &scales : nullptr});
}

PyMethodDef attention_functions[] = {
    {"attend", fast(attend_one), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace qtp
