"""The C++ extension: one pybind11 module, the same kernel source compiled per instruction set.

Everything else about the package is in pyproject.toml. Without a compiler the build goes on and
fastkd runs on its plain torch reference; torch is not needed to build.
"""

import platform
import sys

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
# -ffp-contract=off: a rounded product stays one, so that q - p is exactly 0 for identical logits
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
ISA_FLAGS = {
    "isa_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}
HEADERS = [
    *("isas.h", "kernels.h", "threads.h", "vec.h", "dtype.h", "divergence.h"),
    *("sweeps.h", "fused.h", "rows.h", "sparse.h", "kernels.inl"),
]
SOURCES = ["module", "threads", "isa_baseline", *(ISA_FLAGS if X86 else ())]


class BuildExt(build_ext):
    """Adds the flags of each source's instruction set, and OpenMP where the compiler has it."""

    def build_extensions(self):
        openmp = self._openmp()
        for extension in self.extensions:
            extension.extra_compile_args += openmp
            extension.extra_link_args += openmp
        compile_one = self.compiler._compile

        def compile_for_isa(obj, src, ext, cc_args, extra, pp_opts):
            stem = src.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".cpp")
            compile_one(obj, src, ext, cc_args, [*extra, *ISA_FLAGS.get(stem, [])], pp_opts)

        self.compiler._compile = compile_for_isa
        super().build_extensions()

    def _openmp(self):
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "openmp.cpp"
            source.write_text(
                "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
            )
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_postargs=["-fopenmp"]
                )
                self.compiler.link_executable(
                    objects, str(Path(folder) / "openmp"), extra_postargs=["-fopenmp"]
                )
            except Exception as error:  # whatever the compiler's class raises: build without it
                print(f"fastkd: no OpenMP ({error}); building single-threaded", file=sys.stderr)
                # the loops' simd pragmas need no runtime
                return ["-fopenmp-simd"]
        return ["-fopenmp"]


extension = Pybind11Extension(
    "fastkd._C",
    [f"csrc/{name}.cpp" for name in SOURCES],
    depends=[f"csrc/{name}" for name in HEADERS],
    extra_compile_args=[*FLAGS],  # pybind11 adds to it
    define_macros=[("FASTKD_X86", "1")] if X86 else [],
    cxx_std=17,
)
# a failing compiler must not fail the installation: the reference runs instead, and says so
extension.optional = True

if __name__ == "__main__":  # tests/kernels/binary.py reads the flags
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})
