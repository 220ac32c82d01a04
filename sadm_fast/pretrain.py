"""Train a feature extractor as a classifier, once, and keep the result.

Used twice: Psi is "well trained" on the real data before the game starts, and the judge of `fid_classifier`
is another network trained the same way with another seed.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sadm_fast.errors import UserError

_FORMAT = "sadm_fast.pretrain/1"


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _is_rank_zero() -> bool:
    return not _distributed() or dist.get_rank() == 0


def _communication_device() -> torch.device:
    return torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")


@torch.no_grad()
def _broadcast_state(modules: Iterable[nn.Module]) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    if not _distributed():
        return
    for module in modules:
        for tensor in module.state_dict().values():
            shared = tensor.to(_communication_device()).contiguous()
            dist.broadcast(shared, src=0)
            tensor.copy_(shared)


def _broadcast_json(value: Any) -> Any:
    """Rank 0's JSON value on every rank. As bytes: torch's own broadcast of objects would unpickle them."""
    if not _distributed():
        return value
    device = _communication_device()
    payload = json.dumps(value).encode() if dist.get_rank() == 0 else b""
    length = torch.tensor([len(payload)], device=device)
    dist.broadcast(length, src=0)
    data = torch.zeros(int(length.item()), dtype=torch.uint8, device=device)
    if payload:
        data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    dist.broadcast(data, src=0)
    return json.loads(bytes(data.cpu().tolist()))


def _average_over_ranks(
    parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor], loss: Tensor, samples: int
) -> Tensor:
    """Average gradients, float buffers and the loss over ranks, each weighted by its samples; returns the
    loss.

    The result equals that of one process holding every rank's batch, also when the batches differ in size.
    """
    if not _distributed():
        return loss.detach()
    tensors = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    tensors += [*buffers, loss.detach().view(1)]
    flat = torch.cat([t.flatten().float() for t in tensors] + [torch.ones(1, device=loss.device)]) * samples
    dist.all_reduce(flat)
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
    progress: Callable[[int, int, float], None] | None = None,
) -> nn.Linear:
    """Train `features` in place with cross-entropy on a linear head, and return the head; both end in eval
    mode.

    features: images float32 [B, C, H, W] in [-1, 1] to [B, feature_dim]; moved to `device`. batches: at least
    `steps` of (images, labels int64 [B], ...), for example ImageBatch; further fields are ignored. AdamW
    (decay on matrices and filters only), warm-up and cosine, small shifts of the images. progress(step,
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
    _broadcast_state((features, head))

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
        loss = F.cross_entropy(head(features(_shifted(images, generator))), labels)
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
    _broadcast_state((features, head))
    features.eval()
    return head.eval()


@torch.no_grad()
def accuracy(features: nn.Module, head: nn.Module, images: Tensor, labels: Tensor, batch: int = 256) -> float:
    """Fraction of images [N, C, H, W] in [-1, 1] whose class labels [N] are predicted; ValueError when N is
    0.

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


def _digest(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of the tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Weights and info of a sound file with this fingerprint, else None; UserError for a foreign file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (FileNotFoundError, SafetensorError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); move it away or fix its permissions") from error
    if metadata.get("format") != _FORMAT:
        raise UserError(f"{path}: exists but was not written by this program; move it away")
    try:
        info = json.loads(metadata["info"])
        sound = metadata["sha256"] == _digest(state)
    except (KeyError, json.JSONDecodeError):
        return None
    return (state, info) if sound and metadata.get("fingerprint") == fingerprint else None


def _write(path: Path, module: nn.Module, info: dict[str, Any], fingerprint: str) -> None:
    """Write weights and info as one safetensors file that appears complete or not at all."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    metadata = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "info": json.dumps(info),
        "sha256": _digest(state),
    }
    temporary = path.with_name(path.name + ".tmp")
    save_file(state, temporary, metadata)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _prepare_folder(path: Path) -> None:
    """Fail before the training, not after it, if the result could not be kept."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written ({error}); choose a writable folder") from error


def load_or_train(
    path: Path, build: Callable[[], nn.Module], train: Callable[[nn.Module], dict[str, Any]], fingerprint: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The module of `build` with the weights kept at `path`, or trained by `train` and then kept there.

    `train` changes the module in place and returns what is to be known about it, for example {"accuracy":
    0.98}: JSON values only. `fingerprint` names everything the weights depend on (architecture, data, seed,
    steps): a file with another one, a damaged or a missing file mean training again. The file is safetensors
    with that dictionary in its header, so nothing is unpickled. Returns the module in eval mode and the
    dictionary plus "cached": True or False.

    Under torch.distributed every rank calls this (and `train` on a miss); rank 0 alone reads and writes, and
    all ranks get its weights and its dictionary. Raises UserError, on all ranks and before any training, when
    `path` holds a file of other origin or its folder cannot be written.
    """
    found: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    problem: str | None = None
    if _is_rank_zero():
        try:
            found = _read(path, fingerprint)
            if found is None:
                _prepare_folder(path)
        except UserError as error:
            problem = str(error)
    hit, info, problem = _broadcast_json([found is not None, found[1] if found else {}, problem])
    if problem is not None:
        raise UserError(problem)

    module = build()
    if hit:
        if found is not None:
            module.load_state_dict(found[0], strict=True)
    else:
        info = _broadcast_json(train(module))
        if _is_rank_zero():
            try:
                _write(path, module, info, fingerprint)
            except (OSError, SafetensorError) as error:
                problem = f"{path}: cannot be written ({error}); free some space or choose another folder"
        problem = _broadcast_json(problem)
        if problem is not None:
            raise UserError(problem)
    _broadcast_state((module,))
    return module.eval(), {**info, "cached": hit}
