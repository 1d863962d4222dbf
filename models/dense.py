"""What most families share: attention, then a gated MLP. A family's own file says where its norms are."""

from transformers import PretrainedConfig

from quantize.spec import Absorber, DecoderSpec, InputGroup, Norm, Rows, SharedRows


def dense_spec(config: PretrainedConfig, before_attention: Norm | None, before_mlp: Norm | None) -> DecoderSpec:
    """q, k, v, o, gate, up and down as linears of their own, behind the norms given (None: no norm is before them)."""
    return DecoderSpec((*attention_groups(config, before_attention), *mlp_groups(before_mlp)))


def attention_groups(config: PretrainedConfig, norm: Norm | None) -> tuple[InputGroup, InputGroup]:
    """{q, k, v} behind `norm`, and {o}."""
    query, key, value = (f"self_attn.{name}_proj" for name in "qkv")
    return (InputGroup("qkv", (query, key, value), query, behind(norm)), output_group(config, value))


def output_group(config: PretrainedConfig, value: str, start: int = 0) -> InputGroup:
    """{o}, whose scale goes into the rows of v: of the linear at `value`, from row `start` on.

    Query heads that share a kv head must share its scales for that.
    """
    heads = config.num_attention_heads // config.num_key_value_heads
    shared = SharedRows(value, start, heads, head_dim(config))
    absorber = Rows(value, start) if heads == 1 else shared
    output = "self_attn.o_proj"
    return InputGroup("o", (output,), output, (absorber,), closes="self_attn", ordered=(shared,))


def mlp_groups(norm: Norm | None) -> tuple[InputGroup, InputGroup]:
    """{gate, up} behind `norm`, and {down}."""
    gate, up, down = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
    return (
        InputGroup("gate_up", (gate, up), up, behind(norm)),
        InputGroup("down", (down,), down, (Rows(up),), closes="mlp", ordered=(Rows(gate), Rows(up))),
    )


def behind(norm: Norm | None) -> tuple[Absorber, ...]:
    """The absorbers of a group that reads the output of `norm`; without one its scale stays online."""
    return () if norm is None else (norm,)


def head_dim(config: PretrainedConfig) -> int:
    """Channels of one head, which need not be hidden size / heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
