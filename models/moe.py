"""What mixtures of experts share: a router, and experts that are gated MLPs."""

from quantize.spec import InputGroup, Norm, Rows

EXPERTS = "mlp.experts"


def expert_groups(experts: int, intermediate_size: int) -> tuple[InputGroup, InputGroup]:
    """{gate and up of every expert} behind the norm, and {down of every expert}.

    Every expert can be given any token, so all of them share the group's transform, which is searched on all tokens,
    and its scale, for which no single expert stands. The router reads what the scale divides, in full precision: its
    columns are multiplied. The inputs of the down linears are those of the tokens routed to each, taken together; the
    scale goes into the up half of each expert's own rows, and so does their order, which is that of both halves.
    """
    gate_up, down = (
        tuple(f"{EXPERTS}.{index}.{part}_proj" for index in range(experts)) for part in ("gate_up", "down")
    )
    norm = Norm("post_attention_layernorm")
    absorbers = tuple(Rows(path, intermediate_size) for path in gate_up)
    ordered = tuple(Rows(path, start) for path in gate_up for start in (0, intermediate_size))
    return (
        InputGroup("gate_up", gate_up, None, (norm,), readers=("mlp.gate",), observed=("mlp",)),
        InputGroup("down", down, None, absorbers, observed=down, ordered=ordered),
    )
