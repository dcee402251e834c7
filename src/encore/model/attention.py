"""The three attentions of the family.

    SelfAttention     Gemma, both encoders, the T5Gemma decoder: q, k rotated; one part or, with a cache, past and new
    CrossAttention    T5Gemma decoder: reads the memory; no rotation, no window (T5Gemma paper, section 2)
    MergedAttention   T5Gemma 2 decoder: the same weights read target and memory under one softmax (T5Gemma 2 paper,
                      section 2); memory keys are normed but not rotated

`query_pre_attn_scalar ** -0.5` is in the rotation of the queries (or put on unrotated ones), so scores come out scaled.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from encore.config import StackConfig
from encore.kernels.attention import Keys, attend
from encore.model.cache import LayerCache
from encore.model.layers import RMSNorm, Rotation, rotate
from encore.model.masks import Visibility

KeysValues = tuple[Float[Tensor, "B K S E"], Float[Tensor, "B K S E"]]


@dataclass(frozen=True)
class SelfView:
    """What a layer needs to know of its own tokens: their rotation (that of queries scales them too), and what they see
    of each other (`new`) and of the cached `past`. `new` None: one token, which is in the cache when it attends.
    """

    rotation: Rotation
    query_rotation: Rotation
    new: Visibility | None
    past: Visibility | None = None
    length: int = 0


class Attention(nn.Module):
    """Projections shared by the three; `memory_size` is the width that keys and values are read from."""

    def __init__(self, config: StackConfig, memory_size: int | None = None, *, qk_norm: bool | None = None) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.softcap = config.attn_logit_softcapping
        self.scale = config.query_pre_attn_scalar**-0.5
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(memory_size or config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(memory_size or config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        norm = config.qk_norm if qk_norm is None else qk_norm
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if norm else nn.Identity()

    def queries(self, x: Float[Tensor, "B T D"], rotation: Rotation | None) -> Float[Tensor, "B H T E"]:
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))
        if rotation is None:
            return (q * self.scale).transpose(1, 2)
        return rotate(q, rotation).transpose(1, 2)

    def keys_values(self, x: Float[Tensor, "B S D"], rotation: Rotation | None) -> KeysValues:
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if rotation is not None:
            k = rotate(k, rotation)
        return k.transpose(1, 2), v.transpose(1, 2)


class SelfAttention(Attention):
    def forward(
        self, x: Float[Tensor, "B T D"], view: SelfView, cache: LayerCache | None = None, also: tuple[Keys, ...] = ()
    ) -> Float[Tensor, "B T D"]:
        """Attention over the past in `cache`, the tokens themselves, and `also` further parts."""
        q = self.queries(x, view.query_rotation)
        k, v = self.keys_values(x, view.rotation)
        if cache is not None and view.new is None:  # one token: into the cache with it, and read all from there
            cache.append(view.length, k, v)
            k, v = cache.past(view.length + 1)
        parts = [] if view.new is None else [Keys(k, v, view.new)]
        if cache is not None and view.past is not None:
            past = (k, v) if view.new is None else cache.past(view.length)
            parts.insert(0, Keys(*past, view.past))
        out = attend(q, [*parts, *also], softcap=self.softcap)
        if cache is not None and view.new is not None:
            cache.append(view.length, k, v)
        return self.o_proj(out)


class CrossAttention(Attention):
    """Keys and values from the memory, which may be of another width (9B-2B)."""

    def memory_keys_values(self, states: Float[Tensor, "B S D"]) -> KeysValues:
        return self.keys_values(states, None)

    def forward(self, x: Float[Tensor, "B T D"], memory: KeysValues, visible: Visibility) -> Float[Tensor, "B T D"]:
        return self.o_proj(attend(self.queries(x, None), (Keys(*memory, visible),), softcap=self.softcap))


class MergedAttention(SelfAttention):
    """softmax([target | memory]) with one set of weights."""

    def memory_keys_values(self, states: Float[Tensor, "B S D"]) -> KeysValues:
        return self.keys_values(states, None)
