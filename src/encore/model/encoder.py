"""The encoder: a Gemma stack that sees both ways (T5Gemma paper, section 2; T5Gemma 2 paper, section 2).

It is a product of its own: `Encoder(config)` is loaded, saved and run without a decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from encore.config import LayerType, StackConfig, T5GemmaConfig
from encore.kernels.attention import Keys
from encore.model.attention import SelfAttention, SelfView
from encore.model.cache import LayerCache
from encore.model.layers import GatedMLP, RMSNorm, ScaledEmbedding, real_positions, rotations, segment_positions
from encore.model.masks import Segments, Visibility, encoder_window
from encore.model.vision import MultiModalProjector, VisionTower, insert_pictures


@dataclass(frozen=True)
class Memory:
    """What the encoder made of a source: states (B, S, D) after the final norm, which are real (None = all), and, of
    packed rows, which document each belongs to.

    The hinge of the system: made once, kept, shared by many decodings.
    """

    states: Float[Tensor, "B S D"]
    mask: Bool[Tensor, "B S"] | None = None
    segment_ids: Int[Tensor, "B S"] | None = None

    def index_select(self, rows: Int[Tensor, " rows"]) -> Memory:
        """These rows of the batch, in this order."""
        mask, segment_ids = (x if x is None else x.index_select(0, rows) for x in (self.mask, self.segment_ids))
        return Memory(self.states.index_select(0, rows), mask, segment_ids)

    @staticmethod
    def join(chunks: Sequence[Sequence[Memory]]) -> Memory:
        """Sources that were encoded in chunks: row i holds the real states of all rows of `chunks[i]`, in order.

        Rows come out with padding on the right. A memory in there may be a batch of chunks.
        """
        if not chunks or not all(chunks):
            raise ValueError(f"{len(chunks)} sources were given, one of them perhaps without chunks; give at least one")
        real = [[m.states.flatten(0, 1) if m.mask is None else m.states[m.mask] for m in of_row] for of_row in chunks]
        rows = [torch.cat(states) for states in real]
        states = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=states.device)
        full = bool((lengths == states.shape[1]).all())
        return Memory(states, None if full else torch.arange(states.shape[1], device=states.device) < lengths[:, None])


class GemmaLayer(nn.Module):
    """What every layer of the family has: x += post(attention(pre(x))) and x += post(mlp(pre(x)))."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = SelfAttention(config)
        self.pre_self_attn_layernorm = RMSNorm(size, eps)
        self.post_self_attn_layernorm = RMSNorm(size, eps)
        self.mlp = GatedMLP(config)
        self.pre_feedforward_layernorm = RMSNorm(size, eps)
        self.post_feedforward_layernorm = RMSNorm(size, eps)

    def attend(
        self, x: Float[Tensor, "B T D"], view: SelfView, cache: LayerCache | None, also: tuple[Keys, ...] = ()
    ) -> Float[Tensor, "B T D"]:
        return x + self.post_self_attn_layernorm(self.self_attn(self.pre_self_attn_layernorm(x), view, cache, also))

    def feed_forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class SelfLayer(GemmaLayer):
    """The layer of Gemma and of both encoders."""

    def forward(
        self, x: Float[Tensor, "B T D"], view: SelfView, cache: LayerCache | None = None
    ) -> Float[Tensor, "B T D"]:
        return self.feed_forward(self.attend(x, view, cache))


class Encoder(nn.Module):
    """Tokens (B, S) to a Memory. With `vision=True` the tower and projector are built too."""

    def __init__(self, config: T5GemmaConfig, *, vision: bool = False) -> None:
        super().__init__()
        self.config = config
        stack = config.encoder
        eoi = config.eoi_token_index if config.model_type == "t5gemma2" else None
        self.embed_tokens = ScaledEmbedding(stack.vocab_size, stack.hidden_size, eoi)
        self.layers = nn.ModuleList(SelfLayer(stack) for _ in stack.layer_types)
        self.norm = RMSNorm(stack.hidden_size, stack.rms_norm_eps)
        self.vision_tower: VisionTower | None = None
        self.multi_modal_projector: MultiModalProjector | None = None
        if vision:
            if config.vision is None:
                raise ValueError(
                    "vision=True, but the config describes no vision tower; load a checkpoint that has one"
                )
            self.vision_tower = VisionTower(config.vision)
            self.multi_modal_projector = MultiModalProjector(config.vision, stack.hidden_size)

    def forward(
        self,
        encoder_input_tokens: Int[Tensor, "B S"],
        encoder_mask: Bool[Tensor, "B S"] | None = None,
        *,
        positions: Int[Tensor, "#B S"] | None = None,
        pictures: Float[Tensor, "N C size size"] | None = None,
        segment_ids: Int[Tensor, "B S"] | None = None,
    ) -> Memory:
        """`pictures`, pixels in [-1, 1], stand in the order of their placeholders over the batch. `segment_ids` are of
        packed rows: 0 = padding, 1, 2, … rising from the left; each segment is read as if it were alone.
        """
        check_tokens(encoder_input_tokens, encoder_mask, self.embed_tokens.weight.shape[0], "encoder")
        encoder_mask, segments = packed(encoder_input_tokens, encoder_mask, segment_ids, "encoder")
        stack, device = self.config.encoder, encoder_input_tokens.device
        num_tokens = encoder_input_tokens.shape[1]
        x = self.embed_tokens(encoder_input_tokens)
        if pictures is not None:
            tower, projector = self.vision_tower, self.multi_modal_projector
            x = insert_pictures(x, encoder_input_tokens, pictures, self.config, tower, projector)
        if positions is None and segments is not None:
            positions = segment_positions(segments.queries)
        elif positions is None:
            positions = real_positions(encoder_mask, num_tokens, 0, device)
        rotation = rotations(stack, positions)
        views: dict[LayerType, SelfView] = {}
        for kind in rotation:
            window = encoder_window(self.config, kind)
            visible = Visibility(window, num_keys=num_tokens, key_mask=encoder_mask, segments=segments, device=device)
            views[kind] = SelfView(*rotation[kind], visible)
        for layer, kind in zip(self.layers, stack.layer_types, strict=True):
            x = layer(x, views[kind])
        if segments is None:
            return Memory(self.norm(x), encoder_mask)
        return Memory(self.norm(x), segments.queries > 0, segments.queries)


def check_tokens(tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None, vocab_size: int, side: str) -> None:
    """Shapes and dtypes of what comes from outside, before anything is computed."""
    if tokens.dim() != 2:
        raise ValueError(f"{side} tokens have shape {tuple(tokens.shape)}; expected (batch, length)")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{side} tokens have dtype {tokens.dtype}; expected integer ids (torch.int64)")
    if tokens.device.type == "cpu" and tokens.numel():
        low, high = (int(v) for v in torch.aminmax(tokens))
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{side} tokens lie in {low}..{high}, but the vocabulary has ids 0..{vocab_size - 1}")
    if mask is not None:
        if mask.shape != tokens.shape:
            raise ValueError(f"the {side} mask has shape {tuple(mask.shape)}, the tokens {tuple(tokens.shape)}")
        if mask.dtype != torch.bool:
            raise ValueError(f"the {side} mask has dtype {mask.dtype}; expected bool, True = real (mask.bool())")


def packed(
    tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None, segment_ids: Int[Tensor, "B T"] | None, side: str
) -> tuple[Bool[Tensor, "B T"] | None, Segments | None]:
    """What hides tokens of packed rows from each other; in place of a mask, whose padding becomes segment 0."""
    if segment_ids is None:
        return mask, None
    check_segment_ids(segment_ids, tokens, side)
    if mask is not None:
        segment_ids = torch.where(mask, segment_ids, 0)
    return None, Segments(segment_ids, segment_ids)


def check_segment_ids(segment_ids: Int[Tensor, "B T"], tokens: Int[Tensor, "B T"], side: str) -> None:
    """Shape, dtype and order of segment ids, before anything is computed."""
    if segment_ids.shape != tokens.shape:
        raise ValueError(
            f"the {side} segment ids have shape {tuple(segment_ids.shape)}, the tokens {tuple(tokens.shape)}"
        )
    if segment_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"the {side} segment ids have dtype {segment_ids.dtype}; expected integers (torch.int64)")
    if segment_ids.device.type != "cpu" or not segment_ids.numel():
        return
    highest = segment_ids.cummax(dim=1).values[:, :-1]
    before, now = segment_ids[:, :-1], segment_ids[:, 1:]
    wrong = (now != before) & (now != 0) & (now <= highest)
    if wrong.any() or int(segment_ids.min()) < 0:
        row = int((wrong.any(dim=1) | (segment_ids < 0).any(dim=1)).nonzero()[0])
        raise ValueError(
            f"the {side} segment ids of row {row} are {_shortened(segment_ids[row])}; expected 0 for padding and "
            "1, 2, … rising from the left, each segment in one piece"
        )


def _shortened(ids: Tensor) -> str:
    shown = ", ".join(map(str, ids[:32].tolist()))
    return f"[{shown}{', …' if len(ids) > 32 else ''}]"
