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

// Those attributes of a layer that are named, and its modules.
template <class Fn>
void visit_layer(pybind11::handle layer, const pybind11::tuple& settings, const Fn& fn) {
  const auto attributes = pybind11::reinterpret_steal<pybind11::dict>(PyObject_GenericGetDict(layer.ptr(), nullptr));
  if (!attributes) throw pybind11::error_already_set();
  for (const pybind11::handle name : settings)
    if (!fn(PyDict_GetItemWithError(attributes.ptr(), name.ptr()))) return;
  visit_modules(attributes["_modules"], fn);
}

inline pybind11::tuple state_of(pybind11::handle layer, const pybind11::tuple& settings) {
  pybind11::list state;
  visit_layer(layer, settings, [&](PyObject* object) {
    state.append(object ? pybind11::handle(object) : pybind11::none());
    return true;
  });
  return pybind11::tuple(state);
}

// Whether it is made of the very same objects.
inline bool is_state_of(const pybind11::tuple& state, pybind11::handle layer, const pybind11::tuple& settings) {
  const Py_ssize_t size = PyTuple_GET_SIZE(state.ptr());
  // They lie apart, and what was done since their last use has driven them from the cache.
  for (Py_ssize_t i = 0; i < size; ++i) __builtin_prefetch(PyTuple_GET_ITEM(state.ptr(), i));
  Py_ssize_t i = 0;
  bool is_same = true;
  visit_layer(layer, settings,
              [&](PyObject* object) { return is_same = i < size && PyTuple_GET_ITEM(state.ptr(), i++) == object; });
  return is_same && i == size;
}

}  // namespace tutelx
