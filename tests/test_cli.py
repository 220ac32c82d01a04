"""What all entry points do alike: launchers' arguments and variables, exit codes, who prints an error."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import sadm_fast.train as train
from sadm_fast import cli, encode, evaluate, plan, sample
from sadm_fast.errors import LostRank, UserError
from sadm_fast.ranks.stopping import Stopped, StopRequest
from tests.support.ranks import ROOT, clean_environment

NEEDED = {
    train: ["--config", "x.json"],
    encode: ["--check", "x"],
    plan: ["--config", "x.json"],
    sample: ["x"],
    evaluate: ["x"],
}
DOORS = pytest.mark.parametrize("door", NEEDED, ids=lambda door: door.__name__.split(".")[1])


@DOORS
@pytest.mark.parametrize("added", ["--local_rank=1", "--local-rank=1", "--deepspeed"])
def test_what_launchers_add_is_taken(door: ModuleType, added: str):
    door.parse_arguments([added, *NEEDED[door]])
    door.parse_arguments([*NEEDED[door], added])


@pytest.mark.parametrize("door", [train, encode, plan])
def test_a_configuration_has_two_names_and_overrides(door: ModuleType):
    arguments = door.parse_arguments(["--deepspeed_config", "x.json", "--set", "a=1", "--set", "b=2"])
    assert (arguments.config, arguments.overrides) == ("x.json", ["a=1", "b=2"])


@DOORS
@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"RANK": ""}, 'error: RANK="": must be a whole number'),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "error: SLURM_STEP_NUM_TASKS=4: several tasks were started"),
    ],
)
def test_a_wrong_variable_is_one_line(
    door: ModuleType,
    variables: dict[str, str],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert door.main(NEEDED[door]) == cli.EXIT_USER_ERROR
    out, err = capsys.readouterr()
    assert err.startswith(line) and err.count("\n") == 1 and not out


@DOORS
@pytest.mark.parametrize("arguments", [[], ["--nothing-of-the-kind"]])
def test_a_wrong_option_is_one_line_without_the_usage(
    door: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    assert door.main(arguments) == cli.EXIT_USER_ERROR
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and "--help" in err and not out


@DOORS
def test_help_comes_at_once_from_any_folder(door: ModuleType, tmp_path: Path):
    name = door.__name__.split(".")[1]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "sadm_fast" / f"{name}.py"), "--help"],
        cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and "usage:" in done.stdout
    assert " torch\n" not in done.stderr, "an import of seconds"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a=1: must be 2"), 2, "error: a=1: must be 2\n"),
        (UserError("of\ntwo\r lines \udce9"), 2, "error: of\\ntwo\\r lines \\udce9\n"),
        (LostRank("rank 1: gone"), 1, "error: rank 1: gone; the same command continues\n"),
        (Stopped(), 75, "asked to stop; the same command continues\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues\n"),
    ],
)
def test_an_end_has_a_code_and_a_line(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]):
    def work(_: StopRequest) -> int:
        raise error

    assert cli.run(work, again="continues") == code
    assert capsys.readouterr().err == line


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda _: 1 // 0, again="continues")


@pytest.mark.parametrize(
    ("local_rank", "said", "printed"), [("0", None, True), ("1", None, False), ("1", False, True), ("0", True, False)]
)
def test_one_rank_prints_an_error(
    local_rank: str,
    said: bool | None,
    printed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def work(_: StopRequest) -> int:
        error = UserError("once")
        error.said = said
        raise error

    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert cli.run(work, again="continues") == 2
    assert capsys.readouterr().err == ("error: once\n" if printed else "")


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_ranks_one_does_what_takes_only_one(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert cli.is_sole_worker("plan.py") and not capsys.readouterr().err
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.is_sole_worker("plan.py") == (rank == 0)
    expected = "plan.py uses one rank: the other 3 of 4 have nothing to do\n"
    assert capsys.readouterr().err == (expected if rank == 0 else "")


@pytest.mark.slow
def test_what_trains_nothing_does_without_deepspeed() -> None:
    """Importing it probes compilers and prints, also into the JSON of --dry-run."""
    modules = "sadm_fast.start_checks, sadm_fast.generation, sadm_fast.planning.dry_run, sadm_fast.planning.plan"
    code = f"import sys, {modules}; print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout == "False\n" and done.stderr == ""


def test_leaving_flushes_and_runs_nothing_of_the_interpreters_own_end() -> None:
    program = (
        "import atexit; from sadm_fast import cli; atexit.register(print, 'late'); print('said', end=''); cli.leave(75)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=clean_environment(), cwd=ROOT
    )
    assert (found.returncode, found.stdout, found.stderr) == (75, "said", "")
