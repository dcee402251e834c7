"""Pictures from file to answer: ids as the public processor makes them, batches, the command line, adapted folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from transformers import Gemma3Processor, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from typer.testing import CliRunner

import encore
from encore import assets
from encore.adapt import adapt
from encore.cli import app
from encore.config import GemmaConfig, Rope, StackConfig, T5GemmaConfig, VisionConfig
from encore.generate.batch import generate
from encore.generate.decoding import naive_generate
from encore.generate.embed import embed
from encore.generate.sampling import SamplingSettings
from encore.generate.source import PictureFormat, SourceReader, with_pictures
from encore.generate.text import TextGenerator
from encore.images import PanAndScan, load_picture, to_pixels
from encore.tokenizer import SourceFormat, Tokenizer, load_tokenizer

SIZE, PER_PICTURE, BOI, EOI, SOFT = 28, 4, 6, 7, 8
NAMES = {BOI: "<start_of_image>", EOI: "<end_of_image>", SOFT: "<image_soft_token>"}
SETTINGS = SamplingSettings(max_target_tokens=6, log_probabilities=True)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped tokenizer, with three of its unused ids made Gemma 3's picture tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    load_tokenizer(assets.path("tokenizer")).save(folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token, name in NAMES.items():
        (added,) = (entry for entry in content["added_tokens"] if entry["id"] == token)
        content["model"]["vocab"].pop(added["content"], None)
        content["model"]["vocab"][name] = token
        added.update(content=name, special=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


def build(kind: str, tokenizer: Tokenizer, placeholder: int = SOFT) -> encore.Gemma | encore.T5Gemma:
    stack = StackConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        layer_types=("sliding_attention", "full_attention"),
        sliding_window=6,
        local_rope=Rope(10_000.0),
        global_rope=Rope(1_000_000.0),
        query_pre_attn_scalar=8,
        qk_norm=True,
        max_position_embeddings=400,
    )
    vision = VisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=7,
        mm_tokens_per_image=PER_PICTURE,
    )
    ids = dict(boi_token_index=BOI, eoi_token_index=EOI, image_token_index=placeholder)
    model = (
        encore.T5Gemma(T5GemmaConfig("t5gemma2", stack, stack, vision=vision, **ids), vision=True)
        if kind == "t5gemma2"
        else encore.Gemma(GemmaConfig("gemma3", stack, vision=vision, **ids), vision=True)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.3 if parameter.dim() == 1 or "embed_tokens" in name else 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


@pytest.fixture(scope="module")
def models(tokenizer: Tokenizer) -> dict[str, encore.Gemma | encore.T5Gemma]:
    return {kind: build(kind, tokenizer) for kind in ("t5gemma2", "gemma3")}


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (size[1] // 10 + 1, size[0] // 10 + 1, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize(size)


def reader(tokenizer: Tokenizer, model: encore.Gemma | encore.T5Gemma, **options: object) -> SourceReader:
    return SourceReader(tokenizer, max_tokens=190, picture_format=PictureFormat.of(model.config), **options)


# --- ids


@pytest.mark.parametrize("pan_and_scan", [False, True])
@pytest.mark.parametrize(
    "text, sizes",
    [
        ("<start_of_image> in this image, there is", [(40, 30)]),
        ("One <start_of_image>, two\n<start_of_image>", [(40, 30), (1500, 300)]),
        ("<start_of_image><start_of_image>  <start_of_image>\n\nthree", [(300, 700), (40, 30), (520, 400)]),
    ],
)
def test_ids_and_pixels_are_those_of_the_processor(
    tokenizer: Tokenizer, models: dict, text: str, sizes: list[tuple[int, int]], pan_and_scan: bool
) -> None:
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer.folder / "tokenizer.json"),
        pad_token="<pad>",
        extra_special_tokens={"boi_token": NAMES[BOI], "eoi_token": NAMES[EOI], "image_token": NAMES[SOFT]},
    )
    images = Gemma3ImageProcessorPil(size={"height": SIZE, "width": SIZE})
    processor = Gemma3Processor(images, theirs, image_seq_length=PER_PICTURE)
    pictures = [picture(i, size) for i, size in enumerate(sizes)]
    expected = processor(
        images=[pictures],
        text=[text],
        return_tensors="np",
        images_kwargs={"do_pan_and_scan": pan_and_scan},
        text_kwargs={"add_special_tokens": False},
    )
    crops = PanAndScan() if pan_and_scan else None
    for bos, eos in ((False, False), (True, False), (True, True)):
        framed = reader(tokenizer.with_source_format(SourceFormat(bos, eos)), models["gemma3"], pan_and_scan=crops)
        source = framed.read(text, pictures=pictures)
        assert source.tokens == [*[2] * bos, *expected["input_ids"][0].tolist(), *[1] * eos]
        assert source.pictures is not None
        np.testing.assert_allclose(source.pictures, np.asarray(expected["pixel_values"]), atol=1e-6)
        assert source.tokens.count(SOFT) == PER_PICTURE * len(source.pictures)


def test_the_placeholder_is_the_config_s_not_the_tokenizer_s(tokenizer: Tokenizer) -> None:
    """Gemma 3's tokenizer calls 262144 `<image_soft_token>`; T5Gemma 2 uses 256001, which it calls `<unused99>`."""
    model = build("t5gemma2", tokenizer, placeholder=20)
    tokens = reader(tokenizer, model).read("What?", pictures=[picture(0)]).tokens
    newlines = tokenizer.encode("\n\n")
    assert tokens[: 8 + len(newlines)] == [
        2,
        *newlines,
        BOI,
        *[20] * PER_PICTURE,
        EOI,
        *tokens[7 + len(newlines) :][:1],
    ]
    assert SOFT not in tokens


def test_pictures_stand_in_front_or_where_they_are_put(tokenizer: Tokenizer, models: dict) -> None:
    read = reader(tokenizer, models["gemma3"]).read
    first, second = picture(0), picture(1)
    in_front = read("What?", pictures=[first, second])
    assert in_front.tokens == read("<start_of_image><start_of_image>What?", pictures=[first, second]).tokens
    assert in_front.text == "What?"
    pixels = [to_pixels(load_picture(image), SIZE) for image in (first, second)]
    np.testing.assert_array_equal(in_front.pictures, np.stack(pixels))
    chat = reader(tokenizer, models["gemma3"], chat=True)
    expected = "<start_of_turn>user\nSee \n\n<start_of_image><image_soft_token>"
    assert tokenizer.decode(chat.read("See <start_of_image>", pictures=[first]).tokens, skip_special=False).startswith(
        f"<bos>{expected}"
    )


def test_what_does_not_fit_is_refused(tokenizer: Tokenizer, models: dict) -> None:
    read = reader(tokenizer, models["gemma3"]).read
    with pytest.raises(ValueError, match="the text has 1 <start_of_image> and 2 pictures come with it"):
        read("<start_of_image>", pictures=[picture(0), picture(1)])
    with pytest.raises(ValueError, match=r"the text itself holds the placeholder of pictures \(id 8\)"):
        read("<image_soft_token>", pictures=[picture(0)])
    for overflow in ("error", "keep-end"):
        with pytest.raises(ValueError, match=r"source 3 has \d+ tokens and 190 are allowed; .*never cut.* \(6 tokens"):
            reader(tokenizer, models["gemma3"], overflow=overflow).read("so " * 300, 3, [picture(0)])
    with pytest.raises(ValueError, match="given to a reader of text"):
        SourceReader(tokenizer, max_tokens=99).read("", pictures=[picture(0)])
    with pytest.raises(ValueError, match="this gemma3_text reads text only"):
        PictureFormat.of(GemmaConfig("gemma3_text", models["gemma3"].config.stack))
    with pytest.raises(ValueError, match="have ids up to 9999, but its vocabulary ends at 6143"):
        PictureFormat.of(build("t5gemma2", tokenizer, placeholder=9999).config)


def test_texts_and_pictures_are_read_side_by_side() -> None:
    image = picture(0)
    assert list(with_pictures(["a", "b"], None)) == [("a", ()), ("b", ())]
    assert list(with_pictures(iter("ab"), [[image], ()])) == [("a", [image]), ("b", ())]
    with pytest.raises(ValueError, match="pictures has 1 entries for 2 texts"):
        list(with_pictures(["a", "b"], [[image]]))
    with pytest.raises(ValueError, match="pictures ended before text 2"):
        list(with_pictures(iter("ab"), [[image]]))
    with pytest.raises(ValueError, match=r"the pictures of text 1 are .photo\.jpg.; give a list"):
        list(with_pictures(["a"], ["photo.jpg"]))  # pyright: ignore


# --- answers


@pytest.mark.parametrize("kind", ["t5gemma2", "gemma3"])
def test_batches_with_and_without_pictures_equal_the_oracle(tokenizer: Tokenizer, models: dict, kind: str) -> None:
    model = models[kind]
    read = reader(tokenizer, model).read
    sources = [
        read("What is it?", pictures=[picture(0)]),
        read("Text only, and a good deal longer than the others in this batch."),
        read("First <start_of_image> then <start_of_image>?", pictures=[picture(1), picture(2)]),
        read("", pictures=[picture(3)]),
    ]
    alone = [naive_generate(model, s.tokens, SETTINGS, pictures=[s.pictures]).tokens for s in sources]
    pixels = [s.pictures for s in sources]
    together = generate(model, [s.tokens for s in sources], SETTINGS, pictures=pixels)
    assert [found.tokens for found in together] == alone
    other = naive_generate(model, sources[0].tokens, SETTINGS, pictures=[pixels[3]])
    assert other.log_probabilities != pytest.approx(together[0].log_probabilities, abs=1e-4), "pictures must matter"
    with pytest.raises(ValueError, match="pictures has 1 entries for 4 sources"):
        generate(model, [s.tokens for s in sources], SETTINGS, pictures=pixels[:1])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_texts_are_answered_in_order_with_their_own_pictures(
    tokenizer: Tokenizer, models: dict, batch_size: int
) -> None:
    generator = TextGenerator(models["t5gemma2"], tokenizer)
    texts = ["Short?", "A longer question about two of them, <start_of_image> and <start_of_image>.", "None."] * 3
    pictures = [[picture(i) for i in range(count)] for count in (1, 2, 0)] * 3
    answers = list(generator.generate(iter(texts), SETTINGS, batch_size=batch_size, pictures=iter(pictures)))
    assert [answer.source.text for answer in answers] == texts
    for answer, text, own in zip(answers[:3], texts, pictures, strict=False):
        streamed = [event.token for event in generator.stream(text, SETTINGS, pictures=own)]
        assert answer.generation.tokens == streamed


def test_embeddings_see_pictures(tokenizer: Tokenizer, models: dict) -> None:
    model = models["t5gemma2"]
    read = reader(tokenizer, model).read
    sources = [read("A", pictures=[picture(0)]), read("Only text."), read("B", pictures=[picture(1), picture(2)])]
    found = embed(
        model, [s.tokens for s in sources], pooling="none", batch_size=2, pictures=[s.pictures for s in sources]
    )
    for source, got in zip(sources, found, strict=True):
        pixels = None if source.pictures is None else torch.as_tensor(source.pictures)
        with torch.no_grad():
            expected = model.encode(torch.tensor([source.tokens]), pictures=pixels).states[0].numpy()
        np.testing.assert_allclose(got.vectors, expected, atol=1e-4)


# --- folders and the command line


@pytest.fixture(scope="module")
def folder(models: dict, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "seeing"
    encore.save(models["t5gemma2"], path, tokenizer=tokenizer)
    return path


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photo.jpg"
    picture(5, (60, 45)).save(path, quality=90)
    return path


@pytest.fixture
def encore_(folder: Path) -> Callable[..., Result]:
    def run(verb: str, *arguments: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, [verb, "--model", str(folder), *arguments], input=stdin)

    return run


def test_generate_with_an_image(encore_: Callable[..., Result], folder: Path, photo: Path) -> None:
    short = ["--max-target-tokens", "6", "--json"]
    generator = TextGenerator.load(folder, dtype=torch.float32, vision=True)
    one = encore_("generate", "--image", str(photo), *short, "What is it?")
    assert one.exit_code == 0 and one.stderr == ""
    row = json.loads(one.stdout)
    expected = next(generator.generate(["What is it?"], SETTINGS, pictures=[[photo]]))
    assert (row["tokens"], row["source_tokens"]) == (expected.generation.tokens, len(expected.source.tokens))
    assert encore_("generate", *short, "What is it?").stdout != one.stdout
    both = ["--image", str(photo), "--image", str(photo)]
    several = encore_("generate", *both, *short, stdin="See <start_of_image>, <start_of_image>.\nAnd now?\n")
    counts = [json.loads(line)["source_tokens"] for line in several.stdout.splitlines()]
    texts = ["See <start_of_image>, <start_of_image>.", "And now?"]
    answers = generator.generate(texts, SETTINGS, pictures=[[photo, photo]] * 2)
    assert counts == [len(answer.source.tokens) for answer in answers]


def test_pan_and_scan_adds_crops(encore_: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    picture(6, (900, 300)).save(path)
    counts = []
    for options in ([], ["--pan-and-scan"]):
        run = encore_("generate", "--image", str(path), "--json", "--max-target-tokens", "1", *options, "?")
        counts.append(json.loads(run.stdout)["source_tokens"])
    assert counts[1] - counts[0] > 3 * PER_PICTURE


def test_embed_with_an_image(encore_: Callable[..., Result], photo: Path) -> None:
    rows = [json.loads(encore_("embed", *options, "A.").stdout) for options in (["--image", str(photo)], [])]
    assert rows[0]["tokens"].count(SOFT) == PER_PICTURE and rows[1]["tokens"].count(SOFT) == 0
    assert rows[0]["embedding"] != rows[1]["embedding"]


def test_the_tower_is_loaded_for_pictures_only(encore_: Callable[..., Result], photo: Path, monkeypatch) -> None:
    from encore.checkpoint import pretrained

    asked = []
    load = pretrained.load
    monkeypatch.setattr(pretrained, "load", lambda *a, **k: asked.append(k["vision"]) or load(*a, **k))
    for verb in ("generate", "embed"):
        for options in (["--image", str(photo)], []):
            assert encore_(verb, *options, "A.").exit_code == 0
    assert asked == [True, False, True, False]


def test_bad_pictures_and_models_without_eyes(encore_: Callable[..., Result], photo: Path, tmp_path: Path) -> None:
    (tmp_path / "drawing.svg").write_text("<svg/>")
    for verb in ("generate", "embed"):
        for path, message in ((tmp_path / "drawing.svg", "is an SVG"), (tmp_path / "none.png", "No such file")):
            failed = encore_(verb, "--image", str(path), "--model", "/no/such/model", "A.")
            assert failed.stdout == "" and message in str(failed.exception), "pictures are looked at first"
        blind = encore_(verb, "--image", str(photo), "--model", "translator", "A.")
        assert "holds no vision tower" in str(blind.exception)
    unseeing = TextGenerator.load(assets.path("translator"))
    with pytest.raises(ValueError, match="this t5gemma2 reads text only"):
        next(unseeing.generate(["A."], pictures=[[photo]]))


def test_an_adapted_gemma_keeps_its_eyes(models: dict, tokenizer: Tokenizer, photo: Path, tmp_path: Path) -> None:
    source = models["gemma3"]
    encore.save(source, tmp_path / "gemma3", tokenizer=tokenizer)
    adapt(tmp_path / "gemma3", tmp_path / "adapted", style="t5gemma2")
    adapted = encore.load(tmp_path / "adapted", vision=True)
    assert isinstance(adapted, encore.T5Gemma)
    assert adapted.config.image_token_index == SOFT  # it lies in the small vocabulary, so it stays
    tensors = dict(adapted.encoder.named_parameters())
    for name, parameter in source.named_parameters():
        if name.startswith(("vision_tower.", "multi_modal_projector.")):
            assert tensors[name].equal(parameter)
    generator = TextGenerator.load(tmp_path / "adapted", vision=True)
    (answer,) = generator.generate(["What is it?"], SETTINGS, pictures=[[photo]])
    assert answer.source.tokens.count(SOFT) == PER_PICTURE
    blind = TextGenerator.load(tmp_path / "adapted")
    with pytest.raises(ValueError, match="loaded without its vision tower"):
        next(blind.generate(["What is it?"], SETTINGS, pictures=[[photo]]))
