// An importable module. Importing it loads the library, and loading it runs the TORCH_LIBRARY_IMPL at the end of
// every kernel file that was linked into it: csrc/cpu into gradaug_kernels._cpu, csrc/cuda into gradaug_kernels._cuda.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Registers native kernels with torch's dispatcher; see gradaug_kernels/_library.py.";
}
