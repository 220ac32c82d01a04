"""The report's prose: what the method is, and how to read each part of the page.

All of it is fixed text. Nothing of a run is in it, so it goes into the page without escaping.
"""

from collections.abc import Mapping

MODE_NAMES = {
    "plain": "plain diffusion",
    "structure": "fixed structure",
    "sadm": "SADM",
}
METHOD = (
    "A diffusion model learns to remove noise from images, normally one image at a time. SADM (structure-"
    "guided adversarial training, arXiv 2402.17563) also uses what a batch knows as a whole. A second "
    "network, the structure encoder Ψ, turns every image into a vector of features. R(F) holds the "
    "relation, such as the distance, between any two real images of a batch; R(G) holds the same for what "
    "the denoiser made of their noised copies. The structure distance S is the mean difference of the two "
    "matrices. The denoiser learns to remove noise and to keep S small. The discriminator is Ψ itself, "
    "which goes on learning: it looks for features in which S is large. It never says “real” or “fake”: it "
    "only compares relations."
)
MODE: dict[str | None, str] = {
    "sadm": "This run played the whole game: Ψ learned against the denoiser.",
    "structure": "This run used the structure distance with a fixed Ψ: no discriminator learned.",
    "plain": "This run trained without the game, as the baseline: there is no discriminator and no S in it.",
    None: "The mode of this run is not recorded.",
}
HOW_TO_READ = (
    "Look at the samples first, then at the distances to real images: lower is better, and the floor is "
    "what real images score against other real ones, which no model can be expected to beat. The losses "
    "tell whether training is healthy, not how good the samples are. Blue is always the denoiser, orange "
    "the discriminator."
)
SAMPLES = (
    "Every grid is drawn from the same starting noise for the same classes, so cells at the same place can "
    "be compared. EMA weights are a running average of the weights over training; they are the ones that "
    "are scored."
)
WEIGHTS = {
    "EMA": "The averaged weights: the result of the run.",
    "raw": "The weights as the optimizer left them.",
}
FILM = "The same cells from the same starting noise at evenly chosen steps, real images last."
FRECHET = (
    "A Frechet distance compares the mean and the covariance of features of many samples with those of real"
    " images. It is measured in several feature spaces, because one of them alone can flatter a model. These "
    "are not the FID values of papers, which use another network and 50,000 samples, and must not be "
    "compared with them. The dashed line is the floor: real images against other real images."
)
LOSS_AVERAGED = (
    "The averaged denoiser's loss on training images, by the noise of the image: the same images and the same noise at "
    "every step. Unlike the loss of training it does not jump with the batch."
)
BEST = (
    "* is the best of its column: the lowest distance or loss, the highest of other scores. What is best differs from "
    "column to column; differences smaller than those between two seeds mean nothing."
)
NO_GAME = {
    "plain": (
        "Plain diffusion has no discriminator: there is no structure distance and no discriminator loss to show."
    ),
    "structure": "The structure encoder is fixed in this mode: there is no discriminator loss to show.",
}
LOSS_DENOISE = (
    "The denoiser's error in estimating the clean image, weighted by noise level. Faint: as logged; strong: running "
    "mean."
)
LOSS_QUARTILES = (
    "The denoising loss by the noise of the image, in four equal parts of the noise levels drawn. A part "
    "that stops falling while the others go on shows where the model is short of capacity."
)
DISTANCE: dict[str | None, str] = {
    "structure": "S in the features of the fixed Ψ. The denoiser pushes it down; nobody pushes it up.",
    "sadm": (
        "S, which the denoiser pushes down and the discriminator up. A slow fall or a plateau is healthy; a"
        " steady climb means that the discriminator learns too fast."
    ),
    None: "S, the mean difference between the relations of x0 and of x̂0.",
}
LOSS_DISCRIMINATOR = "The loss that the discriminator descends: minus S."
GRADIENTS = "Length of each player's gradient before clipping. Growing spikes announce instability."
RATES = "The learning rate of each player."
RELATIONS = (
    "One fixed batch of real images, sorted by class; thin lines are class boundaries. Left: the relations "
    "among the real images. Middle: the same images after noising and denoising. Right: their difference, "
    "from which S is computed. All steps share the colour scales, so early and late can be compared."
)
PLAIN_RELATIONS = "Plain diffusion has no discriminator: nothing looks at relations in this run."
CLASSIFIERS = (("structure_encoder", "The structure encoder Ψ"), ("judge", "The judge behind fid_classifier"))


def classifier_role(key: str, facts: Mapping[str, object]) -> str:
    """What a network of CLASSIFIERS is for, or where its weights come from by its entry in run.json."""
    if key == "judge":
        return "It is trained apart from the game and never gives the denoiser a gradient."
    if "weights" in facts:
        return "Its first weights came from a file."
    if facts.get("steps") == 0:
        return "It was not trained before the game: its structure is that of random weights."
    shuffled = facts.get("labels") == "shuffled"
    return f"It was trained as a classifier{' of shuffled labels' if shuffled else ''} before the game started."


def relations_title(mode: str | None) -> str:
    """Heading of the relation matrices."""
    return "What the structure encoder sees" if mode == "structure" else "What the discriminator sees"


def relation_meaning(relation: object) -> str:
    """What a cell of a relation matrix is, for the relation in the config."""
    if relation == "euclidean":
        return "A cell is the distance between the features of two images: dark is alike, bright is different."
    if relation == "cosine":
        return "A cell is the cosine between the features of two images: bright is alike, dark is different."
    if relation == "gaussian":
        return "A cell is a Gaussian similarity of two images' features: bright is alike, dark is different."
    return "A cell is the relation between the features of two images."
