"""A training run as data: frozen dataclasses. No torch here; `recipe_file.py` reads and writes them as TOML.

    [model]   what is trained        [optim]  how weights move
    [data]    what is read           [train]  how long, how often, where

Recipes are made in Python too: `Recipe(objective="causal", data=DataRecipe(train=("text.jsonl",)))`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class ArchitectureRecipe:
    """A model described here instead of by a folder or a preset. Field names are those of config.json."""

    model_type: Literal["gemma2", "gemma3_text", "t5gemma", "t5gemma2"] = "gemma3_text"
    vocab_size: int = 0  # 0: the tokenizer's
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 1
    head_dim: int = 64
    layer_types: tuple[Literal["sliding_attention", "full_attention"], ...] = ()  # (): the family's own pattern
    sliding_window: int = 64
    local_rope_theta: float = 10_000.0
    global_rope_theta: float = 1_000_000.0  # Gemma 3; Gemma 2 uses local_rope_theta everywhere
    global_rope_factor: float = 1.0
    query_pre_attn_scalar: float = 0.0  # 0: head_dim
    max_position_embeddings: int = 1024


@dataclass(frozen=True)
class ModelRecipe:
    """`init` is a folder, a hub name, a preset or `asset:...`; if empty, `architecture` describes the model."""

    init: str = ""
    weights: Literal["load", "random"] = "load"  # "random": the configuration of `init`, fresh weights
    tokenizer: str = ""  # "": the folder of `init`
    architecture: ArchitectureRecipe = field(default_factory=ArchitectureRecipe)


@dataclass(frozen=True)
class DataRecipe:
    """Names are paths or `asset:...` (see `encore.data.sources`). `window_tokens` and the validation of windows serve
    pretrain; keys, limits and `batch_tokens` serve tune."""

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    text_key: str = "text"
    source_key: str = "src"
    target_key: str = "tgt"
    window_tokens: int = 256
    max_tokens: int = 0  # of the training text, from its beginning; 0: all
    max_pairs: int = 0  # of the training pairs, from their beginning; 0: all
    validation_windows: int = 64
    validation_pairs: int = 256
    max_source_tokens: int = 256
    max_target_tokens: int = 256
    batch_tokens: int = 4096
    cache_folder: str = ""  # "": $ENCORE_CACHE or ~/.cache/encore


@dataclass(frozen=True)
class OptimRecipe:
    """AdamW; linear warm-up, then a cosine down to `final_learning_rate_fraction` of the peak.

    The rates by part are factors on that; a part with rate 0 is frozen: it costs no gradient and no state. The
    embedding (shared or not) is a part of its own, and so are the cross-attention's matrices and norms.
    """

    learning_rate: float = 1e-3
    final_learning_rate_fraction: float = 0.1
    warmup_steps: int = 100
    weight_decay: float = 0.1
    decay_embeddings: bool = False
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_gradient_norm: float = 1.0
    encoder_rate: float = 1.0
    decoder_rate: float = 1.0
    cross_attention_rate: float = 1.0
    embedding_rate: float = 1.0
    cross_attention_warmup_steps: int = 0  # so many first steps train the (randomly drawn) cross-attention only


@dataclass(frozen=True)
class TrainRecipe:
    """`batch_size` counts windows per step (pretrain); tune fills batches up to data.batch_tokens instead."""

    steps: int = 1000
    batch_size: int = 16
    accumulation_steps: int = 1
    evaluate_every_steps: int = 100
    checkpoint_every_steps: int = 100
    log_every_steps: int = 1
    keep_last: int = 2
    average_last: int = 1  # RUN/model is the mean of so many last checkpoints; 1: the last weights alone
    divergence_nats: float = 3.0  # stop when the smoothed loss is so far above its best; 0: never
    seed: int = 0
    threads: int = 0  # 0: torch's own choice
    device: str = "cpu"
    precision: Precision = "auto"  # of the matrix products; weights and optimizer stay float32
    output_dtype: Literal["float32", "bfloat16"] = "float32"  # of RUN/model

    @property
    def averaged_steps(self) -> tuple[int, ...]:
        """The checkpoints that RUN/model is the mean of: the last step and those before it, evenly apart."""
        return tuple(self.steps - i * self.checkpoint_every_steps for i in reversed(range(self.average_last)))


@dataclass(frozen=True)
class Recipe:
    """A whole run. `objective`: "causal" (decoder-only), a name of `ul2.MIXTURES` (encoder-decoder), "pairs" (tune)."""

    objective: str = "causal"
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)

    def __post_init__(self) -> None:
        _check_positive(self)
        _check_averaging(self.train)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every key with its value: {"train.steps": 100}."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(value):
        entry = getattr(value, f.name)
        found |= flat(entry, f"{prefix}{f.name}.") if dataclasses.is_dataclass(entry) else {f"{prefix}{f.name}": entry}
    return found


_POSITIVE = (
    *(f"train.{key}" for key in ("steps", "batch_size", "accumulation_steps", "log_every_steps")),
    *("train.keep_last", "train.average_last"),
    *(f"data.{key}" for key in ("window_tokens", "validation_windows", "validation_pairs", "batch_tokens")),
    *("data.max_source_tokens", "data.max_target_tokens", "optim.epsilon", "optim.max_gradient_norm"),
)


def _check_positive(recipe: Recipe) -> None:
    values = flat(recipe)
    for key in _POSITIVE:
        if values[key] <= 0:
            raise ValueError(f"{key} is {values[key]}; expected more than 0")
    for key, value in values.items():
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"{key} is {value}; expected 0 or more")
    if recipe.optim.beta1 >= 1 or recipe.optim.beta2 >= 1:
        raise ValueError(
            f"optim.beta1 and beta2 are {recipe.optim.beta1} and {recipe.optim.beta2}; expected less than 1"
        )


def _check_averaging(train: TrainRecipe) -> None:
    number, every, steps = train.average_last, train.checkpoint_every_steps, train.steps
    if number > 1 and (every == 0 or steps % every or steps < number * every):
        raise ValueError(
            f"train.average_last is {number}, but {steps} steps with a checkpoint every {every} do not end in so many "
            "checkpoints evenly apart; make train.steps a multiple of train.checkpoint_every_steps, at least "
            f"{number} times as large"
        )
