// The module gbci_fast._C. An operator is a folder csrc/<op>/: its schema, checks and CPU code are in <op>.cpp, its
// CUDA code is in <op>_cuda.cu. What several operators use is in csrc/common/.

#include <Python.h>

// An empty module: importing it runs the static registrations in the operators' files.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
