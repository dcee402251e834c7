"""Pictures in the encoder and in Gemma 3, against transformers: features, logits, caches, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from encore.config import GemmaConfig, Rope, StackConfig, T5GemmaConfig, VisionConfig
from encore.model.encoder import Encoder
from encore.model.gemma import Gemma
from encore.model.masks import Visibility, Window, picture_groups
from encore.model.t5gemma import T5Gemma
from encore.model.vision import picture_features

WINDOW, V, TOLERANCE = 7, 97, 3e-5
BOI, EOI, PICTURE, PER_PICTURE = 89, 90, 91, 16
TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
SIZES = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    query_pre_attn_scalar=24,
    sliding_window=WINDOW,
    max_position_embeddings=256,
)
VISION = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=56, patch_size=7
)
ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
}
INDICES = dict(boi_token_index=BOI, eoi_token_index=EOI, image_token_index=PICTURE)


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.3 if parameter.dim() == 1 or "embed" in name else 1.2 * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def reference(kind: str) -> torch.nn.Module:
    text = dict(**SIZES, layer_types=TYPES, rope_parameters=ROPE)
    if kind == "gemma3":
        config = tf.Gemma3Config(
            text_config=text, vision_config=dict(VISION), mm_tokens_per_image=PER_PICTURE, **INDICES
        )
        model = tf.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager")
    else:
        encoder = dict(
            text_config=text, vision_config=dict(VISION), mm_tokens_per_image=PER_PICTURE, eoi_token_index=EOI
        )
        config = tf.T5Gemma2Config(encoder=encoder, decoder=dict(text), image_token_index=PICTURE)
        model = tf.T5Gemma2ForConditionalGeneration._from_config(config, attn_implementation="eager")
    randomise(model)
    model.tie_weights()
    return model.eval()


def config_of(kind: str) -> GemmaConfig | T5GemmaConfig:
    rope = dict(local_rope=Rope(10_000.0), global_rope=Rope(1_000_000.0, 8.0))
    stack = StackConfig(**SIZES, **rope, layer_types=tuple(TYPES), qk_norm=True)  # pyright: ignore
    vision = VisionConfig(**VISION, mm_tokens_per_image=PER_PICTURE)
    if kind == "gemma3":
        return GemmaConfig("gemma3", stack, vision=vision, **INDICES)
    return T5GemmaConfig("t5gemma2", stack, stack, vision=vision, **INDICES)


def build(config: GemmaConfig | T5GemmaConfig, *, vision: bool) -> Gemma | T5Gemma:
    return Gemma(config, vision=vision) if isinstance(config, GemmaConfig) else T5Gemma(config, vision=vision)


@pytest.fixture(scope="module")
def pair():
    """pair(kind) -> (reference, ours), with the same weights."""
    made = {}

    def make(kind: str):
        if kind not in made:
            theirs = reference(kind)
            ours = build(config_of(kind), vision=True)
            renamed = {}
            for name, tensor in theirs.state_dict().items():
                name = name.removeprefix("model.").replace("language_model.", "").replace("text_model.", "")
                if kind == "gemma3" and "tower" not in name:
                    name = name.replace("input_layernorm", "pre_self_attn_layernorm")
                    name = name.replace("post_attention_layernorm", "post_self_attn_layernorm")
                renamed[name.replace("vision_tower.vision_model.", "vision_tower.")] = tensor
            with torch.no_grad():
                for name, parameter in ours.named_parameters():
                    parameter.copy_(renamed[name])
            made[kind] = (theirs, ours.eval())
        return made[kind]

    return make


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def pictures(number: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(number, 3, 56, 56, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def row(*parts: int, seed: int = 1) -> list[int]:
    """Text of the given lengths with a picture between each two."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for i, length in enumerate(parts):
        if i:
            ids += [BOI, *[PICTURE] * PER_PICTURE, EOI]
        ids += torch.randint(3, BOI, (length,), generator=generator).tolist()
    return ids


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    fill = [[5] * (longest - len(r)) for r in rows]
    tokens = torch.tensor([[*r, *f] if side == "right" else [*f, *r] for r, f in zip(rows, fill, strict=True)])
    real = [[True] * len(r) for r in rows]
    mask = [
        [*r, *[False] * len(f)] if side == "right" else [*[False] * len(f), *r] for r, f in zip(real, fill, strict=True)
    ]
    return tokens, torch.tensor(mask)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.abs().max() > 0.5
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


# One picture, several, a row of text only, and pictures longer and shorter than what is around them.
BATCHES = [
    [row(3, 9)],
    [row(0, 4, 0)],
    [row(4, 2, 12), row(11), row(1, 30)],
]


@pytest.mark.parametrize("kind", ["t5gemma2", "gemma3"])
def test_features(pair, kind):
    theirs, ours = pair(kind)
    part = ours.encoder if kind == "t5gemma2" else ours
    pixels = pictures(5)
    pooled = picture_features(part.vision_tower, part.multi_modal_projector, pixels)
    found = part.multi_modal_projector.project(pooled)
    assert found.shape == (5, PER_PICTURE, 32)
    close(found, theirs.get_image_features(pixels).pooler_output)


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_t5gemma2(pair, rows, side):
    theirs, ours = pair("t5gemma2")
    tokens, mask = padded(rows, side)
    pixels = pictures(int((tokens == PICTURE).sum()) // PER_PICTURE)
    target = torch.randint(3, BOI, (len(rows), 11), generator=torch.Generator().manual_seed(2))
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    expected = theirs(
        input_ids=tokens,
        attention_mask=mask.long(),
        position_ids=positions,
        pixel_values=pixels,
        decoder_input_ids=target,
    ).logits
    close(ours(tokens, target, mask, pictures=pixels), expected)
    close(ours.decode(target, ours.encode(tokens, mask, pictures=pixels)), expected)
    close(ours.logits(ours.states(tokens, target, mask, pictures=pixels)), expected)
    without = ours(tokens, target, mask)  # the placeholders' own embeddings
    with_picture = (tokens == PICTURE).any(dim=1)
    assert ((without - expected).abs().amax(dim=(1, 2)) > 0.01).equal(with_picture)


def test_kept_features_stand_for_the_pixels(pair):
    """What a frozen tower makes of a picture can be computed once."""
    _, ours = pair("t5gemma2")
    tokens, pixels, target = torch.tensor([row(3, 9), row(2, 10)]), pictures(2), torch.tensor([[2, 7, 8]] * 2)
    kept = picture_features(ours.encoder.vision_tower, ours.encoder.multi_modal_projector, pixels)
    close(ours(tokens, target, pictures=kept), ours(tokens, target, pictures=pixels))


def test_the_placeholder_in_a_target_stays_text(pair):
    theirs, ours = pair("t5gemma2")
    tokens, pixels, target = torch.tensor([row(3, 9)]), pictures(1), torch.tensor([[2, PICTURE, EOI, 7]])
    close(
        ours(tokens, target, pictures=pixels),
        theirs(input_ids=tokens, pixel_values=pixels, decoder_input_ids=target).logits,
    )


def gemma_logits(theirs: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor, pixels: torch.Tensor):
    return theirs(
        input_ids=tokens,
        attention_mask=mask.long(),
        position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
        pixel_values=pixels,
        token_type_ids=(tokens == PICTURE).long(),
    ).logits


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_gemma3(pair, rows, side):
    theirs, ours = pair("gemma3")
    tokens, mask = padded(rows, side)
    pixels = pictures(int((tokens == PICTURE).sum()) // PER_PICTURE)
    found = ours(tokens, mask, pictures=pixels)
    close(found[mask], gemma_logits(theirs, tokens, mask, pixels)[mask])


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("prompt", [0, 5])
def test_gemma3_decodes_with_a_cache_behind_pictures(pair, rows, prompt):
    """The prompt at once (its pictures in the first call, or after a first call of text), then token by token."""
    theirs, ours = pair("gemma3")
    rows = [[*[9] * prompt, *r] for r in rows]
    tokens, mask = padded([[*r, *row(2 * WINDOW)] for r in rows], "left")
    length = tokens.shape[1] - 2 * WINDOW
    pixels = pictures(int((tokens == PICTURE).sum()) // PER_PICTURE)
    expected = gemma_logits(theirs, tokens, mask, pixels)
    cache = ours.make_cache(len(rows), tokens.shape[1])
    bounds = [0, length] if not prompt or len(rows) > 1 else [0, prompt, length]
    found = []
    for start, stop in pairwise([*bounds, *range(length + 1, tokens.shape[1] + 1)]):
        part = tokens[:, start:stop]
        seen = pixels if (part == PICTURE).any() else None
        found.append(ours(part, mask[:, start:stop], cache, pictures=seen))
    close(torch.cat(found, dim=1)[mask], expected[mask])


def test_a_long_prompt_with_pictures_is_the_same_in_blocks(pair, monkeypatch):
    from encore.kernels import attention

    theirs, ours = pair("gemma3")
    tokens = torch.tensor([row(20, 3, 40, 1)])
    pixels = pictures(3)
    monkeypatch.setattr(attention, "MAX_SCORES", 1 << 8)
    close(ours(tokens, pictures=pixels), gemma_logits(theirs, tokens, torch.ones_like(tokens).bool(), pixels))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=3),
    width=st.integers(1, 14),
    local=st.booleans(),
    start=st.integers(0, 11),
    size=st.integers(1, 12),
)
def test_blocks_of_the_picture_mask(rows, width, local, start, size):
    """Every block, padded out with what it leaves out as hidden, is the dense mask by its definition."""
    tokens = torch.tensor(rows).long()
    group = picture_groups(tokens, 1)
    left = width - 1 if local else None
    see = Visibility(Window(left, 0), num_keys=12, group=group)
    index = torch.arange(12)
    causal = index[:, None] >= index
    same = (group[:, :, None] == group[:, None]) & (group[:, :, None] >= 0)
    expected = causal | same
    if left is not None:
        expected = expected & (index > index[:, None] - width)
    block = slice(start, min(start + size, 12))
    keys = see.keys_of(block)
    seen = torch.zeros(len(rows), block.stop - block.start, 12, dtype=torch.bool)
    hidden = see.hidden(block, keys)
    seen[:, :, keys] = True if hidden is None else ~hidden
    assert seen.equal(expected[:, block])
    if see.span is not None:
        assert expected.sum(dim=-1).max() <= see.span


def test_groups_are_counted_in_each_row():
    tokens = torch.tensor([[9, 9, 1, 9], [1, 1, 1, 1], [1, 9, 1, 9]])
    assert picture_groups(tokens, 9).tolist() == [[0, 0, -1, 1], [-1] * 4, [-1, 0, -1, 1]]
    assert picture_groups(torch.zeros(2, 0, dtype=torch.long), 9).shape == (2, 0)


def with_pictures(model, tokens: torch.Tensor, pixels: torch.Tensor):
    return model(tokens, pictures=pixels) if isinstance(model, Gemma) else model.encode(tokens, pictures=pixels)


@pytest.mark.parametrize("kind", ["t5gemma2", "gemma3"])
@pytest.mark.parametrize(
    "number, shape, dtype, message",
    [
        (1, (3, 56, 56), torch.float32, "32 picture placeholders (id 91), but 1 pictures fill 16: give 16"),
        (3, (3, 56, 56), torch.float32, "but 3 pictures fill 48"),
        (0, (3, 56, 56), torch.float32, "but 0 pictures fill 0"),
        (2, (3, 56, 55), torch.float32, "shape (2, 3, 56, 55); expected pixels (number, 3, 56, 56)"),
        (2, (3, 56), torch.float32, "shape (2, 3, 56)"),
        (2, (3, 56, 56), torch.uint8, "dtype torch.uint8; expected floats in [-1, 1]"),
    ],
)
def test_what_does_not_fit_is_refused(pair, kind, number, shape, dtype, message):
    _, ours = pair(kind)
    with pytest.raises(ValueError) as error:
        with_pictures(ours, torch.tensor([row(1, 1, 1)]), torch.zeros(number, *shape, dtype=dtype))
    assert message in str(error.value)


@pytest.mark.parametrize("kind", ["t5gemma2", "gemma3"])
def test_without_a_tower_pictures_are_refused(kind):
    config = config_of(kind)
    tokens = torch.tensor([row(1, 1)])
    with pytest.raises(ValueError, match=r"loaded without its vision tower; load\(\.\.\., vision=True\)"):
        with_pictures(build(config, vision=False), tokens, pictures(1))
    text_type = "gemma3_text" if kind == "gemma3" else "t5gemma2"
    text_only = build(type(config)(**{**vars(config), "model_type": text_type, "vision": None}), vision=False)
    with pytest.raises(ValueError, match=f"this {text_type} reads text only"):
        with_pictures(text_only, tokens, pictures(1))
    with pytest.raises(ValueError, match="describes no vision tower"):
        build(text_only.config, vision=True)


def test_no_pictures_are_no_pictures(pair):
    """An empty tensor fits a batch of text; the encoder alone takes pictures too, and rounds as its weights do."""
    _, ours = pair("t5gemma2")
    text = torch.tensor([row(9)])
    assert ours.encode(text, pictures=pictures(0)).states.equal(ours.encode(text).states)
    tokens, pixels = torch.tensor([row(3, 4)]), pictures(1)
    encoder = Encoder(ours.config, vision=True)
    encoder.load_state_dict(ours.encoder.state_dict())
    expected = ours.encode(tokens, pictures=pixels).states
    assert encoder(tokens, pictures=pixels).states.equal(expected)
    rounded = encoder.bfloat16()(tokens, pictures=pixels).states
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - expected).abs().mean() < 0.1 * expected.abs().mean()
