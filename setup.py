"""Builds the extension pystage._C. All other build settings are in pyproject.toml.

Environment:
  PYSTAGE_CUDA          auto (default): builds CUDA code if torch is a CUDA build, and then needs a
                        toolkit; 0: never; 1: always, even with a CPU torch (to check that the
                        CUDA code compiles and imports)
  CUDA_HOME             the toolkit, if neither nvcc's folder nor /usr/local/cuda is the right one
  TORCH_CUDA_ARCH_LIST  e.g. "8.0;9.0+PTX"; the default covers Ampere to Blackwell, PTX for later
  PYSTAGE_SANITIZE      address or thread: build the host code under that sanitizer
  PYSTAGE_COVERAGE      1: count the lines that run (gcov), without optimisation
  DEBUG                 1: -O0 -g
"""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from setuptools import setup

INSTALL = (
    "pip install 'torch>=2.11' ninja pybind11 'setuptools>=77' numpy && "
    "pip install --no-build-isolation ."
)

try:
    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    sys.exit(
        f"pystage builds against the torch it will run with, and {error.name} is not importable "
        f"here (an isolated build never sees yours). Run:\n    {INSTALL}"
    )

# pip lets two projects overwrite each other's files. The imported package is then a mixture.
try:
    other = metadata.version("pystage")
except metadata.PackageNotFoundError:
    pass
else:
    sys.exit(
        f"the distribution pystage {other} is installed here: another project, whose package has "
        "the name of this one's. Both cannot be in one environment. Run:\n"
        "    pip uninstall pystage\nor install pystage-h2d into another environment"
    )

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
CUDA_SOURCE = "csrc/cuda_device.cu"
DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")


def find_toolkit() -> Path | None:
    """The first folder with both the compiler and the headers. A wrapper script is no toolkit."""
    nvcc = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        "/usr/local/cuda",
        str(Path(nvcc).resolve().parent.parent) if nvcc else None,
    ]
    for candidate in candidates:
        if candidate:
            home = Path(candidate)
            if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
                return home
    return None


def toolkit_version(home: Path) -> str:
    text = subprocess.run(
        [home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True
    ).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    if not match:
        sys.exit(f"cannot read the version of {home}/bin/nvcc from:\n{text}")
    return match.group(1)


def cuda_toolkit() -> Path | None:
    """The toolkit to build CUDA code with, or None for a build without CUDA code."""
    mode = os.environ.get("PYSTAGE_CUDA", "auto").strip().lower()
    if mode not in ("auto", "0", "1"):
        sys.exit(f"PYSTAGE_CUDA is {mode!r}; it is auto, 0 or 1")
    if mode == "0" or (mode == "auto" and torch.version.cuda is None):
        return None
    home = find_toolkit()
    if home is None:
        reason = "PYSTAGE_CUDA is 1" if mode == "1" else f"torch {torch.__version__} has CUDA"
        wanted = f"CUDA {torch.version.cuda.split('.')[0]}" if torch.version.cuda else "CUDA"
        sys.exit(
            f"{reason}, but no folder with both bin/nvcc and include/cuda_runtime.h was found "
            f"in CUDA_HOME, CUDA_PATH, /usr/local/cuda or around the nvcc on the path. Install the "
            f"toolkit of {wanted} and set CUDA_HOME to it, or build for the CPU alone: "
            "PYSTAGE_CUDA=0"
        )
    version = toolkit_version(home)
    if torch.version.cuda and version.split(".")[0] != torch.version.cuda.split(".")[0]:
        sys.exit(
            f"torch {torch.__version__} was built with CUDA {torch.version.cuda}, but the toolkit "
            f"in {home} is {version}. Set CUDA_HOME to a toolkit of CUDA "
            f"{torch.version.cuda.split('.')[0]}, or build without CUDA code: PYSTAGE_CUDA=0"
        )
    return home


def architectures(home: Path) -> tuple[list[str], str]:
    """nvcc's -gencode flags, and the architecture list that they were made from."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", ";").replace(" ", ";")
    if listed:
        names = [name for name in listed.split(";") if name]
    else:
        known = subprocess.run(
            [home / "bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True
        ).stdout.split()
        names = [a for a in DEFAULT_ARCHS if f"compute_{a.replace('.', '')}" in known]
        names[-1] += "+PTX"
    flags = []
    for name in names:
        match = re.fullmatch(r"(\d+)\.(\d+[a-z]?)(\+PTX)?", name)
        if not match:
            sys.exit(f"TORCH_CUDA_ARCH_LIST: {name!r} is not like 9.0 or 9.0+PTX")
        number = match.group(1) + match.group(2)
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match.group(3):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags, " ".join(names)


def link_cudart(home: Path) -> tuple[list[str], list[str]]:
    """Extra objects and link arguments. With a CUDA torch, links the runtime that torch loads."""
    libs = [home / "lib64", home / "lib", home / "targets/x86_64-linux/lib"]
    if torch.version.cuda is None:
        for lib in libs:
            if (lib / "libcudart_static.a").exists():
                return [str(lib / "libcudart_static.a")], ["-lrt", "-ldl", "-lpthread"]
        sys.exit(f"no libcudart_static.a in {home}")
    major = torch.version.cuda.split(".")[0]
    site = Path(torch.__file__).resolve().parent.parent
    libs += [Path(torch.__file__).parent / "lib", *site.glob("nvidia/*/lib")]
    for lib in libs:
        if (lib / f"libcudart.so.{major}").exists():
            return [], [f"-L{lib}", f"-l:libcudart.so.{major}"]
    sys.exit(f"no libcudart.so.{major} in {home} or beside torch")


class Build(BuildExtension):
    """Compiles the one .cu file with nvcc alone: seconds, where torch's headers take minutes."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # an older extension may be of another torch, or without CUDA code

    def build_extensions(self) -> None:
        home = cuda_toolkit()
        if home is not None:
            flags, names = architectures(home)
            out = Path(self.build_temp).resolve() / "cuda_device.o"
            out.parent.mkdir(parents=True, exist_ok=True)
            define = f'-DPYSTAGE_CUDA_ARCHS="{names}"'
            command = [
                str(home / "bin/nvcc"), "-c", str(ROOT / CUDA_SOURCE), "-o", str(out),
                "-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall",
                "--threads", "2", define, *flags,
            ]  # fmt: skip
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)
            objects, arguments = link_cudart(home)
            for extension in self.extensions:
                extension.define_macros.append(("PYSTAGE_WITH_CUDA", "1"))
                extension.extra_objects = [str(out), *objects]
                extension.extra_link_args += arguments
        super().build_extensions()


sanitize = os.environ.get("PYSTAGE_SANITIZE", "")
if sanitize not in ("", "address", "thread"):
    sys.exit(f"PYSTAGE_SANITIZE is {sanitize!r}; it is address or thread")
compile_args = [
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-interference-size",
]
coverage = os.environ.get("PYSTAGE_COVERAGE", "0") not in ("", "0")
compile_args += ["-O0", "-g"] if DEBUG or coverage else ["-O3", "-g0"]
link_args = [f"-Wl,--version-script={ROOT / 'csrc/exports.map'}"]
if coverage:  # counters must be updated atomically, since worker threads run the same lines
    compile_args += ["--coverage", "-fprofile-update=atomic"]
    link_args += ["--coverage"]
if sanitize:
    compile_args += [f"-fsanitize={sanitize}", "-g", "-fno-omit-frame-pointer"]
    link_args += [f"-fsanitize={sanitize}"]

setup(
    ext_modules=[
        CppExtension(
            "pystage._C",
            [
                "csrc/gather.cpp",
                "csrc/host_device.cpp",
                "csrc/ids_view.cpp",
                "csrc/ops.cpp",
                "csrc/output_memory.cpp",
                "csrc/pool.cpp",
                "csrc/python.cpp",
                "csrc/python_parcel.cpp",
                "csrc/python_rows.cpp",
                "csrc/python_small_tensors.cpp",
                "csrc/python_stage.cpp",
                "csrc/python_staged_tokens.cpp",
                "csrc/requests.cpp",
                "csrc/small_tensors.cpp",
                "csrc/staging.cpp",
            ],
            include_dirs=[pybind11.get_include()],
            define_macros=[("PYSTAGE_TORCH_VERSION", f'"{torch.__version__}"')],
            extra_compile_args=compile_args,
            extra_link_args=link_args,
            depends=[
                str(p.relative_to(ROOT))
                for pattern in ("*.h", "*.cu", "*.map")
                for p in (ROOT / "csrc").glob(pattern)
            ],
        )
    ],
    cmdclass={"build_ext": Build},
)
