"""Loaders for tests, their plan and spec given in one breath."""

from typing import Any

from sadm_fast.config import Config
from sadm_fast.data import LoaderSpec, MicroBatchPlan, make_loader
from sadm_fast.data.batch import Loader
from sadm_fast.data.source import Source
from sadm_fast.feed import loader_spec


def open_loader(source: Source, *, device: str = "cpu", **changes: Any) -> Loader:
    """make_loader with small defaults; `changes` are fields of MicroBatchPlan or LoaderSpec."""
    spec: dict[str, Any] = {"resolution": 8, "channels": 1, "threads": 1}
    plan: dict[str, Any] = {"num_images": len(source), "seed": 1, "flip": True, "micro_batch": 4}
    for name, value in changes.items():
        (spec if name in LoaderSpec.__dataclass_fields__ else plan)[name] = value
    return make_loader(source, MicroBatchPlan(**plan), LoaderSpec(**spec), device)


def open_feed(config: Config, source: Source, micro_batch: int) -> Loader:
    """The loader of a run with this configuration, on one rank from its first sample on."""
    plan = MicroBatchPlan(num_images=len(source), seed=1, flip=config.data.flip, micro_batch=micro_batch)
    return make_loader(source, plan, loader_spec(config))
