"""Files of weights, whole, damaged and malicious."""

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sadm_fast.errors import UserError
from sadm_fast.exchange.reading import read_weights
from sadm_fast.run.manifest import EMA_FILE
from tests.support.finished_run import finished_run

EMA = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
MODEL = {name: value + 1 for name, value in EMA.items()}
TRAINING = {"model": MODEL, "ema": EMA, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4, model="DiT-XL/2")}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_every_format_gives_the_same_tensors(tmp_path: Path) -> None:
    save_file(EMA, tmp_path / "x.safetensors")
    save_file(EMA, tmp_path / "x.bin")  # the content tells the format, not the name
    torch.save(EMA, tmp_path / "x.pt")
    torch.save(EMA, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(TRAINING, tmp_path / "training.pt")
    torch.save(EMA | {"bn.num_batches_tracked": torch.tensor(3)}, tmp_path / "counted.pth")
    for file in tmp_path.iterdir():
        assert same(read_weights("k", file), EMA), file


def test_the_weights_of_the_last_step_are_read_when_asked_for(tmp_path: Path) -> None:
    torch.save(TRAINING, tmp_path / "training.pt")
    assert same(read_weights("k", tmp_path / "training.pt", "model"), MODEL)
    torch.save({"ema": EMA}, tmp_path / "training.pt")
    with pytest.raises(UserError, match=r"cannot be read as weights \(it has no model, only ema\)$"):
        read_weights("k", tmp_path / "training.pt", "model")


def test_a_run_s_folder_and_a_checkpoint_s_mean_the_averaged_weights(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    checkpoint = run / "checkpoints/step-000010"
    wanted = read_weights("k", checkpoint / EMA_FILE)
    assert "blocks.0.attn.qkv.weight" in wanted
    assert same(read_weights("k", run), wanted) and same(read_weights("k", str(checkpoint)), wanted)


class Malicious:
    """A pickle of it calls os.mkdir when it is read as pickles usually are."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["alone", "beside"])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path: Path, where: str, zipped: bool) -> None:
    trap = Malicious(tmp_path / "was-run")
    content = trap if where == "alone" else EMA | {"x": trap}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"\(reading it would run posix.mkdir; only tensors are read\)$"):
        read_weights("k", tmp_path / "x.pt")
    assert not trap.path.exists()


def damage(path: Path, kind: str) -> None:
    if kind == "cut .pt":
        torch.save(EMA, path)
        path.write_bytes(path.read_bytes()[:-40])
    elif kind == "cut legacy":
        torch.save(EMA, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:-40])
    elif kind == "cut safetensors":
        save_file(EMA, path)
        path.write_bytes(path.read_bytes()[:-4])
    elif kind == "LFS pointer":
        path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 2700000000\n")
    elif kind == "a list":
        torch.save([torch.ones(1)], path)
    elif kind == "a number":
        torch.save({"a": 1.0}, path)
    elif kind == "whole numbers":
        torch.save({"a": torch.ones(1, dtype=torch.int32)}, path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "nothing":
        path.write_bytes(
            {"empty": b"", "short": b"1234567", "noise": b"\xff" * 64, "zeros": b"\x80" + bytes(200)}[kind]
        )


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("cut .pt", "neither safetensors nor what torch.save writes, or it is cut off"),
        ("cut legacy", "neither safetensors nor what torch.save writes, or it is cut off"),
        ("cut safetensors", "incomplete"),
        ("LFS pointer", 'git lfs pull"'),
        ("a list", "it holds a list, not tensors by name"),
        ("a number", "its a is a float, not a tensor"),
        ("whole numbers", "a holds int32, not floating-point numbers"),
        ("folder", "is a folder without weights"),
        ("nothing", "there is no such file"),
        *((kind, "neither safetensors nor what torch.save writes") for kind in ("empty", "short", "noise", "zeros")),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, kind: str, said: str) -> None:
    path = tmp_path / "weights"
    damage(path, kind)
    with pytest.raises(UserError) as caught:
        read_weights("denoiser.weights", path)
    text = str(caught.value)
    assert text.startswith(f"denoiser.weights={path}: ") and said in text and "\n" not in text
