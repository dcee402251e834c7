"""Checkpoint folders: `config.json`, safetensors files, tokenizer files, in the public layout.

    config_json.py   config.json, in the vocabularies of transformers 4 and 5 <-> our frozen configs
    names.py         our tensor names <-> the public ones, one table per architecture
    folder.py        what lies in a folder: safetensors headers and indexes, checked before memory is spent
    hub.py           a hub name -> a local folder
    writing.py       safetensors files written tensor by tensor; a folder appears whole or not at all
    pretrained.py    load(), save(), read_config()
    averaging.py     the mean of several folders, tensor by tensor
    training.py      save and resume a training run

Only safetensors are read; nothing here unpickles.
"""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint folder cannot be read or written; the message names the tensor, key or file and what to do."""
