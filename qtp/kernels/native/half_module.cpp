// The type Half: see qtp/kernels/native_kernels.py for what the arguments mean.
#include "attention.hpp"
#include "binding.hpp"
#include "linear.hpp"
#include "rows.hpp"

namespace qtp {
namespace {

// attention: as `attend` wants it, or zeros. reduce: called with an address, a count and `code`, or null.
struct PyHalf {
  PyObject_HEAD
  Linear first, second;
  size_t spec, keys, values, window, scales;
  PyObject* reduce;
  PyObject* code;
};

// Half(first, second, reduce or None, code, (spec, keys, values, window, scales) or None)
PyObject* make_half(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject *first, *second, *reduce, *code, *attention;
  if (!PyArg_ParseTuple(args, "OOOOO", &first, &second, &reduce, &code, &attention)) return nullptr;
  const Linear *one = linear_of(first), *other = linear_of(second);
  if (one == nullptr || other == nullptr || one->dtype != other->dtype || one->wide || one->k != other->outputs())
    return PyErr_Format(PyExc_TypeError, "a half is two Linears of one dtype, the second to where the first comes from");
  PyHalf* self = reinterpret_cast<PyHalf*>(type->tp_alloc(type, 0));
  if (self == nullptr) return nullptr;
  self->first = *one;
  self->second = *other;
  if (attention != Py_None && !PyArg_ParseTuple(attention, "KKKKK", &self->spec, &self->keys, &self->values, &self->window, &self->scales)) {
    Py_DECREF(self);
    return nullptr;
  }
  if (reduce != Py_None) {
    self->reduce = Py_NewRef(reduce);
    self->code = Py_NewRef(code);
  }
  return reinterpret_cast<PyObject*>(self);
}

void free_half(PyObject* self_) {
  PyHalf* self = reinterpret_cast<PyHalf*>(self_);
  PyTypeObject* type = Py_TYPE(self_);
  Py_XDECREF(self->reduce);
  Py_XDECREF(self->code);
  type->tp_free(self_);
  Py_DECREF(type);
}

bool reduced(const PyHalf& self, void* at, size_t count) {
  PyObject* args[3] = {PyLong_FromVoidPtr(at), PyLong_FromSize_t(count), self.code};
  PyObject* done = args[0] != nullptr && args[1] != nullptr ? PyObject_Vectorcall(self.reduce, args, 3, nullptr) : nullptr;
  Py_XDECREF(args[0]);
  Py_XDECREF(args[1]);
  Py_XDECREF(done);
  return done != nullptr;
}

// add(x, tokens, residual, step): residual += reduce(second(first(x))), or with attention between them; rows lie one after the
// other. A second one that is wide is reduced in float32, and rounded after it.
PyObject* add(PyObject* self_, PyObject* const* args, Py_ssize_t given) {
  size_t a[4];
  if (!read_sizes(args, given, 4, a)) return nullptr;
  const PyHalf& self = *reinterpret_cast<PyHalf*>(self_);
  const Linear &first = self.first, &second = self.second;
  const size_t tokens = a[1], item = kItemBytes[int(first.dtype)], inner = first.outputs(), width = second.outputs();
  const auto room = [&](size_t columns) { return (tokens * columns * item + 63) / 64 * 64; };
  const bool attends = self.spec != 0;
  static thread_local Memory memory;
  const size_t partial_room = second.wide ? tokens * width * sizeof(float) : room(width);
  char* hidden = static_cast<char*>(memory.of(room(inner) + (attends ? room(second.k) : 0) + partial_room));
  char *attended = hidden + room(inner), *partial = attended + (attends ? room(second.k) : 0);
  Py_BEGIN_ALLOW_THREADS;
  run_linear(first, address(a[0]), tokens, first.k, hidden, inner);
  if (attends) attend(address(self.spec), address(a[3]), address(self.keys), address(self.values), hidden, inner, self.window, attended, address(self.scales));
  run_linear(second, attends ? attended : hidden, tokens, second.k, partial, width);
  Py_END_ALLOW_THREADS;
  if (self.reduce != nullptr && !reduced(self, partial, tokens * width)) return nullptr;
  const RowsTable& rows = rows_table(first.dtype);
  if (second.wide)
    rows.join_wide(address(a[2]), reinterpret_cast<const float*>(partial), {0, tokens * width});
  else
    rows.join(address(a[2]), partial, {0, tokens * width});
  Py_RETURN_NONE;
}

PyMethodDef half_methods[] = {{"add", fast(add), METH_FASTCALL, nullptr}, {nullptr, nullptr, 0, nullptr}};

PyType_Slot half_slots[] = {{Py_tp_new, reinterpret_cast<void*>(make_half)},
                            {Py_tp_dealloc, reinterpret_cast<void*>(free_half)},
                            {Py_tp_methods, half_methods},
                            {0, nullptr}};

PyType_Spec half_spec = {"qtp.kernels._native.Half", sizeof(PyHalf), 0, Py_TPFLAGS_DEFAULT, half_slots};

}  // namespace

bool add_half_type(PyObject* module) {
  PyObject* half = PyType_FromSpec(&half_spec);
  return half != nullptr && PyModule_AddObject(module, "Half", half) == 0;
}

}  // namespace qtp
