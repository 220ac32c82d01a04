"""DiT-S/4 trained by facebookresearch/DiT as it is shipped, and by us: same machine, same batch, in turns.

    git clone https://github.com/facebookresearch/DiT && python benchmarks/dit_as_shipped.py DiT --micro-batch 32

Its networks, diffusion and average come from the checkout and run in fp32 and eager, as its train.py runs them (without
DistributedDataParallel, which would only add to its time). Ours are plain and sadm as the trainer runs them, bf16 and
compiled; the tuned peer is tuned_peer.py. Latents are made up, 32x32x4. Prints a table. Stood in for: the three classes
of timm that it uses (attention is PyTorch's fused one), and what train.py imports to read and encode images. CPU time
is this process's, of all threads: with one thread it says what a machine that others use too would have needed alone.
"""

import argparse
import importlib
import subprocess
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import measure, tuned_peer  # noqa: E402
from benchmarks.game_cost import environment_of_training  # noqa: E402
from benchmarks.latent_game import CLASSES, game_config, made_up, made_up_players, steady_iteration  # noqa: E402
from benchmarks.measure import Call  # noqa: E402
from benchmarks.report import aligned  # noqa: E402
from sadm_fast.config import Config  # noqa: E402
from sadm_fast.models.dit import Attention, Mlp  # noqa: E402
from sadm_fast.ranks.launch import distributed  # noqa: E402

WARMUP = 3  # compiles, allocates the engines' buffers, settles a first iteration


class _PatchEmbed(nn.Module):
    """timm's, as far as DiT uses it."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool) -> None:
        super().__init__()
        self.patch_size, self.num_patches = (patch_size, patch_size), (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def _modules() -> dict[str, Any]:
    """Stand-ins by the names under which the checkout imports them."""
    timm: Any = types.ModuleType("timm.models.vision_transformer")
    timm.PatchEmbed = _PatchEmbed
    timm.Attention = lambda dim, num_heads, qkv_bias: Attention(dim, num_heads)
    timm.Mlp = lambda in_features, hidden_features, act_layer, drop: Mlp(in_features, hidden_features / in_features)
    names = ("timm", "timm.models", "torchvision", "torchvision.datasets", "diffusers", "diffusers.models")
    return {name: MagicMock() for name in names} | {timm.__name__: timm}


def as_shipped(checkout: Path, config: Config, device: torch.device) -> Call:
    """Return one step of the checkout's training on made-up latents."""
    sys.path.insert(0, str(checkout))
    sys.modules |= (stand_ins := _modules())
    models, diffusion, train = (importlib.import_module(name) for name in ("models", "diffusion", "train"))
    for name in stand_ins:
        del sys.modules[name]
    network = models.DiT_models["DiT-S/4"](input_size=config.sample_shape[1], num_classes=CLASSES).to(device)
    average = deepcopy(network).eval()
    train.requires_grad(average, False)
    network.train()
    process = diffusion.create_diffusion(timestep_respacing="")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0)
    batch = made_up(config, 0)
    x0, labels = batch.x0.to(device), batch.labels.to(device)

    def step() -> float:
        t = torch.randint(0, process.num_timesteps, (len(x0),), device=device)
        loss = process.training_losses(network, x0, t, {"y": labels})["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        train.update_ema(average, network)
        return float(loss.item())

    return step


def ours(mode: str, micro_batch: int) -> Config:
    return game_config(
        mode,
        micro_batch=micro_batch,
        train={"precision": "bf16", "compile": "on"},
        zero_optimization={"stage": 1},
    )


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "an unknown commit"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkout", type=Path, help="folder of facebookresearch/DiT")
    add("--micro-batch", type=int, default=32, metavar="B", help="(default %(default)s)")
    add("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    add("--repeats", type=int, default=9, help="rounds in which each steps once (default %(default)s)")
    arguments = parser.parse_args(argv)
    if not (arguments.checkout / "models.py").is_file():
        parser.error(f"{arguments.checkout}: has no models.py; clone https://github.com/facebookresearch/DiT there")
    measure.use_threads(arguments.threads)
    with distributed() as place:
        about = environment_of_training(arguments.threads, place.device)
        plain = ours("plain", arguments.micro_batch)
        calls: dict[str, Callable[[], object]] = {
            "facebookresearch/DiT": as_shipped(arguments.checkout, plain, place.device),
            "tuned peer": tuned_peer.iteration(plain, place.device),
        }
        for mode in ("plain", "sadm"):
            config = ours(mode, arguments.micro_batch)
            calls[f"ours, {mode}"] = steady_iteration(config, made_up_players(config, place.device))
        for call in calls.values():
            for _ in range(WARMUP):
                call()
        spent: dict[str, list[float]] = defaultdict(list)

        def clocked(name: str) -> None:
            start = time.process_time()
            calls[name]()
            spent[name].append(time.process_time() - start)

        turns: dict[str, Call] = {name: partial(clocked, name) for name in calls}
        times = measure.interleaved(turns, arguments.repeats, place.device.type)
    lines = [["", "ms (p20-p80)", "CPU ms (p20-p80)", "images/s", "over DiT's", "by CPU time"]]
    for name, seconds in times.items():
        wall, used = ([1e3 * value for value in measure.spread(found)] for found in (seconds, spent[name]))
        faster = 1 / measure.ratio(seconds, times["facebookresearch/DiT"])
        cheaper = 1 / measure.ratio(spent[name], spent["facebookresearch/DiT"])
        cells = [f"{middle:.0f} ({low:.0f}-{high:.0f})" for low, middle, high in (wall, used)]
        lines.append([name, *cells, f"{1e3 * arguments.micro_batch / wall[1]:.2f}", f"{faster:.2f}", f"{cheaper:.2f}"])
    print(f"{about['machine']}, {about['device']}, {about['threads']} threads, torch {about['torch']}, DeepSpeed")
    print(f"{about['deepspeed']}, commit {about['commit']}, {about['date'][:10]}; DiT {commit_of(arguments.checkout)}")
    print(f"DiT-S/4, micro-batch {arguments.micro_batch}, median of {arguments.repeats} interleaved rounds\n")
    print(aligned(lines, markdown=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
