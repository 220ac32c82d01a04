"""Training and sampling from Python, with networks and data of the caller's own."""

import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sadm_fast
import sadm_fast.train as door
from sadm_fast import Arrays, UserError, cli
from sadm_fast.api import load, train
from sadm_fast.config import check_config
from tests.support.own_networks import WIDTH, OwnDenoiser, OwnEncoder, own_config, own_data
from tests.support.programs import assert_same_state, lines
from tests.support.ranks import run_ranks


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("RANK", raising=False)


def trained(run: Path, **changes: Any) -> bool:
    config = own_config(**changes)
    return train(config, denoiser=OwnDenoiser, psi=OwnEncoder, data=own_data(), run_dir=run)


def test_a_run_without_pictures_trains_resumes_reports_and_samples(tmp_path: Path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    handler = signal.getsignal(signal.SIGTERM)
    assert trained(run, train={"steps": 2})
    assert trained(run) and trained(whole)
    assert signal.getsignal(signal.SIGTERM) is handler, "the caller's signal handlers are not given back"
    last = Path("checkpoints/step-000004")
    assert_same_state(run / last, whole / last)
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert {path.name for path in (run / "samples").iterdir()} == {
        f"step-00000{n}{ema}.npz" for n in (2, 4) for ema in ("", "-ema")
    }
    with np.load(run / "samples" / "step-000004-ema.npz") as drawn:
        assert drawn["samples"].shape == (6, WIDTH) and drawn["labels"].tolist() == [0, 1, 2] * 2
        model = load(run, denoiser=OwnDenoiser)
        assert torch.equal(model.sample([0, 1, 2] * 2), torch.from_numpy(drawn["samples"]))
    assert np.load(run / "relations" / "step-000004.npz")["real"].shape == (60, 60)
    report = (run / "report.html").read_text()
    assert f"arrays of {WIDTH} numbers, no pictures" in report and "<img" not in report.split('id="relations"')[0]
    written = json.loads((run / "config.json").read_text())
    assert written["data"]["shape"] == [WIDTH] and written["denoiser"]["architecture"] == "own"
    assert "hidden_size" not in written["denoiser"], "a size that has no say"


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(tmp_path: Path):
    run_ranks("tests.support.own_networks", 2, str(tmp_path / "two"), "2", "4")
    assert trained(tmp_path / "one", game={"mode": "plain"})
    one, two = (load_file(tmp_path / run / "checkpoints/step-000004/ema.safetensors") for run in ("one", "two"))
    for name, weight in one.items():  # a step is 1e-4 in size, and gradients are summed in another order
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-6)


def test_samples_do_not_depend_on_how_many_are_drawn_at_a_time(tmp_path: Path):
    assert trained(tmp_path / "run", game={"mode": "plain"})
    model, labels = load(tmp_path / "run", denoiser=OwnDenoiser), [0, 1, 2, 0, 1]
    all_of_them = model.sample(labels, batch=2)
    torch.testing.assert_close(all_of_them, model.sample(labels), rtol=0, atol=1e-5)  # sums in another order
    assert torch.equal(model.sample(labels[3:], first=3, batch=2), model.sample(labels, batch=3)[3:])
    assert len(set(map(tuple, all_of_them.tolist()))) == len(labels)


def test_the_function_is_found_whether_or_not_its_module_was_imported(monkeypatch: pytest.MonkeyPatch):
    def refused(function: Callable[..., Any]) -> None:
        with pytest.raises(UserError, match="nonsense: unknown key"):
            function({"name": "x", "nonsense": 1})

    assert door.main(["--config", "nowhere.json"]) == cli.EXIT_USER_ERROR
    refused(sadm_fast.train)
    monkeypatch.delattr(sadm_fast, "train")
    assert sadm_fast.train is train
    refused(sadm_fast.train)


class Wide(OwnDenoiser):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([super().forward(x, t, y)] * 2, dim=1)


class Failing(OwnDenoiser):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.last(x)


class WrongWidth(OwnEncoder):
    feature_dim = 5

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 3))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "output": ({"denoiser": Wide}, {}, r"Wide.forward: makes \[2, 12\] of \[2, 6\], \[2\], \[2\]; must be \[2, 6\]"),
    "failure": ({"denoiser": Failing}, {}, r"Failing.forward: fails on tensors \[2, 6\].* on the meta device"),
    "classes": ({"denoiser": lambda n: OwnDenoiser(n + 1)}, {}, "OwnDenoiser.num_classes=4: the data have 3"),
    "features": ({"psi": WrongWidth}, {}, r"WrongWidth.forward: makes \[2, 3\] of \[2, 6\]; must be \[2, 5\]"),
    "no denoiser": ({"denoiser": None}, {}, r"data.shape=\[6\]: denoiser.architecture=dit takes \[C, S, S\]"),
    "no encoder": ({"psi": None}, {}, r"data.shape=\[6\]: structure_encoder.architecture=cnn takes \[C, H, W\]"),
    "no data": ({"data": None}, {"data": {"source": "own"}}, "data.source=own: is given to sadm_fast.train"),
    "no blocks": ({}, {"train": {"activation_checkpointing": True}}, "OwnDenoiser has no `blocks`"),
    "judges": ({}, {"evaluate": {"every": 1}}, "evaluate.every=1: the judges compare images"),
    "weights": ({}, {"denoiser": {"weights": "x"}}, "denoiser.weights: are for the networks of this program"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_in_one_line(tmp_path: Path, case: str):
    given, changes, message = REFUSED[case]
    parts: dict[str, Any] = {"denoiser": OwnDenoiser, "psi": OwnEncoder, "data": own_data()}
    with pytest.raises(UserError, match=message) as caught:
        train(own_config(**changes), **{**parts, **given}, run_dir=tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_other_networks_or_data(tmp_path: Path):
    run = tmp_path / "run"
    plain = {"game": {"mode": "plain"}}
    assert trained(run, **plain)
    more = own_config(**plain, train={"steps": 6})
    with pytest.raises(UserError, match="networks has other weights than the denoiser and Psi that are given now"):
        train(more, denoiser=partial(OwnDenoiser, hidden=17), psi=OwnEncoder, data=own_data(), run_dir=run)
    with pytest.raises(UserError, match="data is not what it was: 3 added"):
        train(more, denoiser=OwnDenoiser, psi=OwnEncoder, data=own_data(63), run_dir=run)
    with pytest.raises(UserError, match=r"denoiser.architecture=own: is given to sadm_fast.train or sadm_fast.load"):
        load(run)
    with pytest.raises(UserError, match=r"does not fit the run's config.json"):
        load(run, denoiser=partial(OwnDenoiser, hidden=17))


def test_square_pictures_need_no_networks_of_their_own(tmp_path: Path):
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (12, 1, 8, 8)).astype(np.float32)
    config = own_config(
        game={"mode": "plain"}, train={"steps": 1}, denoiser={"hidden_size": 8, "depth": 1, "num_heads": 1}
    )
    assert train(config, data=Arrays(images, [0, 1] * 6, ["benign", "malignant"]), run_dir=tmp_path / "run")
    written = check_config(json.loads((tmp_path / "run" / "config.json").read_text()))
    assert written.sample_shape == (1, 8, 8) and written.data.shape is None
    assert (tmp_path / "run" / "samples" / "real.png").exists()
    assert load(tmp_path / "run").sample([1]).shape == (1, 1, 8, 8)
