"""Plain training against the game, over seeds, judged by what fits data that are no images.

two-sample   ROC AUC of a random forest that tells drawn samples from held-out ones, each scored by trees that have
             not seen it: 0.5 if they are alike, 1 if it always tells (a classifier two-sample test)
marginals    mean over the columns of the Kolmogorov-Smirnov distance between drawn and held-out values: 0 to 1
correlation  mean difference of the columns' correlations
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import ks_2samp, t
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

import sadm_fast

MODES = ("plain", "sadm")
TREES = 300  # of the forest that tells samples apart
FLOOR = "training samples"  # in place of drawn ones: what nobody can be expected to beat


class Split(NamedTuple):
    """Samples to train on, and held-out ones [N, C, ...] with labels [N].

    groups [N]: held-out samples of one group overlap, so no tree sees one and judges another.
    """

    train: sadm_fast.Arrays
    held_out: np.ndarray
    labels: np.ndarray
    groups: np.ndarray


def two_sample(real: np.ndarray, drawn: np.ndarray, groups: np.ndarray, seed: int) -> float:
    """ROC AUC of telling `drawn` [M, d] from `real` [N, d], five-fold; groups [N] of the real ones."""
    values = np.concatenate([real, drawn])
    is_drawn = np.repeat([0, 1], [len(real), len(drawn)])
    own_groups = np.concatenate([groups, groups.max() + 1 + np.arange(len(drawn))])
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
    forest = RandomForestClassifier(TREES, random_state=seed, n_jobs=1)
    guesses = cross_val_predict(forest, values, is_drawn, groups=own_groups, cv=folds, method="predict_proba")
    return float(roc_auc_score(is_drawn, guesses[:, 1]))


def marginals(real: np.ndarray, drawn: np.ndarray) -> float:
    """Mean Kolmogorov-Smirnov distance of the columns of [N, d] and [M, d]."""
    return float(np.mean([ks_2samp(a, b).statistic for a, b in zip(real.T, drawn.T, strict=True)]))


def correlation(real: np.ndarray, drawn: np.ndarray) -> float:
    """Mean absolute difference of the correlation coefficients of the columns of [N, d] and [M, d]."""
    pairs = np.triu_indices(real.shape[1], 1)
    return float(np.mean(np.abs(np.corrcoef(real.T)[pairs] - np.corrcoef(drawn.T)[pairs])))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval by Student's t; NaN of one value alone."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(np.mean(values)), error * float(t.ppf(0.975, len(values) - 1))


def table(scores: dict[str, list[dict[str, float]]]) -> str:
    """Scores of each seed, by what was judged, as a table in Markdown: mean ± half of the 95% interval.

    The last row is of the differences seed by seed.
    """
    metrics = list(scores[FLOOR][0])
    rows = {who: [[of_seed[metric] for of_seed in found] for metric in metrics] for who, found in scores.items()}
    plain, game = (np.array(rows[mode]) for mode in MODES)
    rows["sadm - plain"] = (game - plain).tolist()
    lines = [f"| | {' | '.join(metrics)} |", f"|{' --- |' * (len(metrics) + 1)}"]
    for who, columns in rows.items():
        sign = "+" if "-" in who else ""
        cells = (f"{mean:{sign}.3f} ± {half:.3f}" for mean, half in map(interval, columns))
        lines.append(f"| {who} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compare(
    config: dict[str, Any],
    denoiser: Callable[[int], sadm_fast.Denoiser],
    psi: Callable[[], sadm_fast.StructureEncoder],
    split: Callable[[int], Split],
    score: Callable[[Split, np.ndarray, int], dict[str, float]],
    argv: Sequence[str] | None = None,
) -> str:
    """Train both ways with each seed, draw as many samples as are held out, score them, and return the table.

    split(seed) divides the data anew; score(split, samples, seed) names the numbers.
    """
    parser = argparse.ArgumentParser(description=f"{config['name']}: plain training against the game")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument(
        "--steps", type=int, default=config["train"]["steps"], help="of each run (default: %(default)s)"
    )
    parser.add_argument("--runs", type=Path, help="keep the runs in this folder, and go on with those that are there")
    arguments = parser.parse_args(argv)
    runs = arguments.runs or Path(tempfile.mkdtemp())
    steps = arguments.steps
    scores: dict[str, list[dict[str, float]]] = {who: [] for who in (FLOOR, *MODES)}
    for seed in range(arguments.seeds):
        parts = split(seed)
        like = parts.train.subset(np.random.default_rng(seed).permutation(len(parts.train))[: len(parts.labels)])
        training = like.read(np.arange(len(like)), np.zeros(len(like), dtype=bool))
        scores[FLOOR].append(score(parts, training, seed))
        for mode in MODES:
            run = runs / f"{config['name']}-{mode}-{seed}"
            changes = {
                "seed": seed,
                "game": {**config["game"], "mode": mode, "start_step": steps // 2},
                "train": {**config["train"], "steps": steps},
            }
            sadm_fast.train({**config, **changes}, denoiser=denoiser, psi=psi, data=parts.train, run_dir=run)
            drawn = sadm_fast.load(run, denoiser=denoiser, device=torch.device("cpu")).sample(parts.labels)
            scores[mode].append(score(parts, drawn.numpy(), seed))
    if arguments.runs is None:
        shutil.rmtree(runs)
    return table(scores)
