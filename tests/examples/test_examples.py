"""The examples at toy length: they train both ways, and print the numbers that their judges find."""

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import sadm_fast
from examples import compare, medical, tabular, time_series
from sadm_fast.api import train


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(compare, "TREES", 20)


@pytest.mark.slow
@pytest.mark.parametrize("example", [tabular, time_series], ids=["tabular", "time_series"])
def test_it_compares_plain_training_with_the_game(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    short = {**example.CONFIG, "structure_encoder": {"pretrain": {"steps": 4, "batch": 8}}}
    monkeypatch.setattr(example, "CONFIG", short)
    assert example.main(["--seeds", "1", "--steps", "4", "--runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    rows = re.findall(r"^\| (training samples|plain|sadm|sadm - plain) \|(.+)\|$", shown, re.MULTILINE)
    assert [name for name, _ in rows] == [compare.FLOOR, "plain", "sadm", "sadm - plain"]
    assert all(re.fullmatch(r"( [+-]?\d\.\d{3} ± nan \|?)+", cells) for _, cells in rows), shown
    floor, plain = (float(cells.split("±")[0]) for _, cells in rows[:2])
    assert floor < 0.75 < plain, "four steps of training cannot be told from real samples"
    assert len(list(tmp_path.glob("*/report.html"))) == 2


def test_held_out_days_and_days_to_train_on_do_not_overlap():
    parts = time_series.split(1)
    days = {tuple(day) for sample in parts.held_out for day in sample.T}
    training = parts.train.read(np.arange(len(parts.train)), np.zeros(len(parts.train), dtype=bool))
    assert not days & {tuple(day) for sample in training for day in sample.T}
    assert np.bincount(parts.train.labels).min() > 0.3 * len(parts.train)
    assert abs(training[:, 1].std() - 1) < 0.1, "returns are standardised"


def test_rows_are_divided_with_every_seed_anew_and_standardised():
    one, other = tabular.split(0), tabular.split(1)
    assert one.train.fingerprint() != other.train.fingerprint() and one.held_out.shape == (190, 30)
    rows = one.train.read(np.arange(len(one.train)), np.zeros(len(one.train), dtype=bool))
    np.testing.assert_allclose([rows.mean(), rows.std()], [0, 1], atol=1e-3)


def test_the_judges_tell_what_differs():
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6))
    real, alike = mixed[:200], mixed[200:]
    shuffled = np.stack([rng.permutation(column) for column in alike.T], axis=1)  # the same columns, each for itself
    groups = np.arange(200)
    assert compare.two_sample(real, alike, groups, 0) < 0.6 < 0.8 < compare.two_sample(real, shuffled, groups, 0)
    assert compare.marginals(real, shuffled) == compare.marginals(real, alike) < 0.15
    assert compare.marginals(real, alike + 2 * alike.std(axis=0)) > 0.5
    assert compare.correlation(real, alike) < 0.15 < compare.correlation(real, shuffled)


def test_samples_that_overlap_are_not_told_by_their_likes():
    rng = np.random.default_rng(0)
    real = np.repeat(rng.normal(size=(40, 4)), 5, axis=0)  # each five times
    drawn = rng.normal(size=(200, 4))
    assert compare.two_sample(real, drawn, np.repeat(np.arange(40), 5), 0) < 0.7
    assert compare.two_sample(real, drawn, np.arange(200), 0) > 0.9


def test_an_interval_is_students():
    mean, half = compare.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.7764 * 1.5811 / 5**0.5, rel=1e-4)


def test_medical_images_train_with_judges_and_pictures(tmp_path: Path):
    medical.write_stand_in(tmp_path / "x.npz", count=40, side=8)
    data = medical.read(tmp_path / "x.npz")
    assert data.shape == (1, 8, 8) and np.bincount(data.labels).tolist() == [20, 20]
    training = {"steps": 3, "batch": 8}
    short = {
        **medical.CONFIG,
        "denoiser": {"hidden_size": 16, "depth": 1, "num_heads": 2},
        "structure_encoder": {"width": 8, "pretrain": training},
        "train": {"steps": 2, "micro_batch": 4},
        "sampling": {"steps": 2, "rows": 1},
        "evaluate": {"every": 2, "samples": 8, "batch": 8, "steps": 2, "judge": training},
    }
    assert train(short, data=data, run_dir=tmp_path / "run")
    assert (tmp_path / "run/samples/step-000002-ema.png").exists()
    scores = json.loads((tmp_path / "run/evaluations.jsonl").read_text())
    assert scores["samples"] == 8 and scores["fid_classifier"] > 0


def test_colour_images_are_read_too(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (6, 9, 9, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", val_images=images, val_labels=np.arange(6)[:, None] % 2)
    data = medical.read(tmp_path / "x.npz", "val")
    assert data.shape == (3, 9, 9) and data.labels.tolist() == [0, 1] * 3
    read = data.read(np.arange(6), np.zeros(6, dtype=bool))
    assert np.array_equal(np.round((read + 1) * 127.5).astype(np.uint8), images.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "train_images and train_labels cannot be read"),
        ({"train_images": np.zeros((4, 8, 8)), "train_labels": np.zeros((4, 1), int)}, "must be uint8"),
        ({"train_images": np.zeros((4, 8, 8), "u1"), "train_labels": np.zeros((4, 14), int)}, "several labels"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: dict[str, Any], message: str):
    np.savez(tmp_path / "x.npz", **content)
    with pytest.raises(sadm_fast.UserError, match=message):
        medical.read(tmp_path / "x.npz")
    assert medical.main(["--npz", str(tmp_path / "x.npz"), "--run-dir", str(tmp_path / "run")]) == 2
