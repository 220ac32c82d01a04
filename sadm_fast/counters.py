"""Random numbers as a function of (seed, purpose, sample). There is no state, so no checkpoint has to save one.

The noise of global sample n is the same on any rank, number of ranks, division into micro-batches and device. The
generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in torch's integer
operations. Counter words: (block, purpose + 256 step, low half of n, high half of n); key: the two halves of the seed.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from sadm_kernels.streams import draws_on, has_streams, philox_draw, philox_first, philox_keep, philox_uniform

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_PURPOSE_BITS = 8  # of their counter word; the step of a sampler has the other 24
_CPU_CHUNK = 1 << 18  # numbers drawn at once on a CPU, so that their integers fit into its caches
_CPU_CHUNK_OF_FLOATS = 1 << 20  # the same where C++ draws, which keeps no integers


class Purpose(IntEnum):
    """What a random number is for. The numbers of two purposes are independent."""

    NOISE = 0  # eps of the diffusion process
    TIME = 1  # noise level t
    LABEL_DROP = 2  # whether a label becomes the null class
    FLIP = 3  # horizontal mirror
    ORDER = 4  # the permutation of an epoch
    LATENT = 5  # the draw from a cached posterior
    SAMPLE_NOISE = 6  # starting noise of generated samples
    SPLIT = 7  # which of two sets an image belongs to
    STEP_NOISE = 8  # what a stochastic sampler adds at one of its steps
    SAMPLE_LABEL = 9  # the class of a generated sample, where it is drawn
    DROPOUT = 10  # which elements of a layer are kept
    AUGMENT = 11  # what is done to an image, and how much
    LABEL_SHUFFLE = 12  # whose label an image is trained on with, where that is wrong on purpose


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Map four 32-bit counter words (int64, shapes that broadcast) and a key to four random 32-bit words (int64)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap around, but their 64 bits are right; the masks remove the sign bits that >> copies in.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (p0 >> 32).bitwise_and_(_MASK), (p1 >> 32).bitwise_and_(_MASK)
        c0, c2 = (high1 ^ c1).bitwise_xor_(k0), (high0 ^ c3).bitwise_xor_(k1)
        c1, c3 = p1.bitwise_and_(_MASK), p0.bitwise_and_(_MASK)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _key(seed: int) -> tuple[int, int]:
    return seed & _MASK, (seed >> 32) & _MASK


def _words(seed: int, stream: int, sample_ids: Tensor, count: int) -> Tensor:
    """Draw `count` 32-bit words for each sample: int64 [B, count]. stream: purpose + 256 step."""
    blocks = -(-count // 4)
    n = sample_ids.to(torch.int64).view(-1, 1)
    block = torch.arange(blocks, device=n.device)
    counter = (block, torch.full_like(n[:1], int(stream)), n & _MASK, (n >> 32) & _MASK)
    words = philox4x32(counter, _key(seed))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :count]


def uniform(seed: int, purpose: Purpose, sample_ids: Tensor, count: int = 1) -> Tensor:
    """Draw uniform numbers in the open interval (0, 1): float64 [B, count] for int64 sample_ids [B]."""
    return (_words(seed, purpose, sample_ids, count).double() + 0.5) * 2.0**-32


def uniform_for(seed: int, purposes: Sequence[Purpose], sample_ids: Tensor) -> Tensor:
    """Draw what `uniform` draws first for each purpose, at once: float64 [len(purposes), B] for sample_ids [B]."""
    if sample_ids.device.type == "cpu" and has_streams():
        return philox_first(seed, [int(purpose) for purpose in purposes], sample_ids)
    n = sample_ids.to(torch.int64)
    streams = torch.tensor([[int(purpose)] for purpose in purposes], device=n.device)
    first, *_ = philox4x32((torch.zeros_like(n), streams, n & _MASK, (n >> 32) & _MASK), _key(seed))
    return (first.double() + 0.5) * 2.0**-32


def normal_and_uniform_for(
    seed: int, purpose: Purpose, shape: Sequence[int], others: tuple[Purpose, Purpose], sample_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """What `normal` draws for one purpose and `uniform_for` for two others; one launch on a GPU with Triton."""
    if draws_on(sample_ids.device):
        first, second = others
        drawn = philox_draw(seed, int(purpose), (int(first), int(second)), sample_ids, math.prod(shape))
        return drawn[0].view(-1, *shape), drawn[1]
    return normal(seed, purpose, sample_ids, shape), uniform_for(seed, others, sample_ids)


def normal(seed: int, purpose: Purpose, sample_ids: Tensor, shape: Sequence[int], step: int = 0) -> Tensor:
    """Draw standard normal numbers (Box-Muller): float32 [B, *shape] for int64 sample_ids [B].

    step: 0 <= step < 2^24; a sample's numbers of different steps are independent.
    """
    count, stream = math.prod(shape), int(purpose) + (step << _PURPOSE_BITS)
    half = -(-count // 2)
    z = torch.empty(len(sample_ids), 2, half, dtype=torch.float32, device=sample_ids.device)
    chunk = _CPU_CHUNK_OF_FLOATS if has_streams() else _CPU_CHUNK
    at_once = max(1, chunk // count if sample_ids.device.type == "cpu" else len(sample_ids))
    for ids, out in zip(sample_ids.split(at_once), z.split(at_once), strict=True):
        _box_muller(_uniform32(seed, stream, ids, 2 * half).view(-1, 2, half), out)
    return z.flatten(1)[:, :count].reshape(-1, *shape)


def keep_mask(seed: int, layer: int, sample_ids: Tensor, shape: Sequence[int], rate: float) -> Tensor:
    """Dropout's mask: False at a share `rate` of the elements, bool [B, *shape] for int64 sample_ids [B].

    layer: 0 <= layer < 2^24; a sample's masks of different layers are independent. One operation to torch.compile.
    """
    stream = int(Purpose.DROPOUT) + (layer << _PURPOSE_BITS)
    key = seed - (1 << 64) if seed >> 63 else seed  # an operation's integers have a sign
    return _keep(key, stream, sample_ids, math.prod(shape), rate).view(-1, *shape)


@torch.library.custom_op("sadm_fast::keep", mutates_args=())
def _keep(seed: int, stream: int, sample_ids: Tensor, count: int, rate: float) -> Tensor:
    if draws_on(sample_ids.device):
        return philox_keep(seed, stream, sample_ids, count, rate)
    chunk = _CPU_CHUNK_OF_FLOATS if has_streams() else _CPU_CHUNK
    at_once = max(1, chunk // count if sample_ids.device.type == "cpu" else len(sample_ids))
    parts = [_uniform32(seed, stream, ids, count) >= rate for ids in sample_ids.split(at_once)]
    return torch.cat(parts)


@_keep.register_fake
def _(seed: int, stream: int, sample_ids: Tensor, count: int, rate: float) -> Tensor:
    return sample_ids.new_empty(len(sample_ids), count, dtype=torch.bool)


def _box_muller(u: Tensor, out: Tensor) -> None:
    """Make normal numbers of uniform ones, which are lost: float32 [B, 2, half] both."""
    radius, angle = u[:, 0], u[:, 1]
    # fp32 rounds the largest words up to 1.0; the logarithm is then 0, which is finite and a fair sample.
    radius.log_().mul_(-2.0).sqrt_()
    angle.mul_(2.0 * math.pi)
    torch.cos(angle, out=out[:, 0])
    torch.sin(angle, out=out[:, 1])
    out.mul_(radius.unsqueeze(1))


def _uniform32(seed: int, stream: int, sample_ids: Tensor, count: int) -> Tensor:
    """Return (word + 1/2) 2^-32 as float32 [B, count]; C++ and tensor operations give the same bits."""
    if sample_ids.device.type == "cpu" and has_streams():
        return philox_uniform(seed, stream, sample_ids, count)
    return _words(seed, stream, sample_ids, count).float().add_(0.5).mul_(2.0**-32)


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """Return the order of the n images in an epoch: int64 [n], a permutation of 0 .. n-1."""
    ids = torch.arange(n) + (epoch << 32)
    words = _words(seed, Purpose.ORDER, ids, 2)
    # The second word breaks ties of the first. Together they fit into 63 bits: one stable sort orders both.
    return torch.argsort((words[:, 0] << 31) | (words[:, 1] >> 1), stable=True)
