"""Compiling a launch as Triton would for a GPU that is not here."""

from __future__ import annotations

from typing import Any, NamedTuple

from bench.aot.cases import Launch


class Built(NamedTuple):
    asm: dict[str, Any]  # text or bytes of every stage
    shared: int  # bytes of shared memory
    warps: int
    warp: int  # threads of one
    values: dict[str, Any]  # the arguments that the driver hands over, in their order


def has_xpu() -> bool:
    """Whether the installed Triton is Intel's (the package triton-xpu, in the place of triton)."""
    from triton.backends import backends

    return "intel" in backends


class _NoDevice:
    """In the place of Intel's helper in C++ that names a device, which needs SYCL's headers."""

    @staticmethod
    def parse_device_arch(number: int) -> str:
        return ""


def gpu_target(arch: str) -> Any:
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget

    if arch == "xpu":
        names = backends["intel"].compiler.__init__.__globals__
        names["compile_module_from_src"] = lambda *source: _NoDevice
        return GPUTarget("xpu", {"sub_group_sizes": [16, 32]}, 32)
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


def build(launch: Launch, arch: str) -> Built:
    import torch
    import triton
    from triton.compiler import ASTSource

    from fastkd.backends.gpu.launch import PINNED

    pointers = {
        **{torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"},
        **{torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1"},
    }
    args = launch.args
    signature, constants, attrs, values = {}, {}, {}, {}
    for i, param in enumerate(launch.kernel.params):
        value, special = args[param.name], not param.do_not_specialize
        if (
            param.is_constexpr
            or value is None
            or (isinstance(value, int) and value == 1 and special)
        ):
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        values[param.name] = value
        if isinstance(value, torch.Tensor):
            signature[param.name] = pointers[value.dtype]
        elif isinstance(value, float):
            signature[param.name] = param.annotation_type or "fp32"
        else:
            signature[param.name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
        if isinstance(value, torch.Tensor):
            aligned = value.data_ptr() % 16 == 0
        else:
            aligned = isinstance(value, int) and value % 16 == 0
        if aligned and special:
            attrs[(i,)] = [["tt.divisibility", 16]]
    target = gpu_target(arch)
    warps = max(1, launch.threads // target.warp_size)
    options = {name: args[name] for name in args.keys() & {"maxnreg"}}
    source = ASTSource(launch.kernel, signature, constants, attrs)
    out = triton.compile(source, target=target, options={"num_warps": warps, **options, **PINNED})
    return Built(out.asm, out.metadata.shared, warps, target.warp_size, values)
