"""From a transformed weight to codes."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from duquant.formats import Codes, Parameters
from duquant.linear import GroupInput, QuantLinear
from duquant.packing import PackedCodes, pack
from duquant.quantizer import NoClip, Quantizer, make_quantizer
from duquant.scheme import SEARCHED, TensorScheme, number_format
from quantize.clipping import search_parameters
from quantize.gptq import gptq_codes
from quantize.refinements import Rounding, RoundingSettings
from quantize.training import LearnedClip

RIDGE = 0.1  # of the Hessian's mean diagonal: what holds the asymmetric target back
TINY = 1e-30  # in place of that mean where a group is given nothing but zeros


class OpenLinear(nn.Module):
    """y = x̂ · Q_w(T(W Λ))ᵀ + b with the transformed weight [O, C] in at least float32, rounded anew in every call.

    What stands in a layer until its weight is rounded for good: straight-through rounding lets a clip be trained.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scheme: TensorScheme, group: GroupInput, learned: bool):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scheme, self.group = scheme, group
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        clip = LearnedClip(_ranges(weight, scheme.group_size)).to(weight.device) if learned else None
        # until a range is searched it is the whole one
        self.quantizer = make_quantizer(scheme, clip or (NoClip() if scheme.clip == SEARCHED else None))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., O], in the dtype of `x`; `x` is left as it is."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(self.group(x), self.quantizer(self.weight).to(x.dtype), bias)

    @property
    def clip(self) -> LearnedClip | None:
        """The clip that is trained, if there is one."""
        clip = getattr(self.quantizer, "clip", None)
        return clip if isinstance(clip, LearnedClip) else None

    def rounded(self, dtype: torch.dtype) -> QuantLinear:
        """The linear with the nearest codes under the clip as it is now; `dtype` is that of what is not rounded."""
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        weight = self.weight.detach()
        encoded = self.quantizer.encode(weight) if isinstance(self.quantizer, Quantizer) else weight.to(dtype)
        return QuantLinear(encoded, number_format(self.scheme), bias, self.group)

    def with_codes(self, codes: PackedCodes | Codes, dtype: torch.dtype) -> QuantLinear:
        """The linear with codes that were found for its weight."""
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return QuantLinear(codes, number_format(self.scheme), bias, self.group)

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"{self.in_features}, {self.out_features}"


def _ranges(weight: Tensor, group_size: int | None) -> tuple[int, ...]:
    """The shape of a weight's ranges: [O, 1], or [O, C/g, 1]."""
    rows, channels = weight.shape
    return (rows, 1) if group_size is None else (rows, channels // group_size, 1)


@torch.no_grad()
def data_codes(
    linears: dict[str, OpenLinear], moments: "Moments", settings: RoundingSettings
) -> dict[str, PackedCodes]:
    """Codes by path of the linears of one group, which depend on what calibration samples gave them (`moments`).

    Ranges are the linear's own where they are fixed or trained, else searched. All linears of a group have one Hessian,
    so GPTQ rounds them as one weight whose rows are theirs.
    """
    paths, first = list(linears), next(iter(linears.values()))
    weights = torch.cat([linear.weight for linear in linears.values()])
    aimed = weights if moments.cross is None else moments.aimed(weights, settings)
    parameters = []
    for path, part in zip(paths, aimed.split([len(linear.weight) for linear in linears.values()]), strict=True):
        parameters.append(_parameters(linears[path], part, moments.hessian))
    joined = Parameters(*(torch.cat(each) for each in zip(*parameters, strict=True)))
    form, size = number_format(first.scheme), first.scheme.group_size
    if settings.rounding is Rounding.GPTQ:
        codes = gptq_codes(aimed, moments.hessian, joined, form, settings.damping, moments.name)
    else:
        codes = form.encode(aimed if joined.scale.dim() == 2 else aimed.unflatten(1, (-1, size)), joined)
    counts = [len(linear.weight) for linear in linears.values()]
    split = [each.split(counts) for each in (codes.values, codes.scale, codes.zero)]
    base = first.quantizer.base
    own = {path: Codes(*(part.clone() for part in parts), base) for path, *parts in zip(paths, *split, strict=True)}
    return {path: pack(codes, form) for path, codes in own.items()}


def share_base_(linears: Collection[OpenLinear]) -> None:
    """Give the linears of one group the base of their format, if it has one, that is made of the largest of all.

    Engines that multiply the weights of a group as one have one base for them.
    """
    form = number_format(next(iter(linears)).scheme)
    if form.has_base:
        base = form.base_of(torch.stack([linear.weight.abs().amax() for linear in linears]).amax()[None])
        for linear in linears:
            linear.quantizer.base = base.float()


def _parameters(linear: OpenLinear, weight: Tensor, hessian: Tensor) -> Parameters:
    """Scale and zero of every range of `weight` [O, C], which stands for the linear's own."""
    if linear.scheme.clip == SEARCHED and linear.clip is None:
        importance = hessian.diagonal().to(weight.dtype)
        form, size = number_format(linear.scheme), linear.scheme.group_size
        return search_parameters(weight, form, importance, size, linear.quantizer.base)
    return linear.quantizer.parameters(linear.quantizer.vectors(weight))


@dataclass(frozen=True)
class Moments:
    """What calibration samples give the linears of a group, called `name` in the log.

    `hessian` X̂ᵀX̂ / n [C, C], float64; `cross` X_fpᵀX̂ / n [C, C], with the rows that the full-precision network would
    give them, transformed alike, where that is aimed at.
    """

    name: str
    hessian: Tensor
    cross: Tensor | None = None

    def aimed(self, weight: Tensor, settings: RoundingSettings) -> Tensor:
        """The weight [O, C] whose output on X̂ is nearest to that of `weight` on X_fp, as far as `target` says.

        W A H⁻¹ with A = X_fpᵀX̂ minimises ‖W X_fpᵀ − V X̂ᵀ‖² over V; `RIDGE` draws it to W, which few samples need. A
        target of 0 leaves W, 1 goes all the way. Source: asymmetric calibration (GPTAQ).
        """
        identity = torch.eye(len(self.hessian), dtype=torch.float64, device=self.hessian.device)
        ridge = RIDGE * self.hessian.diagonal().mean().clamp(min=TINY) * identity
        wide = weight.double()
        best = torch.linalg.solve(self.hessian + ridge, (wide @ (self.cross + ridge)).T).T
        return (wide + settings.target * (best - wide)).to(weight.dtype)
