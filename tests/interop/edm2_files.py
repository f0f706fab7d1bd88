"""EDM2's networks with random weights, under their own names, of any size; and their definition, written down anew."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def tensors(
    width: int,
    multipliers: Sequence[int],
    blocks: int,
    attending: Sequence[int],
    side: int,
    channels: int,
    classes: int,
) -> dict[str, Tensor]:
    """`state_dict` of Precond: levels of `multipliers`, those in `attending` with attention; `classes` 0: none."""
    embedding = width * max(multipliers)
    made = {"unet.emb_fourier.freqs": torch.randn(width), "unet.emb_fourier.phases": torch.rand(width)}
    made |= {"logvar_fourier.freqs": torch.randn(128), "logvar_fourier.phases": torch.rand(128)}
    made |= {"unet.out_gain": 1 + 0.1 * torch.randn(()), "logvar_linear.weight": torch.randn(1, 128)}
    made |= {"unet.emb_noise.weight": torch.randn(embedding, width)}
    if classes:
        made["unet.emb_label.weight"] = torch.randn(embedding, classes)

    def block(name: str, c_in: int, c_out: int, encoder: bool, attention: bool = False) -> None:
        made[f"{name}.emb_gain"] = 1 + 0.1 * torch.randn(())
        made[f"{name}.conv_res0.weight"] = torch.randn(c_out, c_out if encoder else c_in, 3, 3)
        made[f"{name}.emb_linear.weight"] = torch.randn(c_out, embedding)
        made[f"{name}.conv_res1.weight"] = torch.randn(c_out, c_out, 3, 3)
        if c_in != c_out:
            made[f"{name}.conv_skip.weight"] = torch.randn(c_out, c_in, 1, 1)
        if attention:
            made[f"{name}.attn_qkv.weight"] = torch.randn(3 * c_out, c_out, 1, 1)
            made[f"{name}.attn_proj.weight"] = torch.randn(c_out, c_out, 1, 1)

    made[f"unet.enc.{side}x{side}_conv.weight"] = torch.randn(width, channels + 1, 3, 3)
    c, skips = width, [width]
    for level, multiplier in enumerate(multipliers):
        place = f"unet.enc.{side >> level}x{side >> level}"
        if level:
            block(f"{place}_down", c, c, True)
            skips.append(c)
        for n in range(blocks):
            block(f"{place}_block{n}", c, c := width * multiplier, True, level in attending)
            skips.append(c)
    for level, multiplier in reversed([*enumerate(multipliers)]):
        place = f"unet.dec.{side >> level}x{side >> level}"
        if level == len(multipliers) - 1:
            block(f"{place}_in0", c, c, False, True)
            block(f"{place}_in1", c, c, False)
        else:
            block(f"{place}_up", c, c, False)
        for n in range(blocks + 1):
            block(f"{place}_block{n}", c + skips.pop(), c := width * multiplier, False, level in attending)
    made["unet.out_conv.weight"] = torch.randn(channels, c, 3, 3)
    return made


def denoise(weights: Mapping[str, Tensor], x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
    """Their D(x; sigma) in float64, with sigma_data 0.5: x (N,C,H,W), sigma (N,), labels (N, classes) one-hot."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x, sigma = x.double(), sigma.double()

    def unit(h: Tensor, dims: Sequence[int]) -> Tensor:
        return h / (1e-4 + h.square().mean(dims, keepdim=True).sqrt())

    def conv(name: str, h: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = w[f"{name}.weight"]
        weight = unit(weight, [*range(1, weight.ndim)]) * gain / math.sqrt(weight[0].numel())
        return h @ weight.T if weight.ndim == 2 else F.conv2d(h, weight, padding=weight.shape[-1] // 2)

    def silu(h: Tensor) -> Tensor:
        return F.silu(h) / 0.596

    def total(a: Tensor, b: Tensor, share: float) -> Tensor:
        return ((1 - share) * a + share * b) / math.hypot(1 - share, share)

    def block(name: str, h: Tensor, encoder: bool) -> Tensor:
        if name.endswith("_down"):
            h = F.avg_pool2d(h, 2)
        if name.endswith("_up"):
            h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
        widened = f"{name}.conv_skip.weight" in w
        if encoder:
            h = unit(conv(f"{name}.conv_skip", h) if widened else h, [1])
        scale = conv(f"{name}.emb_linear", emb, w[f"{name}.emb_gain"]) + 1
        y = conv(f"{name}.conv_res1", silu(conv(f"{name}.conv_res0", silu(h)) * scale[:, :, None, None]))
        h = total(conv(f"{name}.conv_skip", h) if widened and not encoder else h, y, 0.3)
        if f"{name}.attn_qkv.weight" in w:
            n, c, rows, columns = h.shape
            qkv = conv(f"{name}.attn_qkv", h).reshape(n, c // 64, 64, 3, rows * columns)
            q, k, v = unit(qkv, [2]).unbind(3)  # each (N, heads, 64, L)
            attention = (torch.einsum("nhcq,nhck->nhqk", q, k) / 8).softmax(-1)
            y = torch.einsum("nhqk,nhck->nhcq", attention, v).reshape(h.shape)
            h = total(h, conv(f"{name}.attn_proj", y), 0.3)
        return h.clamp(-256, 256)

    s = sigma[:, None, None, None]
    waves = (sigma.log() / 4)[:, None] * w["unet.emb_fourier.freqs"] + w["unet.emb_fourier.phases"]
    emb = conv("unet.emb_noise", waves.cos() * math.sqrt(2))
    if labels is not None:
        emb = total(emb, conv("unet.emb_label", labels.double() * math.sqrt(labels.shape[1])), 0.5)
    emb = silu(emb)
    names = [
        *dict.fromkeys(".".join(name.split(".")[:3]) for name in weights if name.startswith(("unet.enc", "unet.dec")))
    ]
    h = torch.cat([x / (0.25 + s**2).sqrt(), torch.ones_like(x[:, :1])], dim=1)
    skips = []
    for name in (one for one in names if one.startswith("unet.enc")):
        h = conv(name, h) if name.endswith("_conv") else block(name, h, True)
        skips.append(h)
    for name in (one for one in names if one.startswith("unet.dec")):
        if "_block" in name:
            a, b = h, skips.pop()
            scale = math.sqrt((a.shape[1] + b.shape[1]) / 0.5) / 2
            h = torch.cat([scale / math.sqrt(a.shape[1]) * a, scale / math.sqrt(b.shape[1]) * b], dim=1)
        h = block(name, h, False)
    h = conv("unet.out_conv", h, w["unet.out_gain"])
    return 0.25 / (s**2 + 0.25) * x + 0.5 * s / (s**2 + 0.25).sqrt() * h
