"""Names of weights, as checkpoints have them and modules hold them: this file is their only owner.

    embedding.word_embeddings.weight            the embedding, with tied embeddings the output layer as well
    decoder.layers.<number>.<name>              a weight of a layer; layers are numbered bottom up from 0
    decoder.final_layernorm.weight              the norm before the output layer
    output_layer.weight                         the output layer, where it has its own weight

A linear keeps its adapter below itself: A [r, k] is <linear>.adapter.linear_in.weight, B [n, r] linear_out.
"""

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
OUTPUT_LAYER = "output_layer.weight"
QKV, PROJ = "self_attention.linear_qkv", "self_attention.linear_proj"
FC1, FC2 = "mlp.linear_fc1", "mlp.linear_fc2"
"""The four linears of a layer, below its own name."""
QUERY_NORM, KEY_NORM = "self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"
ATTENTION_NORM, MLP_NORM = f"{QKV}.layer_norm_weight", f"{FC1}.layer_norm_weight"
"""A layer's two norms, as TransformerEngine's fused norm-linears call them."""
ADAPTER_A, ADAPTER_B = "adapter.linear_in.weight", "adapter.linear_out.weight"
"""The factors of a linear's adapter, below the linear's name."""

_LAYERS = "decoder.layers."


def layer_of(key: str) -> int:
    """Number of the layer, bottom up from 0, that a weight belongs to; -1 for a weight outside the layers."""
    return int(key[len(_LAYERS) :].partition(".")[0]) if key.startswith(_LAYERS) else -1


def layer_key(layer: int, name: str) -> str:
    """The key of a layer's weight, which is called `name` within the layer."""
    return f"{_LAYERS}{layer}.{name}"


def in_layer(key: str, layer: int) -> str:
    """The key of the same weight in another layer."""
    return layer_key(layer, key[len(_LAYERS) :].partition(".")[2])


def is_embedding(key: str) -> bool:
    """Whether a weight is the embedding's."""
    return key.startswith("embedding.")


def is_output_layer(key: str) -> bool:
    """Whether a weight is the output layer's own."""
    return key.startswith("output_layer.")


def is_norm(key: str) -> bool:
    """Whether a weight is a norm's."""
    return key.endswith(("layer_norm_weight", "layernorm.weight"))


def is_bias(key: str) -> bool:
    """Whether a weight is a linear's bias."""
    return key.endswith(".bias")


def writes_residual(key: str) -> bool:
    """Whether a weight is the matrix of a linear whose output is added to the residual stream."""
    return key.endswith((f"{PROJ}.weight", f"{FC2}.weight"))


def is_adapter(key: str) -> bool:
    """Whether a weight is an adapter's."""
    return ".adapter." in key


def is_adapter_a(key: str) -> bool:
    """Whether a weight is the A of an adapter."""
    return key.endswith(f".{ADAPTER_A}")


def is_adapter_b(key: str) -> bool:
    """Whether a weight is the B of an adapter."""
    return key.endswith(f".{ADAPTER_B}")


def factor_keys(weight_key: str) -> tuple[str, str]:
    """Keys of A and B of the adapter on a linear, whose matrix is `weight_key`."""
    linear = weight_key.removesuffix(".weight")
    return f"{linear}.{ADAPTER_A}", f"{linear}.{ADAPTER_B}"
