"""The runners that the CPU benchmarks compare, each in a process of its own. Run by cpu_generate.py and cpu_encode.py.

    python benchmarks/peers.py NAME --size 270m-270m --folder CACHE      # then one JSON question per line on stdin

A question is {"work": "decode", "batch": 1, "source_tokens": 512, "target_tokens": 24} or the same with "encode"; the
answer {"tokens_per_second": …, "peak_bytes": …}. Weights are random at the true sizes, since speed does not depend on
them; what a runner needs on disk is made once, in CACHE. Ours and `transformers` and CTranslate2 run the
encoder-decoder; llama.cpp and OpenVINO (openvino_peer.py) have no T5Gemma 2 and run Gemma 3, whose one stack has the
same layers: decoding has the source in its context, and "encode" is reading a prompt.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import openvino_peer

SIZES: dict[str, dict[str, Any]] = {
    "270m-270m": dict(
        preset="t5gemma-2-270m-270m", vocab=262_144, width=640, layers=18, heads=4, kv_heads=1, head_dim=256, ffn=2048
    ),
    "1b-1b": dict(
        preset="t5gemma-2-1b-1b", vocab=262_144, width=1152, layers=26, heads=4, kv_heads=1, head_dim=256, ffn=6912
    ),
    "small-small": dict(
        preset="encore-small-small", vocab=6_144, width=256, layers=4, heads=4, kv_heads=1, head_dim=64, ffn=512
    ),
}

EXPORTED = ("int8", "int4", "int8 preview", "int4 preview")
# Name -> (the module it needs, how to install it).
PEERS = {
    "encore bf16": ("encore", "pip install 'encore-lm[train]'"),
    "encore float32": ("encore", "pip install 'encore-lm[train]'"),
    **{f"encore {weights}": ("onnxruntime", "pip install 'encore-lm[export]'") for weights in EXPORTED},
    "transformers bfloat16": ("transformers", "pip install transformers==5.23.0"),
    "transformers float32": ("transformers", "pip install transformers==5.23.0"),
    "llama.cpp Q8_0": ("llama_cpp", "pip install llama-cpp-python gguf   # builds from source"),
    "llama.cpp Q4_0": ("llama_cpp", "pip install llama-cpp-python gguf   # builds from source"),
    "CTranslate2 int8": ("ctranslate2", "pip install ctranslate2 transformers==5.23.0"),
    "OpenVINO int8": ("openvino", openvino_peer.INSTALL),
    "OpenVINO int4": ("openvino", openvino_peer.INSTALL),
}


def missing(name: str) -> str | None:
    """How to install what a peer needs, if this Python has it not."""
    module, command = PEERS[name]
    return None if importlib.util.find_spec(module) else command


def source_ids(size: str, batch: int, length: int, seed: int = 0) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(seed).integers(300, SIZES[size]["vocab"] - 300, (batch, length)).tolist()


class Ours:
    """Encore: a checkpoint through torch, or what `encore export` made of it."""

    def __init__(self, name: str, size: str, folder: Path, threads: int) -> None:
        self.size, self.weights = size, name.removeprefix("encore ")
        checkpoint = our_checkpoint(size, folder)
        if self.weights in EXPORTED:
            self.model: Any = exported(checkpoint, self.weights, threads, preview_width(size))
        else:
            import torch

            import encore

            torch.set_num_threads(threads)
            dtype = torch.bfloat16 if self.weights == "bf16" else torch.float32
            self.model = encore.load(checkpoint, dtype)

    def encode(self, batch: int, source_tokens: int) -> float:
        sources = source_ids(self.size, batch, source_tokens)
        start = time.perf_counter()
        if self.weights in EXPORTED:
            self.model.encode(sources)
        else:
            import torch

            with torch.inference_mode():
                self.model.encode(torch.tensor(sources))
        return batch * source_tokens / (time.perf_counter() - start)

    def decode(self, batch: int, source_tokens: int, target_tokens: int) -> float:
        from encore.generate.batch import stream
        from encore.generate.sampling import SamplingSettings

        settings = SamplingSettings(max_target_tokens=target_tokens, stop_ids=())
        events, first = 0, 0.0
        for _ in stream(self.model, source_ids(self.size, batch, source_tokens), settings):
            events += 1
            if events == batch:
                first = time.perf_counter()
        return (events - batch) / (time.perf_counter() - first)


class Transformers:
    """transformers, text only, SDPA. The head runs over one position per step; no generate() overhead is counted."""

    def __init__(self, name: str, size: str, folder: Path, threads: int) -> None:
        import torch
        from against_transformers import build_theirs

        from encore.presets import preset

        self.size = size
        torch.set_num_threads(threads)
        dtype = getattr(torch, name.removeprefix("transformers "))
        self.model = build_theirs(preset(SIZES[size]["preset"]), dtype)  # pyright: ignore[reportArgumentType]

    def encode(self, batch: int, source_tokens: int) -> float:
        import torch

        source = torch.tensor(source_ids(self.size, batch, source_tokens))
        start = time.perf_counter()
        with torch.inference_mode():
            self.encoded = self.model.get_encoder()(input_ids=source)
        return batch * source_tokens / (time.perf_counter() - start)

    def decode(self, batch: int, source_tokens: int, target_tokens: int) -> float:
        import torch

        self.encode(batch, source_tokens)
        token, past, start = torch.full((batch, 1), 2), None, 0.0
        with torch.inference_mode():
            for step in range(target_tokens):
                out = self.model(
                    decoder_input_ids=token, encoder_outputs=self.encoded, past_key_values=past, use_cache=True
                )
                token, past = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
                if step == 0:
                    start = time.perf_counter()
        return batch * (target_tokens - 1) / (time.perf_counter() - start)


class LlamaCpp:
    """llama.cpp by way of llama-cpp-python's low-level calls: Gemma 3 of the same layers; batch 1."""

    def __init__(self, name: str, size: str, folder: Path, threads: int) -> None:
        import llama_cpp

        self.size, self.lib = size, llama_cpp
        path = gguf_file(size, name.removeprefix("llama.cpp "), folder)
        self.llm = llama_cpp.Llama(
            str(path), n_ctx=8704, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
        )
        self.context = self.llm._ctx.ctx

    def _read(self, ids: list[int]) -> None:
        array = (self.lib.llama_token * len(ids))(*ids)
        if status := self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(array, len(ids))):
            raise RuntimeError(f"llama_decode gave {status}")

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def encode(self, batch: int, source_tokens: int) -> float:
        assert batch == 1
        (ids,) = source_ids(self.size, 1, source_tokens)
        self._clear()
        start = time.perf_counter()
        for place in range(0, source_tokens, 512):
            self._read(ids[place : place + 512])
        self.lib.llama_synchronize(self.context)
        return source_tokens / (time.perf_counter() - start)

    def decode(self, batch: int, source_tokens: int, target_tokens: int) -> float:
        import numpy as np

        self.encode(batch, source_tokens)
        token, start = 2, 0.0
        for step in range(target_tokens):
            self._read([token])
            logits = np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), shape=(SIZES[self.size]["vocab"],))
            token = int(logits.argmax())
            if step == 0:
                start = time.perf_counter()
        return (target_tokens - 1) / (time.perf_counter() - start)


class CTranslate2:
    """CTranslate2's own T5Gemma 2, converted from a random model of transformers."""

    def __init__(self, name: str, size: str, folder: Path, threads: int) -> None:
        import ctranslate2

        self.size = size
        path = ctranslate2_folder(size, folder)
        self.translator = ctranslate2.Translator(
            str(path), device="cpu", compute_type="int8", intra_threads=threads, inter_threads=1
        )

    def _seconds(self, batch: int, source_tokens: int, target_tokens: int) -> float:
        rows = [[f"t{i}" for i in row] for row in source_ids(self.size, batch, source_tokens)]
        start = time.perf_counter()
        self.translator.translate_batch(
            rows,
            beam_size=1,
            max_decoding_length=target_tokens,
            min_decoding_length=target_tokens,
            max_input_length=0,
        )
        return time.perf_counter() - start

    def encode(self, batch: int, source_tokens: int) -> float:
        """Encoding and one step: it has no call for less."""
        return batch * source_tokens / self._seconds(batch, source_tokens, 1)

    def decode(self, batch: int, source_tokens: int, target_tokens: int) -> float:
        one = self._seconds(batch, source_tokens, 1)
        return batch * (target_tokens - 1) / (self._seconds(batch, source_tokens, target_tokens) - one)


RUNNERS: dict[str, Any] = {
    "encore": Ours,
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
    "CTranslate2": CTranslate2,
    "OpenVINO": openvino_peer.OpenVino,
}


def our_checkpoint(size: str, folder: Path) -> Path:
    """A T5Gemma 2 with random weights, in bfloat16, with no tokenizer: the benchmarks give ids."""
    path = folder / f"t5gemma-2-{size}"
    if not (path / "config.json").is_file():
        import torch

        import encore
        from encore.config import T5GemmaConfig
        from encore.presets import preset

        config = preset(SIZES[size]["preset"])
        assert isinstance(config, T5GemmaConfig)
        config = dataclasses.replace(config, vision=None)  # text alone
        with torch.device("meta"):
            model = encore.T5Gemma(config)
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        model.init_weights(torch.Generator().manual_seed(0))
        encore.save(model, path)
    return path


def preview_width(size: str) -> int:  # two fifths of the head's columns (270M: 256 of 640), in blocks of 128
    return max(128, SIZES[size]["width"] * 2 // 5 // 128 * 128)


def exported(checkpoint: Path, weights: str, threads: int, width: int = 0) -> Any:
    """The exported model, made if it is not there or was made by another version. "int4 preview": with a view."""
    from encore.export import ExportError
    from encore.export.folder import export
    from encore.generate.onnx_backend import OnnxModel
    from encore.quantize.blocks import DEFAULT_BLOCK_SIZE

    path = checkpoint.with_name(f"{checkpoint.name}-{weights.replace(' ', '-')}-{DEFAULT_BLOCK_SIZE}")
    try:
        return OnnxModel.load(path, threads=threads)
    except (ExportError, ValueError):
        export(checkpoint, path, weights[:4], head_preview=width if " " in weights else None, force=True)  # pyright: ignore
        return OnnxModel.load(path, threads=threads)


def gguf_file(size: str, kind: str, folder: Path) -> Path:
    """A random Gemma 3 as GGUF, every matrix in `kind` (as `llama-quantize --pure` makes it)."""
    path = folder / f"gemma-3-{size.split('-')[0]}-{kind}.gguf"
    if path.is_file():
        return path
    import gguf
    import numpy as np

    s, vocab = SIZES[size], SIZES[size]["vocab"]
    kinds = gguf.GGMLQuantizationType
    rng = np.random.default_rng(0)
    temporary = path.with_suffix(".writing")
    writer = gguf.GGUFWriter(str(temporary), "gemma3")
    writer.add_name("random")
    writer.add_context_length(32_768)
    writer.add_embedding_length(s["width"])
    writer.add_block_count(s["layers"])
    writer.add_feed_forward_length(s["ffn"])
    writer.add_head_count(s["heads"])
    writer.add_head_count_kv(s["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(s["head_dim"])
    writer.add_value_length(s["head_dim"])
    writer.add_sliding_window(512)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    writer.add_token_list([*tokens, *(f"t{i}" for i in range(vocab - len(tokens)))])
    writer.add_token_scores([-float(i) for i in range(vocab)])
    writer.add_token_types([3, 3, 3, 2] + [6] * 256 + [1] * (vocab - 260))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.standard_normal((rows, columns), dtype=np.float32) * 0.02
        writer.add_tensor(name, gguf.quantize(values, kinds[kind]), raw_dtype=kinds[kind])

    def norm(name: str, length: int) -> None:
        writer.add_tensor(name, np.ones(length, np.float32))

    matrix("token_embd.weight", vocab, s["width"])
    norm("output_norm.weight", s["width"])
    for i in range(s["layers"]):
        block = f"blk.{i}."
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            norm(f"{block}{name}.weight", s["width"])
        for name in ("attn_q_norm", "attn_k_norm"):
            norm(f"{block}{name}.weight", s["head_dim"])
        matrix(f"{block}attn_q.weight", s["heads"] * s["head_dim"], s["width"])
        matrix(f"{block}attn_k.weight", s["kv_heads"] * s["head_dim"], s["width"])
        matrix(f"{block}attn_v.weight", s["kv_heads"] * s["head_dim"], s["width"])
        matrix(f"{block}attn_output.weight", s["width"], s["heads"] * s["head_dim"])
        matrix(f"{block}ffn_gate.weight", s["ffn"], s["width"])
        matrix(f"{block}ffn_up.weight", s["ffn"], s["width"])
        matrix(f"{block}ffn_down.weight", s["width"], s["ffn"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.rename(path)
    return path


def ctranslate2_folder(size: str, folder: Path) -> Path:
    path = folder / f"ctranslate2-{size}-int8"
    if not (path / "model.bin").is_file():
        import torch
        from against_transformers import build_theirs
        from ctranslate2.converters import transformers as converters

        from encore.presets import preset

        class Words:
            bos_token, eos_token, unk_token = "<bos>", "<eos>", "<unk>"

        model = build_theirs(preset(SIZES[size]["preset"]), torch.float32)  # pyright: ignore[reportArgumentType]
        loader = converters.T5Gemma2Loader()
        loader._model_name_or_path = ""
        spec = loader.get_model_spec(model)
        loader.set_config(spec.config, model, Words)
        loader.set_vocabulary(
            spec, ["<pad>", "<eos>", "<bos>", "<unk>", *(f"t{i}" for i in range(SIZES[size]["vocab"] - 4))]
        )
        spec.validate()
        spec.optimize(quantization="int8")
        path.mkdir(parents=True, exist_ok=True)
        spec.save(str(path))
    return path


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(PEERS))
    parser.add_argument("--size", default="270m-270m", choices=list(SIZES))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prepare", action="store_true", help="make what it needs on disk, and leave")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    runner = RUNNERS[args.name.split()[0]](args.name, args.size, args.folder, args.threads)
    if args.prepare:
        return
    version = importlib.metadata.version(
        {"encore": "encore-lm", "llama.cpp": "llama-cpp-python"}.get(args.name.split()[0], args.name.split()[0].lower())
    )
    print(json.dumps({"ready": True, "version": version, "peak_bytes": peak_bytes()}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        work = question.pop("work")
        repeat = question.pop("repeat", 1)
        values = [getattr(runner, work)(**question) for _ in range(repeat)]
        print(json.dumps({"tokens_per_second": statistics.median(values), "peak_bytes": peak_bytes()}), flush=True)


if __name__ == "__main__":
    main()
