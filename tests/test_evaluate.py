"""evaluate.py on a finished run made by hand, and on images. A run on two ranks is in test_train.py."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sadm_fast import evaluate
from sadm_fast.config_tree import flatten
from sadm_fast.metrics import pretrained, run_evaluation
from sadm_fast.metrics.judges import PROBABILITIES, Judge
from sadm_fast.metrics.pretrained import InceptionJudge
from sadm_fast.ranks import launch
from sadm_fast.run import facts as run_facts
from sadm_fast.scales import pixels_to_float
from tests.support.finished_run import finished_run
from tests.support.judge_files import small_vit
from tests.support.ranks import run_ranks


@contextmanager
def alone(*, deepspeed: bool) -> Iterator[launch.Place]:
    """The only rank, without a process group."""
    yield launch.Place(0, 1, torch.device("cpu"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return finished_run(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", "1"], "--samples 1: must be at least 2"),
        (["--samples", "nan"], "--samples nan: must be a whole number"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--steps", "10000000000"], "--steps 10000000000: must be at most"),
        (["--data", ""], '--data "": must be a path'),
    ],
)
def test_a_wrong_option_is_one_line(
    tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
):
    assert evaluate.main([str(tmp_path), *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and not out


def test_a_folder_without_a_run_is_named_before_the_ranks_meet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "distributed", None)
    assert evaluate.main([str(tmp_path)]) == 2
    assert f"{tmp_path}: holds no run" in capsys.readouterr().err


def test_samples_that_cannot_be_scored_are_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "distributed", alone)
    batches = []

    def broken(config: object, model: object, labels: Tensor, *_: object, **__: object) -> Tensor:
        batches.append(len(labels))
        return torch.full((len(labels), 1, 8, 8), torch.nan)

    monkeypatch.setattr(run_evaluation, "generate", broken)
    assert evaluate.main([str(run)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {run}: cannot be scored: an image, or what a judge makes") and err.count("\n") == 1
    assert batches == [8], "of 12 samples more than a batch was drawn"


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ("size=1", "--sweep size=1: must be one of guidance, steps, ema and its values"),
        ("guidance=", "--sweep guidance=: must be one of"),
        ("guidance=1,big", "--sweep guidance=1,big: guidance=big is no value of it"),
        ("steps=0", "--sweep steps=0: steps=0 is no value of it"),
    ],
)
def test_a_sweep_that_is_none_is_one_line(run: Path, sweep: str, words: str, capsys: pytest.CaptureFixture[str]):
    assert evaluate.main([str(run), "--sweep", sweep]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_a_sweep_is_a_table_with_the_best_marked_and_a_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "distributed", alone)
    scores = tmp_path / "scores.json"
    sweeps = ["--sweep", "guidance=1,4", "--sweep", "steps=1,2"]
    assert evaluate.main([str(run), "--samples", "12", *sweeps, "--json", str(scores)]) == 0
    rows = json.loads(scores.read_text())["scores"]
    assert [(row["steps"], row["guidance"]) for row in rows] == [(1, 1.0), (1, 4.0), (2, 1.0), (2, 4.0)]
    assert [row["sampling"]["guidance"]["scale"] for row in rows] == [1.0, 4.0, 1.0, 4.0]
    assert all(set(row["kid"]) == set(row["floor"]) == set(row["recall"]) for row in rows)
    table = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(table) if line.split()[:2] == ["guidance", "steps"])
    column = table[head].split().index("fid_pixels")
    best = min(range(4), key=lambda i: rows[i]["fid_pixels"])
    starred = [line.split()[column].endswith("*") for line in table[head + 1 : head + 5]]
    assert starred[best] and table[head + 5].split()[0] == "floor"


def test_other_images_have_a_judge_of_their_own(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "distributed", alone)
    assert evaluate.main([str(run), "--samples", "12"]) == 0
    own = run / "pretrained" / "judge.safetensors"
    before = own.read_bytes()
    other = tmp_path / "other"
    for i, name in enumerate(("0", "1")):
        (other / name).mkdir(parents=True)
        for k in range(12):
            picture = np.full((8, 8), 20 * k + 5 * i, np.uint8)
            Image.fromarray(picture).save(other / name / f"{k}.png")
    assert evaluate.main([str(run), "--samples", "12", "--data", str(other)]) == 0
    assert own.read_bytes() == before and len(list((run / "pretrained").glob("on-*/judge.safetensors"))) == 1


def test_a_judge_from_a_file_stands_beside_the_others_and_one_without_is_refused_first(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "distributed", None)
    assert evaluate.main([str(run), "--judges", "inception"]) == 2
    err = capsys.readouterr().err
    assert "--judges inception: needs pt_inception-2015-12-05-6726825d.pth" in err and err.count("\n") == 1
    monkeypatch.setattr(launch, "distributed", alone)
    vit, scores = small_vit(tmp_path), tmp_path / "scores.json"
    options = ["--samples", "8", "--precision", "bf16", "--json", str(scores)]
    assert evaluate.main([str(run), "--judges", f"vit={vit}", *options]) == 0
    written = json.loads(scores.read_text())
    row = written["scores"][0]
    weights = written["judges"]["fd_vit"]
    assert weights["sha256"] == hashlib.sha256(vit.read_bytes()).hexdigest()
    assert row["weights"]["step"] == 10 and row["weights"]["ema"]["profile"] == "power"
    assert row["sampling"]["seed"] == 0 and row["sampling"]["sampler"]["steps"] == 2
    assert row["reference"]["images"] == len(list((tmp_path / "images").glob("*/*.png")))
    assert row["weights"]["precision"] == "bf16"
    assert row["fd_vit"] >= 0 and set(row["kid"]) == {"fid_classifier", "fid_random", "fid_pixels", "fd_vit"}
    assert "8 samples are fewer than the features of fd_vit (8) plus one" in capsys.readouterr().out
    twice = ["--judges", f"vit={vit}", "--judges", "vit=other.pt"]
    assert evaluate.main([str(run), *twice]) == 2
    assert "--judges vit: is there twice" in capsys.readouterr().err


class Small(InceptionJudge):
    """Inception's spaces with few features: 2 x 2 means of each channel, and the rows of one."""

    feature_dim = 12
    more_spaces: ClassVar[dict[str, int]] = {"sfid_inception": 8}
    classes = 4

    def __init__(self) -> None:
        Judge.__init__(self)
        self.weights = {"file": "small", "sha256": "0"}

    def look(self, images: Tensor) -> dict[str, Tensor]:
        pooled = F.adaptive_avg_pool2d(images.expand(-1, 3, -1, -1), 2).flatten(1)
        return {
            "fid_inception": pooled,
            "sfid_inception": images[:, 0].mean(dim=2),
            PROBABILITIES: (5 * pooled[:, :4]).softmax(dim=1),
        }


@pytest.fixture
def small_inception(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "distributed", alone)
    monkeypatch.setattr(pretrained, "pretrained_judge", lambda name, file: Small())
    for attribute in ("feature_dim", "more_spaces"):
        monkeypatch.setattr(InceptionJudge, attribute, getattr(Small, attribute))
    monkeypatch.setenv("SADM_CACHE", str(tmp_path / "cache"))


def pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def save_folder(folder: Path, images: np.ndarray) -> None:
    """Images of one class, in order."""
    (folder / "0").mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / "0" / f"{number:02d}.png")


def moments(images: np.ndarray) -> dict[str, np.ndarray]:
    """As ADM's reference files have them."""
    seen = Small().look(pixels_to_float(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())))
    found: dict[str, np.ndarray] = {}
    for metric, ending in (("fid_inception", ""), ("sfid_inception", "_s")):
        rows = seen[metric].double().numpy()
        found |= {f"mu{ending}": rows.mean(axis=0), f"sigma{ending}": np.cov(rows, rowvar=False)}
    return found


@pytest.mark.usefixtures("small_inception")
def test_images_are_scored_against_images_and_published_moments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, real = pixels(40, 0), pixels(60, 1)
    np.savez(tmp_path / "samples.npz", samples)
    np.savez(tmp_path / "adm.npz", arr_0=real[:30], **moments(real))  # type: ignore[arg-type]
    np.savez(tmp_path / "moments.npz", **moments(real))  # type: ignore[arg-type]
    for name, images in (("samples", samples), ("real", real)):
        save_folder(tmp_path / name, images)
    rows = {}
    for drawn, reference in (
        ("samples.npz", "real"), ("samples", "real"), ("samples", "adm.npz"), ("samples.npz", "moments.npz")
    ):  # fmt: skip
        arguments = [str(tmp_path / drawn), "--data", str(tmp_path / reference), "--judges", "inception"]
        assert evaluate.main([*arguments, "--json", str(tmp_path / "scores.json")]) == 0
        rows[drawn, reference] = json.loads((tmp_path / "scores.json").read_text())["scores"][0]
        shown = capsys.readouterr().out
        assert "FID(40)" in shown and "sFID(40)" in shown and "IS" in shown and "40 samples; floor" in shown
    whole, same, adm, alone = rows.values()
    facts = ("samples_of", "reference")
    assert {k: v for k, v in whole.items() if k not in facts} == {k: v for k, v in same.items() if k not in facts}
    assert whole["samples_of"]["images"] == 40 and whole["reference"]["images"] == 60
    for metric in ("fid_inception", "sfid_inception"):
        assert adm[metric] == pytest.approx(whole[metric], rel=1e-9) == pytest.approx(alone[metric], rel=1e-9)
        assert adm["floor"][metric] > 0 and alone["floor"] == {"fid_inception": None, "sfid_inception": None}
    assert adm["kid"].keys() == {"fid_random", "fid_pixels", "fid_inception"} and "kid" not in alone
    assert whole["inception_score"] == alone["inception_score"] > 1
    assert adm["reference"]["moments"] == ["mu", "sigma", "mu_s", "sigma_s"] and adm["reference"]["images"] == 30


@pytest.mark.usefixtures("small_inception")
def test_a_run_is_scored_against_a_reference_npz(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = pixels(40, 1)[..., :1]
    np.savez(tmp_path / "ref.npz", arr_0=real)
    np.savez(tmp_path / "moments.npz", **moments(real))  # type: ignore[arg-type]
    scores = []
    for reference in ("ref.npz", "moments.npz"):
        arguments = [str(run), "--data", str(tmp_path / reference), "--judges", "inception"]
        assert evaluate.main([*arguments, "--json", str(tmp_path / "scores.json")]) == 0
        scores.append(json.loads((tmp_path / "scores.json").read_text())["scores"][0])
    assert scores[0]["fid_inception"] == pytest.approx(scores[1]["fid_inception"], rel=1e-9)
    assert set(scores[0]["floor"]) == {"fid_random", "fid_pixels", "fid_inception", "sfid_inception"}
    assert scores[0]["reference"]["images"] == 40 and scores[1]["reference"]["images"] == 0
    assert not list((run / "pretrained").rglob("*.safetensors")), (
        "a classifier cannot learn from images without classes"
    )
    capsys.readouterr()
    assert evaluate.main([str(run), "--data", str(tmp_path / "moments.npz")]) == 2
    assert "moments of Inception's features and no images; needs --judges inception=FILE" in capsys.readouterr().err


@pytest.mark.usefixtures("small_inception")
def test_what_cannot_be_scored_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "few.npz", pixels(9, 0))
    np.savez(tmp_path / "one.npz", pixels(1, 0))
    few, inception = str(tmp_path / "few.npz"), ["--judges", "inception"]
    for arguments, words in (
        ([few], "few.npz: say what to compare these images with: --data PATH"),
        ([few, "--data", few, *inception], "few.npz: has 9 images, too few to score; these judges need 10"),
        ([str(tmp_path / "one.npz"), "--data", few], "one.npz: has 1 images, too few to score; these judges need 4"),
        ([few, "--data", str(tmp_path / "one.npz")], "a covariance needs at least 2 feature vectors"),
        ([few, "--data", few, "--steps", "3"], "--steps: is of a run"),
        ([few, "--data", few, "--precision", "bf16"], "--precision: is of a run"),
        ([few, "--data", few, "--sweep", "steps=1,2"], "--sweep: is of a run"),
        ([str(tmp_path / "images"), "--data", str(tmp_path / "nowhere.npz")], "--data"),
        ([str(tmp_path / "images")], "holds no run; to score images, say what to compare them with: --data PATH"),
        ([str(run), "--samples", "9", *inception], "samples=9: too few to score; use at least 10"),
    ):
        assert evaluate.main(arguments) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1, err


@pytest.mark.slow
def test_two_ranks_score_images_as_one_does(tmp_path: Path) -> None:
    save_folder(tmp_path / "samples", pixels(21, 0))  # an odd number: one rank has one more
    np.savez(tmp_path / "real.npz", pixels(31, 1))
    judge, found = small_vit(tmp_path), []
    for ranks in (1, 2):
        scores = tmp_path / f"{ranks}.json"
        run_ranks(
            "sadm_fast.evaluate", ranks, str(tmp_path / "samples"), "--data", str(tmp_path / "real.npz"),
            "--judges", f"vit={judge}", "--json", str(scores),
        )  # fmt: skip
        found += json.loads(scores.read_text())["scores"]
    assert found[0]["samples"] == 21 and found[0]["fd_vit"] > 0
    spaces = {"fid_random", "fid_pixels", "fd_vit"}
    assert all(set(found[0][of]) == spaces for of in ("floor", "kid", "precision", "recall"))
    one, two = (flatten(row) for row in found)
    assert one == pytest.approx(two, rel=1e-6)


def test_copies_of_training_images_are_looked_for_and_shown_in_the_report(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "distributed", alone)
    assert evaluate.main([str(run), "--memorisation"]) == 0
    out = capsys.readouterr().out
    assert "fid_pixels" in out and "as training images among each other" in out
    facts = json.loads((run / "memorisation" / "memorisation.json").read_text())
    assert facts["held_out"] is None and not facts["held_out_batches"] and facts["samples"] == 12
    assert {path.stem for path in (run / "memorisation").glob("*.png")} == set(facts["spaces"])
    assert "each compared with the others" in (run / "report.html").read_text()

    raw = json.loads((run / "config.json").read_text())
    raw["game"]["mode"] = "plain"
    (run / "config.json").write_text(json.dumps(raw))
    other = tmp_path / "held out"
    shutil.copytree(raw["data"]["path"], other)
    scores = tmp_path / "found.json"
    assert evaluate.main([str(run), "--memorisation", "--held-out", str(other), "--json", str(scores)]) == 0
    facts = json.loads(scores.read_text())
    assert facts["held_out"]["of"] == str(other)
    gap = facts["held_out_batches"]["loss"]
    assert gap["training"] > 0 and "S" not in facts["held_out_batches"]
    assert "Denoising loss" in (run / "report.html").read_text()

    raw["game"]["mode"] = "sadm"
    raw["structure_encoder"]["pretrain"] |= {"steps": 0}
    (run / "config.json").write_text(json.dumps(raw))
    capsys.readouterr()
    assert evaluate.main([str(run), "--memorisation", "--held-out", str(other)]) == 2
    err = capsys.readouterr().err
    assert "the discriminator cannot be loaded" in err and err.count("\n") == 1


@pytest.mark.slow
def test_two_ranks_look_for_copies_as_one_does(run: Path, tmp_path: Path) -> None:
    raw = json.loads((run / "config.json").read_text())
    raw["game"]["mode"] = "structure"
    raw["structure_encoder"]["pretrain"] |= {"steps": 3, "batch": 8}  # kept after the first look, as the judge is
    (run / "config.json").write_text(json.dumps(raw))
    other, found = tmp_path / "held out", []
    shutil.copytree(raw["data"]["path"], other)
    for path in other.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path))[:, ::-1]).save(path)
    (path,) = other.rglob("square/07.png")  # an odd number: one rank has one more
    path.unlink()
    for ranks in (1, 2):
        scores = tmp_path / f"{ranks}.json"
        options = ["--held-out", str(other), "--samples", "13", "--json", str(scores)]
        run_ranks("sadm_fast.evaluate", ranks, str(run), "--memorisation", *options)
        found.append(json.loads(scores.read_text()))
    one, two = (flatten(facts) for facts in found)
    assert one == pytest.approx(two, rel=1e-6)
    assert set(found[0]["spaces"]) == {"fid_classifier", "fid_random", "fid_pixels"}
    assert found[0]["held_out"]["images"] == 59 and found[0]["held_out_batches"]["S"]["batches"] == 4


def test_the_record_has_the_commit_of_the_start(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "distributed", alone)
    generate, drawn = run_evaluation.generate, []

    def noticed(*arguments: Any, **options: Any) -> Tensor:
        drawn.append(1)
        return generate(*arguments, **options)

    monkeypatch.setattr(run_evaluation, "generate", noticed)
    monkeypatch.setattr(run_facts, "commit", lambda: "edited meanwhile" if drawn else "as it began")
    scores = tmp_path / "scores.json"
    assert evaluate.main([str(run), "--json", str(scores)]) == 0
    assert drawn and json.loads(scores.read_text())["commit"] == "as it began"


@pytest.mark.parametrize("options", [[], ["--memorisation"]])
def test_images_of_one_class_have_no_classifier_as_judge_and_the_others_remain(
    run: Path, options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "distributed", alone)
    raw = json.loads((run / "config.json").read_text())
    raw["game"]["mode"] = "plain"
    (run / "config.json").write_text(json.dumps(raw))
    for name in ("square", "triangle"):
        for path in (Path(raw["data"]["path"]) / name).iterdir():
            path.rename(Path(raw["data"]["path"]) / "circle" / f"{name}-{path.name}")
        (Path(raw["data"]["path"]) / name).rmdir()
    assert evaluate.main([str(run), *options]) == 0
    out = capsys.readouterr().out
    left_out = "fid_classifier is left out: its judge is trained to tell classes apart, and data.path="
    assert f"{left_out}{raw['data']['path']} has images of only one class" in out
    assert "fid_pixels" in out and out.count("fid_classifier") == 1 and not list((run / "pretrained").iterdir())
    raw["evaluate"]["judges"] = ["classifier"]
    (run / "config.json").write_text(json.dumps(raw))
    assert evaluate.main([str(run), *options]) == 2
    err = capsys.readouterr().err
    assert "evaluate.judges=classifier: no judge is left; give others with --judges" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--held-out", "x"], "--held-out x: is for --memorisation"),
        (["--memorisation", "--data", "x"], "--data: is for scores"),
        (["--memorisation", "--sweep", "steps=1"], "--sweep: is for scores"),
    ],
)
def test_options_of_another_question_are_one_line(
    run: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(run), *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
