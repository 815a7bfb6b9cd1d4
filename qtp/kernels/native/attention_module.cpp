// The Python face of paged attention: see qtp/attention/native_backend.py for what the arguments mean.
#include "attention.hpp"
#include "binding.hpp"

namespace qtp {
namespace {

// attend(attention, step, keys, values, qkv, stride of qkv, window, out, scales). The first two are arrays of int64:
// dtype, heads, KV heads, width, block size, starts; and tokens, sequences, slots, cos, sin, query_lens, kv_lens, tables. The last
// is 0, or for int8 keys and values an array of addresses in the order of Scales.
PyObject* attend(PyObject*, PyObject* const* args, Py_ssize_t given) {
  size_t a[9];
  if (!read_sizes(args, given, 9, a)) return nullptr;
  const int64_t* spec = static_cast<const int64_t*>(address(a[0]));
  const int64_t* step = static_cast<const int64_t*>(address(a[1]));
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
  if (a[8] != 0) {
    const size_t* at = static_cast<const size_t*>(address(a[8]));
    const auto floats = [&](size_t i) { return static_cast<const float*>(address(at[i])); };
    scales = {floats(0), floats(1), floats(2), floats(3), floats(4), floats(5)};
  }
  Py_BEGIN_ALLOW_THREADS;
  run_attention({attention, steps, address(a[2]), address(a[3]), address(a[4]), address(a[7]), a[5], a[6],
                 a[8] != 0 ? &scales : nullptr});
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

}  // namespace

PyMethodDef attention_functions[] = {
    {"attend", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(attend)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace qtp
