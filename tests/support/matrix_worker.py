"""One rank of the rest of test_players.py's matrix."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from sadm_fast.ranks.launch import distributed
from tests.support.engine_cases import matrix
from tests.support.engine_worker import compared

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.parent / "inductor")
    with distributed() as place:
        torch.save(
            {case.name: compared(case, place) for case in matrix(place.world_size)}, folder / f"rank-{place.rank}.pt"
        )
        dist.barrier()
