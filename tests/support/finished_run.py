"""A finished run made by hand, for the programs that use one."""

import json
from pathlib import Path

import torch
from torch import nn

from sadm_fast.build import build_denoiser
from sadm_fast.config import check_config
from sadm_fast.engine.masters import Fragment, trainable_shapes
from sadm_fast.run.checkpoint_writer import CheckpointWriter
from sadm_fast.run.folder import RunFolder
from sadm_fast.run.manifest import EMA_FILE, MORE_EMA
from sadm_fast.run.state import TrainState
from tests.test_train import CLASSES, write_images


def finished_run(root: Path) -> Path:
    """The folder of a run on root/images: one whole checkpoint of a denoiser that answers to image, time and label."""
    training = {"steps": 3, "batch": 8}
    config = check_config(
        {
            "name": "tiny",
            "data": {"path": str(write_images(root / "images")), "resolution": 8, "threads": 1},
            "denoiser": {"hidden_size": 16, "depth": 1, "num_heads": 2},
            "sampling": {"steps": 2},
            "train": {"more_ema": [{"profile": "power", "std": 0.05}]},
            "evaluate": {"every": 10, "samples": 12, "batch": 8, "steps": 2, "judge": training},
        }
    )
    folder = RunFolder(root / "run")
    folder.claim(config)
    folder.facts.write_text(json.dumps({"classes": list(CLASSES)}))
    model = build_denoiser(config, len(CLASSES))
    for i, parameter in enumerate(model.parameters()):  # it begins with zeros, which answer to nothing
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i))
    average = [Fragment(n, 0, p.detach().flatten()) for n, p in model.named_parameters() if p.requires_grad]
    other = [fragment._replace(value=0.5 * fragment.value) for fragment in average]
    writer = CheckpointWriter(
        folder.checkpoints, {}, {EMA_FILE: lambda: average, f"{MORE_EMA}power-0.05.safetensors": lambda: other},
        trainable_shapes(model),
        identity={}, keep_last=1, say=print,
    )  # fmt: skip
    writer.save(TrainState(step=10, ema_updates=10))
    writer.finish()
    writer.close()
    return folder.path
