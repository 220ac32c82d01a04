"""The peers of a training step are the network that we train."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch

from benchmarks import dit_as_shipped, tuned_peer
from benchmarks.latent_game import with_noise
from sadm_fast.models.dit import Block, DiT, FinalLayer


def test_the_tuned_peer_is_the_same_network_in_torchs_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    network = with_noise(DiT(8, 2, 3, hidden_size=32, depth=2, num_heads=4, num_classes=5))
    peer = tuned_peer.plain(deepcopy(network))
    inputs = torch.randn(4, 3, 8, 8), torch.rand(4), torch.tensor([0, 1, 4, 5])
    expected = network(*inputs)
    assert expected.abs().mean() > 0.01

    def ours(*_: object) -> None:
        raise AssertionError("the peer called our kernel")

    for name in ("layer_norm_modulate", "gate_residual_norm_modulate"):
        monkeypatch.setattr(f"sadm_fast.models.dit.{name}", ours)
    torch.testing.assert_close(peer(*inputs), expected)
    assert type(network.blocks[0]) is Block and type(network.final_layer) is FinalLayer


def test_a_folder_without_a_checkout_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dit_as_shipped.main([str(tmp_path)])
    assert f"{tmp_path}: has no models.py" in capsys.readouterr().err
