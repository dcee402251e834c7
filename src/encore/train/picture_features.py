"""What a frozen picture tower makes of each picture, computed once and kept on disk: then a step costs no tower.

    CACHE/pictures/KEY.npy      (pictures, tokens, W) float32, one entry for each picture, by the order of their paths

The key hashes the tower's weights and the bytes of the pictures. A file is written beside its place and renamed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from encore.data.sources import note
from encore.data.token_cache import default_cache_folder
from encore.generate.source import PictureFormat
from encore.images import load_picture, views
from encore.model.t5gemma import T5Gemma
from encore.model.vision import MultiModalProjector, VisionTower, picture_features
from encore.train.loss import Model
from encore.train.pictures import Pictures, picture_digest
from encore.train.reading import cache_folder
from encore.train.recipe import Recipe

_AT_A_TIME = 32


class KeptFeatures(Mapping[str, np.ndarray]):
    """Path of a picture -> its features (tokens, W). Pickles as the file's name, so that it is light to send."""

    def __init__(self, file: Path, paths: Sequence[str]) -> None:
        self.file, self.paths = file, tuple(paths)
        self._rows = {path: row for row, path in enumerate(self.paths)}
        self._array = np.load(file, mmap_mode="r", allow_pickle=False)

    def __getitem__(self, path: str) -> np.ndarray:
        return np.asarray(self._array[self._rows[path]])

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __reduce__(self) -> tuple[type[KeptFeatures], tuple[Path, tuple[str, ...]]]:
        return KeptFeatures, (self.file, self.paths)


def has_pictures(recipe: Recipe) -> bool:
    """Whether the recipe reads rows with pictures."""
    return "pictures" in (recipe.objective, *(source.objective for source in recipe.data.sources))


def what_pictures_become(model: Model, recipe: Recipe) -> Pictures:
    """The ids and pixels that the model wants of a picture, and kept features if the recipe asks for them.

    Raises ValueError for a decoder-only model, and where features are to be kept of a tower that learns.
    """
    if not isinstance(model, T5Gemma):
        raise ValueError("rows with pictures train an encoder-decoder; adapt the model first")
    form = PictureFormat.of(model.config)
    if not recipe.data.keep_features:
        return Pictures(form)
    if recipe.optim.vision_rate:
        raise ValueError(
            f"data.keep_features keeps what a frozen tower makes of pictures, but optim.vision_rate is "
            f"{recipe.optim.vision_rate}; set one of them back"
        )
    tower, projector = model.encoder.vision_tower, model.encoder.multi_modal_projector
    assert tower is not None and projector is not None
    folder = cache_folder(recipe.data)
    return Pictures(form, lambda paths: keep_features(paths, tower, projector, cache_folder=folder))


def keep_features(
    paths: Sequence[str], tower: VisionTower, projector: MultiModalProjector, *, cache_folder: Path | None = None
) -> KeptFeatures:
    """The features of all pictures, from disk if they are there. Says how many are to be computed."""
    folder = (cache_folder or default_cache_folder()) / "pictures"
    size, tokens = projector.image_size, projector.tokens_per_image
    key = hashlib.sha256(f"1 {size} {tokens} {_weights_digest(tower)}".encode())
    for path in paths:
        key.update(picture_digest(path).encode())
    file = folder / f"{key.hexdigest()[:32]}.npy"
    if file.is_file():
        return KeptFeatures(file, paths)
    folder.mkdir(parents=True, exist_ok=True)
    note(f"computing what the picture tower makes of {len(paths):,} pictures, once")
    weight = tower.embeddings.patch_embedding.weight
    shape = (len(paths), tokens, weight.shape[0])
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".writing-", suffix=".npy")
    os.close(handle)
    try:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
        with torch.no_grad():
            for start in range(0, len(paths), _AT_A_TIME):
                some = np.concatenate([views(load_picture(p), size) for p in paths[start : start + _AT_A_TIME]])
                pixels = torch.from_numpy(some).to(weight.device, weight.dtype)
                array[start : start + len(some)] = picture_features(tower, projector, pixels).float().cpu().numpy()
        array.flush()
        del array
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return KeptFeatures(file, paths)


def _weights_digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
