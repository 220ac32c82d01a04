"""fp32 or bf16: what is measured, taken, said and kept."""

import json
from pathlib import Path

import pytest
import torch

from sadm_fast import precision
from sadm_fast.config import Config, check_config
from sadm_fast.precision import allow_tf32, bf16_gain, kept_precision, settle_precision, slow_bf16, tf32

CPU = torch.device("cpu")


def config(asked: str) -> Config:
    return check_config({"name": "precision", "train": {"precision": asked}})


def test_the_measurement_is_a_ratio_of_times() -> None:
    assert 0.001 < bf16_gain(CPU) < 1000


@pytest.mark.parametrize(
    ("asked", "gain", "taken", "words"),
    [
        ("auto", 3.0, "bf16", "3.0 times as fast as in fp32 on this processor; training in bf16"),
        ("auto", 1.05, "fp32", "training in fp32"),
        ("auto", 0.25, "fp32", "4.0 times as slow as in fp32 on this processor; training in fp32"),
        ("bf16", 3.0, "bf16", "3.0 times as fast as in fp32 on this processor"),
        ("bf16", 0.25, "bf16", "4.0 times as slow as in fp32 on this processor; fp32, or auto in a new run"),
    ],
)
def test_auto_takes_bf16_only_where_it_is_quicker_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, asked: str, gain: float, taken: str, words: str
) -> None:
    monkeypatch.setattr(precision, "bf16_gain", lambda device: gain)
    settled, line = settle_precision(config(asked), CPU)
    assert settled == config(taken) and settled.fingerprint() == config(taken).fingerprint()
    assert line is not None and line.startswith(f"train.precision={asked}: a matrix product in bf16 is ")
    assert words in line


def test_a_bf16_that_is_slower_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_gain", lambda device: 0.25)
    assert slow_bf16(CPU) == (
        "a matrix product in bf16 is 4.0 times as slow as in fp32 here; --precision fp32 is quicker"
    )
    monkeypatch.setattr(precision, "bf16_gain", lambda device: 3.0)
    assert slow_bf16(CPU) is None


def test_fp32_measures_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_gain", None)
    assert settle_precision(config("fp32"), CPU) == (config("fp32"), None)


def test_tf32_is_on_or_off_for_products_and_convolutions_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    for of in flags:
        monkeypatch.setattr(of, "allow_tf32", of.allow_tf32)  # to be brought back
    for allowed in (True, False):
        allow_tf32(allowed)
        assert [of.allow_tf32 for of in flags] == [allowed, allowed]


def test_tf32_for_a_while_leaves_both_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    monkeypatch.setattr(products, "allow_tf32", False)
    monkeypatch.setattr(convolutions, "allow_tf32", True)
    for allowed in (True, False):
        with pytest.raises(ValueError), tf32(allowed):
            assert (products.allow_tf32, convolutions.allow_tf32) == (allowed, allowed)
            raise ValueError
        assert (products.allow_tf32, convolutions.allow_tf32) == (False, True)


def test_a_run_keeps_what_auto_was_at_its_start(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    assert kept_precision(config("auto"), file) == config("auto")
    for taken in ("bf16", "fp32"):
        file.write_text(json.dumps(config(taken).resolved()))
        assert kept_precision(config("auto"), file) == config(taken)
        assert kept_precision(config("fp32"), file) == config("fp32")
    file.write_text("{")
    assert kept_precision(config("auto"), file) == config("auto")
