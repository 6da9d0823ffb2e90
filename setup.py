"""Builds pystage._C. Everything that is not the extension stands in pyproject.toml.

Environment:
  PYSTAGE_CUDA          auto (default): CUDA code if torch is a CUDA build and a toolkit is found;
                        0: never; 1: always, also under a CPU torch (a compile and import check)
  CUDA_HOME             the toolkit, if it is not where nvcc or /usr/local/cuda is
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

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
CUDA_SOURCE = "csrc/cuda_device.cu"
DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")


def find_toolkit() -> Path | None:
    """The first folder that has both the compiler and the headers; a wrapper is no toolkit."""
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
    """The toolkit to build CUDA code with, or None for a build without."""
    mode = os.environ.get("PYSTAGE_CUDA", "auto").strip().lower()
    if mode not in ("auto", "0", "1"):
        sys.exit(f"PYSTAGE_CUDA is {mode!r}; it is auto, 0 or 1")
    if mode == "0" or (mode == "auto" and torch.version.cuda is None):
        return None
    home = find_toolkit()
    if home is None:
        if mode == "1":
            sys.exit("PYSTAGE_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME")
        print("pystage: torch is a CUDA build, but no toolkit was found: building without CUDA")
        return None
    version = toolkit_version(home)
    if torch.version.cuda and version.split(".")[0] != torch.version.cuda.split(".")[0]:
        sys.exit(
            f"torch {torch.__version__} was built with CUDA {torch.version.cuda}, but the toolkit "
            f"in {home} is {version}. Set CUDA_HOME to a toolkit of CUDA "
            f"{torch.version.cuda.split('.')[0]}, or build without CUDA code: PYSTAGE_CUDA=0"
        )
    return home


def architectures(home: Path) -> tuple[list[str], str]:
    """nvcc's -gencode flags, and the list they came from."""
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
    """Objects and arguments. Beside a CUDA torch the runtime must be the one torch loads."""
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
    """Compiles the one .cu file with nvcc alone (seconds; through torch's headers, minutes)."""

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
link_args: list[str] = []
if coverage:  # counters are updated atomically: worker threads run the same lines
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
                for pattern in ("*.h", "*.cu")
                for p in (ROOT / "csrc").glob(pattern)
            ],
        )
    ],
    cmdclass={"build_ext": Build},
)
