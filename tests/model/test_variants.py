"""Every variant, of which transformers has none, against a dense model written out here; and with a cache, and packed.

The oracle is float64, with one explicit mask of who sees whom and one softmax per layer, and takes nothing from the
package but the weights.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from encore.config import Rope, StackConfig, T5GemmaConfig
from encore.model.cache import Cache
from encore.model.encoder import Encoder
from encore.model.t5gemma import T5Gemma

WINDOW, V, TOLERANCE = 7, 97, 3e-5
WIDE = dict(hidden_size=40, intermediate_size=56, num_key_value_heads=4)
SHALLOW = dict(num_hidden_layers=2, layer_types=("full_attention", "sliding_attention"))

VARIANTS: dict[str, dict[str, Any]] = {
    "t5gemma causal": dict(causal_encoder=True),
    "t5gemma merged": dict(attention="merged"),
    "t5gemma merged wide": dict(attention="merged", encoder=WIDE),
    "t5gemma tied": dict(tied_embeddings=True),
    "t5gemma global": dict(cross_attention_layers="full_attention"),
    "t5gemma shared": dict(shared_stack=True),
    "t5gemma all": dict(
        causal_encoder=True, attention="merged", tied_embeddings=True, cross_attention_layers="full_attention"
    ),
    "t5gemma2 causal": dict(causal_encoder=True),
    "t5gemma2 separate": dict(attention="separate"),
    "t5gemma2 separate wide": dict(attention="separate", tied_embeddings=False, encoder=WIDE),
    "t5gemma2 two embeddings": dict(tied_embeddings=False),
    "t5gemma2 global": dict(cross_attention_layers="full_attention"),
    "t5gemma2 separate global": dict(attention="separate", cross_attention_layers="full_attention"),
    "t5gemma2 shared": dict(shared_stack=True),
    "t5gemma2 shared separate": dict(shared_stack=True, attention="separate"),
    "t5gemma2 wide": dict(tied_embeddings=False, encoder=WIDE),
    "t5gemma2 wide global": dict(tied_embeddings=False, encoder=WIDE, cross_attention_layers="full_attention"),
    "t5gemma2 shallow": dict(decoder=SHALLOW),
}
each_variant = pytest.mark.parametrize("name", VARIANTS)


def stack(family: str, changes: dict[str, Any]) -> StackConfig:
    second = family == "t5gemma2"
    values: dict[str, Any] = dict(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
        sliding_window=WINDOW,
        local_rope=Rope(10_000.0),
        global_rope=Rope(1_000_000.0, 8.0) if second else Rope(10_000.0),
        query_pre_attn_scalar=24,
        qk_norm=second,
        attn_logit_softcapping=None if second else 5.0,
    )
    return StackConfig(**{**values, **changes})


def build(name: str) -> T5Gemma:
    """Weights large enough that every part matters."""
    family, options = name.split()[0], dict(VARIANTS[name])
    encoder, decoder = (stack(family, options.pop(side, {})) for side in ("encoder", "decoder"))
    cap = 3.0 if family == "t5gemma" else None
    config = T5GemmaConfig(family, encoder, decoder, cap, eoi_token_index=90, **options)  # type: ignore[arg-type]
    assert config.is_public == (name == "t5gemma2 shallow")
    model, generator = T5Gemma(config), torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for leaf, parameter in model.named_parameters():
            std = 0.3 if parameter.dim() == 1 or "embed" in leaf else 1.2 * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


@pytest.fixture(scope="module")
def variant():
    """variant(name) -> the model, made once."""
    made: dict[str, T5Gemma] = {}
    return lambda name: made[name] if name in made else made.setdefault(name, build(name))


class Dense:
    """The oracle: encoder(…) and decoder(…), layer by layer, in float64."""

    def __init__(self, model: T5Gemma) -> None:
        self.config = model.config
        self.w = {n: p.detach().double() for n, p in model.named_parameters(remove_duplicate=False)}

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + self.w[f"{name}.weight"])

    def embed(self, tokens: torch.Tensor, side: str) -> torch.Tensor:
        weight = self.w[f"{side}.embed_tokens.weight"]
        x = weight[tokens] * weight.shape[1] ** 0.5
        vector = self.w.get(f"{side}.embed_tokens.eoi_embedding")
        return x if vector is None else torch.where((tokens == 90)[..., None], vector, x)

    def heads(self, x: torch.Tensor, name: str, which: str, places: torch.Tensor | None, rope: Rope) -> torch.Tensor:
        """(B, heads, T, E), normed if the family does, rotated if `places` are given: pairs as complex numbers."""
        y = F.linear(x, self.w[f"{name}.{which}_proj.weight"]).unflatten(-1, (-1, 16))
        if which != "v" and f"{name}.{which}_norm.weight" in self.w:
            y = self.norm(y, f"{name}.{which}_norm")
        if places is not None:
            turn = places[..., None].double() / rope.factor / rope.theta ** (torch.arange(8).double() / 8)
            y = torch.complex(y[..., :8], y[..., 8:]) * torch.polar(torch.ones_like(turn), turn)[:, :, None]
            y = torch.cat((y.real, y.imag), -1)
        return y.transpose(1, 2)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = q @ k.transpose(2, 3) * 24**-0.5
        if self.config.model_type == "t5gemma":
            scores = torch.tanh(scores / 5) * 5
        weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        return (weights @ v).transpose(1, 2).flatten(2)

    def mlp(self, x: torch.Tensor, layer: str) -> torch.Tensor:
        y = self.norm(x, f"{layer}.pre_feedforward_layernorm")
        gate, up = (F.linear(y, self.w[f"{layer}.mlp.{n}_proj.weight"]) for n in ("gate", "up"))
        y = F.linear(F.gelu(gate, approximate="tanh") * up, self.w[f"{layer}.mlp.down_proj.weight"])
        return x + self.norm(y, f"{layer}.post_feedforward_layernorm")

    def window(self, length: int, kind: str, side: str) -> torch.Tensor:
        """(T, T): which keys are near enough."""
        distance = torch.arange(length)[:, None] - torch.arange(length)
        local = kind == "sliding_attention"
        if side == "decoder" or self.config.causal_encoder:
            return (distance >= 0) & ((distance < WINDOW) if local else True)
        if not local:
            return torch.ones(length, length, dtype=torch.bool)
        if self.config.model_type == "t5gemma":
            return distance.abs() <= WINDOW
        return (distance < (WINDOW + 1) // 2) & (-distance <= WINDOW // 2)

    def encoder(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x, places = self.embed(tokens, "encoder"), (mask.cumsum(1) - 1).clamp(min=0)
        for i, kind in enumerate(self.config.encoder.layer_types):
            layer, rope = f"encoder.layers.{i}", self.config.encoder.rope(kind)
            y, name = self.norm(x, f"{layer}.pre_self_attn_layernorm"), f"{layer}.self_attn"
            q, k, v = (self.heads(y, name, n, None if n == "v" else places, rope) for n in "qkv")
            out = self.attend(q, k, v, self.window(tokens.shape[1], kind, "encoder") & mask[:, None])
            out = F.linear(out, self.w[f"{name}.o_proj.weight"])
            x = self.mlp(x + self.norm(out, f"{layer}.post_self_attn_layernorm"), layer)
        return self.norm(x, "encoder.norm")

    def decoder(
        self, tokens: torch.Tensor, mask: torch.Tensor, memory: torch.Tensor, memory_mask: torch.Tensor
    ) -> torch.Tensor:
        config, x = self.config, self.embed(tokens, "encoder" if self.config.tied_embeddings else "decoder")
        places = (mask.cumsum(1) - 1).clamp(min=0)
        if "decoder.memory_proj.weight" in self.w:
            memory = F.linear(memory, self.w["decoder.memory_proj.weight"])
        of_memory = memory_mask[:, None].expand(-1, tokens.shape[1], -1)
        for i, kind in enumerate(config.decoder.layer_types):
            layer, rope = f"decoder.layers.{i}", config.decoder.rope(kind)
            y, name = self.norm(x, f"{layer}.pre_self_attn_layernorm"), f"{layer}.self_attn"
            q, k, v = (self.heads(y, name, n, None if n == "v" else places, rope) for n in "qkv")
            seen = self.window(tokens.shape[1], kind, "decoder") & mask[:, None]
            reads = config.cross_attention_layers == "all" or kind == "full_attention"
            if reads and config.attention == "merged":
                more = [self.heads(memory, name, n, None, rope) for n in "kv"]
                k, v, seen = torch.cat((k, more[0]), 2), torch.cat((v, more[1]), 2), torch.cat((seen, of_memory), 2)
            out = F.linear(self.attend(q, k, v, seen), self.w[f"{name}.o_proj.weight"])
            x = x + self.norm(out, f"{layer}.post_self_attn_layernorm")
            if reads and config.attention == "separate":
                name = f"{layer}.cross_attn"
                q = self.heads(self.norm(x, f"{layer}.pre_cross_attn_layernorm"), name, "q", None, rope)
                k, v = (self.heads(memory, name, n, None, rope) for n in "kv")
                out = F.linear(self.attend(q, k, v, of_memory), self.w[f"{name}.o_proj.weight"])
                x = x + self.norm(out, f"{layer}.post_cross_attn_layernorm")
            x = self.mlp(x, layer)
        head = self.w["encoder.embed_tokens.weight" if config.tied_embeddings else "decoder.embed_tokens.weight"]
        logits = F.linear(self.norm(x, "decoder.norm"), head)
        return logits if config.final_logit_softcapping is None else torch.tanh(logits / 3) * 3


def padded(lengths: list[int], side: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of these lengths, padding on one side with a real id; the end-of-image token is among the ids."""
    longest = max(lengths)
    tokens = torch.randint(3, V, (len(lengths), longest), generator=torch.Generator().manual_seed(seed))
    tokens[:, longest // 2] = 90
    place = torch.arange(longest)
    of_length = torch.tensor(lengths)[:, None]
    return tokens, place >= longest - of_length if side == "left" else place < of_length


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 0.5, "too small for the comparison to mean anything"
    torch.testing.assert_close(found.double(), expected.double(), atol=TOLERANCE, rtol=0)


def stepwise(model: T5Gemma, tokens: torch.Tensor, mask: torch.Tensor, memory: Any, first: int) -> torch.Tensor:
    """Logits with a cache: `first` tokens at once, then one by one."""
    cache = model.make_cache(memory, tokens.shape[1])
    bounds = [0, first, *range(first + 1, tokens.shape[1] + 1)]
    pieces = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    return torch.cat([model.decode(tokens[:, p], memory, cache, decoder_mask=mask[:, p]) for p in pieces], dim=1)


@each_variant
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_equal_to_the_dense_model_with_and_without_a_cache(variant, name, side):
    model = variant(name)
    dense = Dense(model)
    src, src_mask = padded([3 * WINDOW, WINDOW, 2], side, seed=1)
    tgt, tgt_mask = padded([2 * WINDOW + 2, WINDOW + 1, 3], side, seed=2)
    states = dense.encoder(src, src_mask)
    expected = dense.decoder(tgt, tgt_mask, states, src_mask)
    memory = model.encode(src, src_mask)
    close(memory.states[src_mask], states[src_mask])
    close(model(src, tgt, src_mask, tgt_mask)[tgt_mask], expected[tgt_mask])
    for first in (1, WINDOW + 3):
        close(stepwise(model, tgt, tgt_mask, memory, first)[tgt_mask], expected[tgt_mask])
    alone = model(src[:1, -WINDOW:], tgt[:1, :5])
    everything = torch.ones(1, WINDOW, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool)
    close(
        alone, dense.decoder(tgt[:1, :5], everything[1], dense.encoder(src[:1, -WINDOW:], everything[0]), everything[0])
    )


@each_variant
@torch.no_grad()
def test_packed_rows_equal_each_pair_alone(variant, name):
    model = variant(name)
    src = torch.randint(3, V, (1, 3 * WINDOW), generator=torch.Generator().manual_seed(0))
    tgt = torch.randint(3, V, (1, 2 * WINDOW), generator=torch.Generator().manual_seed(1))
    sources, targets = (0, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 3), (0, 4, WINDOW + 5, WINDOW + 6)
    of_src, of_tgt = torch.zeros_like(src), torch.zeros_like(tgt)
    for number in (1, 2, 3):
        of_src[:, sources[number - 1] : sources[number]] = number
        of_tgt[:, targets[number - 1] : targets[number]] = number
    packed = model(src, tgt, encoder_segment_ids=of_src, decoder_segment_ids=of_tgt)
    for number in (1, 2, 3):
        close(packed[of_tgt == number], model(src[of_src == number][None], tgt[of_tgt == number][None])[0])


@each_variant
def test_every_weight_learns(variant, name):
    model = variant(name)
    src, tgt = padded([9, 9], "right", seed=1)[0], padded([8, 8], "right", seed=2)[0]
    model(src, tgt).pow(2).sum().backward()
    still = [leaf for leaf, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    model.zero_grad()
    assert not still


@torch.no_grad()
def test_the_cache_holds_the_memory_only_where_it_is_read(variant):
    model = variant("t5gemma2 global")
    cache: Cache = model.make_cache(model.encode(torch.tensor([[5, 6, 7]])), 4)
    assert [layer.memory is not None for layer in cache.layers] == [False, True, False]


def test_a_shared_stack_is_held_once(variant):
    model = variant("t5gemma2 shared separate")
    names = [name for name, _ in model.named_parameters()]
    assert not any(name.startswith("decoder.layers.0.self_attn") for name in names)
    assert "decoder.layers.0.cross_attn.q_proj.weight" in names and "decoder.norm.weight" not in names
    assert model.encoder.layers[1].mlp is model.decoder.layers[1].mlp


def test_an_encoder_alone_has_what_its_model_has(variant):
    config = variant("t5gemma2 shared separate").config
    alone, whole = Encoder(config), variant("t5gemma2 shared separate").encoder
    assert {n for n, _ in alone.named_parameters()} == {n for n, _ in whole.named_parameters()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(attention="both"), "attention is 'both'; expected 'separate' or 'merged'"),
        (dict(cross_attention_layers="local"), "cross_attention_layers is 'local'"),
        (dict(tied_embeddings=True, encoder=stack("t5gemma2", WIDE)), "hidden_size is 40 in the encoder, 32"),
        (dict(shared_stack=True, decoder=stack("t5gemma2", SHALLOW)), "shared_stack needs"),
        (
            dict(
                cross_attention_layers="full_attention",
                decoder=stack("t5gemma2", dict(num_hidden_layers=1, layer_types=("sliding_attention",))),
            ),
            "the decoder has none",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(variant, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(variant("t5gemma2 causal").config, **changes)
