"""What is done to q, k and v beside rounding them: matrices that balance q and k, means, clips, the rotation of v."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from duquant.attention import HEAD_ROLES, by_head
from duquant.hadamard import hadamard
from duquant.quantizer import make_quantizer
from duquant.scheme import SEARCHED, Scheme
from quantize.clipping import search_activation_ratio
from quantize.refinements import ExtraSettings, HeadTransform
from quantize.samples import heads_by_kv
from quantize.spec import DecoderSpec, Rows

RIDGE = 1e-3  # of a covariance's mean eigenvalue, added to all: directions that no token has must not be blown up
SEARCH_VECTORS = 8192  # per role, on which a clip ratio is searched


def decide_heads(heads: Mapping[str, Tensor], scheme: Scheme, extras: ExtraSettings) -> dict[str, Tensor]:
    """What samples of q, k and v [n, heads, D] say of how to round them: tensors of the attention quantizer.

    Under the names of its `state_dict`: `matrix` and `key_matrix` [kv heads, D, D], `key.mean` and `value.mean`
    [kv heads, 1, D], `query.clip.ratios` and so on [2]. Only those that `extras` and `scheme` ask for.
    """
    by_role = {role: heads_by_kv(heads, role) for role in HEAD_ROLES}  # [kv heads, vectors, D]
    matrices = {role: hadamard(heads["key"].shape[-1]).to(heads["key"]) for role in ("query", "key")}
    matrices = matrices if scheme.turns_heads else {}
    found: dict[str, Tensor] = {}
    if scheme.turns_heads and extras.head_transform is HeadTransform.BALANCED:
        key = by_role["key"]
        key = key - key.mean(dim=1, keepdim=True) if extras.key_mean else key
        matrices["query"], matrices["key"] = balancing_matrices(by_role["query"], key)
        found |= {"matrix": matrices["query"], "key_matrix": matrices["key"]}
    vectors = {role: by_head(x, matrices.get(role)) for role, x in by_role.items()}
    for role, wanted in (("key", extras.key_mean), ("value", extras.value_mean)):
        if wanted and getattr(scheme, role).quantized:
            found[f"{role}.mean"] = vectors[role].mean(dim=1, keepdim=True)
            vectors[role] = vectors[role] - found[f"{role}.mean"]
    for role in HEAD_ROLES:
        own = getattr(scheme, role)
        if own.quantized and own.clip == SEARCHED:
            flat = vectors[role].flatten(0, 1)
            flat = flat[:: max(1, len(flat) // SEARCH_VECTORS)]
            flat = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-12)  # each token's error beside its own length
            ratio = search_activation_ratio(flat, make_quantizer(own, nn.Identity()))
            found[f"{role}.clip.ratios"] = torch.tensor([ratio, ratio], device=flat.device)
    return found


def balancing_matrices(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """M and M⁻ᵀ [heads, D, D] for vectors [heads, n, D] of q and k: (qM)(kM⁻ᵀ)ᵀ = qkᵀ, and the rounding costs least.

    The error of q·k under ranges per vector is about E|qM|² E|kM⁻ᵀ|², whatever the vectors' directions behind a
    Hadamard matrix. With the covariances S of q and T of k it is least, the square of the nuclear norm of S^½ T^½,
    where MMᵀ = S^-½ (S^½ T S^½)^½ S^-½: q and k have the same covariance then. Ours.
    """
    first, second = (_covariance(each) for each in (query, key))
    root, inverse = _power(first, 0.5), _power(first, -0.5)
    values, vectors = torch.linalg.eigh(inverse @ _power(root @ second @ root, 0.5) @ inverse)
    spread = hadamard(query.shape[-1]).to(values)
    widths = values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()[:, None, :]
    return ((vectors * widths) @ spread).float(), ((vectors / widths) @ spread).float()


def _covariance(x: Tensor) -> Tensor:
    """Of vectors [heads, n, D], each scaled to length 1: [heads, D, D] in float64, positive definite."""
    x = torch.nn.functional.normalize(x.double(), dim=-1)
    moment = x.transpose(1, 2) @ x / x.shape[1]
    mean = moment.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    return moment + RIDGE * mean * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A symmetric positive definite matrix [..., D, D] to a power."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = values.amax(dim=-1, keepdim=True) * torch.finfo(values.dtype).eps
    return (vectors * values.clamp(min=floor).pow(exponent)[..., None, :]) @ vectors.transpose(-1, -2)


def value_rows(spec: DecoderSpec) -> Rows:
    """Where the rows of v are: what o_proj's input is linear in."""
    return next(
        each for group in spec.groups if group.name == "o" for each in group.absorbers if isinstance(each, Rows)
    )


def value_matrices(values: Tensor, layer: nn.Module, spec: DecoderSpec, extras: ExtraSettings) -> Tensor:
    """What the heads of v are multiplied by [kv heads, D, D]: the Hadamard matrix, or what balances v against o_proj.

    `values` [n, kv heads, D]. The same bound as for q and k holds for the error of v through the columns of o_proj.
    """
    heads = heads_by_kv({"key": values, "value": values}, "value")
    if extras.head_transform is HeadTransform.HADAMARD:
        return hadamard(heads.shape[-1]).to(heads).expand(len(heads), -1, -1).clone()
    output = layer.get_submodule(output_path(spec)).weight.detach().float()
    columns = output.unflatten(1, (len(heads), -1, heads.shape[-1]))  # [O, kv heads, query heads of each, D]
    return balancing_matrices(heads, columns.permute(1, 0, 2, 3).flatten(1, 2))[0]


def output_path(spec: DecoderSpec) -> str:
    """The linear behind attention."""
    return next(group.linears[0] for group in spec.groups if group.name == "o")


@torch.no_grad()
def rotate_values_(layer: nn.Module, spec: DecoderSpec, matrices: Tensor) -> None:
    """Multiply the heads of v by M = `matrices` [kv heads, D, D], folded in place into the rows of v_proj and o_proj.

    attention(vM) = attention(v) M, and (aM)(W M⁻ᵀ)ᵀ = a Wᵀ for the columns W of each query head. Exact.
    """
    rows, matrices = value_rows(spec), matrices.double()
    value, output = layer.get_submodule(rows.path), layer.get_submodule(output_path(spec))
    for parameter in (value.weight, value.bias):
        if parameter is not None:
            moved = multiplied_rows(parameter.detach().double(), matrices, rows.start)
            parameter.data = moved.to(parameter.dtype)
    inverse = torch.linalg.inv(matrices).transpose(1, 2)
    output.weight.data = multiplied_columns(output.weight.detach().double(), inverse).to(output.weight.dtype)


def multiplied_rows(weight: Tensor, matrices: Tensor, start: int) -> Tensor:
    """`weight` [O, …] whose rows from `start` on give the heads of v, each times its matrix [kv heads, D, D]."""
    heads, size, _ = matrices.shape
    before, part, behind = weight.tensor_split((start, start + heads * size))
    moved = torch.einsum("hd...,hde->he...", part.unflatten(0, (heads, size)), matrices).flatten(0, 1)
    return torch.cat([before, moved, behind])


def multiplied_columns(rows: Tensor, matrices: Tensor) -> Tensor:
    """Rows [n, C], the query heads behind one another, each head times the matrix of its kv head [kv heads, D, D]."""
    heads = rows.unflatten(1, (len(matrices), -1, matrices.shape[-1]))
    return torch.einsum("nhqd,hde->nhqe", heads, matrices).flatten(1)


def rotated_energy(outputs: Tensor, matrices: Tensor) -> Tensor:
    """The root of the mean square [C] of o_proj's input aM, from the second moments [heads, D, D] of a by head."""
    matrices = matrices.to(outputs).repeat_interleave(len(outputs) // len(matrices), dim=0)
    return (matrices * (outputs @ matrices)).sum(dim=1).clamp(min=0).sqrt().flatten().float()


def order_in_heads(order: Tensor, shape: torch.Size) -> Tensor:
    """What an order [C] of o_proj's input does inside the kv heads, as indices of the `shape` [kv heads, …, D]."""
    heads, size = shape[0], shape[-1]
    inside = order.view(heads, -1, size)[:, 0] % size  # its query heads have one order
    return inside.view(heads, *[1] * (len(shape) - 2), size).expand(shape)


def in_former_order(matrices: Tensor, order: Tensor) -> Tensor:
    """P M Pᵀ for matrices M [kv heads, D, D] of heads whose channels are in an order [C] of o_proj's input by now."""
    rows = order_in_heads(order, matrices.shape).argsort(dim=-1)
    return matrices.gather(-1, rows).gather(-2, rows.transpose(-1, -2))
