"""Each function of game.py against its formula, written out in float64 with loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sadm_fast.diffusion import EDM, VP, Flow, Process
from sadm_fast.game import (
    Batch,
    Comparison,
    at_strength,
    denoiser_loss,
    discriminator_loss,
    draw,
    frozen,
    gate,
    predict,
    schedule,
    structure_distance,
)
from sadm_kernels import Queue, structure_loss
from sadm_kernels.streams import has_streams
from tests.support.dispatched import Dispatched

SIZE, WIDTH, CLASSES = 6, 5, 3
# What is computed in float32 is compared with float64: some ten roundings of numbers of this size.
CLOSE = 20 * 2.0**-24


class Psi(nn.Module):
    """[B, 1, 4, 4] -> [B, WIDTH] by one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, 16, generator=torch.Generator().manual_seed(3)))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).to(self.weight.dtype) @ self.weight.T


def toy_denoiser(x: Tensor, time: Tensor, y: Tensor) -> Tensor:
    """A network whose output depends on all that it is given."""
    return torch.tanh(x) + 0.01 * time.view(-1, 1, 1, 1) + 0.1 * y.view(-1, 1, 1, 1)


def batch(process: Process | None = None) -> Batch:
    ids = torch.arange(SIZE)
    x0 = torch.randn(SIZE, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return draw(process or EDM(), x0, ids % CLASSES, ids, seed=0, null_class=CLASSES, label_dropout=0.5)


def estimate() -> Tensor:
    return torch.randn(SIZE, 1, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_(True)


def distance(f: Tensor, g: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """[4] with unit rows, Euclidean relations, squared penalty: two nested loops in the dtype of f."""
    f, g = (x / x.norm(dim=1, keepdim=True) for x in (f, g))
    above, below = f.new_zeros(()), f.new_zeros(())
    for i in range(len(f)):
        for j in range(len(f)):
            if i != j and counts[i, j]:
                omega = w[i] * w[j]
                above = above + omega * ((g[i] - g[j]).norm() - (f[i] - f[j]).norm()) ** 2
                below = below + omega
    return above / below


def test_noise_level_and_dropped_label_belong_to_the_sample() -> None:
    whole, ids = batch(), torch.arange(SIZE)
    part = draw(EDM(), whole.x0[2:4], ids[2:4] % CLASSES, ids[2:4], seed=0, null_class=CLASSES, label_dropout=0.5)
    assert all(torch.equal(a, b) for a, b in zip(whole.each(lambda x: x[2:4])[:-1], part[:-1], strict=True))
    dropped = whole.condition == CLASSES
    assert dropped.any() and not dropped.all() and torch.equal(whole.condition[~dropped], whole.labels[~dropped])
    assert torch.equal(whole.t, EDM().sample_t(whole.level))


@pytest.mark.skipif(not has_streams(), reason="the C++ library was not built")
@pytest.mark.parametrize(("process", "most"), [(VP(), 12), (EDM(), 14), (Flow(), 11)], ids=["vp", "edm", "flow"])
def test_a_draw_is_a_dozen_operations(process: Process, most: int) -> None:
    """7 for the noise, 2 for the labels, and what the process makes of the uniform number; views are not counted."""
    x0, ids = torch.zeros(64, 4, 32, 32), torch.arange(64)
    with Dispatched() as mode:
        draw(process, x0, ids, ids, seed=0, null_class=64, label_dropout=0.1)
    assert len(mode.names) <= most, mode.names


@pytest.mark.parametrize("process", [EDM(), VP(), Flow()], ids=lambda p: type(p).__name__)
def test_the_denoising_loss_is_the_weighted_squared_error(process: Process) -> None:
    b = batch(process)
    xhat0, loss = predict(process, toy_denoiser, b)
    alpha, sigma = (x.double().view(-1, 1, 1, 1) for x in process.alpha_sigma(b.t))
    x_t = (alpha * b.x0.double() + sigma * b.noise.double()).float()
    # How a process reads its network is tested in tests/diffusion; here, what is done with it.
    output = toy_denoiser(*process.model_input(x_t, b.t), b.condition)
    size = float(process.to_x0(output, x_t, b.t).abs().max())  # VP divides by a small alpha
    torch.testing.assert_close(xhat0, process.to_x0(output, x_t, b.t), rtol=1e-5, atol=1e-6 * size)
    error = (b.x0.double() - xhat0.double()).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss.double(), process.loss_weight(b.t).double() * error, rtol=CLOSE, atol=CLOSE)


def test_a_learned_variance_adds_its_loss() -> None:
    process, b = VP(learn_sigma=True), batch(VP())

    def denoiser(x: Tensor, time: Tensor, y: Tensor) -> Tensor:
        return torch.cat([toy_denoiser(x, time, y), torch.sin(x)], dim=1)

    x_t = process.add_noise(b.x0, b.noise, b.t)
    variance = process.variance_loss(denoiser(x_t, b.t.float(), b.condition), b.x0, x_t, b.t)
    assert variance is not None and variance.any()
    expected = predict(VP(), toy_denoiser, b).loss + variance
    torch.testing.assert_close(predict(process, denoiser, b).loss, expected)


def test_the_gate_is_a_sigmoid_that_never_closes() -> None:
    log_snr = torch.tensor([-40.0, -3.0, -2.2, 0.0, 9.0])
    expected = [max(1e-6, 1 / (1 + math.exp(-2.0 * (x + 2.2)))) for x in log_snr.tolist()]
    torch.testing.assert_close(gate(log_snr, -2.2, 2.0), torch.tensor(expected))
    assert Comparison().weight(log_snr) is None


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("same_class", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_s_of_the_denoiser_equals_the_formula(impl: str, same_class: bool, gated: bool) -> None:
    psi, b, xhat0 = Psi(), batch(), estimate()
    compare = Comparison(gate_log_snr=0.0 if gated else None, same_class=same_class, impl=impl)
    with frozen(psi):
        structure = structure_distance(compare, EDM(), psi, b, xhat0)
        (found,) = torch.autograd.grad(structure.distance, xhat0)
    w = gate(EDM().log_snr(b.t).double(), 0.0, 4.0) if gated else torch.ones(SIZE, dtype=torch.float64)
    counts = b.labels[:, None] == b.labels if same_class else torch.ones(SIZE, SIZE, dtype=torch.bool)
    twin, x = Psi().double(), xhat0.detach().double().requires_grad_(True)
    expected = distance(twin(b.x0).detach(), twin(x), w, counts)
    (gradient,) = torch.autograd.grad(expected, x)
    # A distance of unit rows comes from 2 - 2 ab in float32: a few eps on numbers of order 1, and in its slope.
    torch.testing.assert_close(structure.distance.detach().double(), expected.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.double(), gradient, rtol=1e-3, atol=1e-5)


def test_the_denoiser_descends_the_loss_and_s_with_f_detached_and_psi_frozen() -> None:
    psi, b, xhat0 = Psi(), batch(), estimate()
    x0 = b.x0.clone().requires_grad_(True)
    losses = torch.rand(SIZE, generator=torch.Generator().manual_seed(5))
    with frozen(psi):
        structure = structure_distance(Comparison(), EDM(), psi, b._replace(x0=x0), xhat0)
        total = denoiser_loss(losses, structure.distance, 0.3)
        total.backward()
    expected = losses.double().mean() + 0.3 * structure.distance.detach().double()
    torch.testing.assert_close(total.detach().double(), expected, rtol=CLOSE, atol=CLOSE)
    assert x0.grad is None and psi.weight.grad is None and xhat0.grad is not None and xhat0.grad.any()
    assert psi.weight.requires_grad  # it asks again after the turn
    assert torch.equal(denoiser_loss(losses), losses.mean())  # before the game


def test_the_discriminator_ascends_s_through_both_features_with_xhat0_detached() -> None:
    psi, b, xhat0 = Psi(), batch(), estimate()
    loss = discriminator_loss(Comparison(), EDM(), psi, b, xhat0)
    found, of_xhat0 = torch.autograd.grad(loss, [psi.weight, xhat0], allow_unused=True)
    twin = Psi().double()
    everything = torch.ones(SIZE, SIZE, dtype=torch.bool)
    s = distance(twin(b.x0), twin(xhat0.detach()), torch.ones(SIZE, dtype=torch.float64), everything)
    (gradient,) = torch.autograd.grad(-s, twin.weight)
    torch.testing.assert_close(loss.detach().double(), -s.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.double(), gradient, rtol=1e-3, atol=1e-5)
    assert of_xhat0 is None


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_without_a_pair_there_is_no_structure_term(impl: str) -> None:
    psi, b, xhat0 = Psi(), batch()._replace(labels=torch.arange(SIZE)), estimate()
    compare = Comparison(same_class=True, impl=impl)
    with frozen(psi):
        structure = structure_distance(compare, EDM(), psi, b, xhat0)
        (of_xhat0,) = torch.autograd.grad(structure.distance, xhat0)
    (of_psi,) = torch.autograd.grad(discriminator_loss(compare, EDM(), psi, b, xhat0), psi.weight)
    assert float(structure.distance.detach()) == 0.0
    assert torch.equal(of_xhat0, torch.zeros_like(of_xhat0)) and torch.equal(of_psi, torch.zeros_like(of_psi))


def test_the_queue_adds_its_pairs() -> None:
    psi, b, xhat0 = Psi(), batch(), estimate()
    real, fake = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(2))
    past = Queue(real, fake, torch.ones(4), torch.arange(4) % CLASSES)
    with frozen(psi):
        s = structure_distance(Comparison(), EDM(), psi, b, xhat0, past).distance
    twin = Psi().double()
    f = torch.cat([twin(b.x0), real.double()]).detach()
    g = torch.cat([twin(xhat0), fake.double()]).detach()
    counts = torch.ones(len(f), len(f), dtype=torch.bool)
    counts[SIZE:, SIZE:] = False  # two samples of the past are not compared with one another
    expected = distance(f, g, torch.ones(len(f), dtype=torch.float64), counts)
    torch.testing.assert_close(s.detach().double(), expected, rtol=1e-4, atol=1e-6)


def test_lambda_grows_linearly_once_the_game_has_begun() -> None:
    assert [schedule(step, 0.3, 2, 3, 99, 0) for step in range(7)] == pytest.approx([0, 0, 0.1, 0.2, 0.3, 0.3, 0.3])
    assert [schedule(step, 0.3, 1, 0, 99, 0) for step in range(3)] == [0.0, 0.3, 0.3]


def test_lambda_falls_linearly_to_the_end_of_the_game() -> None:
    found = [schedule(step, 0.3, 0, 2, 6, 3) for step in range(8)]
    assert found == pytest.approx([0.15, 0.3, 0.3, 0.3, 0.2, 0.1, 0, 0])
    assert [schedule(step, 0.3, 0, 0, 2, 0) for step in range(4)] == [0.3, 0.3, 0.0, 0.0]


def test_the_samples_of_a_step_are_what_the_queue_wants() -> None:
    psi, gated = Psi(), Comparison(gate_log_snr=0.0)
    structure = structure_distance(gated, EDM(), psi, batch(), estimate())
    real, fake, weight, labels = structure.samples
    assert torch.equal(real, psi(batch().x0)) and torch.equal(fake, psi(estimate()))
    expected = gated.weight(EDM().log_snr(batch().t))
    assert weight is not None and expected is not None and torch.equal(weight, expected)
    assert labels is not None and torch.equal(labels, batch().labels)
    assert not any(x.requires_grad for x in structure.samples if x is not None)
    weight = structure_distance(Comparison(), EDM(), psi, batch(), estimate()).samples.weight
    assert weight is not None and torch.equal(weight, torch.ones(SIZE))


def test_the_samples_of_a_step_can_share_a_noise_level_and_keep_their_noise() -> None:
    process, ids = EDM(), torch.arange(8, 20)
    x0 = torch.zeros(len(ids), 1, 4, 4)
    given: dict[str, Any] = {"seed": 0, "null_class": CLASSES, "label_dropout": 0.5}
    own = draw(process, x0, ids % CLASSES, ids, **given)
    shared = draw(process, x0, ids % CLASSES, ids, **given, samples_a_level=4)
    assert torch.equal(shared.level, own.level[::4].repeat_interleave(4)) and len(own.level.unique()) == 12
    assert torch.equal(shared.t, process.sample_t(shared.level))
    assert torch.equal(shared.noise, own.noise) and torch.equal(shared.condition, own.condition)


def test_with_one_noise_level_the_gate_weighs_s_as_a_whole() -> None:
    psi, b, xhat0 = Psi(), batch(), estimate()
    b = b._replace(t=b.t[:1].expand(SIZE))
    one, open_ = Comparison(gate_log_snr=3.0, one_level=True), Comparison()
    expected = gate(EDM().log_snr(b.t), 3.0, 4.0)[0]
    assert 1e-3 < float(expected) < 0.999
    for s in (
        lambda compare: structure_distance(compare, EDM(), psi, b, xhat0).distance,
        lambda compare: discriminator_loss(compare, EDM(), psi, b, xhat0),
    ):
        torch.testing.assert_close(s(one), expected * s(open_))
    weight = structure_distance(one, EDM(), psi, b, xhat0).samples.weight
    assert weight is not None and torch.equal(weight, torch.ones(SIZE))


def test_at_equal_strength_s_pulls_as_hard_as_the_denoising_loss() -> None:
    psi, b = Psi(), batch()
    prediction = predict(EDM(), toy_denoiser, b)
    xhat0 = prediction.xhat0.detach().requires_grad_(True)
    weight = EDM().loss_weight(b.t)
    distance = structure_distance(Comparison(), EDM(), psi, b, xhat0).distance
    (of_s,) = torch.autograd.grad(distance, xhat0, retain_graph=True)
    error = (weight * (b.x0 - xhat0).square().flatten(1).mean(dim=1)).mean()
    (of_loss,) = torch.autograd.grad(error, xhat0)
    pull = at_strength(distance, b, xhat0, weight)
    (found,) = torch.autograd.grad(pull, xhat0)
    torch.testing.assert_close(pull.detach(), distance.detach())
    torch.testing.assert_close(found, of_s * (of_loss.norm() / of_s.norm()))
    # The same in each sample, with a factor of its own.
    each = torch.linspace(0.0, 1.0, SIZE)
    distance = structure_distance(Comparison(), EDM(), psi, b, xhat0).distance
    (found,) = torch.autograd.grad(at_strength(distance, b, xhat0, weight, each), xhat0)
    lengths = [x.flatten(1).norm(dim=1) for x in (found, of_loss, of_s)]
    torch.testing.assert_close(lengths[0], each * lengths[1])
    torch.testing.assert_close(found.flatten(1), of_s.flatten(1) * (lengths[0] / lengths[2])[:, None])
    # Equal samples have S = 0 and no gradient: nothing is divided by its length.
    flat = b._replace(x0=torch.zeros_like(b.x0))
    equal = torch.zeros_like(b.x0).requires_grad_(True)
    nothing = at_strength(structure_distance(Comparison(), EDM(), psi, flat, equal).distance, flat, equal, weight)
    assert float(nothing.detach()) == 0.0 and not torch.autograd.grad(nothing, equal)[0].any()


@pytest.mark.parametrize("penalty", ["squared", "absolute", "huber"])
@pytest.mark.parametrize("relation", ["euclidean", "cosine", "gaussian"])
@pytest.mark.parametrize("normalize", ["unit", "none"])
def test_tokens_of_a_map_are_compared_as_the_samples_of_a_batch_are(
    penalty: str, relation: str, normalize: str
) -> None:
    """One sample's tokens as if they were samples: sadm_kernels gives the same S."""
    generator = torch.Generator().manual_seed(7)
    f, g = (torch.randn(3, 5, 4, generator=generator) for _ in range(2))
    options: dict[str, Any] = {"penalty": penalty, "relation": relation, "normalize": normalize}
    weight, labels = torch.tensor([0.0, 1.0, 3.0]), torch.arange(3)
    compare = Comparison(**options, delta=0.1, tau=0.7, compare="tokens", gate_log_snr=0.0)
    alone = [structure_loss(f[i], g[i], **options, delta=0.1, tau=0.7, impl="reference") for i in range(3)]
    log_snr = torch.logit(weight / 4) / compare.gate_slope
    expected = (alone[1] + 3 * alone[2]) / 4
    torch.testing.assert_close(compare.of_real(f, log_snr, labels)(g), expected, rtol=1e-4, atol=1e-5)
    cells = Comparison(**options, delta=0.1, tau=0.7, compare="locations", same_class=True)
    labels = torch.tensor([1, 0, 1])
    at_cells = [
        structure_loss(f[:, p], g[:, p], **options, labels=labels, delta=0.1, tau=0.7, impl="reference")
        for p in range(5)
    ]
    found = cells.of_real(f, torch.zeros(3), labels)(g)
    torch.testing.assert_close(found, torch.stack(at_cells).mean(), rtol=1e-4, atol=1e-5)


def test_features_alone_are_the_control_without_relations() -> None:
    f, g = torch.eye(4)[:2], torch.eye(4)[1:3]
    compare = Comparison(compare="features")
    assert compare.of_real(f, torch.zeros(2), torch.zeros(2))(3.0 * g).item() == pytest.approx(2.0)
    turned = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])  # all relations stay, no feature does
    f = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    assert compare.of_real(f, torch.zeros(2), torch.zeros(2))(f @ turned).item() == pytest.approx(2.0)
    assert Comparison().of_real(f, torch.zeros(2), torch.zeros(2))(f @ turned).item() == pytest.approx(0.0, abs=1e-6)


def test_maps_are_asked_of_an_encoder_that_has_some() -> None:
    rows = torch.ones(3, 4)
    with pytest.raises(ValueError, match="compare=tokens: Psi returned .3, 4., not tokens"):
        Comparison(compare="tokens").of_real(rows, torch.zeros(3), torch.zeros(3))(rows)


def test_the_denoisers_tokens_are_compared_with_what_psi_sees_in_x0() -> None:
    b, generator = batch(), torch.Generator().manual_seed(4)
    tokens = torch.randn(SIZE, 4, 7, generator=generator).requires_grad_(True)
    f = torch.randn(SIZE, 4, 3, generator=generator)
    compare = Comparison(compare="tokens")
    structure = structure_distance(compare, EDM(), lambda x0: f, b, estimate(), tokens=tokens)
    torch.testing.assert_close(structure.distance, compare.of_real(f, b.t, b.labels)(tokens))
    assert torch.autograd.grad(structure.distance, tokens)[0].any()
    pooled = structure_distance(Comparison(), EDM(), lambda x0: f[:, 0], b, estimate(), tokens=tokens).distance
    torch.testing.assert_close(pooled, structure_loss(f[:, 0], tokens.mean(dim=1)))
    with pytest.raises(ValueError, match="a map of 4 tokens against 3 of the denoiser; look at another stage"):
        structure_distance(compare, EDM(), lambda x0: f, b, estimate(), tokens=tokens[:, :3])
