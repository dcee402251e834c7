"""A training run as data: frozen dataclasses. No torch here; `recipe_file.py` reads and writes them as TOML.

    [model]   what is trained        [optim]  how weights move
    [data]    what is read           [train]  how long, how often, where
    [distill] whose distributions are learned, if anyone's

Recipes are made in Python too: `Recipe(objective="causal", data=DataRecipe(train=("text.jsonl",)))`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

Precision = Literal["auto", "float32", "bfloat16"]
Tracker = Literal["auto", "none", "tensorboard", "wandb"]


@dataclass(frozen=True)
class VisionRecipe:
    """The picture tower of a model described in a recipe; none while `image_size` is 0. Names as in config.json."""

    image_size: int = 0
    patch_size: int = 14
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    mm_tokens_per_image: int = 16


@dataclass(frozen=True)
class ArchitectureRecipe:
    """A model described here instead of by a folder or a preset. Field names are those of config.json.

    The last ones are of encoder-decoders: a narrower, wider or less deep encoder, and the ablations, which also change
    an `init` whose weights are "random" (`encore.config.T5GemmaConfig` says what they mean).
    """

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
    encoder_hidden_size: int = 0  # 0: as the decoder's
    encoder_intermediate_size: int = 0
    encoder_num_hidden_layers: int = 0
    attention: Literal["", "separate", "merged"] = ""  # "": as the family has it
    embeddings: Literal["", "tied", "separate"] = ""
    cross_attention_layers: Literal["all", "full_attention"] = "all"
    causal_encoder: bool = False
    shared_stack: bool = False
    vision: VisionRecipe = field(default_factory=VisionRecipe)


@dataclass(frozen=True)
class ModelRecipe:
    """`init` is a folder, a hub name, a preset or `asset:...`; if empty, `architecture` describes the model."""

    init: str = ""
    weights: Literal["load", "random"] = "load"  # "random": the configuration of `init`, fresh weights
    tokenizer: str = ""  # "": the folder of `init`
    architecture: ArchitectureRecipe = field(default_factory=ArchitectureRecipe)


@dataclass(frozen=True)
class SourceRecipe:
    """One `[[data.sources]]` of a mixture. What is empty or 0 here is as in `[data]`, the objective as the recipe's."""

    files: tuple[str, ...] = ()
    name: str = ""  # "": the first of the files
    weight: float = 1.0  # the source's share of the examples is weight / sum of weights
    objective: str = ""  # "causal", a name of `ul2.MIXTURES`, "pairs", or "pictures" (pairs, or prefix LM of text)
    validation: tuple[str, ...] = ()
    text_key: str = ""
    source_key: str = ""
    target_key: str = ""
    images_key: str = ""
    lengths: Literal["", "window", "budget"] = ""
    documents: Literal["", "joined", "separate"] = ""
    window_tokens: int = 0
    max_tokens: int = 0
    max_pairs: int = 0
    max_source_tokens: int = 0
    max_target_tokens: int = 0


@dataclass(frozen=True)
class DataRecipe:
    """Files are paths, URLs or `asset:...` (see `encore.data.shards`). `train` is the short form of a single source.

    `window_tokens` and the validation of windows serve pretrain; keys, limits and `batch_tokens` serve tune. With
    `lengths` "budget", text is cut so that its examples are as long as the limits on source and target allow, task by
    task, and each task's windows are an order of their own over the text.
    """

    train: tuple[str, ...] = ()
    sources: tuple[SourceRecipe, ...] = ()
    validation: tuple[str, ...] = ()
    text_key: str = "text"
    source_key: str = "src"  # "translation.en" is the "en" of the object under "translation"
    target_key: str = "tgt"
    images_key: str = "images"  # of rows with pictures: a list of file names, relative to the rows' file
    keep_features: bool = False  # what a frozen picture tower makes of each picture: computed once, kept on disk
    lengths: Literal["window", "budget"] = "window"  # of text: window_tokens, or what fits the limits below
    documents: Literal["joined", "separate"] = "joined"  # windows go across documents, or never do
    window_tokens: int = 256
    max_tokens: int = 0  # of the training text, from its beginning; 0: all
    max_pairs: int = 0  # of the training pairs, from their beginning; 0: all
    validation_windows: int = 64
    validation_pairs: int = 256
    max_source_tokens: int = 256
    max_target_tokens: int = 256
    batch_tokens: int = 4096
    mode_tokens: tuple[str, ...] = ()  # UL2: the pieces for [NLU], [S2S], [NLG], put before inputs; (): none
    pack: bool = False  # several examples per row
    encoder_row_tokens: int = 0  # of packed rows; 0: after the mean input:target ratio
    decoder_row_tokens: int = 0
    pool_examples: int = 1024  # at least so many examples are packed together
    workers: int = 0  # processes that prepare steps ahead; 0: the training process does
    cache: bool = True  # tokenise first, and keep it; False: when a step needs it, keeping an index of records only
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
    vision_rate: float = 0.0  # of the picture tower, which stays as it is unless asked; the projector is the encoder's
    cross_attention_warmup_steps: int = 0  # so many first steps train the (randomly drawn) cross-attention only


@dataclass(frozen=True)
class TrainRecipe:
    """`batch_size` counts examples per step, packed or not; tune, unless it packs or mixes, fills batches up to
    data.batch_tokens instead."""

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
    data_parallel: int = 0  # processes that take different rows; 0: all that tensor_parallel leaves
    tensor_parallel: int = 1  # processes that split each layer and the vocabulary
    shard: Literal["full", "none"] = "full"  # over data_parallel: weights and moments sharded, or whole on each
    activation_checkpointing: bool = False  # keep only the layers' inputs and compute the rest again in the backward
    compile: bool = False  # each layer with torch.compile
    compile_backend: str = "inductor"  # which writes kernels; "eager" needs no compiler, and gains no speed
    tracker: Tracker = "auto"  # who else is told the metrics; "auto": TensorBoard where it is installed

    @property
    def averaged_steps(self) -> tuple[int, ...]:
        """The checkpoints that RUN/model is the mean of: the last step and those before it, evenly apart."""
        return tuple(self.steps - i * self.checkpoint_every_steps for i in reversed(range(self.average_last)))


@dataclass(frozen=True)
class DistillRecipe:
    """Learning a decoder-only teacher's distributions instead of one-hot targets; off while no teacher is named.

    Per token alpha x temperature^2 x KL(teacher || student) + (1 - alpha) x cross-entropy. Masking tokens and the EOS
    behind a cut text have the cross-entropy alone.
    """

    teacher: str = ""  # a folder, a hub name or `asset:...`: a Gemma of the same vocabulary
    logits: str = ""  # a folder that `encore distill-logits` wrote: read instead of running the teacher
    top_k: int = 256  # how many logits per token distill-logits writes
    temperature: float = 1.0
    alpha: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """A whole run. `objective`: "causal" (decoder-only), a name of `ul2.MIXTURES` (encoder-decoder), "pairs" (tune)."""

    objective: str = "causal"
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    distill: DistillRecipe = field(default_factory=DistillRecipe)

    def __post_init__(self) -> None:
        _check_positive(self)
        _check_averaging(self.train)
        _check_sources(self.data)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every key with its value: {"train.steps": 100}."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(value):
        entry = getattr(value, f.name)
        found |= flat(entry, f"{prefix}{f.name}.") if dataclasses.is_dataclass(entry) else {f"{prefix}{f.name}": entry}
    return found


_POSITIVE = (
    *(f"train.{key}" for key in ("steps", "batch_size", "accumulation_steps", "log_every_steps")),
    *("train.keep_last", "train.average_last", "train.tensor_parallel"),
    *(f"data.{key}" for key in ("window_tokens", "validation_windows", "validation_pairs", "batch_tokens")),
    *(
        "data.max_source_tokens",
        "data.max_target_tokens",
        "data.pool_examples",
        "optim.epsilon",
        "optim.max_gradient_norm",
    ),
    *("distill.top_k", "distill.temperature"),
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
    if recipe.distill.alpha > 1:
        raise ValueError(f"distill.alpha is {recipe.distill.alpha}; expected 0 to 1, the teacher's share of the loss")


def _check_sources(data: DataRecipe) -> None:
    if data.train and data.sources:
        raise ValueError("data.train and [[data.sources]] are both given; data.train is the short form of one source")
    for number, source in enumerate(data.sources):
        where = f"data.sources[{number}]"
        if not source.files:
            raise ValueError(f'{where} names no files; give files = ["…"]')
        if not source.weight > 0:
            raise ValueError(f"{where}.weight is {source.weight}; expected more than 0")
        for key, value in flat(source).items():
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"{where}.{key} is {value}; expected 0 or more")
    names = [source.name or source.files[0] for source in data.sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two of data.sources are called {twice!r}; give each a name of its own")
    if data.mode_tokens and len(data.mode_tokens) != 3:
        raise ValueError(f"data.mode_tokens has {len(data.mode_tokens)} pieces; expected three: [NLU], [S2S], [NLG]")


def _check_averaging(train: TrainRecipe) -> None:
    number, every, steps = train.average_last, train.checkpoint_every_steps, train.steps
    if number > 1 and (every == 0 or steps % every or steps < number * every):
        raise ValueError(
            f"train.average_last is {number}, but {steps} steps with a checkpoint every {every} do not end in so many "
            "checkpoints evenly apart; make train.steps a multiple of train.checkpoint_every_steps, at least "
            f"{number} times as large"
        )
