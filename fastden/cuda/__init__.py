"""The CUDA extension: how it is built, which library is loaded, what its kernels can do."""
