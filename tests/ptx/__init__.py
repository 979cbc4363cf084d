"""Executes the PTX of the Triton kernels without a GPU: see README.md."""
