// The extension module collectives._native: see collectives/shm.py, its one caller, for what the arguments mean.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <new>

#include "group.hpp"
#include "sum.hpp"

namespace {

using qtp::DType;
using qtp::Group;

constexpr long kInterface = 1;                // raised when a signature changes: an old build is then told from a new one
constexpr size_t kHoldBytes = 64 * 1024;      // up to here the interpreter is held through the first microseconds of a wait

PyObject* collective_error = nullptr;

struct PyGroup {
  PyObject_HEAD
  Group* group;
  bool busy;    // a collective runs
  bool closes;  // to be released by the collective that runs
};

// Lets other Python threads run while a collective takes long, and looks for signals in between.
class Turn {
 public:
  explicit Turn(bool long_from_the_start) {
    if (long_from_the_start) let_go();
  }
  ~Turn() {
    if (saved_ != nullptr) PyEval_RestoreThread(saved_);
  }
  qtp::Caller caller() {
    return {[](void* self) { static_cast<Turn*>(self)->let_go(); },
            [](void* self) { return static_cast<Turn*>(self)->interrupted(); }, this};
  }

 private:
  void let_go() {
    if (saved_ == nullptr) saved_ = PyEval_SaveThread();
  }
  bool interrupted() {
    PyEval_RestoreThread(saved_);
    saved_ = nullptr;
    if (PyErr_CheckSignals() != 0) return true;
    let_go();
    return false;
  }

  PyThreadState* saved_ = nullptr;
};

bool read(PyObject* const* args, Py_ssize_t given, Py_ssize_t wanted, size_t* into) {
  if (given != wanted) {
    PyErr_Format(PyExc_TypeError, "needs %zd arguments, not %zd", wanted, given);
    return false;
  }
  for (Py_ssize_t i = 0; i < wanted; ++i) {
    into[i] = PyLong_AsSize_t(args[i]);
    if (into[i] == size_t(-1) && PyErr_Occurred()) return false;
  }
  return true;
}

bool check_dtype(size_t dtype) {
  if (dtype < qtp::kDTypes) return true;
  PyErr_SetString(PyExc_ValueError, "unknown dtype");
  return false;
}

void release(PyGroup* self) {
  if (self->busy) {
    self->closes = true;
    return;
  }
  delete self->group;
  self->group = nullptr;
}

// Runs one collective of the group; `run` gets the group and the caller.
template <class Run>
PyObject* call(PyGroup* self, size_t bytes, Run run) {
  if (self->group == nullptr || self->closes) return PyErr_Format(collective_error, "shm: the communicator is closed");
  if (self->busy) return PyErr_Format(collective_error, "shm: two threads use one communicator at once");
  self->busy = true;
  bool done;
  {
    Turn turn(bytes > kHoldBytes);
    done = run(*self->group, turn.caller());
  }
  self->busy = false;
  if (!done && !PyErr_Occurred()) PyErr_Format(collective_error, "shm: %s", self->group->error());
  if (self->closes) {
    self->closes = false;
    release(self);
  }
  if (!done) return nullptr;
  Py_RETURN_NONE;
}

char* memory(size_t address) { return reinterpret_cast<char*>(address); }

// all_reduce(address, count, dtype)
PyObject* all_reduce(PyObject* self, PyObject* const* args, Py_ssize_t given) {
  size_t a[3];
  if (!read(args, given, 3, a) || !check_dtype(a[2])) return nullptr;
  return call(reinterpret_cast<PyGroup*>(self), a[1] * qtp::kItemBytes[a[2]], [&](Group& group, const qtp::Caller& caller) {
    return group.all_reduce(memory(a[0]), a[1], DType(a[2]), caller);
  });
}

// all_gather(address, address of the result, rows, bytes of a row of rank 0, of rank 1, ...)
PyObject* all_gather(PyObject* self, PyObject* const* args, Py_ssize_t given) {
  PyGroup* group = reinterpret_cast<PyGroup*>(self);
  if (group->group == nullptr) return PyErr_Format(collective_error, "shm: the communicator is closed");
  const Py_ssize_t wanted = 3 + group->group->size();
  size_t* a = new (std::nothrow) size_t[size_t(wanted)];
  if (a == nullptr) return PyErr_NoMemory();
  PyObject* result = nullptr;
  if (read(args, given, wanted, a)) {
    size_t bytes = 0;
    for (Py_ssize_t i = 3; i < wanted; ++i) bytes += a[2] * a[i];
    result = call(group, bytes, [&](Group& g, const qtp::Caller& caller) {
      return g.all_gather(memory(a[0]), memory(a[1]), a[2], a + 3, caller);
    });
  }
  delete[] a;
  return result;
}

// reduce_scatter(address, address of the result, elements of the result, dtype)
PyObject* reduce_scatter(PyObject* self, PyObject* const* args, Py_ssize_t given) {
  size_t a[4];
  if (!read(args, given, 4, a) || !check_dtype(a[3])) return nullptr;
  return call(reinterpret_cast<PyGroup*>(self), a[2] * qtp::kItemBytes[a[3]], [&](Group& group, const qtp::Caller& caller) {
    return group.reduce_scatter(memory(a[0]), memory(a[1]), a[2], DType(a[3]), caller);
  });
}

// broadcast(address, bytes, source)
PyObject* broadcast(PyObject* self, PyObject* const* args, Py_ssize_t given) {
  size_t a[3];
  if (!read(args, given, 3, a)) return nullptr;
  return call(reinterpret_cast<PyGroup*>(self), a[1], [&](Group& group, const qtp::Caller& caller) {
    return group.broadcast(memory(a[0]), a[1], int(a[2]), caller);
  });
}

// all_to_all(address, address of the result, bytes of a part)
PyObject* all_to_all(PyObject* self, PyObject* const* args, Py_ssize_t given) {
  size_t a[3];
  if (!read(args, given, 3, a)) return nullptr;
  return call(reinterpret_cast<PyGroup*>(self), a[2], [&](Group& group, const qtp::Caller& caller) {
    return group.all_to_all(memory(a[0]), memory(a[1]), a[2], caller);
  });
}

PyObject* barrier(PyObject* self, PyObject*) {
  return call(reinterpret_cast<PyGroup*>(self), 0,
              [](Group& group, const qtp::Caller& caller) { return group.barrier(caller); });
}

PyObject* abort_(PyObject* self, PyObject*) {
  Group* group = reinterpret_cast<PyGroup*>(self)->group;
  if (group != nullptr) group->leave(qtp::kAborted);
  Py_RETURN_NONE;
}

PyObject* close_(PyObject* self, PyObject*) {
  PyGroup* group = reinterpret_cast<PyGroup*>(self);
  if (group->group != nullptr) {
    group->group->leave(qtp::kClosed);
    release(group);
  }
  Py_RETURN_NONE;
}

// Group(descriptor, rank, pids of all ranks, slot bytes, bytes up to which one step is taken, timeout, spin), both in seconds
PyObject* make(PyTypeObject* type, PyObject* args, PyObject*) {
  int descriptor;
  Group::Shape shape{};
  PyObject* pids;
  Py_ssize_t slot_bytes, one_step_bytes;
  if (!PyArg_ParseTuple(args, "iiO!nndd", &descriptor, &shape.rank, &PyTuple_Type, &pids, &slot_bytes, &one_step_bytes,
                        &shape.timeout, &shape.spin))
    return nullptr;
  shape.size = int(PyTuple_GET_SIZE(pids));
  const size_t least = (size_t(shape.size) + 1) * 64 * 8;
  if (shape.rank < 0 || shape.rank >= shape.size || slot_bytes <= 0 || size_t(slot_bytes) % qtp::kPage != 0 ||
      size_t(slot_bytes) < least || one_step_bytes < 0 || one_step_bytes > slot_bytes) {
    PyErr_SetString(PyExc_ValueError, "a group of this shape makes no sense");
    return nullptr;
  }
  shape.slot_bytes = size_t(slot_bytes);
  shape.one_step_bytes = size_t(one_step_bytes);
  int* numbers = new (std::nothrow) int[size_t(shape.size)];
  if (numbers == nullptr) return PyErr_NoMemory();
  for (int i = 0; i < shape.size; ++i) numbers[i] = int(PyLong_AsLong(PyTuple_GET_ITEM(pids, i)));
  shape.pids = numbers;
  PyGroup* self = PyErr_Occurred() ? nullptr : reinterpret_cast<PyGroup*>(type->tp_alloc(type, 0));
  if (self != nullptr) {
    self->group = new Group(descriptor, shape);
    if (self->group->error()[0] != '\0') {
      PyErr_Format(PyExc_OSError, "%s", self->group->error());
      Py_CLEAR(self);
    }
  }
  delete[] numbers;
  return reinterpret_cast<PyObject*>(self);
}

void dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  close_(self, nullptr);
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* segment_bytes(PyObject*, PyObject* const* args, Py_ssize_t given) {
  size_t a[2];
  if (!read(args, given, 2, a)) return nullptr;
  return PyLong_FromSize_t(qtp::segment_bytes(int(a[0]), a[1]));
}

// sum(number of the instruction set in ISAS, address of the result, elements, dtype, address of each input): the sums by
// themselves, so that a test reaches those that this processor would not choose
PyObject* sum(PyObject*, PyObject* const* args, Py_ssize_t given) {
  const qtp::Kernels* all[8];
  const size_t count = size_t(qtp::supported(all, 8));
  constexpr Py_ssize_t kMost = 16;
  size_t a[4 + kMost];
  if (given < 6 || given > 4 + kMost) return PyErr_Format(PyExc_TypeError, "needs 2 to %zd inputs", kMost);
  if (!read(args, given, given, a) || !check_dtype(a[3])) return nullptr;
  if (a[0] >= count) return PyErr_Format(PyExc_ValueError, "no such instruction set");
  const void* inputs[kMost];
  for (Py_ssize_t i = 4; i < given; ++i) inputs[i - 4] = memory(a[i]);
  all[a[0]]->sum[a[3]](memory(a[1]), inputs, int(given - 4), a[2]);
  Py_RETURN_NONE;
}

PyObject* isas() {
  const qtp::Kernels* all[8];
  const int count = qtp::supported(all, 8);
  PyObject* names = PyTuple_New(count);
  for (int i = 0; names != nullptr && i < count; ++i) {
    PyObject* name = PyUnicode_FromString(all[i]->isa);
    if (name == nullptr) Py_CLEAR(names);
    else PyTuple_SET_ITEM(names, i, name);
  }
  return names;
}

#define QTP_FAST(function) reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(function)), METH_FASTCALL

PyMethodDef group_methods[] = {{"all_reduce", QTP_FAST(all_reduce), nullptr},
                               {"all_gather", QTP_FAST(all_gather), nullptr},
                               {"reduce_scatter", QTP_FAST(reduce_scatter), nullptr},
                               {"broadcast", QTP_FAST(broadcast), nullptr},
                               {"all_to_all", QTP_FAST(all_to_all), nullptr},
                               {"barrier", barrier, METH_NOARGS, nullptr},
                               {"abort", abort_, METH_NOARGS, nullptr},
                               {"close", close_, METH_NOARGS, nullptr},
                               {nullptr, nullptr, 0, nullptr}};

PyType_Slot group_slots[] = {{Py_tp_new, reinterpret_cast<void*>(make)},
                             {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
                             {Py_tp_methods, group_methods},
                             {0, nullptr}};

PyType_Spec group_spec = {"collectives._native.Group", sizeof(PyGroup), 0, Py_TPFLAGS_DEFAULT, group_slots};

PyMethodDef module_methods[] = {{"segment_bytes", QTP_FAST(segment_bytes), nullptr},
                                {"sum", QTP_FAST(sum), nullptr},
                                {nullptr, nullptr, 0, nullptr}};

PyModuleDef module_definition = {PyModuleDef_HEAD_INIT, "collectives._native", nullptr, -1, module_methods,
                                 nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  PyObject* errors = PyImport_ImportModule("collectives.errors");
  if (errors == nullptr) return nullptr;
  collective_error = PyObject_GetAttrString(errors, "CollectiveError");
  Py_DECREF(errors);
  if (collective_error == nullptr) return nullptr;
  PyObject* module = PyModule_Create(&module_definition);
  PyObject* type = module != nullptr ? PyType_FromSpec(&group_spec) : nullptr;
  if (type == nullptr || PyModule_AddObject(module, "Group", type) != 0 ||
      PyModule_AddIntConstant(module, "INTERFACE", kInterface) != 0 ||
      PyModule_AddObject(module, "ISAS", isas()) != 0) {
    Py_XDECREF(module);
    return nullptr;
  }
  return module;
}
