"""What every denoiser is to the rest of the program; a new network subclasses `Denoiser` (docs/architecture.md)."""

from abc import abstractmethod

from torch import Tensor, nn


class Denoiser(nn.Module):
    """A network D_theta(x, time, labels), called by a diffusion process (diffusion/process.py).

    One that is given to sadm_fast.train needs `num_classes` and `forward` only (docs/extending.md): the sizes are for
    images and for files of weights, and without `blocks` it is compiled, reduced and kept as a whole.

    Attributes:
        in_channels, out_channels: C of the images or latents, and of the output (process.output_channels(C)).
        input_size: H and W.
        num_classes: labels are 0 .. num_classes - 1; `null_class` stands for "no class".
        blocks: called one after another by `forward`. Each is a unit: of compilation, of the reduction of gradients,
            and of recomputation. Blocks alike in code and shapes share what is compiled.
        activation_checkpointing: `blocks` keep only their inputs for the backward pass, which computes the rest anew.
    """

    in_channels: int
    out_channels: int
    input_size: int
    num_classes: int
    blocks: nn.ModuleList
    activation_checkpointing: bool = False

    def units(self) -> list[nn.Module]:
        """`blocks`; none of a network without."""
        return list(getattr(self, "blocks", ()))

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of one sample."""
        return self.in_channels, self.input_size, self.input_size

    @property
    def null_class(self) -> int | None:
        """The label that stands for "no class": one more than there are classes. None: it is told no labels at all."""
        return self.num_classes

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The network's output, float [B, out_channels, ...]; out_channels is process.output_channels(C).

        x: process.model_input of a noised sample, [B, C, ...]: [B, C, H, W] of images and latents.
        t: noise level as the process gives it to networks, float32 [B]: `process.time_scale` times its natural time
            (VP: step 0..999; flow: 1000 t; EDM: 100 ln sigma), so that sinusoids made for 0..999 resolve it. A network
            that wants the natural time divides by process.time_scale.
        y: labels int64 [B], `null_class` for none.

        In training it is called with `Batch.more` behind these (feed.draw_batch), in sampling never.
        """
