"""The CUDA extension: its build, the library that is loaded, the limits of its kernels."""
