"""The operators in C++ for processors: launchers, imported when chosen; kernels are in csrc/cpu."""
