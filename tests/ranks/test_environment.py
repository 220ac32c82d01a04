"""The launcher's variables: what is not set has a default, what is wrong is named in one line."""

import pytest

from sadm_fast.errors import UserError
from sadm_fast.ranks import environment as launcher

WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": "2",
         "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}  # fmt: skip
TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def test_without_a_launcher_there_is_one_rank(environment: pytest.MonkeyPatch):
    launcher.check_environment()
    assert (launcher.rank(), launcher.world_size(), launcher.ranks_here()) == (0, 1, 1)
    assert launcher.speaks_for_machine()


def test_a_launcher_says_which_rank_of_how_many(environment: pytest.MonkeyPatch):
    for name, value in (WHOLE | {"RANK": "3", "WORLD_SIZE": " 4 ", "LOCAL_RANK": "1"}).items():
        environment.setenv(name, value)
    launcher.check_environment()
    assert (launcher.rank(), launcher.world_size(), launcher.ranks_here()) == (3, 4, 2)
    assert not launcher.speaks_for_machine()


@pytest.mark.parametrize("launched", [True, False])
@pytest.mark.parametrize("value", ["", " ", "x", "-1", "1.0", "1_0", "99999999999", "\u0663"])
@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", *TASKS])
def test_what_is_no_number_is_named(environment: pytest.MonkeyPatch, variable: str, value: str, launched: bool):
    for name, right in WHOLE.items() if launched else ():
        environment.setenv(name, right)
    environment.setenv(variable, value)
    with pytest.raises(UserError, match=rf'^{variable}="{value}": must be a whole number'):
        launcher.check_environment()
    launcher.speaks_for_machine()  # the error has to be printed


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"WORLD_SIZE": "0"}, 'WORLD_SIZE="0": must be a whole number of at least 1'),
        ({"MASTER_PORT": "65536"}, 'MASTER_PORT="65536": must be a whole number from 1 to 65535'),
        ({"MASTER_ADDR": ""}, 'MASTER_ADDR="": must be the address'),
        ({"RANK": "2"}, "RANK=2: must be below WORLD_SIZE=2"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2: must be below LOCAL_WORLD_SIZE=2"),
        ({"DS_ACCELERATOR": ""}, 'DS_ACCELERATOR="": must be cuda or cpu'),
        ({"OMP_NUM_THREADS": ""}, 'OMP_NUM_THREADS="": must be a number of threads'),
        ({"OMP_NUM_THREADS": "0"}, 'OMP_NUM_THREADS="0": must be a number of threads'),
        ({"OMP_NUM_THREADS": "2,x"}, 'OMP_NUM_THREADS="2,x": must be a number of threads'),
    ],
)
def test_what_is_out_of_range_is_named(environment: pytest.MonkeyPatch, values: dict[str, str], words: str):
    for name, value in (WHOLE | values).items():
        environment.setenv(name, value)
    with pytest.raises(UserError) as caught:
        launcher.check_environment()
    assert str(caught.value).startswith(words)


def test_nested_numbers_of_threads_are_openmps_own(environment: pytest.MonkeyPatch):
    environment.setenv("OMP_NUM_THREADS", "4, 2")
    launcher.check_environment()


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_half_of_a_launchers_variables_are_refused(environment: pytest.MonkeyPatch, missing: str):
    for name in WHOLE.keys() - {missing}:
        environment.setenv(name, WHOLE[name])
    with pytest.raises(UserError, match=f"{missing}: is not set"):
        launcher.check_environment()


@pytest.mark.parametrize("variable", TASKS)
def test_one_of_several_tasks_does_not_take_itself_for_the_only_one(environment: pytest.MonkeyPatch, variable: str):
    environment.setenv(variable, "1")
    launcher.check_environment()
    environment.setenv(variable, "8")
    with pytest.raises(UserError, match=f"{variable}=8"):
        launcher.check_environment()
