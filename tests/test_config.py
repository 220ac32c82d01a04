"""The configuration: strict, explained in one line, and handed to DeepSpeed completely."""

import json
import re
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sadm_fast.config import Config, check_config, json_schema, load_config
from sadm_fast.config_sampling import SamplingConfig
from sadm_fast.config_training import ExponentialEMA, PowerEMA
from sadm_fast.config_tree import CHANGEABLE, LEARNING_RATES, RETIRED, flatten, override, without
from sadm_fast.diffusion import EDM, VP, Flow
from sadm_fast.engine.optimizers import deepspeed_dict
from sadm_fast.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
EXAMPLES = sorted(path for path in CONFIGS.rglob("*.json") if path.name != "schema.json")
SCHEMA = CONFIGS / "schema.json"


def config(**blocks: Any) -> Config:
    return check_config({"name": "test"} | blocks)


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        check_config({"name": "test"} | raw)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_valid(path: Path) -> None:
    loaded = load_config(path)
    assert loaded.name == path.stem
    assert loaded.schema_file is not None and (path.parent / loaded.schema_file).resolve() == SCHEMA.resolve()


@pytest.mark.parametrize(
    ("given", "steps"),
    [(18, 18), ("250", 250), ([250], 250), ("ddim50", "ddim50"), ([10, 15, 20], (10, 15, 20)), ("9, 9", (9, 9))],
)
def test_sampler_steps_are_a_number_sections_or_a_stride(given: Any, steps: Any) -> None:
    loaded = config(diffusion={"process": "vp"}, sampling={"steps": given})
    assert loaded.sampling.steps == steps
    assert check_config(json.loads(json.dumps(loaded.resolved()))) == loaded


def test_there_are_examples() -> None:
    assert CONFIGS / "mnist.json" in EXAMPLES


def test_the_schema_beside_the_examples_is_fresh() -> None:
    command = (
        'python -c "import json; from sadm_fast.config import json_schema;'
        ' print(json.dumps(json_schema(), indent=2))" > configs/schema.json'
    )
    assert SCHEMA.is_file(), f"write it: {command}"
    assert SCHEMA.read_text() == json.dumps(json_schema(), indent=2) + "\n", f"out of date, write it again: {command}"


def test_the_schema_explains_every_block_and_forbids_unknown_keys() -> None:
    schema = json_schema()
    assert schema["additionalProperties"] is False and schema["required"] == ["name"]
    for name, block in schema["$defs"].items():
        assert block["additionalProperties"] is False, name


# The key's path, its value, and what is allowed.
@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"trian": {}}, "trian: unknown key; did you mean train?"),
        ({"train": {"step": 5}}, "train.step: unknown key; did you mean steps?"),
        (
            {"data": {"zzz": 5}},
            "data.zzz: unknown key; allowed: broken, channels, decode, enlarge, flip, held_out, loader, path, prefetch,"
            " resolution, shape, source, threads",
        ),
        ({"schema_file": "x"}, "schema_file: unknown key; did you mean $schema?"),
        (
            {"diffusion": {"process": "edm", "sigmadata": 1.0}},
            "diffusion.sigmadata: unknown key; did you mean sigma_data?",
        ),
        (
            {"diffusion": {"process": "vp", "p_mean": 1.0}},
            "diffusion.p_mean: unknown key; allowed: learn_sigma, process",
        ),
        ({"train": {"ema": {"profile": "power", "sdt": 0.1}}}, "train.ema.sdt: unknown key; did you mean std?"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 1, "offload_optimizer": {"devise": "cpu"}}}},
            "deepspeed.zero_optimization.offload_optimizer.devise: unknown key; did you mean device?",
        ),
        ({"deepspeed": {"gradient_clipping": 1.0}}, "deepspeed.gradient_clipping: unknown key; allowed: "),
        (
            {"evaluate": {"judge": {"step": 5}}},
            "evaluate.judge.step: unknown key; did you mean steps?",
        ),
        ({"diffusion": {"process": "ddpm"}}, "diffusion.process=\"ddpm\": must be one of 'edm', 'vp', 'flow'"),
        ({"diffusion": {}}, "diffusion.process: is missing"),
        ({"train": {"ema": {"std": 0.1}}}, "train.ema.profile: is missing"),
        ({"train": {"ema": {"profile": "sma"}}}, "train.ema.profile=\"sma\": must be one of 'power', 'exponential'"),
        ({"train": {"steps": "100"}}, 'train.steps="100": input should be a valid integer'),
        ({"train": {"steps": 100.0}}, "train.steps=100.0: input should be a valid integer"),
        ({"train": {"steps": True}}, "train.steps=true: input should be a valid integer"),
        ({"train": {"steps": 0}}, "train.steps=0: input should be greater than or equal to 1"),
        ({"train": {"precision": "fp16"}}, "train.precision=\"fp16\": input should be 'fp32', 'bf16' or 'auto'"),
        ({"data": {"flip": 1}}, "data.flip=1: input should be a valid boolean"),
        ({"train": 5}, "train=5: input should be "),
        ({"data": {"channels": 4}}, "data.channels=4: input should be 1 or 3"),
        ({"data": {"resolution": 4}}, "data.resolution=4: input should be greater than or equal to 8"),
        ({"data": {"path": None}}, "data.path=null: input should be a valid string"),
        ({"game": {"lambda_s": float("nan")}}, "game.lambda_s=NaN: input should be a finite number"),
        ({"game": {"lambda_s": -0.1}}, "game.lambda_s=-0.1: input should be greater than or equal to 0"),
        ({"game": {"tau": 0.0}}, "game.tau=0.0: input should be greater than or equal to 0.000001"),
        (
            {"diffusion": {"process": "flow", "t_std": -1.0}},
            "diffusion.t_std=-1.0: input should be greater than or equal",
        ),
        ({"train": {"ema": {"profile": "power", "std": 0.3}}}, "train.ema.std=0.3: input should be less than 0.28"),
        ({"denoiser_optimizer": {"betas": [0.9]}}, "denoiser_optimizer.betas"),
        ({"denoiser_optimizer": {"betas": [0.9, 1.0]}}, "denoiser_optimizer.betas.1=1.0: input should be less than 1"),
        ({"discriminator_optimizer": {"lr": 0.0}}, "discriminator_optimizer.lr=0.0: input should be greater than 0"),
        ({"structure_encoder": {"width": 12}}, "structure_encoder.width=12: input should be a multiple of 8"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 4}}},
            "deepspeed.zero_optimization.stage=4: input should be 0, 1, 2 or 3",
        ),
        ({"seed": -1}, "seed=-1: input should be greater than or equal to 0"),
        ({"seed": 2**64}, "seed=18446744073709551616: input should be less than"),
        ({"name": "a/b"}, 'name="a/b": string should match pattern'),
        ({"name": "../up"}, 'name="../up": string should match pattern'),
        ({"name": ""}, 'name="": string should match pattern'),
        ({"denoiser": {"label_dropout": 1.0}}, "denoiser.label_dropout=1.0: input should be less than 1"),
        ({"denoiser": {"train": "difffit"}}, "denoiser.train=difffit: is for fine-tuning; needs weights"),
        ({"denoiser": {"label_map": "names"}}, "denoiser.label_map=names: is for fine-tuning; needs weights"),
        (
            {"denoiser": {"architecture": "unet", "train": "difffit", "weights": "x", "label_dropout": 0.0}},
            "denoiser.train: is for architecture=dit, here it is unet",
        ),
        ({"denoiser": {"name": "DiT-M/2"}}, "denoiser.name='DiT-M/2': must be one of DiT-S/2, DiT-S/4"),
        (
            {"denoiser": {"name": "DiT-S/4", "depth": 3, "patch_size": 4}},
            "denoiser.name='DiT-S/4' fixes patch_size, depth: give one or the other",
        ),
        (
            {"denoiser": {"hidden_size": 100, "num_heads": 3}},
            "denoiser.hidden_size=100: must be a multiple of 4 and of num_heads=3",
        ),
        ({"data": {"resolution": 18}}, "data.resolution=18: must be a multiple of the patch size 4"),
        (
            {"data": {"source": "latents", "resolution": 500}, "latents": {}},
            "data.resolution=500: must be a multiple of 32, the patch size 4 on 8x smaller latents",
        ),
        ({"data": {"source": "latents"}}, "data.source=latents: needs a latents block"),
        (
            {"implementation": "reference", "train": {"compile": True}},
            "train.compile=on: implementation=reference is eager; use fast, or train.compile=off",
        ),
        (
            {"latents": {}, "data": {"resolution": 32}},
            "data.source=folder: the latents block is for data.source=latents",
        ),
        (
            {
                "data": {"source": "latents", "resolution": 64},
                "latents": {},
                "evaluate": {"judges": ["pixels", "classifier"]},
            },
            "evaluate.judges=classifier: is trained on images; with data.source=latents use others",
        ),
        ({"evaluate": {"ema": [0.1, 0.05]}}, "evaluate.ema=0.05: the run keeps power-0.1; add it to train.more_ema"),
        ({"evaluate": {"ema": ["power-0.2"]}}, "evaluate.ema=power-0.2: the run keeps power-0.1"),
        ({"evaluate": {"guidance": [1, 1.5, 1]}}, "evaluate.guidance: 1 is there twice"),
        ({"evaluate": {"judges": ["vit=a.pt", "vit=b.pt"]}}, "evaluate.judges: vit is there twice"),
        ({"evaluate": {"guidance": []}}, "evaluate.guidance"),
        (
            {
                "denoiser": {"architecture": "unet", "channels": 32, "conditional": False, "label_dropout": 0.0},
                "evaluate": {"guidance": [1.5]},
            },
            "evaluate.guidance=1.5: denoiser.conditional=false has no null class to guide from; it must be 1",
        ),
        (
            {"data": {"resolution": 36}, "denoiser": {"name": "DiT-S/8"}},
            "data.resolution=36: must be a multiple of the patch size 8",
        ),
        (
            {"diffusion": {"process": "vp"}, "sampling": {"sampler": "heun"}},
            "sampling.sampler=heun: does not fit VP; must be one of auto, ddim, dpmpp_2m, ddpm",
        ),
        *(
            ({"diffusion": {"process": process}, "sampling": sampling}, f"sampling.{message}")
            for process, sampling, message in (
                ("vp", {"steps": 1001}, "steps=1001: the schedule has 1000 steps"),
                ("vp", {"steps": [10, 400, 10]}, "steps=400: section 2 of 3 has 333 steps"),
                ("vp", {"steps": "ddim300"}, "steps=ddim300: no whole stride takes 300 of 1000 steps"),
                ("edm", {"steps": "ddim50"}, "steps=ddim50: chooses from a schedule, which only vp has"),
                ("edm", {"steps": 0}, 'steps=0: must be a whole number from 1 to 100000, "ddimN", or a list of'),
                ("edm", {"steps": "ddim"}, 'steps="ddim": must be a whole number'),
                ("edm", {"steps": True}, "steps=true: must be a whole number"),
                (
                    "edm",
                    {"sampler": "ddim", "churn": 40.0},
                    "churn=40.0: is for sampling.sampler=heun, here it is ddim",
                ),
                ("flow", {"churn": 40.0}, "churn=40: raises the noise level sigma of edm; here the process is flow"),
                ("vp", {"sampler": "ddpm", "eta": 0.5}, "eta=0.5: is for sampling.sampler=ddim, here it is ddpm"),
                (
                    "vp",
                    {"sampler": "ddpm", "variance": "learned"},
                    "variance=learned: needs diffusion.learn_sigma=true",
                ),
                ("vp", {"guidance_channels": 3}, "guidance_channels=3: a sample has 1"),
                ("vp", {"guidance_interval": [700, 100]}, "guidance_interval=[700.0, 100.0]: must be two noise levels"),
            )
        ),
        (
            {"diffusion": {"process": "vp"}, "evaluate": {"steps": 1001}},
            "evaluate.steps=1001: the schedule has 1000 steps",
        ),
        (
            {"data": {"source": "latents", "resolution": 64}, "latents": {}, "sampling": {"clip_denoised": True}},
            "sampling.clip_denoised=true: clips pixels to [-1, 1]; latents have no such range",
        ),
        ({"game": {"queue": 64, "mode": "plain"}}, "game.queue=64: game.mode=plain compares nothing; it must be 0"),
        (
            {"game": {"queue": 15}, "train": {"micro_batch": 8, "grad_accumulation": 2}},
            "game.queue=15: must be 0, or at least the 16 samples of a step",
        ),
        ({"train": {"micro_batch": 1}}, "train.micro_batch=1: the game compares pairs, so it needs at least 2"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}},
            "deepspeed.zero_optimization.offload_param: needs stage 3, not 2",
        ),
        *(
            (
                {"deepspeed": {"zero_optimization": {"stage": stage, "allgather_bucket_size": 7}}},
                f"deepspeed.zero_optimization.allgather_bucket_size=7: must be even at stage {stage}",
            )
            for stage in (1, 2)
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}},
            "deepspeed.zero_optimization.offload_param.device=\"nvme\": input should be 'none' or 'cpu'",
        ),
        ({"deepspeed": {"wall_clock_breakdown": True}}, "deepspeed.wall_clock_breakdown: unknown key"),
        ({"structure_encoder": {"width": 10**40}}, "structure_encoder.width=1000000"),
        ({"train": {"micro_batch": 10**308}}, "train.micro_batch=1000000"),
        ({"denoiser": {"hidden_size": 2**62}}, "denoiser.hidden_size=4611686018427387904: input should be less than"),
        ({"data": {"resolution": 2**31}}, "data.resolution=2147483648: input should be less than or equal to 16384"),
        (
            {"data": {"resolution": 2**14}},
            "data.resolution=16384: is 16,777,216 tokens; at most 1,048,576 (a larger patch",
        ),
        (
            {"train": {"micro_batch": 2**20}, "data": {"resolution": 1024}},
            "train.micro_batch=1048576: 1,048,576 samples at once make one layer's output",
        ),
        (
            {"sampling": {"rows": 1000, "columns": 1000}, "data": {"resolution": 1024}, "game": {"mode": "plain"}},
            "sampling.rows=1000: 1,000,000 samples at once make one layer's output",
        ),
        (
            {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}},
            "deepspeed.zero_optimization.offload_optimizer: needs stage 1, 2 or 3, not 0",
        ),
    ],
)
def test_a_mistake_is_one_line_with_path_value_and_what_is_allowed(raw: dict[str, Any], message: str) -> None:
    assert refusal(raw).startswith(message)


@pytest.mark.parametrize(
    "path",
    [
        "data.path", "latents.images", "latents.autoencoder", "denoiser.weights", "structure_encoder.weights",
    ],
)  # fmt: skip
def test_a_tilde_in_a_path_is_the_home_folder(file: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/mine")
    latents = ["data.source=latents", 'latents={"downsample": 2}'] if path.startswith("latents") else []
    config = load_config(file, [*latents, f"{path}=~/x"])
    assert flatten(config.resolved())[path] == "/home/of/mine/x"
    with pytest.raises(UserError, match=rf'^{path}="~no-such-user/x": there is no home folder ~no-such-user; write it'):
        load_config(file, [*latents, f"{path}=~no-such-user/x"])


FIELDS = sorted(flatten(config(data={"source": "latents", "resolution": 128}, latents={}).resolved()))
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from([-1, 0, 1, 3, 8, 512])
    | st.integers(0, 340).map(lambda n: 2**n),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), ANYTHING, min_size=1, max_size=3))
def test_whatever_stands_in_a_field_is_taken_or_refused_in_one_line(values: dict[str, Any]) -> None:
    tree: dict[str, Any] = {"name": "test"}
    try:
        for path, value in values.items():
            if path in FIELDS:
                override(tree, f"{path}={json.dumps(value)}")
            else:
                tree[path] = value
        loaded = check_config(tree)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 1000
    else:
        assert check_config(json.loads(json.dumps(loaded.resolved()))) == loaded


def test_of_several_mistakes_the_first_is_told_and_the_others_are_counted() -> None:
    message = refusal({"train": {"steps": 0, "log_every": 0}, "dta": {}})
    assert message.startswith("train.steps=0: ") and message.endswith(" (and 2 more)")


def test_a_missing_name_is_named() -> None:
    with pytest.raises(UserError, match=r"^name: is missing$"):
        check_config({})


def test_plain_training_may_have_batches_of_one() -> None:
    assert config(game={"mode": "plain"}, train={"micro_batch": 1}).train.micro_batch == 1


def test_the_builds_of_the_blocks_carry_their_values() -> None:
    built = config(diffusion={"process": "edm", "sigma_data": 0.7, "p_mean": -1.0, "p_std": 0.9}).process
    assert built == EDM(sigma_data=0.7, p_mean=-1.0, p_std=0.9)
    assert config(diffusion={"process": "vp", "learn_sigma": True}).process == VP(learn_sigma=True)
    assert config(diffusion={"process": "flow", "t_mean": 0.1, "t_std": 2.0}).process == Flow(t_mean=0.1, t_std=2.0)
    assert isinstance(config().train.ema, PowerEMA)
    assert config(train={"ema": {"profile": "exponential", "decay": 0.99}}).train.ema == ExponentialEMA(
        profile="exponential", decay=0.99
    )


def test_a_configuration_does_not_change() -> None:
    loaded: Any = config()
    with pytest.raises(ValidationError):
        loaded.train.steps = 3


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"name": "run", "train": {"steps": 7}, "diffusion": {"process": "flow"}}))
    return path


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.steps=100", "train.steps", 100),
        ("denoiser_optimizer.lr=1e-3", "denoiser_optimizer.lr", 1e-3),
        ("data.flip=true", "data.flip", True),
        ("data.path=/some/where", "data.path", "/some/where"),
        ("data.path=a=b", "data.path", "a=b"),
        ('name="2024"', "name", "2024"),
        ("game.gate_log_snr=null", "game.gate_log_snr", None),
        ("denoiser_optimizer.betas=[0.8, 0.9]", "denoiser_optimizer.betas", [0.8, 0.9]),
        ('diffusion={"process": "vp"}', "diffusion.process", "vp"),
        ("deepspeed.zero_optimization.stage=2", "deepspeed.zero_optimization.stage", 2),
    ],
)
def test_set_overrides_a_key(file: Path, override: str, path: str, value: Any) -> None:
    assert flatten(load_config(file, [override]).resolved())[path] == value


def test_overrides_come_in_order_and_leave_the_rest(file: Path) -> None:
    loaded = load_config(file, ["train.steps=100", "train.steps=200", "seed=3"])
    assert (loaded.train.steps, loaded.seed, loaded.name) == (200, 3, "run")
    assert load_config(file).train.steps == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "--set train.steps: must be key.path=value"),
        ("=5", "--set =5: must be key.path=value"),
        ("name.x=5", "--set name.x=5: name is not a block of the configuration"),
        ("train.steps=many", 'train.steps="many": input should be a valid integer'),
        ("train.stesp=5", "train.stesp: unknown key; did you mean steps?"),
        ("game.lambda_s=NaN", 'game.lambda_s="NaN": input should be a valid number'),
        ('train={"steps": 5, "steps": 6}', '--set train={"steps": 5, "steps": 6}: train.steps: given twice'),
        ("train.steps=" + "[" * 5000, 'train.steps="[[['),
        (".".join("x" * 50) + "=1", "--set x.x.x."),
    ],
    ids=lambda text: text[:20],
)
def test_a_bad_override_is_named(file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(file, [override])
    assert str(caught.value).startswith(message)


BAD_FILES = {
    "cut": (b"{", "not valid JSON"),
    "empty": (b"", "is empty"),
    "blank": (b" \n", "is empty"),
    "a list": (b"[1]", "must hold one JSON object, not a list"),
    "null": (b"null", "must hold one JSON object, not null"),
    "a number": (b"7", "must hold one JSON object"),
    "UTF-16": ('{"name": "a"}'.encode("utf-16"), "not UTF-8 text (byte 0)"),
    "Latin-1": ('{"name": "a", "data": {"path": "/Bücher"}}'.encode("latin-1"), "not UTF-8 text (byte "),
    "NaN": (b'{"name": "a", "game": {"lambda_s": NaN}}', "NaN is not a number in JSON"),
    "Infinity": (b'{"name": "a", "game": {"lambda_s": -Infinity}}', "-Infinity is not a number in JSON"),
    "deep": (b'{"name": ' + b"[" * 100_000, "nested too deeply"),
    "deep and whole": (b'{"name": ' + b"[" * 50 + b"]" * 50 + b"}", "nested too deeply"),
    "digits": (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "a block twice": (b'{"name": "a", "train": {"steps": 5}, "train": {"log_every": 5}}', "(train: given twice)"),
    "a key twice": (b'{"name": "a", "train": {"steps": 5, "steps": 5}}', "(train.steps: given twice)"),
    "twice in a list": (b'{"name": "a", "x": [{"y": 1}, {"y": 1, "y": 1}]}', "(x.1.y: given twice)"),
    "twice in a block given once more": (b'{"train": {"ema": {"std": 1, "std": 2}}}', "(train.ema.std: given twice)"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_no_strict_json_object_is_one_line(tmp_path: Path, case: str) -> None:
    content, message = BAD_FILES[case]
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    text = str(caught.value)
    assert text.startswith(f"--config {path}: ") and message in text and "\n" not in text


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "windows.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"name": "windows"}')
    assert load_config(path).name == "windows"


@pytest.mark.parametrize(
    "content",
    [
        {"train_batch_size": 64, "optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 2}},
        {"train_micro_batch_size_per_gpu": "auto"},
        {"zero_optimization": {"stage": 3}},
        {"bf16": {"enabled": True}, "steps_per_print": 10},
    ],
)
def test_a_file_in_deepspeeds_format_is_told_from_one_of_ours(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"ds\.json: is in DeepSpeed's format \({next(iter(content))}.*configs/mnist"):
        load_config(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(UserError, match=f"^--config {path}: "):
            load_config(path)


def test_the_resolved_configuration_is_complete(file: Path) -> None:
    resolved = load_config(file).resolved()
    assert resolved["train"]["steps"] == 7 and resolved["sampling"]["steps"] == 18
    assert set(Config.model_fields) - {"schema_file"} == set(resolved)


STAGE3 = {"zero_optimization": {"stage": 3}}  # which any other field of the block goes with
BASES: list[dict[str, Any]] = [
    {"deepspeed": STAGE3},
    {"deepspeed": STAGE3, "diffusion": {"process": "vp"}, "train": {"ema": {"profile": "exponential"}}},
    {"deepspeed": STAGE3, "diffusion": {"process": "flow"}, "denoiser": {"name": "DiT-S/4"}},
    {"deepspeed": STAGE3, "data": {"source": "latents", "resolution": 128}, "latents": {}},
    {"deepspeed": STAGE3, "denoiser": {"architecture": "unet", "label_dropout": 0.0}},
    {
        "data": {"source": "own", "shape": [5, 7]},
        "denoiser": {"architecture": "own"},
        "structure_encoder": {"architecture": "own"},
    },
]


@pytest.mark.parametrize("blocks", [{}, *BASES], ids=["plain", "stage3", "vp", "named", "latents", "unet", "own"])
def test_a_run_folders_configuration_can_be_read_back(blocks: dict[str, Any]) -> None:
    loaded = config(**blocks)
    again = check_config(json.loads(json.dumps(loaded.resolved())))
    assert again == loaded and again.fingerprint() == loaded.fingerprint()


def other_values(value: Any) -> list[Any]:
    """Other values, of which any field accepts one."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [n for n in (value + 8, 2 * value, 2 * value + 8, value - 1, 3, 512) if n != value]
    if isinstance(value, float):
        return [value + 0.125, value * 0.5]
    if value and isinstance(value, list) and isinstance(value[0], str):
        return [[]]
    if isinstance(value, list):
        return [[v // 2 for v in value], [v / 2 for v in value]] if value else [[{"profile": "power", "std": 0.05}]]
    words = ["bf16", "reference", "torch", "apex_fused_adam", "resnet18", "small", "frozen", "structure", "global"]
    words += [
        "cosine",
        "absolute",
        "none",
        "cpu",
        "skip",
        "webdataset",
        "float32",
        "ddim",
        "text",
        "on",
        "model",
        "shuffled",
        "data",
        "own",
        "features",
        "gradient",
        "batch",
    ]
    return words if isinstance(value, str) else [5, 0.5, "text", True, {"device": "cpu"}]


def changed(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *parents, last = path.split(".")
    result = json.loads(json.dumps(tree))
    node = result
    for key in parents:
        node = node[key]
    node[last] = value
    return result


def changes(base: dict[str, Any]) -> list[tuple[str, Config]]:
    """For every field a configuration in which it alone has another value."""
    found = []
    for path, value in flatten(base).items():
        for other in other_values(value):
            try:
                found.append((path, check_config(changed(base, path, other))))
                break
            except UserError:
                continue
    return found


@pytest.mark.parametrize("blocks", BASES[:5], ids=["stage3", "vp", "named", "latents", "unet"])
def test_the_fingerprint_ignores_what_may_change_on_resume_and_nothing_else(blocks: dict[str, Any]) -> None:
    base = config(**blocks)
    resolved = base.resolved()
    seen = set()
    for path, other in changes(resolved):
        seen.add(path)
        changeable = any(path == free or path.startswith(free + ".") for free in CHANGEABLE)
        assert (other.fingerprint() == base.fingerprint()) == changeable, path
    # Another tag or name would need other keys beside it; those are told apart by the next test.
    alone = {"diffusion.process", "train.ema.profile", "denoiser.name", "latents", "data.source", "evaluate.every"}
    alone |= {"train.ema_snapshot_every", "game.stage", "game.block", "game.look_at"}  # depend on another field
    alone |= {"structure_encoder.input", "data.shape"}  # pixels need latents and weights; a shape is of data.source=own
    alone |= {"denoiser.architecture", "denoiser.train", "denoiser.label_map"}  # fine-tuning needs weights
    alone |= {"evaluate.ema", "evaluate.judges"}  # lists of names
    alone |= {f"sampling.{setting}" for setting in SamplingConfig.model_fields}  # most fit one sampler only
    assert set(flatten(resolved)) - seen <= alone


def test_the_fingerprint_of_the_first_versions_holds_the_learning_rates_too() -> None:
    faster = config(denoiser_optimizer={"lr": 0.5})
    assert faster.fingerprint() == config().fingerprint()
    assert faster.first_fingerprint() != config().first_fingerprint()
    assert config(train={"steps": 9}).first_fingerprint() == config().first_fingerprint() != config().fingerprint()


def test_processes_profiles_and_names_have_their_own_fingerprints() -> None:
    different = [*BASES, {"denoiser": {"name": "DiT-S/2"}}, {"train": {"ema": {"profile": "exponential"}}}]
    assert len({config(**blocks).fingerprint() for blocks in different}) == len(different)


def test_the_weights_under_difffit_may_have_moved() -> None:
    runs = [
        config(denoiser={"weights": path, "train": train, "label_map": rows}).fingerprint()
        for path, train, rows in (
            ("a", "difffit", None), ("b", "difffit", None), ("a", "all", None), ("b", "all", None),
            ("a", "difffit", "names"),
        )
    ]  # fmt: skip
    assert runs[0] == runs[1] and len(set(runs)) == 4


def test_how_long_how_often_and_how_parallel_may_change_on_resume() -> None:
    """A longer list needs a thought: a run continued with another value of the field must still be the same run."""
    how_long_and_often = {
        f"train.{key}"
        for key in ("steps", "log_every", "sample_every", "checkpoint_every", "keep_last", "keep_every", "patience")
    }
    how_long_and_often |= {"train.ema_snapshot_every"}
    divided = {"train.micro_batch", "train.grad_accumulation", "deepspeed.zero_optimization", "train.compile"}
    divided |= {"train.activation_checkpointing"}
    looking = {"sampling", "evaluate", "logging", "name"}
    how = {f"data.{key}" for key in ("path", "threads", "prefetch", "loader", "decode", "broken")}
    making = {f"latents.{key}" for key in ("autoencoder", "images", "images_source", "batch", "shard_size")}
    assert set(CHANGEABLE) == how_long_and_often | looking | how | making | divided | set(LEARNING_RATES)


@pytest.mark.parametrize("path", RETIRED)
def test_a_run_folder_of_an_older_version_can_be_read(path: str) -> None:
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    now = config(deepspeed={"zero_optimization": {"stage": 3, **offload}})
    old = changed(now.resolved(), path, RETIRED[path])
    assert check_config(old) == now and check_config(old).fingerprint() == now.fingerprint()
    with pytest.raises(UserError, match=f"^{path}: unknown key"):
        check_config(changed(now.resolved(), path, "on"))


def test_every_changeable_field_exists() -> None:
    resolved = config(data={"source": "latents", "resolution": 128}, latents={}).resolved()
    for path in CHANGEABLE:
        assert without(resolved, [path]) != resolved


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_accepts_both_players_dictionaries(stage: int, precision: str) -> None:
    loaded = config(
        train={"precision": precision, "micro_batch": 6, "grad_accumulation": 2},
        denoiser_optimizer={"gradient_clipping": 0.5},
        deepspeed={"zero_optimization": {"stage": stage, "reduce_bucket_size": 1234}},
    )
    for optimizer in (loaded.denoiser_optimizer, loaded.discriminator_optimizer):
        given = deepspeed_dict(loaded, optimizer, world_size=1, device_type="cpu")
        # Left out, DeepSpeed would clip at 1.0; below stage 3 our own step clips instead.
        assert "gradient_clipping" in given
        own = stage < 3
        accepted = DeepSpeedConfig(json.loads(json.dumps(given)))
        assert accepted.gradient_clipping == (0.0 if own else optimizer.gradient_clipping)
        assert accepted.zero_config.stage == accepted.zero_optimization_stage == stage
        assert accepted.zero_config.reduce_bucket_size == 1234
        assert accepted.bfloat16_config.enabled == (precision == "bf16")
        assert not accepted.float16_config.enabled
        assert (accepted.train_micro_batch_size_per_gpu, accepted.gradient_accumulation_steps) == (6, 2)
        assert accepted.train_batch_size == 12


@pytest.mark.parametrize(
    ("device_type", "given", "expected"),
    [
        ("cpu", {}, (2_000_000, 2_000_000)),
        ("cuda", {}, (50_000_000, 500_000_000)),
        ("cpu", {"reduce": 7}, (7, 2_000_000)),
    ],
)
def test_buckets_fit_the_device_unless_given(
    device_type: str, given: dict[str, int], expected: tuple[int, int]
) -> None:
    zero = {f"{name}_bucket_size": size for name, size in given.items()}
    loaded = config(deepspeed={"zero_optimization": zero})
    derived = deepspeed_dict(loaded, loaded.denoiser_optimizer, 1, device_type)["zero_optimization"]
    assert (derived["reduce_bucket_size"], derived["allgather_bucket_size"]) == expected


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_the_global_batch_counts_ranks_and_accumulation(world_size: int) -> None:
    loaded = config(train={"micro_batch": 6, "grad_accumulation": 3})
    given = deepspeed_dict(loaded, loaded.denoiser_optimizer, world_size, "cpu")
    assert given["train_batch_size"] == 18 * world_size


def test_every_key_of_the_zero_block_is_deepspeeds_own() -> None:
    """DeepSpeed ignores unknown keys at the top of its dictionary, but not inside this block."""
    offload = {"device": "cpu", "pin_memory": True}
    zero = {"stage": 3, "overlap_comm": True, "offload_optimizer": offload, "offload_param": offload}
    loaded = config(deepspeed={"zero_optimization": zero})
    given = deepspeed_dict(loaded, loaded.denoiser_optimizer, world_size=1, device_type="cpu")["zero_optimization"]
    accepted = DeepSpeedZeroConfig(**given)
    for key, value in given.items():
        if not isinstance(value, dict):
            # 0.19 reads some stage 3 keys under their older names only.
            known = {key, key.removeprefix("stage3_")} & set(type(accepted).model_fields)
            assert getattr(accepted, known.pop()) == value
    assert accepted.offload_optimizer.device == accepted.offload_param.device == "cpu"
    with pytest.raises(ValidationError):
        DeepSpeedZeroConfig(**given | {"made_up": 1})


def test_every_top_level_key_is_one_that_deepspeed_reads() -> None:
    """It ignores those it does not know, so a misspelt one would be a setting without effect."""
    loaded = config()
    runtime = Path(deepspeed.runtime.config.__file__).parent
    source = "".join(path.read_text() for path in runtime.glob("**/c*.py"))  # config.py, constants.py
    for key in deepspeed_dict(loaded, loaded.denoiser_optimizer, world_size=1, device_type="cpu"):
        assert re.search(rf"""["']{key}["']""", source), key


def test_dotted_paths_can_be_taken_out_and_flattened() -> None:
    tree: dict[str, Any] = {"a": {"b": 1, "c": {"d": 2}}, "e": [3]}
    assert flatten(tree) == {"a.b": 1, "a.c.d": 2, "e": [3]}
    assert without(tree, ["a.b", "e"]) == {"a": {"c": {"d": 2}}}
    assert tree["a"]["b"] == 1


# As the first versions wrote them into checkpoints. A new field belongs into config_tree.LATER, or CHANGEABLE.
FIRST_FINGERPRINTS = {
    "mnist": "e59e3d965675203c20124a3e712d3a7dcda15b35367a7061c942547465d83ccd",
    "ffhq64": "cd8accd1f896ec718c1675750b022697035dd4c976e6b14e770112322bde9c48",
    "cifar10": "75f35c2d7ef0f74aae8e0a9776870eef39ebc515227b2aa88dd287b11c9362c8",
}


# What the files of that time had otherwise.
FIRST_CONFIGURATIONS: dict[str, list[str]] = {
    "mnist": [],
    "ffhq64": [
        'denoiser={"name": "DiT-B/4", "num_classes": 1, "label_dropout": 0.0}',
        "structure_encoder.weights=weights/resnet18.safetensors",
        'train={"steps": 200000, "micro_batch": 64, "precision": "bf16", "checkpoint_every": 5000}',
    ],
    "cifar10": [
        'denoiser={"name": "DiT-B/2", "num_classes": 10, "label_dropout": 0.1}',
        'train={"steps": 200000, "micro_batch": 64, "precision": "bf16", "checkpoint_every": 5000}',
    ],
}
_PIXELS_THEN = [
    "data.flip=true",
    "game.start_step=100000",
    'denoiser_optimizer={"lr": 0.0002, "betas": [0.9, 0.99], "warmup_steps": 5000}',
]


@pytest.mark.parametrize("name", FIRST_FINGERPRINTS)
def test_runs_of_the_first_versions_go_on(name: str) -> None:
    then = FIRST_CONFIGURATIONS[name]
    config = load_config(CONFIGS / f"{name}.json", then + _PIXELS_THEN if then else [])
    assert config.fingerprint() == FIRST_FINGERPRINTS[name]


def test_several_averages_and_their_snapshots() -> None:
    second = {"profile": "power", "std": 0.05}
    train = config(train={"more_ema": [second], "ema_snapshot_every": 500, "checkpoint_every": 250}).train
    assert [profile.label for profile in train.profiles] == ["power-0.1", "power-0.05"]
    assert config(train={"more_ema": [second]}).fingerprint() != config().fingerprint()
    for wrong, message in (
        ({"more_ema": [{"profile": "power", "std": 0.1}]}, "train.more_ema: power-0.1: an average twice"),
        ({"ema_snapshot_every": 300}, "train.ema_snapshot_every=300: must be a multiple of checkpoint_every=250"),
        (
            {"ema": {"profile": "constant", "decay": 0.999}, "ema_snapshot_every": 250},
            "train.ema_snapshot_every=250: needs an ema of profile power",
        ),
    ):
        with pytest.raises(UserError, match=message):
            config(train=wrong)


def test_the_game_ends_after_it_has_begun() -> None:
    game = config(game={"mode": "sadm", "start_step": 2, "warmup_steps": 1, "stop_step": 4}).game
    assert [game.playing(step) for step in range(6)] == [False, False, True, True, False, False]
    assert not config(game={"mode": "plain"}).game.playing(3)
    with pytest.raises(UserError, match="stop_step=3: must be above start_step"):
        config(game={"start_step": 2, "warmup_steps": 1, "stop_step": 3})


@pytest.mark.parametrize(
    ("game", "message"),
    [
        ({"compare": "tokens", "queue": 64}, "compare=tokens: needs queue=0"),
        ({"compare": "locations", "scope": "global"}, "compare=locations: needs scope=rank"),
        ({"compare": "features", "relation": "cosine"}, "compare=features: needs relation=euclidean"),
        ({"compare": "tokens", "same_class": True}, "compare=tokens: pairs no samples"),
        ({"compare": "tokens", "normalize": "mean"}, "compare=tokens: has no normalize=mean"),
        ({"look_at": "hidden"}, "look_at=hidden: Psi cannot play against the tokens"),
        ({"look_at": "hidden", "mode": "structure", "block": 5}, "game.block=5: the denoiser has 4"),
        ({"block": 2}, "block=2: is for look_at=hidden"),
        ({"stage": 1}, "stage=1: is for compare=tokens and locations"),
        ({"compare": "tokens", "stage": 4}, "game.stage=4: cnn has 3"),
        ({"strength": "gradient", "scope": "global"}, "strength=gradient: needs scope=rank"),
        ({"noise_levels": "batch", "queue": 128}, "noise_levels=batch: needs queue=0"),
    ],
)
def test_what_s_cannot_compare_is_refused(game: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(game=game)


def test_psi_needs_a_stage_only_where_its_maps_are_compared() -> None:
    vit = {"architecture": "vit", "depth": 1}
    config(structure_encoder=vit)
    with pytest.raises(UserError, match="game.stage=2: vit has 1"):
        config(structure_encoder=vit, game={"compare": "locations"})
