// The module gbci_fast._C. Each operator has a folder csrc/<op>/: <op>.cpp has its schema, checks and CPU code,
// <op>_cuda.cu its CUDA code. Code that several operators share is in csrc/common/.

#include <Python.h>

// An empty module: importing it runs the static registrations in the operators' files.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
