// A view of the ids [start, stop) of an array, without a copy, for engines that slice requests
// before they stage them.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace pystage {

// Adds the type IdsView and the function ids_view(ids, start, stop) to a module. Returns -1 with a
// Python error set if that fails.
int add_ids_view(PyObject* module);

}  // namespace pystage
