"""How good are generated images: Frechet distances to the real ones in three feature spaces."""

from sadm_fast.metrics.evaluation import Evaluator
from sadm_fast.metrics.frechet import FeatureStatistics, frechet_distance
from sadm_fast.metrics.judges import ClassifierJudge, Judge, PixelJudge, RandomJudge

__all__ = [
    "ClassifierJudge",
    "Evaluator",
    "FeatureStatistics",
    "Judge",
    "PixelJudge",
    "RandomJudge",
    "frechet_distance",
]
