// Schemas of the operators in torch.ops.gbci_fast, and the module that loads them.
// One operator is csrc/<op>.h, csrc/<op>.cpp (checks, CPU) and csrc/cuda/<op>.cu.

#include <Python.h>

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(gbci_fast, m) {
  m.def("philox_normal(Tensor seeds, SymInt num_elements, int step, int stream) -> Tensor");
  m.def(
      "blend_step(Tensor latents, Tensor conditional, Tensor? unconditional, Tensor? previous, Tensor(a!)? denoised, "
      "Tensor(b!)? corrected, Tensor? noise, Tensor? seeds, Tensor? known, Tensor? known_noise, Tensor? weight, "
      "Tensor(c!)? model_input, Tensor(d!) out, float[] coefficients, float? clip, float guidance_scale, "
      "float guidance_rescale, int step, int stream) -> ()");
  m.def("mask_to_latent(Tensor mask, int factor, int feather, int halo) -> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_film_silu_out(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, "
      "Tensor? shift, bool silu, Tensor(a!) out) -> ()");
  m.def("conv3x3_weight(Tensor weight) -> Tensor");
  m.def("conv3x3(Tensor x, Tensor weight, Tensor? bias, SymInt out_channels) -> Tensor");
}

// An empty module: importing gbci_fast._C runs the static registrations above and in the operators' files.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
