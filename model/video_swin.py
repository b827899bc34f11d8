"""Video Swin Transformer, the whole architecture in reading order.

Parameter names and their order are those of the official checkpoints. Inside, activations are
channels-last: B clips, D H W token grid, C channels. Window arithmetic is not here: it belongs to
the operators of `videoswin_kernels`.

Sources: Video Swin Transformer (Liu et al., CVPR 2022), section 3; upstream
`mmaction/models/backbones/swin_transformer.py` and `heads/i3d_head.py` at db018fb.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.weights.load import load_weights
from model.weights.windows import check_window, name_window
from videoswin_kernels import patch_merging, residual_norm, window_attention
from videoswin_kernels.geometry import Triple, check_triple, table_rows
from videoswin_kernels.selection import check_word, refuse_script


class PatchEmbed3D(nn.Module):
    """Clips [B, 3, T, H, W] to tokens [B, D, H, W, C], one for each patch, padded at the end."""

    def __init__(
        self, patch_size: Triple, in_chans: int, embed_dim: int, norm: nn.LayerNorm | None
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = norm

    def forward(self, clips: Tensor) -> Tensor:
        sizes = zip(clips.shape[2:], self.patch_size, strict=True)
        depth, height, width = (-size % patch for size, patch in sizes)
        if depth or height or width:
            clips = F.pad(clips, (0, width, 0, height, 0, depth))
        x = self.proj(clips).permute(0, 2, 3, 4, 1).contiguous()
        return x if self.norm is None else self.norm(x)


class WindowAttention3D(nn.Module):
    """Multi-head attention within shifted windows, [B, D, H, W, C] to the same.

    The qkv Linear acts on each token alone, so it runs on the unpadded grid: upstream pads with
    zeros first, which this Linear would turn into its bias. That bias is `pad_qkv`.
    """

    operator = "window_attention"
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        dim: int,
        window_size: Triple,
        shift_size: Triple,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        self.window_size, self.shift_size = window_size, shift_size
        self.num_heads, self.scale, self.attn_drop = num_heads, qk_scale, attn_drop
        self.kernels, self.head_width = kernels, dim // num_heads
        rows = table_rows(window_size)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_state_dict_post_hook(name_window)
        self.register_load_state_dict_pre_hook(check_window)

    def forward(self, x: Tensor) -> Tensor:
        x = window_attention(
            self.qkv(x),
            self.relative_position_bias_table,
            window=self.window_size,
            shift=self.shift_size,
            num_heads=self.num_heads,
            pad_qkv=self.qkv.bias,
            scale=self.scale,
            dropout=self.attn_drop if self.training else 0.0,
            kernels=self.kernels,
        )
        return self.proj_drop(self.proj(x))


class Mlp(nn.Module):
    """Linear, exact GELU, Linear, with dropout after each Linear."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    """Stochastic depth: the factor [B] of a residual branch, 0 or 1/keep for each clip.

    Source: timm 0.3.2 `drop_path`: floor(keep + U[0, 1)) / keep, in training only.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor | None:
        if not self.training or self.rate == 0:
            return None
        keep = 1 - self.rate
        return torch.rand(x.shape[0], device=x.device).add_(keep).floor_().div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.4f}"


class SwinTransformerBlock3D(nn.Module):
    """Pre-norm block: attention in shifted windows, then the MLP, each on a residual branch."""

    operator = "residual_norm"
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Triple,
        shift_size: Triple,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
        drop: float,
        attn_drop: float,
        drop_path: float,
        norm_layer: Callable[[int], nn.LayerNorm],
        kernels: str,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.norm1 = norm_layer(dim)
        self.attn = WindowAttention3D(
            dim, window_size, shift_size, num_heads, qkv_bias, qk_scale, attn_drop, drop, kernels
        )
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor) -> Tensor:
        norm2 = self.norm2
        x, normed = residual_norm(
            x,
            self.attn(self.norm1(x)),
            norm2.weight,
            norm2.bias,
            eps=norm2.eps,
            branch_scale=self.drop_path(x),
            kernels=self.kernels,
        )
        branch, factor = self.mlp(normed), self.drop_path(x)
        if factor is not None:
            branch = branch * factor.to(x.dtype).view(-1, 1, 1, 1, 1)
        return x + branch


class PatchMerging(nn.Module):
    """Half the height and width, twice the channels: [B, D, H, W, C] to [B, D, H/2, W/2, 2C]."""

    operator = "patch_merging"
    __prepare_scriptable__ = refuse_script

    def __init__(
        self, dim: int, norm_layer: Callable[[int], nn.LayerNorm], kernels: str = "auto"
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        x = patch_merging(x, norm.weight, norm.bias, eps=norm.eps, kernels=self.kernels)
        return self.reduction(x)


class BasicLayer(nn.Module):
    """One stage: its blocks, every second one shifted, and the patch merging that ends it."""

    def __init__(
        self, blocks: Sequence[SwinTransformerBlock3D], downsample: PatchMerging | None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, use_checkpoint: bool = False) -> Tensor:
        """The tokens after the blocks, before the merging."""
        for block in self.blocks:
            if use_checkpoint and torch.is_grad_enabled():
                # Non-reentrant: the reentrant kind gives a stage behind frozen ones no gradient.
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class SwinTransformer3D(nn.Module):
    """The backbone, with the official constructor's arguments, their defaults, and two more.

    Args:
        pretrained: weights to begin with, whatever `model.load_weights` takes.
        pretrained2d: accepted for the official signature; the weights themselves show whether they
            are 2-D.
        patch_size: frames, rows and columns of a patch; every released model has (2, 4, 4).
        in_chans: channels of a clip.
        embed_dim: channels after the patch embedding, doubled by each merging.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        window_size: window in tokens; an axis no longer than it is one window without shift.
        mlp_ratio: hidden channels of the MLP over its channels.
        qkv_bias: whether the qkv Linear has a bias.
        qk_scale: factor of the scores; None or 0 = head width ** -0.5.
        drop_rate: dropout after the patch embedding, the projection and in the MLP.
        attn_drop_rate: dropout of the attention weights; fused kernels refuse any but 0.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
        norm_layer: makes the LayerNorms; must give `nn.LayerNorm` with weight and bias.
        patch_norm: a LayerNorm after the patch embedding; every released model has it.
        frozen_stages: -1 none; 0 the patch embedding; k >= 1 also the first k stages.
        use_checkpoint: recompute each block in the backward pass instead of keeping activations.
        kernels: which implementation runs the operators (`videoswin_kernels.selection`).
        out_indices: stages whose tokens, taken before their merging and normalised, are returned
            as a tuple (dense features); each but the last adds a LayerNorm `norm0`, `norm1`, ...
            Later stages do not run. None returns those of the last stage alone, as upstream.

    Shapes:
        clips [B, in_chans, T, H, W] floating point, any size from 1 frame and 1 pixel; returns
        [B, C, D, H, W], a channels-last tensor viewed channels-first, or a tuple of them.

    Raises:
        TypeError, ValueError: an argument outside the above.
        WeightsError: `pretrained` cannot be read, or does not fit.
        RuntimeError: at the first forward, if the kernels asked for cannot run.
    """

    def __init__(
        self,
        pretrained: str | Path | Mapping[str, Any] | None = None,
        pretrained2d: bool = True,
        patch_size: Triple = (4, 4, 4),
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: Triple = (2, 7, 7),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        norm_layer: Callable[[int], nn.LayerNorm] = nn.LayerNorm,
        patch_norm: bool = False,
        frozen_stages: int = -1,
        use_checkpoint: bool = False,
        kernels: str = "auto",
        out_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        _check_norm(where, norm_layer)
        patch_size = check_triple(where, "patch_size", patch_size, 1)
        window_size = check_triple(where, "window_size", window_size, 1)
        depths = _check_integers(where, "depths", depths)
        num_heads = _check_integers(where, "num_heads", num_heads)
        (embed_dim,) = _check_integers(where, "embed_dim", (embed_dim,))
        (in_chans,) = _check_integers(where, "in_chans", (in_chans,))
        for name, rate in (
            ("drop_rate", drop_rate),
            ("attn_drop_rate", attn_drop_rate),
            ("drop_path_rate", drop_path_rate),
        ):
            if not 0 <= rate < 1:
                raise ValueError(f"{where}: {name} must be at least 0 and below 1, got {rate}")
        if mlp_ratio <= 0:
            raise ValueError(f"{where}: mlp_ratio must be above 0, got {mlp_ratio}")
        num_stages = len(depths)
        if len(num_heads) != num_stages:
            raise ValueError(
                f"{where}: num_heads must have one entry per stage of depths {list(depths)}, "
                f"got {list(num_heads)}"
            )
        if frozen_stages not in range(-1, num_stages + 1):
            raise ValueError(
                f"{where}: frozen_stages must be -1 to {num_stages}, got {frozen_stages}"
            )
        self.out_indices = None if out_indices is None else tuple(out_indices)
        if self.out_indices == () or not set(self.out_indices or ()) <= set(range(num_stages)):
            raise ValueError(
                f"{where}: out_indices must be stages within 0 to {num_stages - 1}, "
                f"got {out_indices}"
            )
        self.kernels = check_word(where, kernels)
        self.in_chans, self.embed_dim, self.num_stages = in_chans, embed_dim, num_stages
        self.num_features = embed_dim * 2 ** (num_stages - 1)
        self.frozen_stages, self.use_checkpoint = frozen_stages, use_checkpoint
        self.window_size = window_size

        patch_embed_norm = norm_layer(embed_dim) if patch_norm else None
        self.patch_embed = PatchEmbed3D(patch_size, in_chans, embed_dim, patch_embed_norm)
        self.pos_drop = nn.Dropout(drop_rate)
        last_block = max(sum(depths) - 1, 1)
        drop_path = (drop_path_rate * block / last_block for block in count())
        half = tuple(extent // 2 for extent in window_size)
        self.layers = nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim = embed_dim * 2**stage
            if dim % heads:
                raise ValueError(
                    f"{where}: num_heads must divide the {dim} channels of stage {stage}, "
                    f"got {heads}"
                )
            blocks = [
                SwinTransformerBlock3D(
                    dim,
                    heads,
                    window_size,
                    half if i % 2 else (0, 0, 0),
                    mlp_ratio,
                    qkv_bias,
                    qk_scale,
                    drop_rate,
                    attn_drop_rate,
                    next(drop_path),
                    norm_layer,
                    kernels,
                )
                for i in range(depth)
            ]
            is_last = stage == num_stages - 1
            merging = None if is_last else PatchMerging(dim, norm_layer, kernels)
            self.layers.append(BasicLayer(blocks, merging))
        self.norm = norm_layer(self.num_features)
        for index in self.out_indices or ():
            if index < num_stages - 1:
                self.add_module(f"norm{index}", norm_layer(embed_dim * 2**index))
        self.init_weights()
        if pretrained is not None:
            load_weights(self, pretrained)
        self._freeze_stages()

    def init_weights(self, std: float = 0.02) -> None:
        """Draw the Linears anew: normal weights (cut at +-2), zero biases.

        The convolution keeps torch's initial values. 0.02 is upstream's for all widths.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _freeze_stages(self) -> None:
        frozen: list[nn.Module] = [self.patch_embed] if self.frozen_stages >= 0 else []
        if self.frozen_stages >= 1:
            frozen += [self.pos_drop, *self.layers[: self.frozen_stages]]
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> SwinTransformer3D:
        """Sets training mode, keeps frozen stages frozen, and returns self (upstream: None)."""
        super().train(mode)
        self._freeze_stages()
        return self

    def forward(self, clips: Tensor) -> Tensor | tuple[Tensor, ...]:
        if clips.dim() != 5 or clips.shape[1] != self.in_chans or 0 in clips.shape[2:]:
            raise ValueError(
                f"SwinTransformer3D: clips must be [B, {self.in_chans}, T, H, W] with at least one "
                f"frame and pixel, got {list(clips.shape)}"
            )
        x = self.pos_drop(self.patch_embed(clips))
        features = []
        for stage, layer in enumerate(self.layers):
            x = layer(x, self.use_checkpoint and self.training)
            is_last = stage == self.num_stages - 1
            if is_last if self.out_indices is None else stage in self.out_indices:
                norm = self.norm if is_last else self.get_submodule(f"norm{stage}")
                features.append(norm(x).permute(0, 4, 1, 2, 3))
            if self.out_indices is not None and stage == max(self.out_indices):
                break
            if layer.downsample is not None:
                x = layer.downsample(x)
        return features[0] if self.out_indices is None else tuple(features)


class I3DHead(nn.Module):
    """Mean over depth, height and width together, dropout, one Linear.

    Source: upstream `I3DHead` (spatial_type "avg", dropout_ratio 0.5, init_std 0.01).
    """

    def __init__(self, in_channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.fc_cls = nn.Linear(in_channels, num_classes)
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.zeros_(self.fc_cls.bias)

    def forward(self, features: Tensor) -> Tensor:
        wide = torch.promote_types(features.dtype, torch.float32)
        pooled = features.mean(dim=(2, 3, 4), dtype=wide)
        return self.fc_cls(self.dropout(pooled).to(self.fc_cls.weight.dtype))


class VideoSwin(nn.Module):
    """Backbone and classifier: clips [B, 3, T, H, W] to logits [B, classes].

    With views, [B, views, 3, T, H, W], the logits are [B, views, classes]; whoever evaluates
    averages their softmax.
    """

    def __init__(self, backbone: SwinTransformer3D, num_classes: int, dropout: float = 0.5) -> None:
        super().__init__()
        _check_integers("VideoSwin", "num_classes", (num_classes,))
        if backbone.out_indices is not None:
            raise ValueError(
                "VideoSwin: backbone must return one feature map, got one with out_indices "
                f"{backbone.out_indices}"
            )
        self.backbone = backbone
        self.cls_head = I3DHead(backbone.num_features, num_classes, dropout)

    def forward(self, clips: Tensor) -> Tensor:
        if clips.dim() not in (5, 6):
            raise ValueError(
                "VideoSwin: clips must be [B, 3, T, H, W] or [B, views, 3, T, H, W], "
                f"got {list(clips.shape)}"
            )
        leading = clips.shape[:-4]
        logits = self.cls_head(self.backbone(clips.reshape(prod(leading), *clips.shape[-4:])))
        return logits.unflatten(0, leading) if clips.dim() == 6 else logits


def _check_integers(where: str, name: str, values: Sequence[int]) -> tuple[int, ...]:
    """`values` as a tuple of at least one integer, each at least 1; raises ValueError otherwise."""
    is_sequence = hasattr(values, "__len__") and not isinstance(values, str)
    items = tuple(values) if is_sequence else ()
    if not items or any(not isinstance(item, int) or item < 1 for item in items):
        got = values[0] if is_sequence and len(values) == 1 else values
        raise ValueError(f"{where}: {name} must be integers of at least 1, got {got!r}")
    return items


def _check_norm(where: str, norm_layer: object) -> None:
    """Raises TypeError unless `norm_layer(width)` is an affine `nn.LayerNorm`, as kernels need."""
    norm = norm_layer(8) if callable(norm_layer) else norm_layer
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        raise TypeError(
            f"{where}: norm_layer must make nn.LayerNorm with weight and bias, got {norm_layer!r}"
        )
