"""From pixels to the encoder's input: patches, CLS token, mask token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megad2v.config.modalities import VisionConfig
from megad2v.models.data2vec import FrontEnd
from megad2v.models.initialise import FAIRSEQ, InitScheme


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one linear map (a convolution with stride = kernel).

    Computed as the matrix product that it is: cuDNN's gradients of a convolution may differ from call to call in the
    last bit, and tensor-parallel ranks have to get the same ones.
    """

    def __init__(self, channels: int, patch: int, width: int, scheme: InitScheme = FAIRSEQ) -> None:
        super().__init__()
        self.patch = patch
        self.weight = nn.Parameter(torch.empty(width, channels, patch, patch))
        self.bias = nn.Parameter(torch.empty(width))
        weight, bias = scheme.front_end(channels * patch * patch)
        self.initialisers = {"weight": weight, "bias": bias}

    def forward(self, images_bchw: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H/patch x W/patch, D), rows first."""
        p = self.patch
        rows = images_bchw.to(self.weight.dtype).unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, h, p, w, p)
        patches_btk = rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches_btk, self.weight.flatten(1), self.bias)


class VisionFrontEnd(FrontEnd):
    """Patch embedding, mask token at hidden patches, CLS in front; no absolute positions (spec 3.2)."""

    prefix_tokens = 1
    decayed_vectors = ("mask_token",)
    """What optimizer.decay_all false decays none the less, as the BEiT fork does."""

    def __init__(self, config: VisionConfig, width: int, scheme: InitScheme = FAIRSEQ) -> None:
        super().__init__()
        self.patches = PatchEmbed(config.channels, config.patch_size, width, scheme)
        self.cls_token = nn.Parameter(torch.empty(width))
        self.mask_token = nn.Parameter(torch.empty(width))
        self.initialisers = {"cls_token": scheme.token, "mask_token": scheme.token}
        # Buffers would be averaged and partitioned; these are constants of the recipe.
        self.mean, self.std = config.mean, config.std

    def _pixels(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1)
        return (images.float() / 255.0 - mean) / std

    def forward(self, images: Tensor, mask_bt: Tensor | None) -> tuple[Tensor, Tensor]:
        """uint8 pixels, or floats already normalised, (B, C, H, W) -> masked and clean view, each (B, 1 + T, D).

        Without a mask the two are the same tensor.
        """
        x_btd = self.patches(self._pixels(images))
        cls = self.cls_token.to(x_btd.dtype).expand(x_btd.shape[0], 1, -1)
        clean_btd = torch.cat((cls, x_btd), dim=1)
        if mask_bt is None:
            return clean_btd, clean_btd
        x_btd = torch.where(mask_bt.unsqueeze(-1), self.mask_token.to(x_btd.dtype), x_btd)
        return torch.cat((cls, x_btd), dim=1), clean_btd
