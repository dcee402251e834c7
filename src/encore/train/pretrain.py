"""pretrain(): a model reads a stream of text. Causal LM for a decoder-only one, a denoising mixture for the others.

data = DataRecipe(train=("asset:text/train",))
recipe = Recipe(objective="t5gemma2", model=ModelRecipe(init="runs/adapted"), data=data)
result = pretrain(recipe, "runs/ul2")        # -> runs/ul2/model
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from encore.checkpoint import hub
from encore.checkpoint.pretrained import load, read_config
from encore.checkpoint.training import RunFolder
from encore.config import GemmaConfig, LayerType, ModelConfig, Rope, StackConfig, T5GemmaConfig
from encore.data.pipeline import Ids, Objective, Row, WindowBatches, Windows, causal, source_tokens
from encore.data.sources import resolve, token_stream, tokenizer_fingerprint
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma
from encore.objectives import ul2
from encore.presets import PRESETS, layer_types, preset
from encore.tokenizer import SourceFormat, Tokenizer
from encore.train.loop import Evaluate, RunResult, fit
from encore.train.loss import Model, mean_loss
from encore.train.metrics import Progress
from encore.train.recipe import ArchitectureRecipe, ModelRecipe, Recipe


def pretrain(
    recipe: Recipe, out: str | Path, *, resume: bool = True, progress: Progress | None = None, name: str = "pretrain"
) -> RunResult:
    """Train as the recipe says into the run folder `out`; an interrupted run goes on. Raises as `fit` does."""
    if recipe.objective == "pairs":
        raise ValueError(
            'objective is "pairs", which is for tune; pretrain takes "causal" or a mixture of ul2.MIXTURES'
        )
    tokenizer = open_tokenizer(recipe.model)
    model = open_model(recipe.model, tokenizer, recipe.train.seed)
    objective = objective_named(recipe.objective, tokenizer, encoder=isinstance(model, T5Gemma))
    if objective is causal:  # a causal LM goes on from its prompt: no EOS behind it
        tokenizer = tokenizer.with_source_format(SourceFormat(bos=True, eos=False))
    train, fingerprint = _stream(recipe, recipe.data.train, tokenizer, recipe.data.max_tokens)
    settings, data = recipe.train, recipe.data
    batches = WindowBatches(
        Windows(train, data.window_tokens, seed=settings.seed),
        objective,
        tokenizer,
        batch_size=settings.batch_size,
        accumulation_steps=settings.accumulation_steps,
        seed=settings.seed,
    )
    evaluate = _validation(recipe, objective, tokenizer) if data.validation else None
    return fit(
        model,
        batches,
        recipe,
        RunFolder(out),
        tokenizer=tokenizer,
        data_fingerprint=fingerprint,
        evaluate=evaluate,
        resume=resume,
        progress=progress,
        name=name,
    )


def objective_named(name: str, tokenizer: Tokenizer, *, encoder: bool) -> Objective:
    """ "causal" for a decoder-only model, a name of `ul2.MIXTURES` for an encoder-decoder."""
    if name == "causal" and not encoder:
        return causal
    if name == "causal" or not encoder:
        kind, fitting = ("an encoder-decoder", "a mixture of ul2.MIXTURES") if encoder else ("decoder-only", '"causal"')
        raise ValueError(f"objective is {name!r} but the model is {kind}, which learns {fitting}")
    mixture = ul2.mixture_rows(name)

    def denoise(window: Ids, random: np.random.Generator) -> Row:
        task = ul2.sample_task(mixture, random)
        example = ul2.apply(task, window, tokenizer.sentinel_ids, tokenizer.eos_id, random)
        return Row(source_tokens(example.inputs, tokenizer), example.targets)

    return denoise


def open_tokenizer(recipe: ModelRecipe) -> Tokenizer:
    """The recipe's tokenizer, else the one in the folder of `init`."""
    name = recipe.tokenizer or recipe.init
    if not name:
        raise ValueError("the recipe names no tokenizer; set model.tokenizer, for example to asset:tokenizer")
    return hub.load_tokenizer(resolve(name))


def open_model(recipe: ModelRecipe, tokenizer: Tokenizer, seed: int) -> Model:
    """The model to train, in float32: loaded, or with weights drawn at random from the seed."""
    init = str(resolve(recipe.init)) if recipe.init.startswith("asset:") else recipe.init
    if init and recipe.weights == "load":
        model = load(init, torch.float32)
        if not isinstance(model, Gemma | T5Gemma):
            raise ValueError(f"{recipe.init} is an encoder alone, which has nothing to train here; give a whole model")
    else:
        config = _config(init, recipe.architecture, tokenizer)
        model = Gemma(config) if isinstance(config, GemmaConfig) else T5Gemma(config)
        model.init_weights(torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    vocab_size = model.head_weight.shape[0]
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model {vocab_size} rows; they do not belong together"
        )
    return model.requires_grad_(True)


def _config(init: str, architecture: ArchitectureRecipe, tokenizer: Tokenizer) -> ModelConfig:
    if not init:
        return model_config(architecture, tokenizer)
    if init in PRESETS and not Path(init).exists():
        return preset(init)
    return read_config(init)


def model_config(recipe: ArchitectureRecipe, tokenizer: Tokenizer) -> ModelConfig:
    """The `[model.architecture]` of a recipe as a configuration; both stacks of an encoder-decoder are alike."""
    gemma3 = recipe.model_type in ("gemma3_text", "t5gemma2")
    types: tuple[LayerType, ...] = recipe.layer_types or layer_types(recipe.num_hidden_layers, 6 if gemma3 else 2)
    local = Rope(recipe.local_rope_theta)
    stack = StackConfig(
        vocab_size=recipe.vocab_size or tokenizer.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        head_dim=recipe.head_dim,
        layer_types=types,
        sliding_window=recipe.sliding_window,
        local_rope=local,
        global_rope=Rope(recipe.global_rope_theta, recipe.global_rope_factor) if gemma3 else local,
        query_pre_attn_scalar=recipe.query_pre_attn_scalar or recipe.head_dim,
        qk_norm=gemma3,
        attn_logit_softcapping=None if gemma3 else 50.0,
        max_position_embeddings=recipe.max_position_embeddings,
    )
    softcap = None if gemma3 else 30.0
    ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.bos_id}
    if recipe.model_type in ("gemma2", "gemma3_text"):
        return GemmaConfig(recipe.model_type, stack, softcap, **ids)  # pyright: ignore[reportArgumentType]
    return T5GemmaConfig(recipe.model_type, stack, stack, softcap, **ids)  # pyright: ignore[reportArgumentType]


def _stream(
    recipe: Recipe, names: tuple[str, ...], tokenizer: Tokenizer, max_tokens: int = 0
) -> tuple[np.ndarray, str]:
    """The token stream, and a fingerprint of the ids in it."""
    if not names:
        raise ValueError("the recipe names no text; set data.train, for example to asset:text/train")
    folder = Path(recipe.data.cache_folder).expanduser() if recipe.data.cache_folder else None
    key = recipe.data.text_key
    stream = token_stream(names, tokenizer, text_key=key, max_tokens=max_tokens, cache_folder=folder)
    digest = hashlib.sha256(np.ascontiguousarray(stream).tobytes())
    digest.update(tokenizer_fingerprint(tokenizer).encode())
    return stream, digest.hexdigest()


def _validation(recipe: Recipe, objective: Objective, tokenizer: Tokenizer) -> Evaluate:
    """The loss on the first windows of the validation text, with the same objective and always the same noise."""
    stream, _ = _stream(recipe, recipe.data.validation, tokenizer)
    windows = Windows(stream, recipe.data.window_tokens, shuffle=False)
    number = min(windows.per_epoch, recipe.data.validation_windows)
    batch_size = recipe.train.batch_size
    made = WindowBatches(windows, objective, tokenizer, batch_size=number, accumulation_steps=1, seed=recipe.train.seed)
    made.accumulation_steps = max(1, number // batch_size)
    batches = made.batches(range(number))
    return lambda model: {"validation_loss": mean_loss(model, batches)}
