// What the Python faces of the kernels share.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstddef>

#include "isa.hpp"

namespace qtp {

inline void* address(size_t number) { return reinterpret_cast<void*>(number); }

// `wanted` arguments that are sizes or addresses; sets an exception and returns false otherwise.
inline bool read_sizes(PyObject* const* args, Py_ssize_t given, Py_ssize_t wanted, size_t* into) {
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

inline bool check_dtype(size_t dtype) {
  if (dtype < size_t(kDTypes)) return true;
  PyErr_SetString(PyExc_ValueError, "unknown dtype");
  return false;
}

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

inline PyCFunction fast(FastCall call) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)); }

struct Linear;

// The layer that an object of the type Linear holds; null if it is of another type.
const Linear* linear_of(PyObject* object);

// Adds Linear and Experts. False: an exception is set.
bool add_linear_types(PyObject* module);

// Adds Half, likewise.
bool add_half_type(PyObject* module);

// Adds Int8Linear and scale_sums, likewise.
bool add_int8_type(PyObject* module);

// spec and step are arrays of int64: dtype, heads, KV heads, width, block size, starts; and tokens, sequences, slots, cos, sin,
// query_lens, kv_lens, tables. scales: null, or for int8 keys and values an array of addresses in the order of Scales.
void attend(const void* spec, const void* step, void* keys, void* values, void* qkv, size_t stride, size_t window, void* out,
            const void* scales);

extern PyMethodDef attention_functions[];

}  // namespace qtp
