"""The passes in Triton, for CUDA, HIP and XPU tensors (CPU tensors through its interpreter)."""

try:
    import triton
except ImportError as error:
    raise ImportError(
        "Triton is not installed; it comes with torch on Linux, or by pip install triton"
    ) from error

# earlier ones launch no kernel that takes a function, as the kernels take their divergence
if tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 3):
    raise ImportError(
        f"Triton: got {triton.__version__}, expected 3.3 or later; torch 2.7 brings one"
    )

from fastkd.backends.gpu.unfused import BACKEND

__all__ = ["BACKEND"]
