"""The operators in Triton: kernels and launchers, imported when they are chosen."""
