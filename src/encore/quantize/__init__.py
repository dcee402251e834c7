"""Packed weights: int8 and int4 in blocks, rounded to nearest or calibrated on real text.

    blocks.py      numbers <-> packed blocks with a scale each; no torch
    gptq.py        rounding one column after the other, each error made up for by the columns that follow; no torch
    calibrate.py   the model read on real text: what each matrix is multiplied with, and from it its packed weights
    folder.py      quantize(): a checkpoint folder -> the same folder with packed weights

`checkpoint/packed.py` runs such folders with torch; `encore export` turns them into graphs as they are.
"""

from __future__ import annotations
