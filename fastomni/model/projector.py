"""The three-branch visual projector `all_in_one_small` and the audio projector.

Channels stay last throughout: 1x1 convolutions are linear layers, and the causal 2x2x2 sampler
convolution is one matrix product over gathered patches (the released Conv3d pads time on both
sides, computes one slot more and drops it; see its equality test). Parameter names are the
released ones, so that checkpoints map one to one.

Shapes: B clips, F frames, h x w patches, C input width, H hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-5  # timm's LayerNormAct2d default; 1e-6 is visibly wrong (1.3e-3)


class ConvNorm(nn.Module):
    """A bias-free convolution and a LayerNorm over channels, on channels-last maps."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False
        )
        self.bn = nn.LayerNorm(outputs, eps=NORM_EPS)

    def forward(self, maps: Tensor) -> Tensor:
        """[N, h, w, inputs] -> [N, h, w, outputs]."""
        if self.conv.kernel_size == (1, 1):
            return self.bn(F.linear(maps, self.conv.weight[:, :, 0, 0]))
        return self.bn(self.conv(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class SqueezeExcite(nn.Module):
    """Channel gates from the map's mean; width is a quarter of the block's input."""

    def __init__(self, channels: int, squeeze: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """Scales [N, h, w, C] by its gates."""
        mean = maps.mean(dim=(1, 2))
        squeezed = F.silu(F.linear(mean, self.fc1.weight[:, :, 0, 0], self.fc1.bias))
        gates = F.linear(squeezed, self.fc2.weight[:, :, 0, 0], self.fc2.bias).sigmoid()
        return maps * gates[:, None, None]


class RegBlock(nn.Module):
    """RegNet bottleneck with depthwise 3x3 convolution (timm Bottleneck, group size 1)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs)
        self.conv2 = ConvNorm(outputs, outputs, kernel=3, groups=outputs)
        self.se = SqueezeExcite(outputs, round(inputs / 4))
        self.conv3 = ConvNorm(outputs, outputs)
        self.downsample = ConvNorm(inputs, outputs) if inputs != outputs else None

    def forward(self, maps: Tensor) -> Tensor:
        """[N, h, w, inputs] -> [N, h, w, outputs]."""
        branch = F.silu(self.conv1(maps))
        branch = F.silu(self.conv2(branch))
        branch = self.conv3(self.se(branch))
        shortcut = maps if self.downsample is None else self.downsample(maps)
        return F.silu(branch + shortcut)


class RegStage(nn.Module):
    """Two blocks, named b1 and b2 as in the released weights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.b1 = RegBlock(inputs, outputs)
        self.b2 = RegBlock(outputs, outputs)

    def forward(self, maps: Tensor) -> Tensor:
        """[N, h, w, inputs] -> [N, h, w, outputs]."""
        return self.b2(self.b1(maps))


def causal_sampler(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Causal 2x2x2 convolution, spatial stride 2: frame t sees frames t-1 and t.

    Args:
        maps: [B, F, h, w, C]; an odd last row or column is dropped, as the convolution does.
        weight: [H, C, 2, 2, 2] of the released Conv3d.
        bias: [H].

    Returns:
        [B, F, h // 2, w // 2, H], before the activation.
    """
    height, width = maps.shape[2] // 2, maps.shape[3] // 2
    maps = maps[:, :, : 2 * height, : 2 * width]
    patches = maps.unflatten(2, (height, 2)).unflatten(4, (width, 2))  # [B,F,h/2,2,w/2,2,C]
    patches = patches.transpose(3, 4).flatten(4)  # [B, F, h/2, w/2, 2*2*C]
    weight = weight.permute(2, 0, 3, 4, 1).flatten(2)  # [2, H, 2*2*C], time first
    current = F.linear(patches, weight[1], bias)
    previous = F.linear(patches[:, :-1], weight[0])
    return torch.cat((current[:, :1], current[:, 1:] + previous), dim=1)


class AllInOneSmall(nn.Module):
    """Video, body and face branches over the same vision features, one weight triple per clip."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        for branch in ("video", "body"):
            self.add_module(f"s1_{branch}", RegStage(inputs, hidden))
            self.add_module(f"sampler_{branch}", nn.Sequential(nn.Conv3d(hidden, hidden, 2)))
            self.add_module(f"s2_{branch}", RegStage(hidden, hidden))
            self.add_module(f"readout_{branch}", gelu_mlp(hidden, hidden))
        self.mlp_2xgelu_face = gelu_mlp(inputs, hidden)

    def branch(self, features: Tensor, name: str) -> Tensor:
        """The video or body branch: [B, F, h, w, C] -> [B, F * h/2 * w/2, H]."""
        frames = features.shape[1]
        maps = self.get_submodule(f"s1_{name}")(features.flatten(0, 1))
        sampler = (self.get_parameter(f"sampler_{name}.0.{part}") for part in ("weight", "bias"))
        maps = maps.unflatten(0, (-1, frames))
        maps = F.silu(causal_sampler(maps, *sampler))
        maps = self.get_submodule(f"s2_{name}")(maps.flatten(0, 1))
        return self.get_submodule(f"readout_{name}")(maps.unflatten(0, (-1, frames)).flatten(1, 3))

    def face(self, features: Tensor) -> Tensor:
        """The face branch: [B, F, h, w, C] -> [B, F * h/2 * w/2, H].

        Pooling before the second linear layer instead of after it gives the same numbers (both are
        linear and the pooling weights sum to one) for a quarter of the work.
        """
        batch, _, height, width, _ = features.shape
        hidden = F.gelu(self.mlp_2xgelu_face[0](features.flatten(0, 1)))
        pooled = F.interpolate(
            hidden.permute(0, 3, 1, 2), size=(height // 2, width // 2), mode="bilinear"
        ).permute(0, 2, 3, 1)
        return self.mlp_2xgelu_face[2](pooled.reshape(batch, -1, pooled.shape[-1]))

    def forward(self, features: Tensor, weights: Tensor) -> Tensor:
        """Video tokens, frame-major, then rows, then columns.

        Args:
            features: [B, F, h, w, C] vision tower features.
            weights: [B, 3] router probabilities of (video, body, face).

        Returns:
            [B, F * (h // 2) * (w // 2), H].
        """
        video, body, face = weights[:, :, None, None].unbind(1)
        fused = video * self.branch(features, "video") + body * self.branch(features, "body")
        return fused + face * self.face(features)


def gelu_mlp(inputs: int, outputs: int) -> nn.Sequential:
    """Linear, erf-GELU, Linear: the released `mlp2x_gelu`."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))
