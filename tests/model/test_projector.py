"""The projector's channels-last arithmetic against the released formulas in plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastomni.model.projector import AllInOneSmall, ConvNorm, RegBlock, causal_sampler, gelu_mlp


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def randomised(module: nn.Module) -> nn.Module:
    """The module in float64 with every weight random, norms too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module.double()


def conv_norm(maps: Tensor, layer: ConvNorm) -> Tensor:
    """Convolution and a norm over channels at each pixel, written with moments; maps [N,C,h,w]."""
    weight = layer.conv.weight
    groups = maps.shape[1] if weight.shape[1] == 1 and weight.shape[-1] == 3 else 1
    maps = F.conv2d(maps, weight, padding=weight.shape[-1] // 2, groups=groups)
    centred = maps - maps.mean(1, keepdim=True)
    maps = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    return maps * layer.bn.weight[:, None, None] + layer.bn.bias[:, None, None]


def released_block(maps: Tensor, block: RegBlock) -> Tensor:
    """RegNet's bottleneck: 1x1, depthwise 3x3, squeeze and excite, 1x1, shortcut."""
    silu = F.silu
    out = silu(conv_norm(maps, block.conv1))
    out = silu(conv_norm(out, block.conv2))
    squeezed = silu(block.se.fc1(out.mean((2, 3), keepdim=True)))
    out = out * torch.sigmoid(block.se.fc2(squeezed))
    out = conv_norm(out, block.conv3)
    shortcut = maps if block.downsample is None else conv_norm(maps, block.downsample)
    return silu(out + shortcut)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 12), (12, 12), (8, 4)])
def test_block(inputs: int, outputs: int) -> None:
    block = randomised(RegBlock(inputs, outputs))
    assert isinstance(block, RegBlock)
    assert (block.downsample is None) == (inputs == outputs)
    assert block.se.fc1.out_channels == inputs // 4
    maps = torch.randn(3, inputs, 5, 4, dtype=torch.float64)
    found = block(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, released_block(maps, block), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("frames", "height", "width"), [(4, 4, 6), (1, 2, 2), (3, 5, 7)], ids=str)
def test_sampler(frames: int, height: int, width: int) -> None:
    # The released convolution pads time on both sides, makes one slot more and drops it.
    released = nn.Conv3d(6, 5, 2, stride=(1, 2, 2), padding=(1, 0, 0)).double()
    maps = torch.randn(2, frames, height, width, 6, dtype=torch.float64, requires_grad=True)
    wanted = released(maps.permute(0, 4, 1, 2, 3))[:, :, :-1].permute(0, 2, 3, 4, 1)
    assert released.bias is not None
    found = causal_sampler(maps, released.weight, released.bias)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(wanted)
    inputs = (maps, released.weight, released.bias)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, direction),
        torch.autograd.grad(wanted, inputs, direction),
        rtol=1e-10,
        atol=1e-10,
    )


def test_sampler_sees_no_later_frame() -> None:
    weight, bias = torch.randn(5, 6, 2, 2, 2), torch.randn(5)
    maps = torch.randn(1, 5, 4, 4, 6)
    changed = maps.clone()
    changed[:, 3] += 1
    difference = causal_sampler(changed, weight, bias) - causal_sampler(maps, weight, bias)
    moved = difference.abs().amax((0, 2, 3, 4)) > 1e-4
    assert moved.tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("side", [4, 14, 5])
def test_face_branch_pools_early(side: int) -> None:
    projector = randomised(AllInOneSmall(6, 8))
    assert isinstance(projector, AllInOneSmall)
    features = torch.randn(2, 3, side, side, 6, dtype=torch.float64)
    # As released: both linear layers on every patch, then pooled.
    patches = projector.mlp_2xgelu_face(features).flatten(0, 1).permute(0, 3, 1, 2)
    pooled = F.interpolate(patches, size=(side // 2, side // 2), mode="bilinear")
    wanted = pooled.permute(0, 2, 3, 1).reshape(2, -1, 8)
    torch.testing.assert_close(projector.face(features), wanted, rtol=1e-10, atol=1e-10)


def test_branches_are_weighted_per_clip() -> None:
    projector = randomised(AllInOneSmall(6, 8))
    assert isinstance(projector, AllInOneSmall)
    features = torch.randn(2, 3, 4, 4, 6, dtype=torch.float64)
    branches = [
        projector.branch(features, "video"),
        projector.branch(features, "body"),
        projector.face(features),
    ]
    weights = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]], dtype=torch.float64)
    found = projector(features, weights)
    wanted = sum(
        weight[:, None, None] * branch for weight, branch in zip(weights.T, branches, strict=True)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert found.shape == (2, 3 * 2 * 2, 8)
    torch.testing.assert_close(found[1], branches[0][1])


def test_tokens_go_frame_by_frame_row_by_row() -> None:
    projector = randomised(AllInOneSmall(6, 8))
    assert isinstance(projector, AllInOneSmall)
    features = torch.randn(1, 3, 4, 6, 6, dtype=torch.float64)
    changed = features.clone()
    changed[:, 2, 2:, 4:] += 1  # last frame, last row and column of the pooled 2 x 3 map
    moved = (projector.face(changed) - projector.face(features)).abs().amax((0, 2)) > 1e-9
    assert moved.nonzero().flatten().tolist() == [3 * 2 * 3 - 1]


def test_gelu_is_the_exact_one() -> None:
    layers = gelu_mlp(3, 4).double()
    inputs = torch.randn(5, 3, dtype=torch.float64)
    hidden = layers[0](inputs)
    exact = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(layers(inputs), layers[2](exact))
