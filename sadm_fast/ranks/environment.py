"""What launchers say in environment variables, checked: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_PORT and the like.

Nothing is imported that takes time: the entry points ask before anything else.
"""

import os
import re

from sadm_fast.errors import UserError

# How many tasks srun and mpirun have started.
_OF_TASK_STARTERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_LOWEST = {
    "RANK": 0,
    "LOCAL_RANK": 0,
    "WORLD_SIZE": 1,
    "LOCAL_WORLD_SIZE": 1,  # torchrun
    "LOCAL_SIZE": 1,  # deepspeed
    "MASTER_PORT": 1,
    **dict.fromkeys(_OF_TASK_STARTERS, 1),
}
_HIGHEST_PORT = 65535
_HOW_TO_START = "docs/scale.md says how to start several ranks"


def check_environment() -> None:
    """Check the launcher's variables.

    Raises:
        UserError: one of them is set but empty, no number or out of range, or one of them is missing although RANK is
            set, or this process is one of several tasks without a RANK: each would take itself for the only one.
    """
    for variable in _LOWEST:
        number(variable)
    if os.environ.get("MASTER_ADDR") == "":
        raise UserError(f'MASTER_ADDR="": must be the address of the machine with rank 0, or unset; {_HOW_TO_START}')
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None and not re.fullmatch(r"\s*0*[1-9]\d{0,8}\s*(,\s*0*[1-9]\d{0,8}\s*)*", threads):
        raise UserError(f'OMP_NUM_THREADS="{threads}": must be a number of threads of at least 1, or unset')
    accelerator = os.environ.get("DS_ACCELERATOR")
    if accelerator not in (None, "cpu", "cuda"):
        raise UserError(f'DS_ACCELERATOR="{accelerator}": must be cuda or cpu, or unset')
    if "RANK" in os.environ:
        _check_launched()
        return
    for variable in _OF_TASK_STARTERS:
        if (number(variable) or 1) > 1:
            raise UserError(
                f"{variable}={os.environ[variable]}: several tasks were started, but RANK is not set; {_HOW_TO_START}"
            )


def _check_launched() -> None:
    for variable in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if variable not in os.environ:
            raise UserError(f"{variable}: is not set, though RANK is; {_HOW_TO_START}")
    for one, all_of_them in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_SIZE")):
        index, count = number(one), number(all_of_them)
        if index is not None and count is not None and index >= count:
            raise UserError(f"{one}={index}: must be below {all_of_them}={count}; {_HOW_TO_START}")


def number(variable: str) -> int | None:
    """The value of one of the launcher's variables, None if it is not set; UserError if it is no number in range."""
    text = os.environ.get(variable)
    if text is None:
        return None
    low = _LOWEST[variable]
    high = _HIGHEST_PORT if variable == "MASTER_PORT" else 10**9
    if re.fullmatch(r"\s*[0-9]{1,10}\s*", text) and low <= int(text) <= high:
        return int(text)
    allowed = f"from {low} to {high}" if variable == "MASTER_PORT" else f"of at least {low}"
    raise UserError(f'{variable}="{text}": must be a whole number {allowed}, or unset; {_HOW_TO_START}')


def rank() -> int:
    """This process's rank; 0 without a launcher."""
    return number("RANK") or 0


def world_size() -> int:
    """The number of ranks; 1 without a launcher."""
    return number("WORLD_SIZE") or 1


def ranks_here() -> int:
    """The number of ranks on this machine; 1 if the launcher does not say."""
    return number("LOCAL_WORLD_SIZE") or number("LOCAL_SIZE") or 1


def speaks_for_machine() -> bool:
    """Whether this rank prints what all ranks of a machine meet alike. Never fails: errors are printed through it."""
    return os.environ.get("LOCAL_RANK", "0").strip() in ("", "0")
