"""Our config and weights -> ONNX graphs, built node by node, that need no torch to be made or run.

    manifest.py   what an exported folder holds, and whether it is whole
    weights.py    a checkpoint's matrices -> one file of float32 or packed int8 / int4 blocks
    graph.py      nodes, constants and the layer parts that all graphs share
    encoder.py    encoder.onnx   source ids -> states
    attention.py  what is kept of keys and values, float32 or int8, and attention over it
    preview.py    a narrow view of the head, by which the best words are found
    step.py       memory.onnx    states -> keys and values of every decoder layer
                  step.onnx      one target id per row, or several, with caches in place -> logits
    folder.py     export(): all of it, for one checkpoint folder

`generate/onnx_backend.py` runs them.
"""

from __future__ import annotations


class ExportError(ValueError):
    """A model cannot be exported, or an exported folder not be used; the message says what is wrong and what to do."""
