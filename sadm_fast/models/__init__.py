"""The networks: denoisers, the structure encoder Psi, the autoencoder of latent diffusion."""

from sadm_fast.models.denoiser import Denoiser
from sadm_fast.models.dit import DiT
from sadm_fast.models.efficientnet import EfficientNetLite
from sadm_fast.models.structure_encoder import ResNet18, SmallCNN, StructureEncoder
from sadm_fast.models.unet import UNet
from sadm_fast.models.vit import ViT

__all__ = ["Denoiser", "DiT", "EfficientNetLite", "ResNet18", "SmallCNN", "StructureEncoder", "UNet", "ViT"]
