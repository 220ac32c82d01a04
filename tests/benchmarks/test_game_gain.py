"""The sweep that asks whether the game pays off: its plans, what is trained and what is not, its statistics."""

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from benchmarks import gain_picture, gain_report, game_gain
from benchmarks.gain_plan import ROOT, Job, Plan
from sadm_fast.errors import UserError
from sadm_fast.files import append_json
from sadm_fast.ranks.stopping import Stopped

LITE0 = "efficientnet_lite0"
SPACES = ("fid_classifier", "fid_pixels")
RAW: dict[str, Any] = {
    "expectation": "the game is better",
    "sets": {"digits": {"config": "configs/mnist.json", "set": {"train.micro_batch": 8}}},
    "configurations": {"plain": {"game.mode": "plain"}, "game": {"game.mode": "sadm", "game.start_step": 10}},
    "seeds": [0, 1, 2],
    "score_at": [10, 30],
}


def plan(tmp_path: Path, **changes: Any) -> Plan:
    path = tmp_path / "trial.json"
    path.write_text(json.dumps(RAW | changes))
    return Plan.read(path)


def line(of: Plan, job: Job, distances: tuple[float, float]) -> dict[str, Any]:
    """A line of results.jsonl: the same distances in both spaces."""
    scores = [
        {"step": step, **dict.fromkeys(SPACES, distance), "floor": dict.fromkeys(SPACES, 0.5)}
        for step, distance in zip(of.score_at, distances, strict=True)
    ]
    where = {"set": job.set, "configuration": job.configuration, "seed": job.seed}
    by_noise = [0.1, 0.2, 0.3, None if job.seed else 0.4]
    facts = {"digest": of.digests[job], "commit": "1234567", "loss_by_noise_quartile": by_noise}
    return {**where, **facts, "scores": scores}


def finished(of: Plan, ratio: float) -> dict[Job, dict[str, Any]]:
    """All runs of a plan: plain falls from 8 to 2 plus its seed, the game to `ratio` times that."""
    found = {}
    for job in of.jobs:
        last = 2.0 + job.seed
        found[job] = line(of, job, (8.0, last * (ratio if job.configuration == "game" else 1.0)))
    return found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [0]}, "seed: must be one of expectation, sets"),
        ({"seeds": [0, 0]}, r"seeds=\[0, 0\]: must be different whole numbers"),
        ({"score_at": [0, 5]}, r"score_at=\[0, 5\]"),
        ({"expectation": ""}, "expectation: is missing or empty"),
        ({"judges": ["alexnet"]}, "judges: alexnet must be one of inception"),
        (
            {"configurations": {"a": {"structure_encoder.architecture": "efficientnet_lite0"}}, "judges": [LITE0]},
            "judges: efficientnet_lite0 is the Psi of a",
        ),
        ({"configurations": {"a": {"data.resolution": 8}}}, "data.resolution must be the same for all"),
        ({"configurations": {"a": {"game.lambda": 8}}}, "digits, a: game.lambda"),
        ({"sets": {"digits": {"path": "x"}}}, 'sets.digits: must be {"config": FILE'),
        ({"sets": {"a/b": {"config": "x"}}}, "'a/b': a name is"),
    ],
)
def test_a_plan_that_is_wrong_says_where(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(tmp_path, **changes)


def test_every_plan_in_the_repository_can_be_read() -> None:
    plans = sorted((ROOT / "benchmarks" / "plans").glob("*.json"))
    assert plans and all(Plan.read(path).jobs for path in plans)


def test_runs_of_one_seed_differ_in_what_their_configuration_says_only(tmp_path: Path) -> None:
    of = plan(tmp_path)
    assert of.baseline == "plain" and len(of.jobs) == 6
    plain, game = (of.config(Job("digits", name, 1)).resolved() for name in ("plain", "game"))
    assert {key for key in plain if plain[key] != game[key]} == {"name", "game"}
    assert plain["seed"] == 1 and plain["train"]["steps"] == 30 and plain["evaluate"]["every"] is None
    assert plain["train"]["keep_every"] == 10 and plain["train"]["micro_batch"] == 8


def test_a_digest_changes_with_all_that_a_result_depends_on(tmp_path: Path) -> None:
    job = Job("digits", "game", 0)
    digests = {
        plan(tmp_path, **changes).digest(job)
        for changes in ({}, {"set": {"game.lambda_s": 1.0}}, {"score_at": [15, 30]}, {"judges": ["efficientnet_lite0"]})
    }
    assert len(digests) == 4
    assert plan(tmp_path, expectation="another").digest(job) in digests


def test_the_results_of_2026_11_28_still_count() -> None:
    """A field that is added since must be in gain_plan._YOUNGER with the default that changes nothing."""
    screening = Plan.read(ROOT / "benchmarks" / "plans" / "screening_digits.json")
    assert screening.digest(Job("digits", "plain", 0)) == "3d83c9c9af573284"


def test_finished_runs_are_not_repeated_and_those_of_another_plan_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = plan(tmp_path)
    started: list[str] = []

    class Worker:
        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command[-1])

        def wait(self) -> int:
            return 75 if started[-1] == "digits:2" else 0

    monkeypatch.setattr(game_gain.subprocess, "Popen", Worker)
    for job in of.jobs[:3]:  # seed 0 whole, seed 1 in part
        append_json(tmp_path / game_gain.RESULTS, line(of, job, (8.0, 2.0)))
    with (tmp_path / game_gain.RESULTS).open("a") as file:
        file.write('{"set": "digits", "configu')  # stopped while it wrote
    assert list(game_gain.results(of, tmp_path)) == of.jobs[:3]
    assert game_gain.supervise(Path("trial.json"), of, tmp_path, 1, 1) == 75
    assert started == ["digits:1", "digits:2"]
    assert game_gain.results(plan(tmp_path, set={"game.lambda_s": 1.0}), tmp_path) == {}


def test_a_sweep_that_is_asked_to_stop_asks_its_workers_and_starts_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, gone, started = threading.Event(), threading.Event(), []

    class Worker:
        terminate = staticmethod(gone.set)

        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command[-1])

        def wait(self) -> int:
            here.set()
            return 75 if gone.wait(60) else 0

    def asked(pool: Any, work: Any, groups: Any) -> Any:
        futures = [pool.submit(work, group) for group in groups]
        assert here.wait(60) and len(futures) == 3
        raise Stopped

    monkeypatch.setattr(game_gain.subprocess, "Popen", Worker)
    monkeypatch.setattr(game_gain.ThreadPoolExecutor, "map", asked)
    with pytest.raises(Stopped):
        game_gain.supervise(Path("trial.json"), plan(tmp_path), tmp_path, 1, 1)
    assert gone.is_set() and started == ["digits:0"]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_interval_is_students_of_the_logarithms(count: int) -> None:
    ratios = [0.8, 0.9, 0.85, 1.05, 0.7][:count]
    found = gain_report.interval(ratios)
    logs = [math.log(r) for r in ratios]
    low, high = stats.t.interval(0.95, count - 1, stats.tmean(logs), stats.sem(logs))
    # The quantiles are kept with three decimals.
    assert found == pytest.approx([stats.gmean(ratios), math.exp(low), math.exp(high)], rel=1e-3)
    assert str(gain_report.interval([0.9])) == "-10.0%"
    with pytest.raises(ValueError, match="must be positive"):
        gain_report.interval([])


def test_a_distance_is_reached_between_two_scores() -> None:
    points = [(10.0, 8.0), (20.0, 4.0), (30.0, 1.0)]
    assert gain_report.reached(points, 4.0) == 20.0
    assert gain_report.reached(points, 2.0) == pytest.approx(25.0)  # half of the way in its logarithm
    assert gain_report.reached(points, 9.0) == 10.0 and gain_report.reached(points, 0.5) is None


def test_the_tables_pair_the_runs_of_a_seed(tmp_path: Path) -> None:
    of = plan(tmp_path)
    found = finished(of, 0.8)
    found.pop(Job("digits", "game", 2))  # not finished: its plain run has no partner
    text = "\n".join(gain_report.tables(of, found, None))
    assert "Expected: the game is better" in text and "3 (2 to 4)" in text
    assert "-20.0% [-20.0%, -20.0%]" in text  # though plain's seeds differ twofold
    text = "\n".join(gain_report.tables(of.against("game"), found, None))
    assert "+25.0% [+25.0%, +25.0%]" in text and of.against("game").digests == of.digests
    with pytest.raises(UserError, match="structure must be one of plain, game"):
        of.against("structure")
    steps = [10 + 20 * math.log(8 / last) / math.log(8 / (0.8 * last)) for last in (2, 3)]
    assert gain_report.fewer_steps(of, found, "digits", "game", "fid_pixels") == pytest.approx([30 / s for s in steps])
    assert gain_report.fewer_steps(of, finished(of, 1.1), "digits", "game", "fid_pixels") == [None, None, None]


def test_time_counts_the_steps_of_the_game_as_dear_as_they_are(tmp_path: Path) -> None:
    of = plan(tmp_path)
    costs = {"digits": {"plain": {"plain": 20.0}, "game": {"plain": 20.0, "game": 50.0}}}
    assert gain_report.cost_at(of, costs, "digits", "game", 10) == 10.0
    assert gain_report.cost_at(of, costs, "digits", "game", 30) == pytest.approx(10 + 20 * 2.5)
    assert "2.00" in list(gain_report.tables(of, finished(of, 0.8), costs))[-2]
    pictures = gain_report.picture(of, finished(of, 0.8), costs, tmp_path)
    assert [path.name for path in pictures] == ["distance-steps.png", "distance-time.png"]
    assert all(path.stat().st_size > 5000 for path in pictures)


def test_one_picture_is_drawn_from_the_scores_of_several_series(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for name, ratio in (("digits", 0.8), ("letters", 1.1)):
        of = plan(tmp_path, sets={name: RAW["sets"]["digits"]})
        found = finished(of, ratio)
        found.pop(Job(name, "game", 2))
        (tmp_path / name).mkdir()
        for one in found.values():
            append_json(tmp_path / name / game_gain.RESULTS, one)
        told = list(game_gain.report(of, tmp_path / name))
        assert f"scores: {tmp_path / name / 'scores.csv'}" in told
        assert f"picture: {tmp_path / name / 'ratios.png'}" in told and (tmp_path / name / "ratios.png").exists()
        paths.append(tmp_path / name / game_gain.SCORES)
    scores = gain_picture.read(paths)
    assert scores.sets == ["digits", "letters"] and scores.spaces == list(SPACES)
    points = scores.ratios("digits", "game", "plain", "fid_pixels")
    assert [step for step, _ in points] == [10, 30]
    assert points[0][1] == pytest.approx([1, 1, 1]) and points[1][1] == pytest.approx([0.8, 0.8, 0.8])
    out = tmp_path / "pictures" / "ratios.png"
    assert gain_picture.main([*map(str, paths), "--out", str(out)]) == 0 and out.stat().st_size > 5000
    assert gain_picture.main([*map(str, paths), "--only", "plain", "games"]) == 2
    assert gain_picture.main([str(tmp_path / "digits" / game_gain.RESULTS)]) == 2
    errors = capsys.readouterr().err
    assert "--only: games must be one of plain, game" in errors and "is no scores.csv of game_gain.py" in errors


def test_a_set_without_a_finished_run_has_no_column(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    of = plan(tmp_path, sets={"emoji": RAW["sets"]["digits"], **RAW["sets"]})
    found = {job: one for job, one in finished(of, 0.8).items() if job.set == "digits"}
    assert gain_report.picture(of, found, None, tmp_path) and not recwarn.list


def test_losses_by_noise_are_compared_where_both_runs_have_them(tmp_path: Path) -> None:
    of = plan(tmp_path)
    found = finished(of, 0.8)
    for job, one in found.items():
        one["loss_by_noise_quartile"][0] *= 1.1 if job.configuration == "game" else 1.0
    lines = gain_report.losses(of, found, "digits")
    assert lines[1] == ["plain", "0.1", "0.2", "0.3", "0.4"]
    assert lines[2][:2] == ["game", "+10.0% [+10.0%, +10.0%]"] and lines[2][4] == "+0.0%"  # seed 0 alone has the last


def test_facts_are_read_from_a_runs_log() -> None:
    log = [
        {"step": step, "wall_s": step / 10, "samples_per_s": 100 + step, "structure_distance": step / 100}
        | {f"loss_denoise_q{q}": q * step for q in range(1, 5)}
        for step in range(10, 101, 10)
    ]
    found = game_gain.facts_of_log(log, (50, 100))
    assert found["seconds"] == [5.0, 10.0] and found["images_per_s"] == 155
    assert found["loss_by_noise_quartile"] == [95, 190, 285, 380] and found["structure_distance"] == 1.0
