"""The C++ extension: one pybind11 module, the same kernel source compiled per instruction set.

Everything else about the package is in pyproject.toml. Without a compiler the build says so, goes
on, and fastkd runs on its plain torch reference; with FASTKD_REQUIRE_CPU=1 it fails instead. torch
is not needed to build.
"""

import os
import platform
import shlex
import sys
from contextlib import suppress
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
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
# what takes longest first: the sources are compiled side by side
SOURCES = [*(ISA_FLAGS if X86 else ()), "isa_baseline", "module", "threads"]
# after all other flags; of this project's own checks (-O0 where only the files are in question)
LAST_FLAGS = shlex.split(os.environ.get("FASTKD_CXXFLAGS", ""))


def tell(text):
    """On stderr, and on the terminal, if there is one: pip shows a build's stderr with -v only."""
    print(text, file=sys.stderr, flush=True)
    with suppress(OSError), open("/dev/tty", "w") as terminal:
        print(f"\n{text}", file=terminal)


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
            flags = [*extra, *ISA_FLAGS.get(stem, []), *LAST_FLAGS]
            compile_one(obj, src, ext, cc_args, flags, pp_opts)

        self.compiler._compile = compile_for_isa
        super().build_extensions()

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:
            # neither may an earlier build, of other sources, stand in for the one that failed
            name = self.get_ext_filename(self.get_ext_fullname(ext.name))
            Path(self.build_lib, name).unlink(missing_ok=True)
            if self.editable_mode:
                Path(name).unlink(missing_ok=True)
            if ext.optional:
                why = " ".join(str(error).split())
                why = why if len(why) < 160 else f"{why[:80]} ... {why[-60:]}"
                tell(
                    f"fastkd: WITHOUT ITS C++ KERNELS ({why}). The losses will run on the "
                    "reference, in plain torch: the same values, slower. Install a C++17 compiler "
                    "and reinstall (pip install --force-reinstall --no-deps --no-cache-dir); "
                    "FASTKD_REQUIRE_CPU=1 makes this an error."
                )
            raise  # setuptools goes on where the extension is optional

    def _openmp(self):
        import tempfile

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
    # all of the folder: what is not named here is not in the sdist, and its edits rebuild nothing;
    # sources of another machine's instruction sets are in the sdist so that it builds there
    depends=sorted(glob("csrc/*")),
    extra_compile_args=[*FLAGS],  # pybind11 adds to it
    define_macros=[("FASTKD_X86", "1")] if X86 else [],
    cxx_std=17,
)
# A failing compiler must not fail a user's installation: the reference runs instead, and says so.
# This project's own builds and tests set the variable: they must not pass on the reference.
extension.optional = os.environ.get("FASTKD_REQUIRE_CPU") != "1"

if __name__ == "__main__":  # tests/kernels/binary.py reads the flags
    ParallelCompile("FASTKD_JOBS").install()  # as many at once as there are cores, or so many
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})
