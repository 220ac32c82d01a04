"""Diffusion processes and samplers: pure functions of tensors."""

from sadm_fast.diffusion.edm import EDM
from sadm_fast.diffusion.flow import Flow
from sadm_fast.diffusion.guidance import denoise, guided
from sadm_fast.diffusion.process import Process
from sadm_fast.diffusion.samplers import sample
from sadm_fast.diffusion.vp import VP

__all__ = ["EDM", "VP", "Flow", "Process", "denoise", "guided", "sample"]
