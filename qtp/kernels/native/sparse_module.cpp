// The type SparseLinear: see qtp/kernels/sparse.py for what the arguments mean.
#include "binding.hpp"
#include "sparse.hpp"

namespace qtp {
namespace {

struct PySparse {
  PyObject_HEAD
  Sparse sparse;
};

// SparseLinear(rows, k, data, bytes of it, index, bytes of it)
PyObject* make(PyTypeObject* type, PyObject* args, PyObject*) {
  Py_ssize_t rows, k, data_bytes, index_bytes;
  size_t data, index;
  if (!PyArg_ParseTuple(args, "nnKnKn", &rows, &k, &data, &data_bytes, &index, &index_bytes)) return nullptr;
  const Sparse sparse{size_t(rows), size_t(k), static_cast<const uint8_t*>(address(data)),
                      static_cast<const uint8_t*>(address(index))};
  const char* wrong;
  Py_BEGIN_ALLOW_THREADS;
  wrong = problem(sparse, size_t(data_bytes), size_t(index_bytes));
  Py_END_ALLOW_THREADS;
  if (wrong != nullptr) return PyErr_Format(PyExc_ValueError, "W8A8SC: %s", wrong);
  PyObject* self = type->tp_alloc(type, 0);
  if (self != nullptr) reinterpret_cast<PySparse*>(self)->sparse = sparse;
  return self;
}

void free_object(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

// run(x, tokens, stride of x, out, stride of out)
PyObject* run(PyObject* self, PyObject* const* args, Py_ssize_t given) {
  size_t a[5];
  if (!read_sizes(args, given, 5, a)) return nullptr;
  const Sparse& sparse = reinterpret_cast<PySparse*>(self)->sparse;
  Py_BEGIN_ALLOW_THREADS;
  run_sparse(sparse, static_cast<const int8_t*>(address(a[0])), a[1], a[2], static_cast<int32_t*>(address(a[3])), a[4]);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"run", fast(run), METH_FASTCALL, nullptr}, {nullptr, nullptr, 0, nullptr}};

PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(make)},
                       {Py_tp_dealloc, reinterpret_cast<void*>(free_object)},
                       {Py_tp_methods, methods},
                       {0, nullptr}};

PyType_Spec spec = {"qtp.kernels._native.SparseLinear", sizeof(PySparse), 0, Py_TPFLAGS_DEFAULT, slots};

}  // namespace

bool add_sparse_type(PyObject* module) {
  PyObject* type = PyType_FromSpec(&spec);
  return type != nullptr && PyModule_AddObject(module, "SparseLinear", type) == 0;
}

}  // namespace qtp
