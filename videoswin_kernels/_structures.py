"""What the parts of other people's models become: their own classes, with our forward.

A part is a subclass of `Part` and of the class it was found with, made by `subclass`; an instance
becomes one by `__class__` alone. Submodules are called as modules, so that their hooks fire and
replaced ones work, but for those an operator does without: a norm behind a residual, stochastic
depth on a branch, upstream's attention on windows. Of these every forward asks whether something is
attached to them that only calling them would do (`obstacle`); then they are called.

Structures: torchvision 0.29 `models/video/swin_transformer.py` and `models/swin_transformer.py`;
upstream `mmaction/models/backbones/swin_transformer.py` at db018fb; mmaction2 1.x
`mmaction/models/backbones/swin.py` at 4d6c934.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn.modules.module import _has_any_global_hook

from videoswin_kernels.geometry import clamp_window, relative_position_index
from videoswin_kernels.ops.attention import window_attention
from videoswin_kernels.ops.patch_merging import patch_merging
from videoswin_kernels.ops.residual_norm import residual_norm
from videoswin_kernels.selection import refuse_script

# Traced by torch.fx, the operators are nodes, and what x is cannot be asked (`is_grid`).
fx.wrap("window_attention")
fx.wrap("residual_norm")
fx.wrap("patch_merging")

# The attribute with the rate, by the class of a stochastic depth (timm and mmcv: DropPath).
RATES = {"StochasticDepth": "p", "DropPath": "drop_prob"}
# What the attention of a `SwinTransformerBlock3D` has.
ATTENTION_NEEDS = ("qkv", "proj", "num_heads", "scale", "softmax", "attn_drop", "proj_drop")


class Use(NamedTuple):
    """An operator of a part: its head width, and why the part's own code runs instead, if so.

    `where` is the submodule to blame, "" for the part itself.
    """

    operator: str
    head_width: int | None = None
    why_not: str | None = None
    where: str = ""


def obstacle(module: nn.Module) -> str | None:
    """What is lost if a module is not called; None if nothing is."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "has hooks"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    return "is seen by global hooks" if _has_any_global_hook() else None


def norm_obstacle(norm: nn.Module, channels: int | None = None) -> str | None:
    """Why an operator cannot stand for `norm`, over so many channels; None if it can."""
    if type(norm) is not nn.LayerNorm:
        return f"is a {type(norm).__name__}, not an nn.LayerNorm"
    if norm.weight is None or norm.bias is None:
        return "has no weight or no bias"
    if len(norm.normalized_shape) != 1 or channels not in (None, norm.normalized_shape[0]):
        return f"normalises {list(norm.normalized_shape)}"
    return obstacle(norm)


def rate_of(drop_path: nn.Module) -> str | None:
    """The attribute with the rate of a stochastic depth, None where its class is not known."""
    name = RATES.get(type(drop_path).__name__, "")
    return name if hasattr(drop_path, name) else None


def depth_obstacle(drop_path: nn.Module) -> str | None:
    """Why a factor for each clip cannot stand for `drop_path`; None if it can."""
    if type(drop_path) is not nn.Identity and rate_of(drop_path) is None:
        name = type(drop_path).__name__
        return f"is a {name}, and no StochasticDepth, DropPath or nn.Identity that is known"
    return obstacle(drop_path)


def clip_factor(drop_path: nn.Module, branch: Tensor) -> Tensor | None:
    """The factor [B] that `drop_path` gives each clip of a branch; None where it is 1."""
    if type(drop_path) is nn.Identity or not drop_path.training:
        return None
    if getattr(drop_path, rate_of(drop_path)) == 0:
        return None
    # It draws one number for each clip, whatever the extent behind the batch.
    return drop_path(branch.new_ones((branch.shape[0], 1, 1, 1, 1))).flatten()


def is_grid(x: Tensor | fx.Proxy) -> bool:
    """Whether x has five axes, [B, D, H, W, C]."""
    return isinstance(x, fx.Proxy) or x.dim() == 5


def add_and_norm(
    x: Tensor, branch: Tensor, norm: nn.Module, drop_path: nn.Module, kernels: str
) -> tuple[Tensor, Tensor]:
    """x + drop_path(branch) and the norm of it, by one operator where nothing is lost by it."""
    if (
        is_grid(x)
        and norm_obstacle(norm, _channels(x)) is None
        and depth_obstacle(drop_path) is None
        # The operator's sum has the dtype of x.
        and (isinstance(x, fx.Proxy) or torch.promote_types(x.dtype, branch.dtype) == x.dtype)
    ):
        return residual_norm(
            x,
            branch,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            branch_scale=clip_factor(drop_path, branch),
            kernels=kernels,
        )
    x = x + drop_path(branch)
    return x, norm(x)


def _channels(x: Tensor | fx.Proxy, times: int = 1) -> int | None:
    """The channels of so many tokens of x, None where it is traced."""
    return None if isinstance(x, fx.Proxy) else times * x.shape[-1]


def attend(
    attention: nn.Module,
    x: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float | None,
    kernels: str,
) -> Tensor:
    """Attention of the tokens x [B, D, H, W, C] in shifted windows, before its projection."""
    window, shift = tuple(window), tuple(shift)
    # First, so that whoever watches the Linear sees the tokens last.
    pads = _qkv_of_padding(attention.qkv, x, window, shift)
    return window_attention(
        attention.qkv(x),
        attention.relative_position_bias_table,
        window=window,
        shift=shift,
        num_heads=attention.num_heads,
        pad_qkv=pads,
        scale=scale,
        kernels=kernels,
    )


def _qkv_of_padding(
    qkv: nn.Module, x: Tensor, window: tuple[int, ...], shift: tuple[int, ...]
) -> Tensor | None:
    """What `qkv` makes of a padded place, [3C]: a plain Linear its bias."""
    if type(qkv).forward is nn.Linear.forward and obstacle(qkv) is None:
        return qkv.bias
    if not isinstance(x, fx.Proxy):
        grid = tuple(x.shape[1:4])
        _, _, padded = clamp_window(grid, window, shift)
        if padded == grid:
            return None
    return qkv(x.new_zeros((1, 1, 1, 1, x.shape[-1]))).flatten()


def head_width(attention: nn.Module) -> int | None:
    """Channels of a head, None where there is no `qkv` that tells."""
    channels = getattr(getattr(attention, "qkv", None), "in_features", None)
    return None if channels is None else channels // attention.num_heads


class Part(nn.Module):
    """What all parts have in common: they differ from what they were in nothing but `forward`.

    Attributes:
        found_as: name of the class that it stands for.
        methods: those of that class that it stands for: a subclass may not have its own.
        needs: the attributes of that class that it uses.
        operators: those of this package that it uses.
        index: where its relative_position_index is, which it takes for granted; "" for none.
        original: the class that the part was found with.
        kernels: which implementation runs the operators (`videoswin_kernels.selection`).
    """

    found_as: ClassVar[str]
    methods: ClassVar[tuple[str, ...]] = ("forward",)
    needs: ClassVar[tuple[str, ...]]
    operators: ClassVar[tuple[str, ...]]
    index: ClassVar[str] = ""
    original: ClassVar[type[nn.Module]]
    kernels: ClassVar[str]
    __prepare_scriptable__ = refuse_script

    def uses(self) -> Iterator[Use]:
        """The operators of the part, as it would run now."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), f"kernels={self.kernels!r}"]))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as what it was: whoever reads it needs nothing of this package."""
        reduced = super().__reduce_ex__(protocol)
        # A class that was derived from this one since is pickled its own way, if it can be.
        if "original" not in vars(type(self)):
            return reduced
        # `copyreg.__newobj__` makes objects of one's own class alone.
        return (copyreg._reconstructor, (self.original, object, None), *reduced[2:])

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        """Copied as it is; without this, copying would go through `__reduce_ex__`."""
        inherited = getattr(super(), "__deepcopy__", None)
        if inherited is not None:
            return inherited(memo)
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        # torch forbids to pickle what was parametrised since, not to copy it.
        is_derived = "original" not in vars(type(self))
        state = self.__dict__ if is_derived else super().__reduce_ex__(4)[2]
        copied.__setstate__(copy.deepcopy(state, memo))
        return copied

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *others: Any, **more: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others, **more)
        index = state_dict.get(f"{prefix}{self.index}")
        if isinstance(index, Tensor) and has_other_order(index, self.window_size):
            error_msgs = more["error_msgs"] if "error_msgs" in more else others[-1]
            error_msgs.append(
                f"{prefix}{self.index} must be that of the window {tuple(self.window_size)} in "
                "accelerated attention, got another order; load before you accelerate"
            )


class Attention(Part):
    """torchvision's `ShiftedWindowAttention3d`."""

    found_as = "ShiftedWindowAttention3d"
    methods = ("forward", "get_relative_position_bias")
    needs = ("qkv", "proj", "num_heads", "attention_dropout", "dropout")
    operators = ("window_attention",)
    index = "relative_position_index"

    def forward(self, x: Tensor) -> Tensor:
        if self._why_not() is not None:
            return super().forward(x)
        x = attend(self, x, self.window_size, self.shift_size, None, self.kernels)
        return F.dropout(self.proj(x), p=self.dropout, training=self.training)

    def uses(self) -> Iterator[Use]:
        yield Use("window_attention", head_width(self), self._why_not())

    def _why_not(self) -> str | None:
        drops = self.training and self.attention_dropout > 0
        return "drops attention weights in training" if drops else None


class Block(Part):
    """torchvision's `SwinTransformerBlock`, of which the attention is 3-D."""

    found_as = "SwinTransformerBlock"
    needs = ("norm1", "attn", "stochastic_depth", "norm2", "mlp")
    operators = ("residual_norm",)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.attn(self.norm1(x))
        x, normed = add_and_norm(x, branch, self.norm2, self.stochastic_depth, self.kernels)
        return x + self.stochastic_depth(self.mlp(normed))

    def uses(self) -> Iterator[Use]:
        yield residual_use(self.norm2, self.stochastic_depth, "stochastic_depth")


class Block3D(Part):
    """`SwinTransformerBlock3D` of upstream and of mmaction2, of which the attention takes windows.

    The mask that it is given is not used, but for being there: the operator knows the window.
    """

    found_as = "SwinTransformerBlock3D"
    methods = ("forward", "forward_part1", "forward_part2")
    needs = ("norm1", "attn", "drop_path", "norm2", "mlp")
    operators = ("window_attention", "residual_norm")
    index = "attn.relative_position_index"

    def forward_part1(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        if self._why_not() is not None or (mask_matrix is None and self._is_shifted(x)):
            return super().forward_part1(x, mask_matrix)
        attn, x = self.attn, self.norm1(x)
        x = attend(attn, x, self.window_size, self.shift_size, attn.scale, self.kernels)
        return attn.proj_drop(attn.proj(x))

    def forward(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        if self._is_checkpointed():
            return super().forward(x, mask_matrix)
        branch = self.forward_part1(x, mask_matrix)
        x, normed = add_and_norm(x, branch, self.norm2, self.drop_path, self.kernels)
        return x + self.drop_path(self.mlp(normed))

    def uses(self) -> Iterator[Use]:
        yield Use("window_attention", head_width(self.attn), *(self._why_not() or ()))
        if self._is_checkpointed():
            yield Use("residual_norm", None, "recomputes its two halves in the backward pass")
        else:
            yield residual_use(self.norm2, self.drop_path, "drop_path")

    def _why_not(self) -> tuple[str, str] | None:
        """Why the block's own code attends, and the submodule to blame."""
        attn = self.attn
        # Another class, a subclass perhaps, may attend otherwise.
        if type(attn).__name__ != "WindowAttention3D":
            return f"is a {type(attn).__name__}, not WindowAttention3D", "attn"
        if type(attn.attn_drop) not in (nn.Dropout, nn.Identity):
            return f"is a {type(attn.attn_drop).__name__}, not nn.Dropout", "attn.attn_drop"
        if type(attn.softmax) is not nn.Softmax or attn.softmax.dim not in (-1, 3):
            return f"is {attn.softmax}, not nn.Softmax(dim=-1)", "attn.softmax"
        if attn.attn_drop.training and getattr(attn.attn_drop, "p", 0) > 0:
            return "drops attention weights in training", "attn"
        bypassed = {"attn": attn, "attn.softmax": attn.softmax, "attn.attn_drop": attn.attn_drop}
        for name, module in bypassed.items():
            reason = obstacle(module)
            if reason is not None:
                return reason, name
        return None

    def _is_shifted(self, x: Tensor) -> bool:
        _, shift, _ = clamp_window(x.shape[1:4], tuple(self.window_size), tuple(self.shift_size))
        return any(shift)

    def _is_checkpointed(self) -> bool:
        # The first is upstream's word, the second mmaction2's.
        return bool(getattr(self, "use_checkpoint", False) or getattr(self, "with_cp", False))


class Merging(Part):
    """`PatchMerging`, the same in all three."""

    found_as = "PatchMerging"
    needs = ("norm", "reduction")
    operators = ("patch_merging",)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not is_grid(x) or norm_obstacle(norm, _channels(x, 4)) is not None:
            return super().forward(x)
        x = patch_merging(x, norm.weight, norm.bias, eps=norm.eps, kernels=self.kernels)
        return self.reduction(x)

    def uses(self) -> Iterator[Use]:
        yield Use("patch_merging", None, norm_obstacle(self.norm), "norm")


def has_other_order(index: Tensor, window: Sequence[int]) -> bool:
    """Whether it is no relative_position_index of the window; False where it has no numbers yet."""
    if index.is_meta or isinstance(index, FakeTensor):
        return False
    with unset_fake_temporarily():
        expected = torch.from_numpy(relative_position_index(tuple(window)))
        return index.shape != expected.shape or not torch.equal(index.cpu().long(), expected)


def residual_use(norm: nn.Module, drop_path: nn.Module, name: str) -> Use:
    """The use of `residual_norm` by a block with these modules, the second called `name`."""
    reason = norm_obstacle(norm)
    if reason is not None:
        return Use("residual_norm", None, reason, "norm2")
    return Use("residual_norm", None, depth_obstacle(drop_path), name)


def subclass(part: type[Part], original: type[nn.Module], kernels: str) -> type[Part]:
    """The class of an accelerated `original`, under its name, for one word: the same each time.

    Raises ValueError if no class can be derived from `original` without arguments.
    """
    # It holds them weakly: no class lives on because it was accelerated once.
    for made in type.__subclasses__(original):
        if issubclass(made, part) and is_ours(made) and made.kernels == kernels:
            return made
    members = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "original": original,
        "kernels": kernels,
    }
    try:
        return type(original.__name__, (part, original), members)
    except TypeError as error:
        raise ValueError(
            f"accelerate: {original.__name__} must be a class that others can be derived from "
            f"without arguments, got {error}; give those of its __init_subclass__ a default"
        ) from error


PARTS = (Attention, Block, Block3D, Merging)


def is_ours(cls: type) -> bool:
    """Whether a class is one of those above, or made of one by `subclass`."""
    return cls is Part or cls in PARTS or (issubclass(cls, Part) and "original" in vars(cls))


def known_class(module: nn.Module, name: str) -> type[nn.Module] | None:
    """The class of that name that a module is an instance of, other than one of ours."""
    return next((c for c in type(module).__mro__ if c.__name__ == name and not is_ours(c)), None)
