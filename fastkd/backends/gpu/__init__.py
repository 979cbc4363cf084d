"""The passes in Triton, for CUDA, HIP and XPU tensors (CPU tensors through its interpreter)."""

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        "Triton is not installed; it comes with torch on Linux, or by pip install triton"
    ) from error

from fastkd.backends.gpu.unfused import BACKEND

__all__ = ["BACKEND"]
