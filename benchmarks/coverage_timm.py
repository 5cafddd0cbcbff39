"""Choose one model for each family of timm: the fewest parameters, on the smallest image that it takes.

    python -m benchmarks.coverage_timm       # writes benchmarks/records/coverage_timm.json

The choice is a record, so that a run of the benchmark does not build all models of timm first. Nothing but the size of
the image is chosen: the models are built with timm's own defaults, without pretrained weights.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["chosen", "image_size"]

RECORD = Path(__file__).resolve().parent / "records" / "coverage_timm.json"
SIDES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 299, 320, 331, 384, 448, 512)


def chosen() -> dict[str, dict[str, Any]]:
    """Return family -> model and side, as recorded."""
    return json.loads(RECORD.read_text())["families"]


def image_size(model: nn.Module) -> int:
    """Return the side of the smallest square image that a model takes: its own where it is fixed, else by trying.

    Args:
        model: a model of timm, in eval mode.
    """
    own = int(model.pretrained_cfg["input_size"][-1])
    if model.pretrained_cfg.get("fixed_input_size"):
        return own
    for side in (*(side for side in SIDES if side < own), own):
        try:
            with torch.no_grad():
                model(torch.randn(2, 3, side, side))
        except Exception:
            continue
        return side
    return own


def smallest(family: str) -> str:
    """Return the family's model with the fewest parameters (then the smallest image, then the first name)."""
    import timm

    sizes: list[tuple[int, int, str]] = []
    for name in timm.list_models(module=family):
        if name.startswith("test_"):
            continue  # made for timm's own tests
        with torch.device("meta"):
            model = timm.create_model(name)
        parameters = sum(p.numel() for p in model.parameters())
        sizes.append((parameters, int(model.pretrained_cfg["input_size"][-1]), name))
    return min(sizes)[-1]


def main() -> None:
    import timm

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    families: dict[str, dict[str, Any]] = {}
    for family in timm.list_modules():
        torch.manual_seed(0)
        name = smallest(family)
        model = timm.create_model(name).eval()
        families[family] = {"model": name, "side": image_size(model)}
        print(family, families[family], flush=True)
    RECORD.write_text(json.dumps({"timm": timm.__version__, "families": families}, indent=1) + "\n")


if __name__ == "__main__":
    main()
