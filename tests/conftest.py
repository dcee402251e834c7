"""What all tests share: one thread, no network, the same random numbers in every run."""

from __future__ import annotations

import os

# Before anything reads them: torch its threads, huggingface_hub whether there is a network, matplotlib its back end.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"

import random

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile("encore", deadline=None, derandomize=True, max_examples=50, print_blob=True)
hypothesis.settings.load_profile("encore")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Each test starts from the same seed, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
