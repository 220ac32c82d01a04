"""EMA against closed forms: what share of the average each past step has."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from sadm_fast.config_training import ConstantEMA, ExponentialEMA, PowerEMA
from sadm_fast.ema import EMA, decay_schedule, posthoc_weights, power_gamma
from sadm_fast.engine.masters import Fragment

EPS = torch.finfo(torch.float32).eps
PROFILES: list[PowerEMA | ExponentialEMA] = [
    PowerEMA(profile="power", std=0.1),
    ExponentialEMA(profile="exponential", decay=0.999),
]
every_profile = pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.profile)


def owner(*values: Tensor, starts: tuple[int, ...] | None = None) -> Callable[[], list[Fragment]]:
    """Fragments "p0", "p1", ... as an engine hands them out: new tuples around the same memory at each call."""
    starts = starts or (0,) * len(values)
    return lambda: [Fragment(f"p{i}", s, v) for i, (s, v) in enumerate(zip(starts, values, strict=True))]


# Karras et al. 2023 (EDM2) give these values.
@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.972), (0.10, 6.937), (0.25, 0.720)])
def test_gamma_has_the_published_values(std: float, gamma: float) -> None:
    assert power_gamma(std) == pytest.approx(gamma, abs=6e-4)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.279])
def test_gamma_gives_the_profile_its_relative_width(std: float) -> None:
    """The profile on (0, 1) has density (gamma + 1) t^gamma, whose deviation is `std`."""
    gamma = power_gamma(std)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert math.sqrt(square - mean**2) == pytest.approx(std, rel=1e-6)


@every_profile
def test_the_first_update_copies_the_weights(profile: PowerEMA | ExponentialEMA) -> None:
    weights = torch.randn(7, generator=torch.Generator().manual_seed(0))
    ema = EMA(owner(weights), profile)
    weights.mul_(3.0).add_(1.0)
    ema.update()
    assert torch.equal(ema.average[0].value, weights) and ema.updates == 1


def power_shares(steps: int) -> list[float]:
    """Step k has the share (k^(g+1) - (k-1)^(g+1)) / n^(g+1): the profile integrated over its step."""
    exponent = power_gamma(0.1) + 1
    return [(k**exponent - (k - 1) ** exponent) / steps**exponent for k in range(1, steps + 1)]


def exponential_shares(steps: int) -> list[float]:
    """While the decay grows as (n-1)/(n+9), step k has the share 10 k (k+1) ... (k+8) / (n (n+1) ... (n+9))."""
    whole = math.prod(range(steps, steps + 10))
    return [10 * math.prod(range(k, k + 9)) / whole for k in range(1, steps + 1)]


@pytest.mark.parametrize("steps", [1, 2, 5, 60])
@pytest.mark.parametrize(("profile", "shares"), list(zip(PROFILES, (power_shares, exponential_shares), strict=True)))
def test_the_average_is_the_closed_form_of_its_profile(profile, shares, steps: int) -> None:
    sequence = torch.randn(steps, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([100.0])  # the initial value must be forgotten
    ema = EMA(owner(weights), profile)
    for value in sequence:
        weights.fill_(float(value))
        ema.update()
    expected = shares(steps)
    assert sum(expected) == pytest.approx(1.0, rel=1e-9)
    exact = sum(share * float(value) for share, value in zip(expected, sequence, strict=True))
    # One rounding of values of order 1 a step.
    assert float(ema.average[0].value) == pytest.approx(exact, abs=2 * steps * EPS)


def test_an_exponential_profile_ends_at_its_decay() -> None:
    decay = decay_schedule(ExponentialEMA(profile="exponential", decay=0.9))
    values = [decay(n) for n in range(1, 2000)]
    assert values[0] == 0.0 and values == sorted(values)
    # (n - 1) / (n + 9) reaches 0.9 at n = 91.
    assert values[89] < 0.9 and set(values[90:]) == {0.9}
    weights = torch.zeros(1)
    ema = EMA(owner(weights), ExponentialEMA(profile="exponential", decay=0.9))
    ema.updates = 10_000
    weights.fill_(1.0)
    for n in range(1, 6):
        ema.update()
        assert float(ema.average[0].value) == pytest.approx(1 - 0.9**n, rel=8 * EPS)


@every_profile
def test_weights_that_stand_still_are_their_own_average(profile: PowerEMA | ExponentialEMA) -> None:
    weights = torch.randn(5, generator=torch.Generator().manual_seed(0))
    ema = EMA(owner(weights), profile)
    for _ in range(50):
        ema.update()
    assert torch.equal(ema.average[0].value, weights)


def test_the_average_has_memory_of_its_own_and_leaves_the_weights_alone() -> None:
    weights = torch.ones(3, requires_grad=True)
    ema = EMA(owner(weights), PROFILES[0])
    average = ema.average[0].value
    assert not average.requires_grad and average.data_ptr() != weights.data_ptr()
    ema.update()
    with torch.no_grad():
        weights.add_(1.0)
    assert average.tolist() == [1.0, 1.0, 1.0]
    ema.update()
    assert weights.tolist() == [2.0, 2.0, 2.0] and ema.average[0].value is average


def test_fragments_are_asked_for_anew_at_each_update() -> None:
    """An engine may replace its tensors, for instance when it loads a checkpoint."""
    held = [torch.zeros(2)]
    ema = EMA(lambda: [Fragment("p", 0, held[0])], PROFILES[0])
    held[0] = torch.full((2,), 5.0)
    ema.update()
    assert ema.average[0].value.tolist() == [5.0, 5.0]


@every_profile
def test_fragments_average_like_the_whole(profile: PowerEMA | ExponentialEMA) -> None:
    whole = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    flat = whole.view(-1)
    together, parts = EMA(owner(flat), profile), EMA(owner(flat[:7], flat[7:], starts=(0, 7)), profile)
    generator = torch.Generator().manual_seed(1)
    for _ in range(9):
        whole.add_(torch.randn(4, 5, generator=generator))
        together.update()
        parts.update()
    assert torch.equal(torch.cat([f.value for f in parts.average]), together.average[0].value)
    assert [(f.name, f.start) for f in parts.average] == [("p0", 0), ("p1", 7)]


def test_load_takes_each_fragment_from_its_offset_in_the_full_parameter() -> None:
    pieces = [Fragment("a", 3, torch.zeros(4)), Fragment("b", 0, torch.zeros(2)), Fragment("a", 9, torch.zeros(3))]
    ema = EMA(lambda: pieces, PROFILES[0])
    ema.load({"a": torch.arange(12.0).view(3, 4), "b": torch.tensor([-1.0, -2.0]), "other": torch.zeros(1)}, updates=41)
    assert [f.value.tolist() for f in ema.average] == [[3.0, 4.0, 5.0, 6.0], [-1.0, -2.0], [9.0, 10.0, 11.0]]
    assert ema.updates == 41 and all(not f.value.any() for f in pieces)


@every_profile
def test_a_loaded_average_goes_on_as_if_never_interrupted(profile: PowerEMA | ExponentialEMA) -> None:
    def push(weights: Tensor, step: int) -> None:
        weights.copy_(torch.randn(6, generator=torch.Generator().manual_seed(step)))

    weights = torch.zeros(6)
    through = EMA(owner(weights), profile)
    for step in range(5):
        push(weights, step)
        through.update()
    saved = {"p0": through.average[0].value.clone()}
    resumed = EMA(owner(weights[:2], weights[2:4], weights[4:], starts=(0, 2, 4)), profile)
    resumed.load({f"p{i}": saved["p0"] for i in range(3)}, through.updates)
    for step in range(5, 9):
        push(weights, step)
        through.update()
        resumed.update()
    assert torch.equal(torch.cat([f.value for f in resumed.average]), through.average[0].value)


def test_a_constant_decay_averages_the_initialisation_too() -> None:
    weights = torch.zeros(1)
    ema = EMA(owner(weights), ConstantEMA(profile="constant", decay=0.9))
    weights.fill_(1.0)
    for n in range(1, 6):
        ema.update()
        assert float(ema.average[0].value) == pytest.approx(1 - 0.9**n, rel=8 * EPS)  # as DiT's train.py, from step 1


def _walk(steps: int) -> Iterator[Tensor]:
    """Weights that move as in training: a random walk."""
    weights = torch.zeros(50)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        weights.add_(torch.randn(50, generator=generator))
        yield weights


@pytest.mark.parametrize("std", [0.06, 0.08, 0.12, 0.15])
def test_any_length_is_made_of_stored_averages(std: float) -> None:
    """Against the average of that length, which was kept through all steps."""
    steps, every, lengths = 1200, 100, (0.05, 0.1)
    weights = torch.zeros(50)
    kept = {width: EMA(owner(weights), PowerEMA(profile="power", std=width)) for width in (*lengths, std)}
    stored: list[tuple[int, float]] = []
    averages: list[Tensor] = []
    for step, now in enumerate(_walk(steps), start=1):
        weights.copy_(now)
        for ema in kept.values():
            ema.update()
        if step % every == 0:
            stored += [(step, width) for width in lengths]
            averages += [kept[width].average[0].value.clone() for width in lengths]
    coefficients, error = posthoc_weights(stored, (steps, std))
    found = sum(weight * average.double() for weight, average in zip(coefficients, averages, strict=True))
    exact = kept[std].average[0].value.double()
    assert sum(coefficients) == pytest.approx(1.0, abs=1e-9)
    # What the fit leaves of the profile is what it may leave of the walk, which is smoother than white noise.
    assert error < 0.05
    nearest = min(float((average.double() - exact).norm()) for average in averages)
    assert float((found - exact).norm()) < min(0.1 * nearest, error * float(exact.norm()) + 0.02 * nearest)


def test_a_stored_average_is_its_own_reconstruction_and_a_far_one_is_told() -> None:
    stored = [(step, std) for step in (250, 500, 750, 1000) for std in (0.05, 0.1)]
    coefficients, error = posthoc_weights(stored, (750, 0.1))
    assert coefficients == pytest.approx([0, 0, 0, 0, 0, 1, 0, 0], abs=1e-6) and error < 1e-6
    assert posthoc_weights(stored[:2], (1000, 0.05))[1] > 0.5  # snapshots that end long before
