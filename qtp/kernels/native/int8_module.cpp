// The type Int8Linear: see qtp/kernels/native_quantized.py for what the arguments mean.
#include "binding.hpp"
#include "int8.hpp"

#include <cstdlib>

namespace qtp {
namespace {

struct PyInt8 {
  PyObject_HEAD
  Int8Linear linear;
  int32_t* sums;
};

void free_int8(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  std::free(reinterpret_cast<PyInt8*>(self)->sums);
  type->tp_free(self);
  Py_DECREF(type);
}

constexpr int kCompressed = int(Input::kFloat) + 1;

// Int8Linear(input, rows, k, weight, stride, index, bytes of it, input_scale, input_offset, quant_bias, scale, offset, stride of scale and offset,
// group, phase, bias, norm, norm_bias, eps). Input kCompressed: as kStatic, weight and stride being data and bytes of it.
PyObject* make_int8(PyTypeObject* type, PyObject* args, PyObject*) {
  Int8Linear linear{};
  int input;
  Py_ssize_t rows, k, stride, index_bytes, scale_stride, group, phase;
  size_t weight, index, quant_bias, scale, offset, bias, norm, norm_bias;
  if (!PyArg_ParseTuple(args, "innKnKnffKKKnnnKKKf", &input, &rows, &k, &weight, &stride, &index, &index_bytes, &linear.input_scale,
                        &linear.input_offset, &quant_bias, &scale, &offset, &scale_stride, &group, &phase, &bias, &norm, &norm_bias,
                        &linear.eps))
    return nullptr;
  if (input < 0 || input > kCompressed) return PyErr_Format(PyExc_ValueError, "no input number %d", input);
  if (phase < 0 || (phase > 0 && phase >= group)) return PyErr_Format(PyExc_ValueError, "phase %zd in a group of %zd", phase, group);
  linear.input = input == kCompressed ? Input::kStatic : Input(input);
  linear.rows = size_t(rows);
  linear.k = size_t(k);
  if (input != kCompressed) {
    linear.weight = static_cast<const int8_t*>(address(weight));
    linear.stride = size_t(stride);
  } else {
    linear.sparse = {linear.rows, linear.k, static_cast<const uint8_t*>(address(weight)), static_cast<const uint8_t*>(address(index))};
    const char* wrong;
    Py_BEGIN_ALLOW_THREADS;
    wrong = problem(linear.sparse, size_t(stride), size_t(index_bytes));
    Py_END_ALLOW_THREADS;
    if (wrong != nullptr) return PyErr_Format(PyExc_ValueError, "W8A8SC: %s", wrong);
  }
  linear.quant_bias = static_cast<const int32_t*>(address(quant_bias));
  linear.scale = static_cast<const float*>(address(scale));
  linear.offset = static_cast<const float*>(address(offset));
  linear.scale_stride = size_t(scale_stride);
  linear.group = size_t(group);
  linear.phase = size_t(phase);
  linear.bias = address(bias);
  linear.norm = address(norm);
  linear.norm_bias = address(norm_bias);
  PyObject* object = type->tp_alloc(type, 0);
  if (object == nullptr) return nullptr;
  PyInt8* self = reinterpret_cast<PyInt8*>(object);
  if (linear.input != Input::kFloat && !linear.compressed() && has_vnni()) {
    self->sums = static_cast<int32_t*>(std::malloc(linear.rows * sizeof(int32_t) + 64));
    if (self->sums == nullptr) {
      Py_DECREF(object);
      return PyErr_NoMemory();
    }
    sum_rows(linear, self->sums);
    linear.sums = self->sums;
  }
  self->linear = linear;
  return object;
}

// run(dtype, x, tokens, stride of x, maxima, out, stride of out, form)
PyObject* run(PyObject* self, PyObject* const* args, Py_ssize_t given) {
  size_t a[8];
  if (!read_sizes(args, given, 8, a) || !check_dtype(a[0])) return nullptr;
  Int8Linear linear = reinterpret_cast<PyInt8*>(self)->linear;
  linear.dtype = DType(a[0]);
  if (a[7] > size_t(Form::kGated) || (Form(a[7]) == Form::kInteger && linear.input == Input::kFloat))
    return PyErr_Format(PyExc_ValueError, "no form number %zu", a[7]);
  Py_BEGIN_ALLOW_THREADS;
  run_int8(linear, address(a[1]), a[2], a[3], static_cast<const float*>(address(a[4])), address(a[5]), a[6], Form(a[7]));
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

// scale_sums(dtype, total, rows, width, scale, stride of scale, out)
PyObject* scale(PyObject*, PyObject* const* args, Py_ssize_t given) {
  size_t a[7];
  if (!read_sizes(args, given, 7, a) || !check_dtype(a[0])) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  scale_sums(DType(a[0]), static_cast<const int32_t*>(address(a[1])), a[2], a[3], static_cast<const float*>(address(a[4])), a[5],
             address(a[6]));
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {{"scale_sums", fast(scale), METH_FASTCALL, nullptr}, {nullptr, nullptr, 0, nullptr}};

PyMethodDef methods[] = {{"run", fast(run), METH_FASTCALL, nullptr}, {nullptr, nullptr, 0, nullptr}};

PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(make_int8)},
                       {Py_tp_dealloc, reinterpret_cast<void*>(free_int8)},
                       {Py_tp_methods, methods},
                       {0, nullptr}};

PyType_Spec spec = {"qtp.kernels._native.Int8Linear", sizeof(PyInt8), 0, Py_TPFLAGS_DEFAULT, slots};

}  // namespace

bool add_int8_type(PyObject* module) {
  PyObject* type = PyType_FromSpec(&spec);
  return type != nullptr && PyModule_AddObject(module, "Int8Linear", type) == 0 && PyModule_AddFunctions(module, functions) == 0;
}

}  // namespace qtp
