"""The README.md beside exported weights: how to use them, what they scored, where they come from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sadm_fast.files import parse_json

_FITTED = """\
The same latents, to rounding, as `sample.py --sampler ddim --steps ddim{steps}` draws of the same noise. **Only with
{steps} steps of DDIM**: diffusers' time embedding has other frequencies than DiT's, and was fitted at these steps.
Weights for any steps and schedulers: `export.py --steps 0`."""
_NOT_FITTED = """\
diffusers' time embedding has other frequencies than DiT's. Without this line it draws other, worse images:

```python
for block in pipeline.transformer.transformer_blocks:
    block.norm1.emb.time_proj.downscale_freq_shift = 0
```"""
_DIFFUSERS = """\
```python
from diffusers import DiTPipeline

pipeline = DiTPipeline.from_pretrained("this folder")
images = pipeline(class_labels=[0, 1], guidance_scale={guidance:g}, num_inference_steps={steps}).images
```

"""
_ALONE = """\
```
python sadm_fast/sample.py --weights {file} --config sadm_fast.json --out grid.png
```
"""
_DIT = """
The names are those of DiT's release: `DiT(...).load_state_dict(torch.load("{file}", weights_only=True))` there. Its
sampler guides 3 of 4 channels, this project's all, unless `sampling.guidance_channels` says otherwise.
"""


def model_card(form: str, file: str, config: Mapping[str, Any], steps: int, scores: Any, record: Any) -> str:
    """The text of a model card.

    Args:
        form: "diffusers", "safetensors" or "dit".
        file: the name of the weights, but for diffusers.
        config: the resolved configuration.
        steps: diffusers: those of `to_diffusers`.
        scores: the line of evaluations.jsonl that belongs to the weights; None: there is none.
        record: where the weights come from and how they are sampled; JSON values.
    """
    guidance = config["sampling"]["guidance_scale"]
    if form == "diffusers":
        use = _DIFFUSERS.format(guidance=guidance, steps=steps or 50)
        use += _FITTED.format(steps=steps) if steps else _NOT_FITTED
    else:
        use = _ALONE.format(file=file) + (_DIT.format(file=file) if form == "dit" else "")
    head = {
        "library_name": "diffusers" if form == "diffusers" else "sadm_fast",
        "pipeline_tag": "unconditional-image-generation",
        "tags": "[diffusion, dit, sadm]",
    }
    return "\n".join(
        [
            "---",
            *(f"{key}: {value}" for key, value in head.items()),
            "---",
            "",
            f"# {config['name']}",
            "",
            use,
            "",
            "## Scores",
            "",
            *_scores(scores),
            "",
            "## Provenance",
            "",
            "```json",
            json.dumps(record, indent=2),
            "```",
            "",
        ]
    )


def scores_at(evaluations: Path, step: int | None) -> Any:
    """The last line of evaluations.jsonl of a step; None if there is none that can be read."""
    found = None
    try:
        lines = evaluations.read_bytes().splitlines()
    except OSError:
        return None
    for line in lines:
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if isinstance(value, dict) and value.get("step") == step:
            found = value
    return found


def _scores(scores: Any) -> list[str]:
    """A table of the numbers in a line of evaluations.jsonl, each with its floor where it has one."""
    if not isinstance(scores, dict):
        return ["None of this step."]
    floor = scores.get("floor")
    floor = floor if isinstance(floor, dict) else {}
    numbers = {k: v for k, v in scores.items() if isinstance(v, int | float) and k not in ("step", "samples")}
    rows = [f"| {name} | {value:.4g} | {_number(floor.get(name))} |" for name, value in numbers.items()]
    about = (
        f"Of {scores.get('samples')} samples at step {scores.get('step')}; the floor is real images against real ones."
    )
    return [about, "", "| score | value | floor |", "| --- | --- | --- |", *rows]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""
