"""Compiles the C++ kernels into one shared library beside this file.

`python -m paceline_kernels.cpu.build` does it; `make setup` calls that. The same source is
compiled once per instruction set and the library chooses when it is loaded, so what was built on
one machine runs on another.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = Path(__file__).parent / "libpaceline_cpu.so"

_COMMON = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"),
    # GCC's own AVX-512 headers trip these.
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]
_AVX2 = ["-mavx2", "-mfma", "-mbmi2", "-mf16c"]
_AVX512 = [
    *_AVX2,
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16"),
    "-mprefer-vector-width=512",
]
_X86 = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "amx": [*_AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}


class BuildError(RuntimeError):
    """No library could be made; the message says why."""


def build() -> Path:
    """Compile and replace the library; return its path.

    Raises:
        BuildError: no C++20 compiler ($CXX, g++, clang++), or it failed.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise BuildError("no C++ compiler: install g++ or set CXX")
    isas = {"portable": [], **(_X86 if platform.machine() in ("x86_64", "AMD64") else {})}
    plain = [p for p in sorted(SOURCES.glob("*.cpp")) if p.name != "kernels.cpp"]
    with tempfile.TemporaryDirectory() as folder:
        jobs = [([compiler, *_COMMON, "-c", str(p)], Path(folder, f"{p.stem}.o")) for p in plain]
        for isa, flags in isas.items():
            names = [f"-DPACELINE_ISA={isa}", f'-DPACELINE_NAME="{isa}"']
            command = [compiler, *_COMMON, *flags, *names, "-c", str(SOURCES / "kernels.cpp")]
            jobs.append((command, Path(folder, f"kernels_{isa}.o")))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: _run([*job[0], "-o", str(job[1])]), reversed(jobs)))
        objects = [str(path) for _, path in jobs]
        made = Path(folder, LIBRARY.name)
        _run([compiler, "-shared", "-pthread", "-o", str(made), *objects])
        # Never a half-written library, and never a changed one under a process that uses it.
        staged = LIBRARY.with_suffix(f".{os.getpid()}.tmp")
        shutil.copyfile(made, staged)
        os.replace(staged, LIBRARY)
    return LIBRARY


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(f"{' '.join(command)}\n{result.stderr[-4000:]}")
    if result.stderr:
        print(result.stderr, file=sys.stderr)


if __name__ == "__main__":
    try:
        print(build())
    except BuildError as error:
        # Everything works without the library, only slower.
        print(f"C++ kernels not built: {error}", file=sys.stderr)
