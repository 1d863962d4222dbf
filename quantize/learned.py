"""The learned dual transformation: rotations, scales and clips of one layer, trained from where the search left them.

What is learned is multiplied into what was there: R̂ exp(A − Aᵀ), Λ exp(δ), and ratios of the ranges. Everything stays
an exact reparametrisation while it is trained (`quantize.learning`), and is read out as plain rotations, scales and
ratios. Ours.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from duquant.attention import HEAD_ROLES, QUANTIZER, AttentionQuantizer, attach_, by_head
from duquant.formats import BLOCK_FORMATS
from duquant.quantizer import make_quantizer
from duquant.scheme import BY_BLOCK, Scheme, TensorScheme, number_format
from duquant.transform import DualTransform, rotate_blocks
from quantize.bits import LARGEST_BLOCK_RATIO
from quantize.build import LayerBuilder, absorbers
from quantize.fake import fake_quantize
from quantize.heads import in_former_order, multiplied_columns, multiplied_rows, value_rows
from quantize.refinements import Rounding
from quantize.settings import TrainingSettings
from quantize.spec import DecoderSpec, SharedRows
from quantize.state import GroupState, LayerState

WEIGHT_RATIO = 0.9  # where clips of weights begin: near what a search finds
LARGEST_START = 0.99  # ratios are sigmoids, which never reach 1
GPTQ_ERROR = 0.5  # of nearest rounding's error, what GPTQ leaves, about: no transform is to be learned for more


def rotation_of(skew: Tensor) -> Tensor:
    """exp(A − Aᵀ) of matrices [..., B, B]: orthogonal, and the identity at A = 0."""
    return torch.linalg.matrix_exp(skew - skew.transpose(-1, -2))


Turn = Callable[[Tensor], Tensor]


class LearnedRatios(nn.Module):
    """Both ends of ranges multiplied by ratios in (0, limit), sigmoids of trainable logits of one shape."""

    def __init__(self, low: Tensor, high: Tensor, limit: float = 1.0):
        super().__init__()
        self.limit = limit
        self.low, self.high = (nn.Parameter((each / limit).clamp(max=LARGEST_START).logit()) for each in (low, high))

    def ratios(self) -> tuple[Tensor, Tensor]:
        """Of the lower and of the upper end."""
        return self.limit * self.low.sigmoid(), self.limit * self.high.sigmoid()


class FixedRatios(nn.Module):
    """Both ends of ranges multiplied by ratios that stay as they are."""

    def __init__(self, low: Tensor, high: Tensor):
        super().__init__()
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def ratios(self) -> tuple[Tensor, Tensor]:
        """Of the lower and of the upper end."""
        return self.low, self.high


class LearnedQuantizer(nn.Module):
    """Fake quantization of vectors under a clip's ratios of their ranges, learned or fixed; straight-through."""

    def __init__(self, scheme: TensorScheme, clip: LearnedRatios | FixedRatios):
        super().__init__()
        self.scheme, self.clip = scheme, clip

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x` [..., C]."""
        size = self.scheme.group_size
        vectors = x if size is None else x.unflatten(-1, (-1, size))
        return fake_quantize(vectors, *self.clip.ratios(), number_format(self.scheme)).view(x.shape)


def learned_quantizer(
    scheme: TensorScheme, ratios: Tensor | None, shape: tuple[int, ...] = (1,), fixed: bool = False
) -> nn.Module:
    """That of a tensor, from the `ratios` [2] that were searched or else from the scheme's; the identity at 16 bits.

    They stay as they are where `fixed`; there are none where every block chooses its own. One ratio for all vectors may
    exceed 1 where the format gives that a meaning.
    """
    if not scheme.quantized:
        return nn.Identity()
    if scheme.clip == BY_BLOCK:
        return make_quantizer(scheme)
    usual = scheme.clip if isinstance(scheme.clip, float) else 1.0
    ends = [torch.full(shape, each) for each in ((usual, usual) if ratios is None else ratios.tolist())]
    if fixed:
        return LearnedQuantizer(scheme, FixedRatios(*ends))
    limit = LARGEST_BLOCK_RATIO if scheme.format in BLOCK_FORMATS and shape == (1,) else 1.0
    return LearnedQuantizer(scheme, LearnedRatios(*ends, limit))


class LearnedGroup(nn.Module):
    """Q_x(T((x − m) Λ⁻¹)) and T(W Λ), with what is learned of T, Λ and Q_x; the mean m of x goes with the weight.

    While a step lasts, all linears of the group are given one result, and matrices are made once (`begin_step_`).
    `turn` multiplies rows by what is learned of v's heads, where the group reads them. `shared`: where query heads
    share what is learned of Λ, since it goes upstream. `fixed`: nothing is learned of Q_x.
    """

    def __init__(
        self,
        state: GroupState,
        online: Tensor | None,
        scheme: TensorScheme,
        turn: Turn | None,
        shared: SharedRows | None = None,
        fixed: bool = False,
    ):
        super().__init__()
        self.state, self.online, self.turn, self.shared = state, online, turn, shared
        self.skews = nn.Parameter(torch.zeros_like(state.rotations))
        self.log_scale = nn.Parameter(torch.zeros(state.permutations.shape[-1], device=state.rotations.device))
        self.quantizer = learned_quantizer(scheme, state.ratios, fixed=fixed).to(state.rotations.device)
        self.mean = None
        if state.shift is not None:
            self.mean = DualTransform(state.rotations, state.permutations, online).inverse(state.shift[None])
        self.begin_step_()

    def begin_step_(self) -> None:
        """Forget what was made of the parameters as they were."""
        self._matrices, self._seen, self._result = None, None, None

    def rotations(self) -> Tensor:
        """The rotations now [n+1, B, B]."""
        if self._matrices is None:
            self._matrices = self.state.rotations @ rotation_of(self.skews)
        return self._matrices

    def scale(self) -> Tensor:
        """What x is divided by and W multiplied with here [C]: Λ, or what is learned of it where Λ is upstream."""
        return self.factor() if self.online is None else self.online * self.factor()

    def factor(self) -> Tensor:
        """What is learned of Λ [C], in the order that the channels have now."""
        factor = self.log_scale.exp()
        return factor if self.shared is None else self.shared.tie(factor)

    def shift(self) -> Tensor | None:
        """The mean m [1, C] of x."""
        return self.mean if self.turn is None or self.mean is None else self.turn(self.mean)

    def orthogonal(self, x: Tensor) -> Tensor:
        """T(x) along the last axis, without Λ."""
        for index, rotation in enumerate(self.rotations()):
            x = rotate_blocks(x, rotation)
            if index < len(self.state.permutations):
                x = x[..., self.state.permutations[index]]
        return x

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., C]."""
        if self._seen is not x:
            shift = self.shift()
            wide = (x.float() if shift is None else x.float() - shift) / self.scale()
            self._seen, self._result = x, self.quantizer(self.orthogonal(wide)).to(x.dtype)
        return self._result

    def learned(self) -> GroupState:
        """What was learned, as plain tensors; the shift is to be measured anew."""
        factor, order = self.factor(), self.state.order
        factor = factor if order is None else factor[order.argsort()]  # scales are of the channels as they were
        scale = None if self.state.scale is None else self.state.scale * factor
        rotations = (self.state.rotations.double() @ rotation_of(self.skews.double())).float()
        fixed = isinstance(getattr(self.quantizer, "clip", None), FixedRatios)
        ratios = self.state.ratios if fixed else ratios_of(self.quantizer)
        return replace(self.state, scale=scale, rotations=rotations, ratios=ratios, shift=None)


class LearnedLinear(nn.Module):
    """y = x̂ · Q_w(T(W Λ))ᵀ + W m + b, everything made anew in each step from W [O, C].

    `turn` multiplies weight and bias by what is learned of v's heads, where the linear makes or reads them. Of the
    weight's rounding error the share `error` is there.
    """

    def __init__(self, linear: nn.Module, group: LearnedGroup, scheme: TensorScheme, turn: Turn | None, error: float):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach(), persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float(), persistent=False)
        self.group, self.turn, self.error = group, turn, error
        outputs, channels = linear.weight.shape
        ranges = channels // (scheme.group_size or channels)
        shape = (outputs, 1) if ranges == 1 else (outputs, ranges, 1)
        self.quantizer = learned_quantizer(scheme, torch.tensor([WEIGHT_RATIO] * 2), shape).to(linear.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., O], in the dtype of `x`."""
        group, reads = self.group, self.group.turn is not None
        weight = self.weight if self.turn is None else self.turn(self.weight)
        bias = self.bias if self.turn is None or self.bias is None or reads else self.turn(self.bias)
        exact = group.orthogonal(weight * group.scale())
        rounded = torch.lerp(exact, self.quantizer(exact), self.error)
        shift = group.shift()
        if shift is not None:
            moved = (shift @ weight.T)[0]
            bias = moved if bias is None else bias + moved
        return F.linear(group(x), rounded.to(x.dtype), None if bias is None else bias.to(x.dtype))


def ratios_of(quantizer: nn.Module) -> Tensor | None:
    """The ratios (low, high) [2] that an activation's quantizer has learned; None if it rounds nothing."""
    return torch.cat(quantizer.clip.ratios()).detach() if isinstance(quantizer, LearnedQuantizer) else None


class LearnedHeads(nn.Module):
    """What is learned of q, k and v: rotations behind the matrices that were there, clips; rotations of v's heads."""

    def __init__(self, quantizer: AttentionQuantizer, scheme: Scheme, kv_heads: int, head_dim: int, state: LayerState):
        super().__init__()
        self.base, device = quantizer, next(iter(state.groups.values())).rotations.device
        self.skew = nn.Parameter(torch.zeros(kv_heads, head_dim, head_dim, device=device))
        self.value_skew = nn.Parameter(torch.zeros(kv_heads, head_dim, head_dim, device=device))
        self.rotates, self.rotates_values = quantizer.matrix is not None, state.values is not None
        for role in HEAD_ROLES:
            found = state.attention.get(f"{role}.clip.ratios")
            setattr(self, role, learned_quantizer(getattr(scheme, role), found).to(device))
        self.means = {role: state.attention.get(f"{role}.mean") for role in HEAD_ROLES}

    def matrices(self) -> tuple[Tensor, Tensor] | None:
        """M and M⁻ᵀ now [kv heads, D, D]."""
        if not self.rotates:
            return None
        key = self.base.matrix if self.base.key_matrix is None else self.base.key_matrix
        turn = rotation_of(self.skew)
        return self.base.matrix @ turn, key @ turn

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `AttentionQuantizer`."""
        first, second = self.matrices() or (None, None)
        key_mean, value_mean = self.means["key"], self.means["value"]
        if key_mean is not None:
            key_mean = key_mean @ rotation_of(self.skew)
        if value_mean is not None:
            value_mean = value_mean @ rotation_of(self.value_skew)
        return (
            self.query(by_head(query.float(), first)).to(query.dtype),
            self._centered(self.key, by_head(key.float(), second), key_mean).to(key.dtype),
            self._centered(self.value, value.float(), value_mean).to(value.dtype),
        )

    @staticmethod
    def _centered(quantizer: nn.Module, x: Tensor, mean: Tensor | None) -> Tensor:
        return quantizer(x) if mean is None else quantizer(x - mean) + mean

    def value_turn(self) -> Tensor:
        """What is learned of v's heads [kv heads, D, D]."""
        return rotation_of(self.value_skew)

    def put_(self, state: LayerState) -> None:
        """Put what was learned into `state`, as plain tensors."""
        if self.rotates:
            turn = rotation_of(self.skew.double())
            key = self.base.matrix if self.base.key_matrix is None else self.base.key_matrix
            state.attention["matrix"] = (self.base.matrix.double() @ turn).float()
            state.attention["key_matrix"] = (key.double() @ turn).float()
            if self.means["key"] is not None:
                state.attention["key.mean"] = (self.means["key"].double() @ turn).float()
        if self.rotates_values:
            turn = rotation_of(self.value_skew.double())
            order = state.orders.get("o")
            behind = turn if order is None else in_former_order(turn, order)
            state.values = (state.values.double() @ behind).float()
            if self.means["value"] is not None:
                state.attention["value.mean"] = (self.means["value"].double() @ turn).float()
        ratios = {f"{role}.clip.ratios": ratios_of(getattr(self, role)) for role in HEAD_ROLES}
        state.attention |= {name: each for name, each in ratios.items() if each is not None}


class LearnedLayer:
    """A decoder layer in which everything that can be learned is; the layer is scaled and not rounded yet.

    `rate` of learning by parameter: rotations, scales, clips.
    """

    def __init__(self, layer: nn.Module, spec: DecoderSpec, state: LayerState, builder: LayerBuilder):
        self.layer, self.spec, self.state = layer, spec, state
        attention, rows = layer.get_submodule(spec.attention), value_rows(spec)
        quantizer = getattr(attention, QUANTIZER)
        kv_heads = attention.config.num_key_value_heads
        self.heads = LearnedHeads(quantizer, builder.scheme, kv_heads, attention.head_dim, state)
        turns = state.values is not None
        self.groups: dict[str, LearnedGroup] = {}
        self.linears: dict[str, LearnedLinear] = {}
        error = GPTQ_ERROR if builder.settings.rounding.rounding is Rounding.GPTQ else 1.0
        self.keeps_clips = builder.settings.learns_weight_clips and builder.scheme.weight.quantized
        for group in spec.groups:
            reads = turns and group.name == "o"
            columns = (lambda x: multiplied_columns(x, self.heads.value_turn())) if reads else None
            online = builder.online_scale(group)
            upstream = absorbers(group, builder.settings.smooth)
            shared = next((each for each in upstream if isinstance(each, SharedRows)), None)
            fixed = builder.settings.training.fixed_input_clips
            own = (state.groups[group.name], online, builder.scheme.input, columns, shared, fixed)
            learned = LearnedGroup(*own)
            self.groups[group.name] = learned
            for path in group.linears:
                gives = turns and path == rows.path
                turn = (lambda x: multiplied_rows(x, self.heads.value_turn(), rows.start)) if gives else columns
                own = LearnedLinear(layer.get_submodule(path), learned, builder.scheme.weight, turn, error)
                builder.replace_(path, own)
                self.linears[path] = own
        attach_(attention, self.heads)

    def rates(self, config: TrainingSettings) -> list[dict]:
        """Parameters with their learning rates, as an optimizer takes them. Each is there once."""
        groups = list(self.groups.values())
        scales = [each.log_scale for each in groups if each.state.scale is not None]
        rotations = [each.skews for each in groups if each.skews.numel()]
        rotations += [self.heads.skew] * self.heads.rotates + [self.heads.value_skew] * self.heads.rotates_values
        clips = [
            each for module in self.layer.modules() if isinstance(module, LearnedRatios) for each in module.parameters()
        ]
        rates = ((rotations, config.rotation_rate), (scales, config.scale_rate), (clips, config.clip_rate))
        found = [{"params": parameters, "lr": rate} for parameters, rate in rates if parameters]
        for parameter in (each for group in found for each in group["params"]):
            parameter.requires_grad_(True)
        return found

    def begin_step_(self) -> None:
        """The parameters have changed, or the sample will."""
        for group in self.groups.values():
            group.begin_step_()

    def learned(self) -> LayerState:
        """What was learned, as plain tensors."""
        groups = {name: group.learned() for name, group in self.groups.items()}
        state = replace(self.state, groups=groups, attention=dict(self.state.attention), clips={})
        for path, linear in self.linears.items() if self.keeps_clips else ():
            state.clips[path] = (linear.quantizer.clip.low.detach(), linear.quantizer.clip.high.detach())
        self.heads.put_(state)
        return state
