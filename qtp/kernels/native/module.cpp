// The extension module qtp.kernels._native: see qtp/kernels/native_kernels.py for what the arguments mean.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "binding.hpp"
#include "isa.hpp"
#include "parallel.hpp"
#include "rows.hpp"

namespace qtp {
namespace {

constexpr long kInterface = 4;          // raised when a signature changes: an old build is then told from a new one
constexpr size_t kWorthAThread = 32768;  // elements

int threads_for_rows(size_t rows, size_t width) {
  const size_t most = rows * width / kWorthAThread + 1;
  return most < size_t(threads()) ? int(most) : threads();
}

// isas(): the names of those that this processor has, the best one last.
PyObject* isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (int i = 0; names != nullptr && i <= int(best_isa()); ++i) {
    PyObject* name = PyUnicode_FromString(kIsaNames[i]);
    if (name == nullptr || PyList_Append(names, name) != 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

// use_isa(index in isas())
PyObject* choose_isa(PyObject*, PyObject* index) {
  const long chosen = PyLong_AsLong(index);
  if (chosen == -1 && PyErr_Occurred()) return nullptr;
  if (chosen < 0 || chosen > long(best_isa())) {
    PyErr_SetString(PyExc_ValueError, "this processor does not have it");
    return nullptr;
  }
  use_isa(Isa(chosen));
  Py_RETURN_NONE;
}

// rms_norm(dtype, x, rows, width, weight, bias, eps, out)
PyObject* rms_norm(PyObject*, PyObject* const* args, Py_ssize_t given) {
  size_t a[6];
  if (given != 8) return PyErr_Format(PyExc_TypeError, "needs 8 arguments, not %zd", given);
  if (!read_sizes(args, 6, 6, a)) return nullptr;
  const double eps = PyFloat_AsDouble(args[6]);
  const size_t out = PyLong_AsSize_t(args[7]);
  if (PyErr_Occurred() || !check_dtype(a[0])) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  parallel(threads_for_rows(a[2], a[3]), [&](int thread, int all) {
    rows_table(DType(a[0])).norm(address(a[1]), a[3], address(a[4]), address(a[5]), float(eps), address(out), share(a[2], thread, all));
  });
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

// silu_and_mul(dtype, x, rows, width of the result, out)
PyObject* silu_and_mul(PyObject*, PyObject* const* args, Py_ssize_t given) {
  size_t a[5];
  if (!read_sizes(args, given, 5, a) || !check_dtype(a[0])) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  parallel(threads_for_rows(a[2], 2 * a[3]), [&](int thread, int all) {
    rows_table(DType(a[0])).gate(address(a[1]), a[3], address(a[4]), a[3], share(a[2], thread, all), {0, a[3]});
  });
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

// scale(dtype of the gates, gates, dtype of x, x, rows of x, gates, width): row i of x by gate i modulo their number
PyObject* scale(PyObject*, PyObject* const* args, Py_ssize_t given) {
  size_t a[7];
  if (!read_sizes(args, given, 7, a) || !check_dtype(a[0]) || !check_dtype(a[2])) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  parallel(threads_for_rows(a[4], a[6]), [&](int thread, int all) {
    const Range rows = share(a[4], thread, all);
    const size_t gate = kItemBytes[a[0]], row = a[6] * kItemBytes[a[2]];
    for (size_t i = rows.begin; i < rows.end; ++i)
      rows_table(DType(a[0])).scale(address(a[1] + i % a[5] * gate), DType(a[2]), address(a[3] + i * row), a[6]);
  });
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

// choose(dtype, logits, rows, experts, choices, normalize, weights, chosen)
PyObject* choose(PyObject*, PyObject* const* args, Py_ssize_t given) {
  size_t a[8];
  if (!read_sizes(args, given, 8, a) || !check_dtype(a[0])) return nullptr;
  const size_t item = kItemBytes[a[0]];
  Py_BEGIN_ALLOW_THREADS;
  parallel(threads_for_rows(a[2], 16 * a[3]), [&](int thread, int all) {
    const Range rows = share(a[2], thread, all);
    for (size_t i = rows.begin; i < rows.end; ++i)
      rows_table(DType(a[0])).choose(address(a[1] + i * a[3] * item), a[3], a[4], a[5] != 0, address(a[6] + i * a[4] * item),
                                     static_cast<int64_t*>(address(a[7])) + i * a[4]);
  });
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {{"isas", isas, METH_NOARGS, nullptr},
                           {"use_isa", choose_isa, METH_O, nullptr},
                           {"rms_norm", fast(rms_norm), METH_FASTCALL, nullptr},
                           {"scale", fast(scale), METH_FASTCALL, nullptr},
                           {"choose", fast(choose), METH_FASTCALL, nullptr},
                           {"silu_and_mul", fast(silu_and_mul), METH_FASTCALL, nullptr},
                           {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "qtp.kernels._native", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace qtp

PyMODINIT_FUNC PyInit__native() {
  PyObject* module = PyModule_Create(&qtp::definition);
  if (module == nullptr) return nullptr;
  if (!qtp::add_linear_types(module) || !qtp::add_half_type(module) || !qtp::add_int8_type(module) ||
      PyModule_AddIntConstant(module, "INTERFACE", qtp::kInterface) != 0 ||
      PyModule_AddFunctions(module, qtp::attention_functions) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
