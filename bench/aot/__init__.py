"""Every Triton kernel compiled with no GPU: see `__main__`."""
