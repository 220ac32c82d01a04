"""The floors of docs/architecture.md: a room imports only from floors below its own, wherever the import stands.

Imports in functions and under TYPE_CHECKING count as well: a reader has to follow them like any other.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = (  # lowest first; rooms of one floor do not know each other
    "errors scales diffusion console",
    "files counters config_errors ranks",
    "data models game augmentation classifier pictures config_block config_tree train_once",
    "config_data config_denoiser config_game config_training config_sampling",
    "config",
    "feed build engine precision",
    "ema",
    "run planning encoding",
    "exchange",
    "generation",
    "metrics drawing",
    "pretrain report",
    "gallery start_checks",
    "trainer",
    "assemble",
    "cli api",
    "train sample evaluate export encode plan",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()} | {"__init__": len(FLOORS)}


def imported(source: str, package: tuple[str, ...]) -> Iterator[list[str]]:
    """The modules that a file in `package` imports, each as the parts of its name; `from a import b` may mean a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = list(package[: len(package) - node.level + 1]) if node.level else []
            yield from (above + (node.module or "").split(".") * bool(node.module) + [a.name] for a in node.names)


def not_below(source: str, path: tuple[str, ...]) -> list[str]:
    """What the file at `path` ("sadm_fast", ..., "x.py") imports from its own floor or above, outside its own room."""
    top, room = path[0], path[1].removesuffix(".py")
    ours = [name for name in imported(source, path[:-1]) if name[0] == "sadm_fast"]
    if top == "kernels":
        return [".".join(name) for name in ours]
    return [".".join(name) for name in ours if name[1] != room and FLOOR.get(name[1], 99) >= FLOOR.get(room, 99)]


def test_every_room_imports_only_from_floors_below() -> None:
    files = [file for folder in ("sadm_fast", "kernels") for file in (ROOT / folder).rglob("*.py")]
    found = {str(file): not_below(file.read_text(), file.relative_to(ROOT).parts) for file in files}
    assert {file: names for file, names in found.items() if names} == {} and len(files) > 50


def test_every_room_has_a_floor() -> None:
    rooms = {
        path.stem for path in (ROOT / "sadm_fast").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms == FLOOR.keys()
    documented = (ROOT / "docs/architecture.md").read_text()
    assert [room for room in rooms - {"__init__"} if f"`{room}`" not in documented] == []


@pytest.mark.parametrize(
    "source",
    [
        "import sadm_fast.gallery",
        "from sadm_fast import gallery",
        "from sadm_fast.gallery import look",
        "def late():\n    from sadm_fast.metrics.judges import JUDGES",
        "if TYPE_CHECKING:\n    from sadm_fast.config import Config",
        "from ..data import make_loader",
        "from sadm_fast.a_room_without_a_floor import x",
    ],
)
def test_an_import_that_goes_up_is_found(source: str) -> None:
    assert len(not_below(source, ("sadm_fast", "models", "dit.py"))) == 1
    assert not_below(source.replace("..data", "sadm_fast.data"), ("kernels", "api.py"))


def test_an_import_from_below_or_beside_in_the_room_is_not() -> None:
    source = "import torch\nfrom sadm_fast.errors import UserError\nfrom . import autoencoder\nfrom .dit import DiT"
    assert not_below(source, ("sadm_fast", "models", "denoiser.py")) == []
