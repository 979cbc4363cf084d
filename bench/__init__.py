"""Benchmarks of fastkd against what it replaces: `python -m bench --help`."""

import os

# torch's profiler, which counts allocations here, otherwise writes log lines into the progress;
# read when torch is imported, so it is set before anything of this package imports it
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
