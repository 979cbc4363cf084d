"""Who runs the passes over rows: plain torch, C++ on the CPU, Triton on a GPU."""
