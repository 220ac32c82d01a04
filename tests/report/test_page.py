import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image, ImageDraw

from sadm_fast.config import Config
from sadm_fast.errors import UserError
from sadm_fast.report import sections, write_report
from sadm_fast.report.figures import picture
from sadm_fast.report.page import _progress
from sadm_fast.report.reading import evenly_chosen, read_run
from tests.report.test_memorisation import FACTS

FLOOR = {"fid_classifier": 0.1127, "fid_random": 0.00212, "fid_pixels": 0.3541}
COLUMNS = 10


def make_run(
    root: Path,
    *,
    mode: str = "sadm",
    steps: int = 2000,
    planned: int = 2000,
    classes: list[str] | None = None,
    relation_batch: int = 64,
) -> Path:
    """A run's folder with everything in it that a demo run of `steps` steps leaves behind."""
    classes = classes or [str(digit) for digit in range(10)]
    rng = np.random.default_rng(0)
    run_dir = root / f"mnist-{mode}"
    for folder in ("samples", "relations", "memorisation"):
        (run_dir / folder).mkdir(parents=True)
    write_json(run_dir / "config.json", fake_config(mode, planned))
    write_json(run_dir / "run.json", fake_facts(classes))
    write_rows(run_dir / "metrics.jsonl", fake_metrics(mode, steps, rng))
    write_rows(run_dir / "evaluations.jsonl", fake_evaluations(steps))
    write_json(run_dir / "memorisation/memorisation.json", FACTS)
    clean = fake_digits(rng)
    save_grid(run_dir / "samples/real.png", fake_digits(rng))
    for step in range(250, steps + 1, 250):
        blur = 1 - 0.93 * step / 2000
        for suffix, more in (("", 0.12), ("-ema", 0.0)):
            noise = rng.normal(0.4, 0.35, clean.shape)
            share = min(1.0, blur + more)
            save_grid(run_dir / f"samples/step-{step:06d}{suffix}.png", (1 - share) * clean + share * noise)
        if mode != "plain":
            arrays = fake_relations(relation_batch, len(classes), blur)
            np.savez(run_dir / f"relations/step-{step:06d}.npz", **arrays)
    return run_dir


def fake_config(mode: str, planned: int) -> dict[str, Any]:
    fields = {"name": f"mnist-{mode}", "game": {"mode": mode}, "train": {"steps": planned}}
    return Config.model_validate(fields).resolved()


def fake_facts(classes: list[str]) -> dict[str, Any]:
    return {
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8", "nvidia-dali": "2.4.0", "python": "3.11.2"},
        "machine": {"cpu": "a laptop's processor", "cores": 2, "memory_gib": 16, "accelerator": "none"},
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "command": "deepspeed sadm_fast/train.py --config configs/mnist.json",
        "classes": classes,
        "sample_grid": {"columns": COLUMNS, "labels": [index % len(classes) for index in range(8 * COLUMNS)]},
        "structure_encoder": {"accuracy": 0.9812, "test_images": 1000, "architecture": "cnn", "epochs": 4},
        "judge": {"accuracy": 0.974, "test_images": 1000, "architecture": "resnet18"},
        "parameters": {"denoiser": 1_253_000, "discriminator": 94_200},
    }


def fake_metrics(mode: str, steps: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for step in range(5, steps + 1, 5):
        fall = (step / 5) ** -0.35
        game = mode == "sadm"
        row = {
            "step": step,
            "samples_seen": step * 128,
            "loss_denoise": 0.12 + 0.9 * fall * rng.lognormal(0, 0.08),
            "structure_distance": None if mode == "plain" else (0.01 + 0.2 * fall) * rng.lognormal(0, 0.15),
            "loss_discriminator": -(0.01 + 0.2 * fall) * rng.lognormal(0, 0.15) if game else None,
            "grad_norm_denoiser": 2.2 * fall * rng.lognormal(0, 0.2) * (6 if rng.random() < 0.01 else 1),
            "grad_norm_discriminator": 0.4 * fall * rng.lognormal(0, 0.3) if game else None,
            "lr": 1e-3 * min(1, step / 100),
            "lr_discriminator": 1e-6 * min(1, step / 100) if game else None,
            "samples_per_s": rng.normal(640, 25),
            "data_wait_fraction": abs(rng.normal(0.008, 0.003)),
            "memory_bytes": int(1.4e9 + 2e5 * step),
            "skipped_steps": 0,
            "wall_s": step * 0.2,
        }
        for quartile, level in enumerate((0.05, 0.1, 0.3, 0.5), start=1):
            row[f"loss_denoise_q{quartile}"] = level + 0.9 * fall * rng.lognormal(0, 0.12)
        rows.append(row)
    return rows


def fake_evaluations(steps: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "samples": 2000,
            "fid_classifier": 0.2 + 41.2345 * (step / 250) ** -1.6,
            "fid_random": 0.004 + 0.31 * (step / 250) ** -1.3,
            "fid_pixels": 0.9 + 11.7 * (step / 250) ** -1.1,
            "floor": FLOOR,
            "sampling": {"sampler": {"name": "heun", "steps": 18}, "guidance": {"scale": 1.5}},
        }
        for step in range(250, steps + 1, 250)
    ]


def fake_digits(rng: np.random.Generator) -> np.ndarray:
    """Float [8, COLUMNS, 28, 28] in [0, 1]: a digit a column, drawn a little differently in every row."""
    cells = np.zeros((8, COLUMNS, 28, 28))
    for row, column in np.ndindex(8, COLUMNS):
        cell = Image.new("L", (28, 28))
        ImageDraw.Draw(cell).text(tuple(rng.integers(6, 10, 2)), str(column), fill=255, font_size=18)
        cells[row, column] = np.asarray(cell.rotate(float(rng.normal(0, 9)))) / 255
    return cells


def save_grid(path: Path, cells: np.ndarray) -> None:
    grid = cells.transpose(0, 2, 1, 3).reshape(8 * 28, COLUMNS * 28)
    Image.fromarray((grid.clip(0, 1) * 255).astype(np.uint8)).save(path)


def fake_relations(size: int, classes: int, blur: float) -> dict[str, Any]:
    """Relations of one fixed batch; `blur` is how much of a noised image the denoiser leaves lost."""
    rng = np.random.default_rng(1)
    labels = np.sort(rng.integers(0, classes, size))
    log_snr = rng.normal(1, 2.5, size)
    features = rng.normal(0, 1, (classes, 64))[labels] + 0.45 * rng.normal(0, 1, (size, 64))
    lost = ((0.2 + 0.8 * blur) / (1 + np.exp(log_snr)))[:, None]
    denoised = (1 - lost) * features + lost * features.mean(0) + 0.1 * blur * rng.normal(0, 1, (size, 64))

    def distances(vectors: np.ndarray) -> np.ndarray:
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.linalg.norm(unit[:, None] - unit[None, :], axis=2).astype(np.float32)

    return {"real": distances(features), "fake": distances(denoised), "labels": labels, "log_snr": log_snr}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text outside <style>."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.feed(self.source)
        self.text = " ".join("".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"unbalanced </{tag}>"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.pieces.append(data)

    def figures_about(self, words: str) -> int:
        return sum(tag == "svg" and words in (attrs["aria-label"] or "") for tag, attrs in self.tags)


def report_of(run_dir: Path) -> Page:
    page = Page(write_report(run_dir))
    assert page.open == []
    assert pyplot.get_fignums() == []
    return page


@pytest.fixture
def outlined_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts without drawing, for tests that ask only which ones are there."""

    def outline(key: str, curves: object, *, y_label: str, **_: object) -> str:
        return f'<svg id="{key}" aria-label="{y_label}"></svg>'

    monkeypatch.setattr(sections, "line_chart", outline)


@pytest.fixture(scope="module")
def sadm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def sadm_page(sadm: Path) -> Page:
    return report_of(sadm)


def test_the_page_loads_nothing_and_runs_nothing(sadm_page: Page) -> None:
    for tag, attrs in sadm_page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith(("data:image/", "#"))
    assert not re.search(r"https?:|@import|url\((?!#)", sadm_page.source)


def test_the_page_stays_small(sadm: Path, sadm_page: Page) -> None:
    assert len(sadm_page.source.encode()) < 3_000_000
    assert [path.name for path in sadm.iterdir() if "tmp" in path.name] == []


def test_the_headline_numbers_are_those_in_the_files(sadm: Path, sadm_page: Page) -> None:
    rows = [json.loads(line) for line in (sadm / "evaluations.jsonl").read_text().splitlines()]
    header = sadm_page.source[: sadm_page.source.index("<main>")]
    values = [float(value) for value in re.findall(r'<data value="([^"]+)">', header)]
    tiles = []
    for space, floor in FLOOR.items():
        tiles += [rows[-1][space], rows[0][space], floor]
    sentence = [rows[0]["fid_classifier"], rows[-1]["fid_classifier"], FLOOR["fid_classifier"]]
    assert values == sentence + tiles
    assert f"{rows[0]['fid_classifier'] / rows[-1]['fid_classifier']:.3g} times lower" in header
    for words in (
        "SADM",
        "all 2,000 steps done",
        "256,000 images seen",
        "6 min 40 s",
        "denoiser 1.25 million",
    ):
        assert words in header


def test_every_panel_of_a_game_is_there(sadm_page: Page) -> None:
    charts = (
        *("fid_classifier", "fid_random", "fid_pixels", "gradient norm", "learning rate"),
        *("structure distance S", "discriminator loss", "images per second", "data wait", "memory"),
        *("Relation matrices at step 250", "Relation matrices at step 2000"),
    )
    for chart in charts:
        assert sadm_page.figures_about(chart) == 1, chart
    assert sadm_page.figures_about("denoising loss") == 2  # all images, and by noise
    assert "missing" not in [attrs.get("class") for _, attrs in sadm_page.tags]
    facts = ("98.1%", "97.4%", "0123456789abcdef", "a laptop's processor", "2.13.0")
    settings = ("deepspeed.zero_optimization", "gate_slope")
    for words in (*facts, *settings, "deepspeed sadm_fast/train.py --config configs/mnist.json"):
        assert words in sadm_page.text


def test_grids_go_from_the_first_to_the_last_step_beside_real_images(sadm_page: Page) -> None:
    pictures = [attrs["alt"] for tag, attrs in sadm_page.tags if tag == "img"]
    assert pictures[:3] == ["Step 2,000, EMA weights", "Real images", "Step 2,000, raw weights"]
    film = pictures[3:]
    assert film[0] == "Step 250" and film[-2:] == ["Step 2,000", "Real images"] and len(film) <= 8


def test_asked_classes_are_named_over_the_columns(sadm_page: Page) -> None:
    asked = re.search(r'<div class="asked" style="--count: 10">(.*?)</div>', sadm_page.source)
    assert asked and re.findall(r">(\d)</span>", asked[1]) == [str(digit) for digit in range(10)]


def test_asked_classes_are_named_beside_rows_and_otherwise_listed(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, steps=250)
    facts = fake_facts(["cat", "dog"])
    facts["sample_grid"] = {"columns": 3, "labels": [0, 0, 0, 1, 1, 1]}
    write_json(run_dir / "run.json", facts)
    assert "framed by-row" in sections.samples(read_run(run_dir))
    facts["sample_grid"] = {"columns": 3, "labels": [0, 1, 1, 1, 0, 0]}
    write_json(run_dir / "run.json", facts)
    assert "row by row: cat, dog, dog; dog, cat, cat" in sections.samples(read_run(run_dir))
    del facts["sample_grid"]
    write_json(run_dir / "run.json", facts)
    assert "The classes are cat, dog." in sections.samples(read_run(run_dir))


def test_what_strangers_wrote_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script><img src=x onerror=alert(2)>'
    names = [evil, "</style>", "$\\frac{", "'\" onload='x", "猫", "\ud800\x00", *"6789"]
    run_dir = make_run(tmp_path, steps=500, classes=names, relation_batch=12)
    config = fake_config("sadm", 500) | {evil: evil, "notes": {evil: [evil]}}
    write_json(run_dir / "config.json", config)
    facts = fake_facts(names) | {"command": evil, "commit": evil, "versions": {evil: evil}}
    facts["structure_encoder"] |= {evil: evil}
    facts["parameters"] |= {evil: 3}
    write_json(run_dir / "run.json", facts)
    rows = fake_evaluations(500)
    rows[-1]["sampling"] = {evil: evil}
    for name in (evil, "\ud800\x00"):
        rows[-1] |= {name: 3.0, "floor": rows[-1]["floor"] | {name: 1.0}}
    write_rows(run_dir / "evaluations.jsonl", rows)
    page = report_of(run_dir.rename(tmp_path / "<b>run"))
    assert not {"script", "b>run"} & {tag for tag, _ in page.tags}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert all((attrs["src"] or "").startswith("data:") for tag, attrs in page.tags if tag == "img")
    assert page.text.count(evil) >= 11
    assert "<b>run" in page.text and "猫" in page.text


def scored(step: int, std: float, scale: float, distance: float) -> dict[str, Any]:
    """A line of evaluations.jsonl."""
    return {
        "step": step,
        "fid_pixels": distance,
        "floor": {"fid_pixels": 0.5},
        "samples": 400,
        "loss_denoise": 0.1 * std,
        **{f"loss_denoise_q{part}": part * std for part in range(1, 5)},
        "seconds": 8.0,
        "images_per_s": 50.0,
        "sampling": {"guidance": {"scale": scale}, "sampler": {"name": "heun", "steps": 12}},
        "weights": {"ema": {"profile": "power", "std": std}},
    }


@pytest.mark.usefixtures("outlined_charts")
def test_readers_see_which_average_and_guidance_is_best(tmp_path: Path) -> None:
    points = [(0.1, 1.0), (0.1, 1.5), (0.05, 1.0), (0.05, 1.5)]
    rows = [
        scored(step, std, scale, 100 / step + place)
        for step in (10, 20)
        for place, (std, scale) in zip((3, 1, 0, 2), points, strict=True)
    ]
    again = scored(20, 0.05, 1.0, 4.5)  # a resumed run: only this line of the step is replaced
    write_rows(tmp_path / "evaluations.jsonl", [*rows, again])
    write_json(tmp_path / "scores.json", {"scores": [scored(20, 0.08, 1.0, 3.0), scored(20, 0.08, 2.0, 3.5)]})
    write_json(tmp_path / "other.json", {"scores": [1, None]})
    run = read_run(tmp_path)
    assert {name: [row["step"] for row in of] for name, of in run.variants.items()} == {
        "power-0.1, guidance 1": [10, 20], "power-0.1, guidance 1.5": [10, 20],
        "power-0.05, guidance 1.5": [10, 20], "power-0.05, guidance 1": [10, 20],
    }  # fmt: skip
    assert run.evaluations == [rows[0], rows[4]] and list(run.sweeps) == ["scores.json"]
    page = report_of(tmp_path)
    assert page.figures_about("fid_pixels") == page.figures_about("loss of the averaged denoiser") == 1
    assert "Averages and guidance at step 20" in page.text and "scores.json: scores of step 20" in page.text
    starred = [re.sub(r"<[^>]+>", "", row) for row in re.findall(r"<tr>(?:(?!</tr>).)*?\*.*?</tr>", page.source)]
    assert any(row.startswith("power-0.05, guidance 14.5 *0.005 *") for row in starred), starred
    assert any(row.startswith("power-0.08, guidance 1, 12 steps3 *") for row in starred), starred
    assert "It took 8 s, 50 images/s" in page.text


def test_an_empty_folder_gives_a_page_of_honest_sentences(tmp_path: Path) -> None:
    page = report_of(tmp_path)
    assert page.figures_about("") == 0
    for sentence in (
        "no step logged yet",
        "have not been evaluated yet",
        "No samples have been drawn yet.",
        "No training step has been logged yet.",
        "No relation matrices have been written yet.",
        "config.json has not been written yet.",
        "run.json has not been written yet.",
        "Not looked at yet",
    ):
        assert sentence in page.text


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nowhere")


def test_a_failed_write_keeps_the_old_report_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.html").write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="No space left"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


def test_a_half_written_last_line_is_ignored(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, steps=500)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        path = run_dir / name
        path.write_text(path.read_text() + '{"step": 505, "loss_deno')
    run = read_run(run_dir)
    assert run.metrics[-1]["step"] == 500 and run.evaluations[-1]["step"] == 500
    assert run.unreadable == []
    assert _progress(run) == "step 500 of 2,000, unfinished when this page was written"


def test_names_and_values_that_are_not_a_runs_are_passed_over(tmp_path: Path, outlined_charts: None) -> None:
    run_dir = make_run(tmp_path, steps=500, relation_batch=12)
    (run_dir / "samples" / "step-000900.png").mkdir()
    for name in ("samples/step-best.png", "samples/step-\u0663.png", f"samples/step-{5000 * '9'}.png"[:200]):
        (run_dir / name).touch()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1' + 400 * "0" + ', "loss_denoise": 1}\n{"step": -1}\n{"step": true}\n')
    (run_dir / "config.json").write_text(900 * '{"a":' + "1" + 900 * "}")
    run = read_run(run_dir)
    assert run.step == 500
    assert run.unreadable == [
        "config.json is there but is not a readable JSON object.", "metrics.jsonl: 3 broken lines left out.",
    ]  # fmt: skip
    write_report(run_dir)


def test_broken_files_are_named_and_the_rest_is_shown(tmp_path: Path, outlined_charts: None) -> None:
    run_dir = make_run(tmp_path, steps=500, relation_batch=12)
    metrics = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_bytes(b'{"step": 1, "lo{"step": 2}\n[3]\n\xff\n' + metrics.encode())
    (run_dir / "config.json").write_text("{")
    (run_dir / "run.json").write_text("[]")
    (run_dir / "samples/step-000500-ema.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    relations = (run_dir / "relations/step-000250.npz").read_bytes()
    (run_dir / "relations/step-000250.npz").write_bytes(relations[: len(relations) // 2])
    page = report_of(run_dir)
    for sentence in (
        "metrics.jsonl: 3 broken lines left out.",
        "config.json is there but is not a readable JSON object.",
        "run.json is there but is not a readable JSON object.",
        "step-000500-ema.png cannot be read.",
        "step-000250.npz cannot be read.",
    ):
        assert sentence in page.text
    assert page.figures_about("Relation matrices at step 500") == 1
    assert page.figures_about("gradient norm") == 1


def test_relations_that_need_unpickling_are_not_loaded(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, steps=250)
    path = run_dir / "relations/step-000250.npz"
    np.savez(path, real=np.array([{"a": 1}], dtype=object), fake=np.eye(1), labels=np.zeros(1, int))
    assert "step-000250.npz cannot be read." in sections.relations(read_run(run_dir))


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    rows = [{"step": step, "loss_denoise": 1.0} for step in (10, 20, 30, 40)]
    write_rows(tmp_path / "metrics.jsonl", [*rows, {"step": 30, "loss_denoise": 2.0}])
    assert [(row["step"], row["loss_denoise"]) for row in read_run(tmp_path).metrics] == [
        (10, 1.0),
        (20, 1.0),
        (30, 2.0),
    ]


def test_a_loss_that_is_not_finite_is_told_and_plotted_as_a_gap(tmp_path: Path) -> None:
    rows = fake_metrics("sadm", 400, np.random.default_rng(0))
    rows[3]["loss_denoise"], rows[7]["loss_denoise"] = float("nan"), float("inf")
    rows[9]["grad_norm_denoiser"] = "large"
    rows[11]["structure_distance"] = 10**400
    write_rows(tmp_path / "metrics.jsonl", rows)
    page = report_of(tmp_path)
    assert "At 2 logged steps the denoising loss was not a finite number." in page.text
    assert "nan" not in page.source.split("</style>")[1]


def test_plain_mode_says_that_there_is_no_discriminator(tmp_path: Path, outlined_charts: None) -> None:
    page = report_of(make_run(tmp_path, mode="plain", steps=500))
    assert "plain diffusion" in page.text
    assert "there is no structure distance and no discriminator loss to show" in page.text
    assert "nothing looks at relations in this run" in page.text
    assert "The judge behind fid_classifier" in page.text
    for chart in ("structure distance", "discriminator loss", "Relation matrices"):
        assert page.figures_about(chart) == 0
    assert page.figures_about("gradient norm") == 1


def test_structure_mode_says_that_the_encoder_is_fixed(tmp_path: Path, outlined_charts: None) -> None:
    run = read_run(make_run(tmp_path, mode="structure", steps=250))
    losses = sections.losses(run)
    assert "The structure encoder is fixed in this mode" in losses
    assert "structure distance S" in losses
    assert 'discriminator loss"' not in losses


def test_scores_that_got_worse_are_called_higher(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "fid_classifier": 2.0},
        {"step": 2, "fid_classifier": 5.0, "fid_random": None},
    ]
    write_rows(tmp_path / "evaluations.jsonl", rows)
    page = report_of(tmp_path)
    assert "2.5 times higher than 2 at step 1" in page.text
    assert "fid_random was not measured." in page.text
    assert "no floor recorded" in page.text


def test_a_metric_that_this_version_does_not_know_is_shown_as_the_evaluation_wrote_it(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": 1, "kid": 2.0, "fid_pixels": 3.0, "floor": {"kid": 0.5, "fid_pixels": 0.25}}]
    write_rows(tmp_path / "evaluations.jsonl", rows)
    page = report_of(tmp_path)
    assert "as kid measures it, is 2 at step 1" in page.text and "Real images against real ones: 0.5." in page.text
    assert page.figures_about("kid") == page.figures_about("fid_pixels") == 1
    assert "fid_random" not in page.text


def test_large_batches_long_runs_and_large_pictures_still_fit(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, steps=500, relation_batch=400, classes=[f"class {n}" for n in range(50)])
    rng = np.random.default_rng(0)
    write_rows(run_dir / "metrics.jsonl", fake_metrics("sadm", 10_000, rng))
    noise = Image.fromarray(rng.integers(0, 255, (480, 1500, 3), dtype=np.uint8))  # a PNG of 2 MB
    for path in (run_dir / "samples").iterdir():
        noise.save(path)
    page = report_of(run_dir)
    assert "Drawn: 128 of the 400 images" in page.text
    assert len(page.source.encode()) < 3_000_000


def test_small_pictures_grow_by_whole_factors_and_keep_their_pixels(tmp_path: Path) -> None:
    Image.fromarray(np.eye(30, dtype=np.uint8) * 255).save(tmp_path / "grid.png")
    result = picture(tmp_path / "grid.png", target_width=100, most_bytes=10_000)
    assert result is not None
    assert result.uri.startswith("data:image/png;base64,")
    assert (result.width, result.height) == (30, 30)


@pytest.mark.parametrize(("length", "count"), [(0, 6), (1, 6), (6, 6), (7, 6), (100, 6), (3, 2)])
def test_evenly_chosen_keeps_both_ends(length: int, count: int) -> None:
    items = list(range(length))
    chosen = evenly_chosen(items, count)
    assert len(chosen) == min(length, count) == len(set(chosen))
    assert chosen[:1] == items[:1] and chosen[-1:] == items[-1:]
