"""The operators in CUDA C++: launchers, imported when they are chosen; kernels are in csrc/cuda."""
