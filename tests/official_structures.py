"""Video Swin with the classes and names of the official repository and of mmaction2 1.x.

`family` makes a class for each of theirs: WindowAttention3D, Mlp, SwinTransformerBlock3D,
PatchMerging, BasicLayer, SwinTransformer3D. The two projects differ in the name of the width (`dim`
or `embed_dims`), in that of checkpointing (`use_checkpoint` or `with_cp`) and in whose DropPath
they take. Each family is new, so that a test may change a method of a class and no other class.

Written from the formulas of the paper and from the names of parameters and attributes; what it
computes is judged by `model.create` in test_accelerate_structures.py.
"""

from math import prod
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class TimmDropPath(nn.Module):
    """Stochastic depth as timm draws it: Bernoulli numbers in the dtype of the branch."""

    def __init__(self, drop_prob=0.0, scale_by_keep=True):
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x):
        if not self.training or self.drop_prob == 0:
            return x
        kept = x.new_empty((x.shape[0], *[1] * (x.dim() - 1))).bernoulli_(1 - self.drop_prob)
        return x * (kept / (1 - self.drop_prob) if self.scale_by_keep else kept)


class MmcvDropPath(nn.Module):
    """Stochastic depth as mmcv and old versions of timm draw it: uniform numbers, rounded down."""

    def __init__(self, drop_prob=0.1):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        drawn = torch.rand((x.shape[0], *[1] * (x.dim() - 1)), dtype=x.dtype, device=x.device)
        return x.div(keep) * (keep + drawn).floor()


# Both projects call theirs so.
TimmDropPath.__name__ = MmcvDropPath.__name__ = "DropPath"


def clamped(grid, window, shift):
    """(window, shift) where an axis no longer than its window is one window, unshifted."""
    axes = list(zip(grid, window, shift, strict=True))
    return tuple(min(g, w) for g, w, _ in axes), tuple(0 if g <= w else s for g, w, s in axes)


def partition(x, window):
    """Windows [B * M, N, C] of a grid [B, D, H, W, C] that they divide."""
    for axis, size in zip((1, 3, 5), window, strict=True):
        x = x.unflatten(axis, (-1, size))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, prod(window), x.shape[-1])


def put_back(windows, window, grid):
    """The grid [B, D, H, W, C] of its windows."""
    counts = [size // extent for size, extent in zip(grid, window, strict=True)]
    x = windows.reshape(-1, *counts, *window, windows.shape[-1])
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, *grid, windows.shape[-1])


def mask_of(grid, window, shift):
    """[M, N, N]: -100 between places of a window that the shift brought from different ends."""
    regions = torch.zeros(1)
    for size, extent, by in zip(grid, window, shift, strict=True):
        place = torch.arange(size)
        region = (place >= size - extent).float() + (place >= size - by).float()
        regions = 3 * regions[..., None] + (region if by else torch.zeros(size))
    regions = partition(regions[..., None], window)[..., 0]
    return torch.where(regions[:, :, None] == regions[:, None, :], 0.0, -100.0)


def family(
    name="official",
    *,
    width="dim",
    checkpointing="use_checkpoint",
    drop_path=TimmDropPath,
    use_reentrant=False,
):
    """The classes of one project, under the names that it gives them.

    Args:
        name: where in this module they can be found, for pickle.
        width: the attribute for the number of channels.
        checkpointing: the attribute that says whether a block keeps its activations.
        drop_path: the class of stochastic depth.
        use_reentrant: which kind of checkpointing; both projects take what torch takes by default.
    """

    class WindowAttention3D(nn.Module):
        def __init__(
            self, dim, window_size, num_heads, qkv_bias=True, attn_drop=0.0, proj_drop=0.0
        ):
            super().__init__()
            setattr(self, width, dim)
            self.window_size, self.num_heads = window_size, num_heads
            self.scale = (dim // num_heads) ** -0.5
            spans = [2 * size - 1 for size in window_size]
            table = torch.zeros(prod(spans), num_heads)
            self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
            places = torch.cartesian_prod(*map(torch.arange, window_size))
            offsets = places[:, None] - places[None] + torch.tensor(window_size) - 1
            rows = offsets @ torch.tensor([spans[1] * spans[2], spans[2], 1])
            self.register_buffer("relative_position_index", rows)
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
            self.attn_drop = nn.Dropout(attn_drop)
            self.proj = nn.Linear(dim, dim)
            self.proj_drop = nn.Dropout(proj_drop)
            self.softmax = nn.Softmax(dim=-1)

        def forward(self, x, mask=None):
            tokens = x.shape[1]
            packed = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
            q, k, v = packed.permute(2, 0, 3, 1, 4)
            scores = (q * self.scale) @ k.transpose(-2, -1)
            rows = self.relative_position_index[:tokens, :tokens]
            scores = scores + self.relative_position_bias_table[rows].permute(2, 0, 1)
            if mask is not None:
                mask = mask.to(scores.dtype)
                scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
            weights = self.attn_drop(self.softmax(scores))
            return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))

    class Mlp(nn.Module):
        def __init__(self, dim, hidden, drop=0.0):
            super().__init__()
            self.fc1, self.act = nn.Linear(dim, hidden), nn.GELU()
            self.fc2, self.drop = nn.Linear(hidden, dim), nn.Dropout(drop)

        def forward(self, x):
            return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))

    class SwinTransformerBlock3D(nn.Module):
        def __init__(
            self,
            dim,
            num_heads,
            window_size,
            shift_size=(0, 0, 0),
            *,
            mlp_ratio=4.0,
            qkv_bias=True,
            drop=0.0,
            attn_drop=0.0,
            drop_path_rate=0.0,
            norm_layer=nn.LayerNorm,
            checkpoints=False,
        ):
            super().__init__()
            setattr(self, width, dim)
            setattr(self, checkpointing, checkpoints)
            self.num_heads, self.mlp_ratio = num_heads, mlp_ratio
            self.window_size, self.shift_size = window_size, shift_size
            self.norm1 = norm_layer(dim)
            self.attn = classes.WindowAttention3D(
                dim, window_size, num_heads, qkv_bias, attn_drop, drop
            )
            self.drop_path = drop_path(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
            self.norm2 = norm_layer(dim)
            self.mlp = classes.Mlp(dim, int(dim * mlp_ratio), drop)

        def forward_part1(self, x, mask_matrix):
            grid = x.shape[1:4]
            window, shift = clamped(grid, self.window_size, self.shift_size)
            pads = [-size % extent for size, extent in zip(grid, window, strict=True)]
            x = F.pad(self.norm1(x), (0, 0, 0, pads[2], 0, pads[1], 0, pads[0]))
            padded = x.shape[1:4]
            mask = mask_matrix if any(shift) else None
            if any(shift):
                x = x.roll([-by for by in shift], dims=(1, 2, 3))
            x = put_back(self.attn(partition(x, window), mask=mask), window, padded)
            if any(shift):
                x = x.roll(shift, dims=(1, 2, 3))
            return x[:, : grid[0], : grid[1], : grid[2]].contiguous()

        def forward_part2(self, x):
            return self.drop_path(self.mlp(self.norm2(x)))

        def forward(self, x, mask_matrix):
            if getattr(self, checkpointing):
                reentrant = {"use_reentrant": use_reentrant}
                x = x + self.drop_path(checkpoint(self.forward_part1, x, mask_matrix, **reentrant))
                return x + checkpoint(self.forward_part2, x, **reentrant)
            x = x + self.drop_path(self.forward_part1(x, mask_matrix))
            return x + self.forward_part2(x)

    class PatchMerging(nn.Module):
        def __init__(self, dim, norm_layer=nn.LayerNorm):
            super().__init__()
            setattr(self, width, dim)
            self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
            self.norm = norm_layer(4 * dim)

        def forward(self, x):
            x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
            corners = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            return self.reduction(self.norm(torch.cat(corners, -1)))

    class BasicLayer(nn.Module):
        """[B, C, D, H, W] to the same; one mask for all blocks, made of the stage's shift."""

        def __init__(self, dim, depth, num_heads, window_size, *, merges, rates, **options):
            super().__init__()
            self.window_size = window_size
            self.shift_size = tuple(size // 2 for size in window_size)
            shifts = [(0, 0, 0) if i % 2 == 0 else self.shift_size for i in range(depth)]
            self.blocks = nn.ModuleList(
                classes.SwinTransformerBlock3D(
                    dim, num_heads, window_size, shift, drop_path_rate=rate, **options
                )
                for shift, rate in zip(shifts, rates, strict=True)
            )
            norm_layer = options.get("norm_layer", nn.LayerNorm)
            self.downsample = classes.PatchMerging(dim, norm_layer) if merges else None

        def forward(self, x):
            grid = x.shape[2:]
            window, shift = clamped(grid, self.window_size, self.shift_size)
            padded = [size + -size % extent for size, extent in zip(grid, window, strict=True)]
            mask = mask_of(padded, window, shift).to(x.device)
            x = x.permute(0, 2, 3, 4, 1)
            for block in self.blocks:
                x = block(x, mask)
            x = x if self.downsample is None else self.downsample(x)
            return x.permute(0, 4, 1, 2, 3)

    class SwinTransformer3D(nn.Module):
        """Clips [B, 3, T, H, W] that patches divide, to features [B, C, D, H, W]."""

        def __init__(
            self,
            patch_size=(2, 4, 4),
            embed_dim=24,
            depths=(2, 2),
            num_heads=(2, 4),
            window_size=(2, 3, 3),
            drop_path_rate=0.0,
            **options,
        ):
            super().__init__()
            self.patch_embed = nn.Conv3d(3, embed_dim, patch_size, patch_size)
            rates = torch.linspace(0, drop_path_rate, sum(depths)).split(list(depths))
            self.layers = nn.ModuleList(
                classes.BasicLayer(
                    embed_dim * 2**stage,
                    depths[stage],
                    num_heads[stage],
                    window_size,
                    merges=stage + 1 < len(depths),
                    rates=rates[stage].tolist(),
                    **options,
                )
                for stage in range(len(depths))
            )
            self.norm = nn.LayerNorm(embed_dim * 2 ** (len(depths) - 1))

        def forward(self, clips):
            x = self.patch_embed(clips)
            for layer in self.layers:
                x = layer(x)
            return self.norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)

    made = (WindowAttention3D, Mlp, SwinTransformerBlock3D)
    made += (PatchMerging, BasicLayer, SwinTransformer3D)
    for each in made:
        each.__qualname__ = f"{name}.{each.__name__}"
    classes = SimpleNamespace(**{each.__name__: each for each in made})
    return classes


MM = {"width": "embed_dims", "checkpointing": "with_cp", "drop_path": MmcvDropPath}
official = family()
mm = family("mm", **MM)
