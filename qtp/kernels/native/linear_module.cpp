// The types Linear and Experts: see qtp/kernels/native_kernels.py for what the arguments mean.
#include "binding.hpp"
#include "experts.hpp"
#include "isa.hpp"
#include "linear.hpp"

#include <cstdlib>

namespace qtp {
namespace {

struct PyLinear {
  PyObject_HEAD
  Linear linear;
};

// Linear(dtype, rows, k, weight, stride, bias, norm, eps, gated, wide, cuts)
PyObject* make_linear(PyTypeObject* type, PyObject* args, PyObject*) {
  Linear linear{};
  int dtype, gated, wide;
  Py_ssize_t rows, k, stride;
  size_t weight, bias, norm;
  PyObject* cuts;
  if (!PyArg_ParseTuple(args, "innKnKKfppO!", &dtype, &rows, &k, &weight, &stride, &bias, &norm, &linear.eps, &gated, &wide, &PyTuple_Type,
                        &cuts))
    return nullptr;
  const Py_ssize_t leaves = PyTuple_GET_SIZE(cuts) - 1;
  if (!check_dtype(size_t(dtype))) return nullptr;
  if (leaves < 1 || leaves > kMostLeaves) return PyErr_Format(PyExc_ValueError, "%zd leaves", leaves);
  for (Py_ssize_t i = 0; i <= leaves; ++i) {
    linear.cuts[i] = PyLong_AsSize_t(PyTuple_GET_ITEM(cuts, i));
    if (linear.cuts[i] == size_t(-1) && PyErr_Occurred()) return nullptr;
  }
  linear.dtype = DType(dtype);
  linear.rows = size_t(rows);
  linear.k = size_t(k);
  linear.weight = address(weight);
  linear.stride = size_t(stride);
  linear.bias = address(bias);
  linear.norm = address(norm);
  linear.gated = gated != 0;
  linear.wide = wide != 0;
  linear.leaves = int(leaves);
  PyObject* self = type->tp_alloc(type, 0);
  if (self != nullptr) reinterpret_cast<PyLinear*>(self)->linear = linear;
  return self;
}

void free_object(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

// run(x, tokens, stride of x, out, stride of out)
PyObject* run_one(PyObject* self, PyObject* const* args, Py_ssize_t given) {
  size_t a[5];
  if (!read_sizes(args, given, 5, a)) return nullptr;
  const Linear& linear = reinterpret_cast<PyLinear*>(self)->linear;
  Py_BEGIN_ALLOW_THREADS;
  run_linear(linear, address(a[0]), a[1], a[2], address(a[3]), a[4]);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

// best(x, tokens, stride of x, count, allowed, values, indices)
PyObject* best(PyObject* self, PyObject* const* args, Py_ssize_t given) {
  size_t a[7];
  if (!read_sizes(args, given, 7, a)) return nullptr;
  const Linear& linear = reinterpret_cast<PyLinear*>(self)->linear;
  bool done;
  Py_BEGIN_ALLOW_THREADS;
  done = best_outputs(linear, address(a[0]), a[1], a[2], a[3], a[4], static_cast<float*>(address(a[5])),
                      static_cast<int64_t*>(address(a[6])));
  Py_END_ALLOW_THREADS;
  if (!done) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyMethodDef linear_methods[] = {{"run", fast(run_one), METH_FASTCALL, nullptr},
                                {"best", fast(best), METH_FASTCALL, nullptr},
                                {nullptr, nullptr, 0, nullptr}};

PyType_Slot linear_slots[] = {{Py_tp_new, reinterpret_cast<void*>(make_linear)},
                              {Py_tp_dealloc, reinterpret_cast<void*>(free_object)},
                              {Py_tp_methods, linear_methods},
                              {0, nullptr}};

PyType_Spec linear_spec = {"qtp.kernels._native.Linear", sizeof(PyLinear), 0, Py_TPFLAGS_DEFAULT, linear_slots};

struct PyExperts {
  PyObject_HEAD
  Expert* held;
  const Expert** by_index;
  size_t count;
};

void free_experts(PyObject* self_) {
  PyExperts* self = reinterpret_cast<PyExperts*>(self_);
  std::free(self->held);
  std::free(self->by_index);
  free_object(self_);
}

// Experts((gate_up, down) or None, one for each expert)
PyObject* make_experts(PyTypeObject* type, PyObject* args, PyObject*) {
  const size_t count = size_t(PyTuple_GET_SIZE(args));
  PyObject* object = type->tp_alloc(type, 0);
  if (object == nullptr) return nullptr;
  PyExperts* self = reinterpret_cast<PyExperts*>(object);
  self->count = count;
  self->held = static_cast<Expert*>(std::calloc(count + 1, sizeof(Expert)));
  self->by_index = static_cast<const Expert**>(std::calloc(count + 1, sizeof(Expert*)));
  if (self->held == nullptr || self->by_index == nullptr) {
    Py_DECREF(object);
    return PyErr_NoMemory();
  }
  for (size_t i = 0; i < count; ++i) {
    PyObject* pair = PyTuple_GET_ITEM(args, Py_ssize_t(i));
    if (pair == Py_None) continue;
    const bool two = PyTuple_Check(pair) && PyTuple_GET_SIZE(pair) == 2;
    const Linear* gate_up = two ? linear_of(PyTuple_GET_ITEM(pair, 0)) : nullptr;
    const Linear* down = two ? linear_of(PyTuple_GET_ITEM(pair, 1)) : nullptr;
    if (gate_up == nullptr || down == nullptr) {
      Py_DECREF(object);
      return PyErr_Format(PyExc_TypeError, "an expert is two Linears, or None");
    }
    self->held[i] = {*gate_up, *down};
    self->by_index[i] = &self->held[i];
  }
  return object;
}

// run(x, tokens, stride of x, weights, chosen, choices, partial, whether that is float32)
PyObject* run_chosen(PyObject* self_, PyObject* const* args, Py_ssize_t given) {
  size_t a[8];
  if (!read_sizes(args, given, 8, a)) return nullptr;
  const PyExperts& self = *reinterpret_cast<PyExperts*>(self_);
  bool done;
  Py_BEGIN_ALLOW_THREADS;
  done = run_experts(self.by_index, self.count, address(a[0]), a[1], a[2], address(a[3]), static_cast<const int64_t*>(address(a[4])),
                     a[5], address(a[6]), a[7] != 0);
  Py_END_ALLOW_THREADS;
  if (!done) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyMethodDef experts_methods[] = {{"run", fast(run_chosen), METH_FASTCALL, nullptr}, {nullptr, nullptr, 0, nullptr}};

PyType_Slot experts_slots[] = {{Py_tp_new, reinterpret_cast<void*>(make_experts)},
                               {Py_tp_dealloc, reinterpret_cast<void*>(free_experts)},
                               {Py_tp_methods, experts_methods},
                               {0, nullptr}};

PyType_Spec experts_spec = {"qtp.kernels._native.Experts", sizeof(PyExperts), 0, Py_TPFLAGS_DEFAULT, experts_slots};

}  // namespace

const Linear* linear_of(PyObject* object) {
  return Py_TYPE(object)->tp_dealloc == free_object ? &reinterpret_cast<PyLinear*>(object)->linear : nullptr;
}

bool add_linear_types(PyObject* module) {
  PyObject* linear = PyType_FromSpec(&linear_spec);
  if (linear == nullptr || PyModule_AddObject(module, "Linear", linear) != 0) return false;
  PyObject* experts = PyType_FromSpec(&experts_spec);
  return experts != nullptr && PyModule_AddObject(module, "Experts", experts) == 0;
}

}  // namespace qtp
