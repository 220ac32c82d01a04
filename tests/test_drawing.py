"""Drawing many samples: labels, going on after a kill, refusing to mix, and the record beside."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sadm_fast import drawing, sample
from sadm_fast.generation import load_trained
from sadm_fast.ranks.stopping import StopRequest
from sadm_fast.run import facts
from sadm_fast.run.snapshots import snapshot_name
from tests.support.finished_run import finished_run
from tests.support.programs import tree
from tests.support.ranks import run_ranks


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return finished_run(tmp_path)


def drawn(run: Path, *arguments: str, out: str = "x.npz") -> np.ndarray:
    """All samples, uint8 [N, H, W, C]."""
    path = run.parent / out
    assert sample.main([str(run), *arguments, "--out", str(path)]) == 0
    with np.load(path) as archive:
        return archive["arr_0"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert sample.main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def record(path: Path) -> dict[str, Any]:
    return json.loads(path.with_name(f"{path.name}.provenance.json").read_text())


def interrupted_after(batches: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """Let the drawing end after so many batches; the next one is whole."""
    whole, left = drawing.generate, iter(range(batches))

    def generate(*arguments: Any, **options: Any) -> torch.Tensor:
        if next(left, None) is None:
            monkeypatch.setattr(drawing, "generate", whole)
            raise error
        return whole(*arguments, **options)

    monkeypatch.setattr(drawing, "generate", generate)


@pytest.mark.parametrize("option", ["--folder", "--out"])
def test_a_killed_drawing_goes_on_where_it_was_and_ends_the_same(
    run: Path, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def arguments(name: str) -> list[str]:
        return [str(run), "--count", "9", "--batch", "2", option, str(run.parent / name / "samples.npz")]

    assert sample.main(arguments("whole")) == 0
    interrupted_after(2, monkeypatch, KeyboardInterrupt)
    assert sample.main(arguments("cut")) == 130
    if option == "--folder":
        damaged = run.parent / "cut/samples.npz/square/000001.png"
        damaged.write_bytes(damaged.read_bytes()[:-5])
    capsys.readouterr()
    assert sample.main(arguments("cut")) == 0
    there = 3 if option == "--folder" else 4
    assert f"samples.npz: {there} of 9 samples are there already\n" in capsys.readouterr().out
    whole, cut = (tree(run.parent / name) for name in ("whole", "cut"))
    assert cut == whole and len(cut) > 1


def test_a_drawing_that_only_lacks_its_end_is_ended_and_one_that_is_complete_is_left_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(facts, "commit", lambda: "0123456789ab")
    arguments = [str(run), "--count", "4", "--out", str(run.parent / "x.npz")]
    monkeypatch.setattr(drawing, "_end", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample.main(arguments)
    monkeypatch.undo()
    monkeypatch.setattr(facts, "commit", lambda: "0123456789ab")
    whole = drawing.generate
    monkeypatch.setattr(drawing, "generate", None)
    assert sample.main(arguments) == 0 and (run.parent / "x.npz").exists()
    assert sample.main(arguments) == 0
    assert capsys.readouterr().out.endswith("x.npz: complete already\n")
    monkeypatch.setattr(drawing, "generate", whole)
    monkeypatch.setattr(facts, "commit", lambda: "0123456789ab+changes")
    assert sample.main(arguments) == 0 and "already" not in capsys.readouterr().out


def test_a_rank_whose_launcher_is_gone_stops_between_two_batches(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = iter([False, True, True])
    monkeypatch.setattr(StopRequest, "asked", property(lambda _: next(asked)))
    arguments = [str(run), "--count", "6", "--batch", "2", "--folder", str(run.parent / "out")]
    assert sample.main(arguments) == 75
    assert capsys.readouterr().err == "asked to stop; the same command continues\n"
    assert len(list((run.parent / "out").rglob("*.png"))) == 2


def test_samples_drawn_otherwise_are_not_mixed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run.parent / "out"
    arguments = [str(run), "--count", "6", "--batch", "2", "--folder", str(folder)]
    interrupted_after(1, monkeypatch, KeyboardInterrupt)
    assert sample.main(arguments) == 130
    assert record(folder)["complete"] is False
    before = tree(run.parent)
    for changed, difference in (
        (["--steps", "3"], "sampler.steps 2, now 3"),
        (["--seed", "1"], "seed 0, now 1"),
        (["--labels", "random"], "labels.drawn in turn, now at random"),
        (["--set", "sampling.churn=2"], "sampler.churn 0.0, now 2.0"),
        (["--count", "7"], "images 6, now 7"),
    ):
        error = refused(capsys, *arguments, *changed)
        assert f"--folder {folder}: holds samples drawn otherwise ({difference})" in error
        assert tree(run.parent) == before
    assert sample.main(arguments) == 0 and record(folder)["complete"] is True


def test_labels_at_random_are_a_function_of_seed_and_number(run: Path) -> None:
    first = drawn(run, "--labels", "random", "--count", "40", "--seed", "3")
    again = drawn(run, "--labels", "random", "--count", "25", "--seed", "3", "--batch", "4", out="y.npz")
    assert np.array_equal(first[:25], again)
    assert sample.main([str(run), "--labels", "random", "--count", "300", "--folder", str(run.parent / "f")]) == 0
    counts = [len(list((run.parent / "f" / name).iterdir())) for name in ("circle", "square", "triangle")]
    # 100 expected of each, with a deviation of sqrt(300 * 2 / 9) = 8.2.
    assert sum(counts) == 300 and all(abs(count - 100) < 4 * 8.2 for count in counts)
    assert len(set(counts)) > 1


def test_labels_may_be_listed_in_a_file_or_equal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = run.parent / "labels.txt"
    listed.write_text("square\ncircle\n\nsquare\n")
    assert sample.main([str(run), "--labels", str(listed), "--folder", str(run.parent / "f")]) == 0
    found = sorted(str(path.relative_to(run.parent / "f")) for path in (run.parent / "f").rglob("*.png"))
    assert found == ["circle/000001.png", "square/000000.png", "square/000002.png"]
    assert record(run.parent / "f")["labels"].keys() == {"drawn", "sha256"}

    def line(*arguments: str) -> str:
        return refused(capsys, str(run), *arguments)

    assert "--count 7: --labels equal needs a multiple of the 3 classes" in line("--labels", "equal", "--count", "7")
    assert f"--count 4: {listed} has 3 lines" in line("--labels", str(listed), "--count", "4")
    assert "leave --classes out" in line("--labels", str(listed), "--classes", "circle")
    assert "--labels nowhere: cannot be read (No such file" in line("--labels", "nowhere")
    listed.write_text("circle\npentagon\n")
    assert f"--labels {listed}, class pentagon: the run was trained on" in line("--labels", str(listed))
    listed.write_text("\n")
    assert "is empty" in line("--labels", str(listed))


def test_the_record_says_all_that_has_a_say(run: Path) -> None:
    drawn(run, "--count", "3", "--guidance-scale", "2", "--set", "sampling.guidance_interval=[0.1,5]")
    there = record(run.parent / "x.npz")
    assert there["images"] == 3 and there["complete"] is True and there["seed"] == 0
    assert there["sampler"] == {
        "name": "heun", "steps": 2, "churn": 0, "churn_t_min": 0, "churn_t_max": 1e6, "churn_noise": 1
    }  # fmt: skip
    assert there["guidance"] == {"scale": 2, "channels": None, "interval": [0.1, 5]}
    assert there["weights"]["step"] == 10 and there["weights"]["ema"] == {"profile": "power", "std": 0.1}
    complete = json.loads((run / "checkpoints/step-000010/COMPLETE").read_text())
    assert there["weights"]["sha256"] == complete["files"]["ema.safetensors"]
    assert there["labels"] == {"drawn": "in turn", "classes": "all 3"}
    assert there["weights"]["precision"] == "fp32"
    assert {"torch", "python", "sadm_fast"} <= there["versions"].keys() and "commit" in there


def test_bf16_rounds_the_network_and_is_in_the_record(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guided = ["--guidance-scale", "2", "--guide", str(run / "checkpoints/step-000010"), "--count", "3"]
    rounded = drawn(run, *guided, "--precision", "bf16")
    assert not np.array_equal(rounded, drawn(run, *guided, out="y.npz"))
    trained = load_trained(run, torch.device("cpu"), print)
    inputs = torch.ones(1, 1, 8, 8), torch.zeros(1), torch.tensor([1])
    exact = trained.model(*inputs)
    assert trained.at("bf16").model(*inputs).dtype == torch.bfloat16
    # A few roundings to 8 bits on the way through one block.
    assert (trained.model(*inputs) - exact).abs().max() < 2**-5 * exact.abs().max()
    there = record(run.parent / "x.npz")
    assert there["weights"]["precision"] == there["guide"]["precision"] == "bf16"
    error = refused(capsys, str(run), "--out", str(run.parent / "x.npz"), "--precision", "tf32")
    assert "--precision tf32: only GPUs have it" in error


def test_weights_alone_draw_what_their_run_draws(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, config = run / "checkpoints/step-000010/ema.safetensors", run / "config.json"
    out = run.parent / "alone.npz"
    alone = ["--weights", str(weights), "--config", str(config), "--out", str(out)]
    assert sample.main([*alone, "--count", "5"]) == 0
    with np.load(out) as archive:
        assert np.array_equal(archive["arr_0"], drawn(run, "--count", "5"))
    assert record(out)["weights"]["sha256"] == record(run.parent / "x.npz")["weights"]["sha256"]
    assert record(out)["labels"]["classes"] == "all 3"

    def line(*arguments: str) -> str:
        return refused(capsys, *alone, *arguments)

    assert "does not fit this configuration's denoiser (its " in line("--set", "denoiser.hidden_size=32")
    assert "denoiser.num_classes=9: the label table of" in line("--set", "denoiser.num_classes=9")
    assert "--classes 3: the run was trained on images of 0, 1, 2" in line("--classes", "3")
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "cannot be read as weights" in line()


def test_a_checkpoint_may_be_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = run / "checkpoints/step-000010"
    drawn(named, "--count", "2", out="step.npz")
    error = refused(capsys, str(named.with_name("step-000011")), "--out", "x.png")
    assert "step-000011: cannot be used (COMPLETE cannot be read" in error


def test_another_average_is_chosen_by_its_name_or_length(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = drawn(run, "--count", "3"), drawn(run, "--count", "3", "--ema", "power-0.05", out="y.npz")
    assert not np.array_equal(first, other)
    assert record(run.parent / "y.npz")["weights"]["ema"] == {"profile": "power", "std": 0.05}
    for name, expected in (("0.05", other), ("power-0.1", first), ("0.10", first)):
        assert np.array_equal(drawn(run, "--count", "3", "--ema", name, out=f"{name}.npz"), expected)
    # Snapshots of one average after each of ten steps: any length that is near to theirs is made of them.
    state = load_file(run / "checkpoints/step-000010/ema.safetensors")
    for step in range(1, 11):
        path = run / "snapshots" / snapshot_name(0.1).format(step=step)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, path)
    # Their weights add up to 1, so that it is the same network again, up to rounding.
    assert np.abs(drawn(run, "--count", "3", "--ema", "0.11", out="z.npz").astype(int) - first).max() <= 1
    there = record(run.parent / "z.npz")["weights"]
    assert there["ema"] == {"profile": "power", "std": 0.11, "made_of": "snapshots"} and len(there["sha256"]) == 64
    for ema, words in (
        ("exponential-0.9", "--ema exponential-0.9: must be one of power-0.1, power-0.05, or a number from 0.001"),
        ("0.5", "--ema 0.5: must be one of power-0.1, power-0.05, or a number from 0.001 to 0.28"),
        ("nan", "--ema nan: must be one of"),
        ("0.001", "EMA length 0.001 at step 10: 10 snapshots"),
    ):
        assert words in refused(capsys, str(run), "--ema", ema)


def test_a_worse_model_guides(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guide = ["--guide", str(run / "checkpoints/step-000010")]
    scaled = ["--count", "3", "--guidance-scale", "2"]
    # A network guided by itself is not guided at all: x + s (x - x).
    assert np.array_equal(drawn(run, *scaled, *guide), drawn(run, "--count", "3", out="y.npz"))
    there = record(run.parent / "x.npz")
    assert there["guide"] == there["weights"]
    alone = [
        "--guide",
        str(run / "checkpoints/step-000010/ema.safetensors"),
        "--guide-config",
        str(run / "config.json"),
    ]
    assert np.array_equal(drawn(run, *scaled, *alone, out="z.npz"), drawn(run, *scaled, *guide, out="w.npz"))
    assert "--guidance-scale 1 guides nothing" in refused(capsys, str(run), *guide)
    other = json.loads((run / "config.json").read_text()) | {"diffusion": {"process": "flow"}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    error = refused(capsys, str(run), *scaled, *alone[:-1], str(tmp_path / "other.json"))
    assert "must have the same diffusion" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "data.resolution=16"], "--set data.resolution=16: of a trained run only sampling.* can be changed"),
        (["--set", "sampling.churn=3", "--sampler", "ddim"], "sampling.churn=3.0: is for sampling.sampler=heun"),
        (["--sampler", "ddpm"], "sampling.sampler=ddpm: does not fit EDM"),
        (["--steps", "ddim50"], "sampling.steps=ddim50: chooses from a schedule"),
        (["--weights", "x"], "give either the folder of a run, or --weights and --config"),
        (["--config", "x"], "--weights and --config go together"),
        (["--guide-config", "x"], "--guide-config is for a --guide"),
    ],
)
def test_a_setting_that_does_not_fit_is_one_line(
    run: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(run.parent)
    assert words in refused(capsys, str(run), *arguments)
    assert tree(run.parent) == before


@pytest.mark.slow
def test_two_ranks_draw_what_one_draws(run: Path) -> None:
    arguments = [str(run), "--count", "11", "--batch", "2", "--labels", "random", "--set", "sampling.churn=2", "--out"]
    for ranks in (1, 2):
        run_ranks("sadm_fast.sample", ranks, *arguments, str(run.parent / f"{ranks}.npz"))
    one, two = (np.load(run.parent / f"{ranks}.npz")["arr_0"] for ranks in (1, 2))
    assert len(one) == 11 and np.array_equal(one, two)
    one_record, two_record = (record(run.parent / f"{ranks}.npz") for ranks in (1, 2))
    assert one_record == two_record
