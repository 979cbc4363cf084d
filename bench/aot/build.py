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


def flat(launch: Launch) -> dict[str, Any]:
    """The arguments of a launch in their order; one in a tuple by the tuple's name and its own."""
    found: dict[str, Any] = {}
    for name in launch.kernel.arg_names:
        value = launch.args[name]
        parts = value._asdict() if hasattr(value, "_asdict") else {}
        found |= {f"{name}.{field}": x for field, x in parts.items()} if parts else {name: value}
    return found


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1


def build(launch: Launch, arch: str) -> Built:
    import torch
    import triton
    from triton.compiler import ASTSource

    from fastkd.backends.gpu.launch import PINNED

    pointers = {
        **{torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"},
        **{torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1"},
    }
    constants: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    signature, values = {}, {}

    def typed(name: str, value: Any, place: tuple[int, ...], special: bool, annotated: str) -> Any:
        """The type of an argument, or of each in a tuple, by which Triton compiles."""
        if isinstance(value, tuple):
            parts = enumerate(value._asdict().items())  # type: ignore[attr-defined]
            return type(value)(
                *(typed(f"{name}.{field}", x, (*place, i), True, "") for i, (field, x) in parts)
            )
        if not isinstance(value, (torch.Tensor, float, int)) or (special and _is_one(value)):
            constants[place] = value
            return "constexpr"
        values[name] = value
        if isinstance(value, torch.Tensor):
            kind, aligned = pointers[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            kind, aligned = annotated or "fp32", False
        else:
            kind = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            aligned = value % 16 == 0
        if aligned and special:
            attrs[place] = [["tt.divisibility", 16]]
        return kind

    for i, param in enumerate(launch.kernel.params):
        name, value, special = param.name, launch.args[param.name], not param.do_not_specialize
        if param.is_constexpr:
            signature[name], constants[(i,)] = "constexpr", value
        else:
            signature[name] = typed(name, value, (i,), special, param.annotation_type)
    target = gpu_target(arch)
    warps = max(1, launch.threads // target.warp_size)
    options = {name: x for name, x in launch.args.items() if name == "maxnreg"}
    source = ASTSource(launch.kernel, signature, constants, attrs)
    out = triton.compile(source, target=target, options={"num_warps": warps, **options, **PINNED})
    return Built(out.asm, out.metadata.shared, warps, target.warp_size, values)
