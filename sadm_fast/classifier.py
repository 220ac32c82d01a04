"""Train a feature extractor as a classifier.

Used twice: Psi is "well trained" on the real data before the game starts, and the judge of `fid_classifier`
is another network trained the same way with another seed.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sadm_fast.errors import UserError
from sadm_fast.ranks.collectives import broadcast_state, is_distributed, sum_over_ranks


def _average_over_ranks(
    parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor], loss: Tensor, samples: int
) -> Tensor:
    """Average gradients, float buffers and the loss over ranks, each weighted by its samples.

    Returns the averaged loss, 0-d.

    The result equals that of one process holding every rank's batch, also when the batches differ in size.
    """
    if not is_distributed():
        return loss.detach()
    tensors = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    tensors += [*buffers, loss.detach().view(1)]
    flat = torch.cat([t.flatten().float() for t in tensors] + [torch.ones(1, device=loss.device)]) * samples
    flat = sum_over_ranks(flat)
    pieces = (flat[:-1] / flat[-1]).split([t.numel() for t in tensors])
    for parameter, piece in zip(parameters, pieces, strict=False):
        parameter.grad = piece.view_as(parameter).to(parameter.dtype)
    for buffer, piece in zip(buffers, pieces[len(parameters) :], strict=False):
        buffer.copy_(piece.view_as(buffer))
    return pieces[-1][0]


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images moved by up to a fourteenth of their size (2 of 28 pixels), the edge repeated.

    One shift for the whole batch: a function of the step alone, so it does not depend on the number of ranks.
    """
    height, width = images.shape[-2:]
    reach = min(height, width) // 14
    top, left = torch.randint(0, 2 * reach + 1, (2,), generator=generator).tolist()
    if reach == 0:
        return images
    return F.pad(images, (reach,) * 4, mode="replicate")[..., top : top + height, left : left + width]


def _learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first twentieth of the steps (at most 100), then half a cosine down to zero."""
    warm_up = min(100, max(1, steps // 20))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def train_classifier(
    features: nn.Module,
    feature_dim: int,
    num_classes: int,
    batches: Iterable[Sequence[Tensor]],
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    seed: int,
    device: torch.device | str,
    shift: bool = True,
    progress: Callable[[int, int, float], None] | None = None,
) -> nn.Linear:
    """Train `features` in place with cross-entropy on a linear head, and return the head.

    Both end in eval mode.

    features: images float32 [B, C, H, W] in [-1, 1] to [B, feature_dim]; moved to `device`. batches: at least
    `steps` of (images, labels int64 [B], ...), for example ImageBatch; further fields are ignored. AdamW
    (decay on matrices and filters only), warm-up and cosine, small shifts of images (shift). progress(step,
    steps, loss) is called about fifty times, with the mean loss of all ranks.

    Under torch.distributed each rank passes its own batches: gradients are averaged over all samples, every
    rank starts from rank 0's weights and ends with identical ones. Statistics of batch norm are those of a
    rank's batch, their running averages are shared.

    Raises ValueError when `batches` ends early and UserError when the loss is no longer finite.
    """
    device = torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(feature_dim, num_classes)
    with torch.no_grad():
        head.weight.normal_(0.0, feature_dim**-0.5, generator=generator)
        head.bias.zero_()
    head.to(device)
    features.to(device).train()
    broadcast_state((features, head))

    parameters = [p for p in (*features.parameters(), *head.parameters()) if p.requires_grad]
    state = features.state_dict(keep_vars=True)
    buffers = [b for name, b in features.named_buffers() if name in state and b.is_floating_point()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=lr,
    )
    report_every = max(1, steps // 50)
    iterator = iter(batches)
    for step in range(steps):
        batch = next(iterator, None)
        if batch is None:
            raise ValueError(f"the batches ended after {step} of {steps} steps")
        images, labels = batch[0].to(device), batch[1].to(device)
        for group in optimizer.param_groups:
            group["lr"] = lr * _learning_rate_factor(step, steps)
        loss = F.cross_entropy(head(features(_shifted(images, generator) if shift else images)), labels)
        optimizer.zero_grad()
        loss.backward()
        mean_loss = _average_over_ranks(parameters, buffers, loss, len(images))
        optimizer.step()
        if (step + 1) % report_every == 0 or step + 1 == steps:
            value = float(mean_loss)
            if not math.isfinite(value):
                raise UserError(
                    f"training the classifier diverged at step {step + 1}: loss {value}; lower its lr={lr:g}"
                )
            if progress is not None:
                progress(step + 1, steps, value)
    optimizer.zero_grad()  # the next to train these weights would find the last gradient in its own
    broadcast_state((features, head))
    features.eval()
    return head.eval()


@torch.no_grad()
def accuracy(features: nn.Module, head: nn.Module, images: Tensor, labels: Tensor, batch: int = 256) -> float:
    """Fraction of images [N, C, H, W] in [-1, 1] whose class labels [N] are predicted.

    Raises ValueError if N is 0.

    Local to the calling rank. Runs in eval mode on the device of the head and restores the mode of
    `features`.
    """
    if len(images) == 0:
        raise ValueError("accuracy of no images is not defined")
    device = next(head.parameters()).device
    was_training = features.training
    features.eval()
    correct = 0
    for part, target in zip(images.split(batch), labels.split(batch), strict=True):
        correct += int((head(features(part.to(device))).argmax(dim=1) == target.to(device)).sum())
    features.train(was_training)
    return correct / len(images)
