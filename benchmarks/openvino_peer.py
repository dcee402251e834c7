"""OpenVINO as a peer of the CPU benchmarks: Gemma 3 of the same layers, exported by optimum-intel. Run by peers.py.

    python benchmarks/peers.py "OpenVINO int8" --folder CACHE --prepare         # makes the model, about a minute

OpenVINO has no T5Gemma 2, so it runs Gemma 3 as llama.cpp does: decoding has the source in its context, and "encode" is
reading a prompt, 512 tokens at a time. NNCF packs every matrix, the one that embedding and head share included: int8
symmetric with a float16 scale per row, or int4 symmetric with one per 64 weights (4.25 bits per weight, where ours has
4.5). Norms and rotary frequencies stay in floating point. The compiled model holds its keys and values itself (a
stateful model), those of local layers for the whole context too. Precision is what the CPU plugin chooses; without
bfloat16 units its properties read: 8-bit keys and values, float32, activations quantized in groups of 32.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# optimum-intel asks for torchvision, which nothing here uses; its build from PyPI breaks the import of transformers
# beside a torch for CPUs.
INSTALL = (
    "pip install torch==2.13.0 torchvision==0.28.0 openvino==2026.4.1 nncf==3.4.0 optimum-intel==2.2.0 "
    "transformers==5.0.0 && pip uninstall -y torchvision   # in an environment of its own: --python"
)
CHUNK = 512  # prompt tokens read at once, as llama.cpp's runner does; all 2,048 at once were no faster


class OpenVino:
    """The stateful model through OpenVINO's own runtime; rows of a batch have equal lengths."""

    def __init__(self, name: str, size: str, folder: Path, threads: int) -> None:
        import openvino

        self.size = size
        path = openvino_folder(size, name.removeprefix("OpenVINO "), folder)
        core = openvino.Core()
        model = core.read_model(path / "openvino_model.xml")
        keep_last_logits(model)
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self.compiled = core.compile_model(model, "CPU", settings)
        self.request = self.compiled.create_infer_request()
        self.read = 0  # tokens per row in the keys and values

    def _read(self, ids: Any) -> Any:
        """Reads the next (batch, tokens) ids; gives the (batch, vocabulary) logits after the last one.

        The logits lie in the runtime's own memory and hold until the next call.
        """
        import numpy as np

        batch, tokens = ids.shape
        end = self.read + tokens
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, end), np.int64),
            "position_ids": np.tile(np.arange(self.read, end), (batch, 1)),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        self.request.infer(inputs, share_inputs=True, share_outputs=True)
        self.read = end
        return self.request.get_output_tensor(0).data[:, -1]

    def encode(self, batch: int, source_tokens: int) -> float:
        """Source tokens per second over the batch; each chunk gives the logits of its last position only."""
        import numpy as np
        from peers import source_ids

        sources = np.array(source_ids(self.size, batch, source_tokens))
        self.request.reset_state()
        self.read = 0
        start = time.perf_counter()
        for place in range(0, source_tokens, CHUNK):
            self._read(sources[:, place : place + CHUNK])
        return batch * source_tokens / (time.perf_counter() - start)

    def decode(self, batch: int, source_tokens: int, target_tokens: int) -> float:
        """Target tokens per second over the batch, from the first one to the last."""
        import numpy as np

        self.encode(batch, source_tokens)
        tokens, start = np.full(batch, 2), 0.0
        for step in range(target_tokens):
            tokens = self._read(tokens[:, None]).argmax(-1)
            if step == 0:
                start = time.perf_counter()
        assert self.read == source_tokens + target_tokens
        return batch * (target_tokens - 1) / (time.perf_counter() - start)


def keep_last_logits(model: Any) -> None:
    """Cuts the head's input to its last position, in place.

    optimum-intel exports logits of all positions: 2 GB for 2,048 tokens, which no other runner computes.
    """
    import numpy as np
    from openvino import opset13

    head = model.output("logits").get_node().input_value(0).get_node()
    assert head.get_type_name() == "MatMul", head
    borders = (np.array([border], np.int64) for border in (-1, np.iinfo(np.int64).max, 1, 1))  # start, stop, step, axis
    head.input(0).replace_source_output(opset13.slice(head.input_value(0), *borders).output(0))
    model.validate_nodes_and_infer_types()


def openvino_folder(size: str, kind: str, folder: Path) -> Path:
    """A random Gemma 3 as OpenVINO's files, made if it is not there.

    The making is a process of its own, so that its memory does not count in the peak of this one.
    """
    path = folder / f"openvino-gemma-3-{size.split('-')[0]}-{kind}"
    if not path.is_dir():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(export, size, kind, path).result()
    return path


def export(size: str, kind: str, path: Path) -> None:
    """Writes a random Gemma 3, its matrices packed as `kind` (int8 or int4), to the folder `path`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        import torch
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
        from peers import SIZES
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        s = SIZES[size]
        config = Gemma3TextConfig(
            vocab_size=s["vocab"],
            hidden_size=s["width"],
            intermediate_size=s["ffn"],
            num_hidden_layers=s["layers"],
            num_attention_heads=s["heads"],
            num_key_value_heads=s["kv_heads"],
            head_dim=s["head_dim"],
            query_pre_attn_scalar=s["head_dim"],
            sliding_window=512,
            max_position_embeddings=32_768,
        )
        torch.manual_seed(0)
        weights, files = f"{temporary}/weights", f"{temporary}/files"
        Gemma3ForCausalLM(config).bfloat16().save_pretrained(weights)
        packing = {"int8": dict(bits=8), "int4": dict(bits=4, group_size=64, ratio=1.0, all_layers=True)}[kind]
        model = OVModelForCausalLM.from_pretrained(
            weights, export=True, compile=False, quantization_config=OVWeightQuantizationConfig(sym=True, **packing)
        )
        model.save_pretrained(files)
        shutil.move(files, path)
