"""The configuration's blocks about samples: where they lie, how they are read, and the latent space of latents."""

from typing import Annotated, Literal

from pydantic import Field

from sadm_fast.config_block import Block, FilePath


class DataConfig(Block):
    path: FilePath = Field("demo:mnist5k", description="folder of the samples; demo:mnist5k is the embedded demo set")
    source: Literal["folder", "webdataset", "mds", "huggingface", "latents", "own"] = Field(
        "folder",
        description="folder: class/name.png; webdataset: tar shards; mds: MosaicML's shards; huggingface: Parquet or"
        " Arrow files; latents: what encode.py wrote; own: given to sadm_fast.train",
    )
    resolution: int = Field(
        16, ge=8, le=2**14, description="side of the square crop in pixels, also of the images behind latents"
    )
    channels: Literal[1, 3] = Field(1, description="1 grey, 3 colour")
    held_out: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of each class that nothing is trained on; evaluate.py --memorisation compares with it",
    )
    shape: tuple[Annotated[int, Field(ge=1, le=2**24)], ...] | None = Field(
        None,
        min_length=1,
        max_length=8,
        strict=False,
        description="own: of a sample, channels first, if it is no square image; sadm_fast.train fills it in",
    )
    flip: bool = Field(False, description="mirror half of the images; wrong for digits and text")
    enlarge: bool = Field(
        False, description="true: enlarge images smaller than the crop, as DiT does; false: count them as broken"
    )
    broken: Literal["refuse", "skip"] = Field(
        "refuse",
        description="refuse: decode every image once before training, and stop if one is broken;"
        " skip: replace a broken image when it is met, and count it",
    )
    loader: Literal["dali", "torch"] = Field("dali", description="dali: NVIDIA DALI; torch: PIL in torch workers")
    decode: Literal["auto", "mixed", "cpu"] = Field(
        "auto", description="where DALI decodes: mixed is JPEG on the GPU; auto is mixed if there is a GPU"
    )
    threads: int = Field(2, ge=1, le=1024, description="reading and decoding threads of each rank")
    prefetch: int = Field(2, ge=1, le=1024, description="batches prepared ahead")


class LatentsConfig(Block):
    """The latent space of data.source=latents, and how encode.py fills data.path."""

    autoencoder: FilePath | None = Field(
        "stabilityai/sd-vae-ft-ema",
        description="diffusers AutoencoderKL: a local folder or a hub id; null: samples stay latents, without pictures",
    )
    channels: int = Field(4, ge=1, le=1024, description="channels of a latent")
    downsample: int = Field(8, ge=1, le=1024, description="side of an image over the side of its latent")
    scale: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="scaled latent = scale * raw latent; null: the autoencoder's scaling_factor, or by the channels of"
        " latents_stats.pt",
    )
    images: FilePath | None = Field(None, description="encode.py: folder of the images to encode")
    images_source: Literal["folder", "webdataset", "mds", "huggingface"] = Field(
        "folder", description="encode.py: as data.source"
    )
    dtype: Literal["float16", "float32"] = Field(
        "float16", description="encode.py: of the cached mean and standard deviation"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="encode.py: arithmetic of the autoencoder")
    shard_size: int = Field(
        8192, ge=1, le=2**24, description="encode.py: images in a shard; a killed run loses at most one shard a rank"
    )
    batch: int = Field(32, ge=1, le=2**16, description="encode.py: images in one forward")
