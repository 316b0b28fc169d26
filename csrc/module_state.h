// What torch modules are made of, to see whether anything changed since they were asked for something. Reading each
// attribute from Python takes longer than a small operator does.
#pragma once
#include <pybind11/pybind11.h>

namespace tutelx {

// Calls fn with what a dictionary holds, its keys too, as long as fn gives true.
template <class Fn>
bool visit_entries(PyObject* entries, const Fn& fn) {
  PyObject *key, *value;
  for (Py_ssize_t i = 0; PyDict_Next(entries, &i, &key, &value);)
    if (!fn(key) || !fn(value)) return false;
  return true;
}

// The same with the modules of a dictionary: each one's class, its attributes, and what those that are dictionaries
// hold: parameters, buffers, hooks.
template <class Fn>
bool visit_modules(const pybind11::dict& modules, const Fn& fn) {
  PyObject *name, *module;
  for (Py_ssize_t i = 0; PyDict_Next(modules.ptr(), &i, &name, &module);) {
    if (!fn(name) || !fn(module) || !fn(reinterpret_cast<PyObject*>(Py_TYPE(module)))) return false;
    const auto attributes = pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(module, nullptr));
    if (!attributes) {
      PyErr_Clear();
      continue;
    }
    const bool as_told = visit_entries(attributes.ptr(), [&](PyObject* object) {
      return fn(object) && (!PyDict_Check(object) || visit_entries(object, fn));
    });
    if (!as_told) return false;
  }
  return true;
}

inline pybind11::tuple state_of(const pybind11::dict& modules) {
  pybind11::list state;
  visit_modules(modules, [&](PyObject* object) {
    state.append(pybind11::handle(object));
    return true;
  });
  return pybind11::tuple(state);
}

// Whether it is made of the very same objects.
inline bool is_state_of(const pybind11::tuple& state, const pybind11::dict& modules) {
  const Py_ssize_t size = PyTuple_GET_SIZE(state.ptr());
  Py_ssize_t i = 0;
  const auto same = [&](PyObject* object) { return i < size && PyTuple_GET_ITEM(state.ptr(), i++) == object; };
  return visit_modules(modules, same) && i == size;
}

}  // namespace tutelx
