"""An environment without a launcher, for every test of ranks/."""

import pytest

LAUNCHERS = (
    "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE",
    "TORCHELASTIC_USE_AGENT_STORE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE",
)  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without the variables of whatever launcher has started pytest; what tests set is undone."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch
