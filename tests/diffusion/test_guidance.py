"""Guidance: classifier-free, by a worse network, of some channels, at some noise levels; clipping."""

import pytest
import torch
from torch import Tensor, nn

from sadm_fast.diffusion import EDM, VP, Flow, Process, denoise, guided
from sadm_fast.diffusion.process import per_sample

PROCESSES: list[Process] = [EDM(sigma_data=0.5), Flow(), VP()]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


class Recorder(nn.Module):
    """A network whose answer is a known function of image, time and label; remembers its calls."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        self.calls.append((x, time, labels))
        channel = torch.arange(1.0, x.shape[1] + 1).view(1, -1, 1, 1)
        return 0.1 * x + self.gain * channel * per_sample(labels.float(), x) + 1e-3 * per_sample(time, x)


def start_of(process: Process, size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(size, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.full((size,), 400) if isinstance(process, VP) else torch.full((size,), 0.4)
    return x, t, torch.tensor([0, 2, 5])


@every_process
def test_denoise_is_the_process_around_the_network(process: Process) -> None:
    network = Recorder()
    x, t, labels = start_of(process)
    found = denoise(process, network, x, t, labels)
    images, time = process.model_input(x, t)
    torch.testing.assert_close(found, process.to_x0(network(images, time, labels), x, t), rtol=0, atol=0)
    assert torch.equal(network.calls[0][1], time) and torch.equal(network.calls[0][2], labels)


@every_process
def test_guidance_of_scale_1_is_the_conditional_answer_in_one_call(process: Process) -> None:
    network = Recorder()
    x, t, labels = start_of(process)
    found = guided(process, network, labels, 9, 1.0)(x, t)
    assert len(network.calls) == 1 and len(network.calls[0][0]) == len(x)
    assert torch.equal(network.calls[0][2], labels)
    assert torch.equal(found, denoise(process, Recorder(), x, t, labels))


@every_process
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 4.0])
def test_guidance_extrapolates_every_channel_from_the_null_class(process: Process, scale: float) -> None:
    network = Recorder()
    x, t, labels = start_of(process)
    found = guided(process, network, labels, 9, scale)(x, t)
    assert len(network.calls) == 1 and network.calls[0][2].tolist() == [0, 2, 5, 9, 9, 9]
    conditional = denoise(process, Recorder(), x, t, labels)
    free = denoise(process, Recorder(), x, t, torch.full_like(labels, 9))
    expected = free + scale * (conditional - free)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    if scale != 0:
        difference = (found - free).abs().amax(dim=(0, 2, 3))
        assert (difference > 0.1).all(), f"some channels are not guided: {difference.tolist()}"


@every_process
def test_the_first_channels_alone_are_guided_if_asked(process: Process) -> None:
    x, t, labels = start_of(process)
    found = guided(process, Recorder(), labels, 9, 1.5, channels=3)(x, t)
    assert torch.equal(found[:, :3], guided(process, Recorder(), labels, 9, 1.5)(x, t)[:, :3])
    torch.testing.assert_close(found[:, 3:], denoise(process, Recorder(), x, t, labels)[:, 3:], rtol=1e-6, atol=1e-5)


@every_process
def test_outside_the_interval_of_noise_levels_there_is_no_guidance_and_one_call(process: Process) -> None:
    x, t, labels = start_of(process)
    level = float(t[0])
    plain, everywhere = (guided(process, Recorder(), labels, 9, scale)(x, t) for scale in (1.0, 1.5))
    for interval, expected in (
        ((level, level * 2), everywhere),
        ((level / 2, level), everywhere),
        ((level * 1.01, level * 2), plain),
        ((0.0, level * 0.99), plain),
    ):
        network = Recorder()
        assert torch.equal(guided(process, network, labels, 9, 1.5, interval=interval)(x, t), expected)
        assert len(network.calls[0][0]) == (len(x) if expected is plain else 2 * len(x))


@every_process
def test_a_worse_network_guides_with_the_same_labels(process: Process) -> None:
    """Autoguidance: away from what `guide` says of the same label."""
    network, guide = Recorder(), Recorder(gain=0.5)
    x, t, labels = start_of(process)
    found = guided(process, network, labels, 9, 2.0, guide=guide)(x, t)
    good, bad = (denoise(process, Recorder(gain=gain), x, t, labels) for gain in (1.0, 0.5))
    torch.testing.assert_close(found, 2 * good - bad, rtol=1e-6, atol=1e-5)
    assert torch.equal(network.calls[0][2], labels) and torch.equal(guide.calls[0][2], labels)
    guided(process, network, labels, 9, 1.0, guide=guide)(x, t)
    assert len(guide.calls) == 1


@every_process
def test_clipping_comes_after_guidance(process: Process) -> None:
    x, t, labels = start_of(process)
    found = guided(process, Recorder(), labels, 9, 1.5)(x, t)
    assert found.abs().max() > 1
    assert torch.equal(guided(process, Recorder(), labels, 9, 1.5, clip=True)(x, t), found.clamp(-1, 1))


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("clip", [False, True])
def test_a_learned_variance_is_that_of_the_label_unguided_and_unclipped(channels: int | None, clip: bool) -> None:
    process = VP(learn_sigma=True)

    class TwoFold(Recorder):
        def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
            return torch.cat([super().forward(x, time, labels), 5 + per_sample(labels.float(), x).expand_as(x)], dim=1)

    x, t, labels = start_of(process)
    found = guided(process, TwoFold(), labels, 9, 1.5, channels=channels, clip=clip)(x, t)
    assert found.shape[1] == 8
    assert torch.equal(found[:, 4:], 5 + per_sample(labels.float(), x).expand_as(x))
    assert torch.equal(found[:, :4], guided(VP(), Recorder(), labels, 9, 1.5, channels=channels, clip=clip)(x, t))
