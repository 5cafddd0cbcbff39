"""Models to deploy, each with a call of it: plain modules, Transformers models, and a graph converted to int8."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import fx, nn

from torchopt_passes.deploy.cpu import saturates

Source = tuple[nn.Module, dict[str, Any]]


class Cnn(nn.Module):
    """Convolutions with a residual sum, big enough that its weights outweigh everything else in a file."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, width, 3, padding=1)
        self.c2 = nn.Conv2d(width, width, 3, padding=1)
        self.c3 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.c1(x))
        x = torch.relu(self.c2(x)) + x
        x = torch.relu(self.c3(x))
        return self.fc(x.mean((2, 3)))


def plain() -> Source:
    torch.manual_seed(0)
    return Cnn().eval(), {"x": torch.randn(2, 3, 16, 16)}


def resnet() -> Source:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10, layer_type="basic", num_channels=1
    )
    model = ResNetForImageClassification(config)
    for _ in range(2):  # running statistics that are not the initial ones
        model(pixel_values=torch.randn(8, 1, 16, 16))
    return model, {"pixel_values": torch.randn(4, 1, 16, 16), "labels": torch.tensor([1, 2, 3, 4])}


def bert() -> Source:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=50,
        num_labels=3,
        max_position_embeddings=64,
    )
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    inputs = {"input_ids": torch.randint(0, 50, (2, 12)), "attention_mask": mask, "labels": torch.tensor([0, 2])}
    return BertForSequenceClassification(config), inputs


def int8(source: Source) -> Source:
    """Quantize every convolution and linear with torchao, without any of our passes."""
    from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

    most = 63 if saturates("onnx") else 127
    data = QuantizationSpec(torch.uint8, MinMaxObserver, 0, 255, torch.per_tensor_affine)
    channels = PerChannelMinMaxObserver
    weight = QuantizationSpec(torch.int8, channels, -most - 1, most, torch.per_channel_symmetric, ch_axis=0)
    layers = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)

    class Everything(Quantizer):
        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            for node in model.graph.nodes:
                if node.target in layers:
                    behind = next((u for u in node.users if u.target is torch.ops.aten.relu.default), None)
                    node.meta["quantization_annotation"] = QuantizationAnnotation(
                        input_qspec_map={node.args[0]: data, node.args[1]: weight},
                        output_qspec=None if behind else data,
                        _annotated=True,
                    )
                    if behind is not None:
                        behind.meta["quantization_annotation"] = QuantizationAnnotation(
                            output_qspec=data, _annotated=True
                        )
            return model

        def validate(self, model: fx.GraphModule) -> None:
            del model

    module, inputs = source
    shapes = {
        name: {0: torch.export.Dim.AUTO} | ({} if value.is_floating_point() else {1: torch.export.Dim.AUTO})
        for name, value in inputs.items()
        if name != "labels"
    }
    inputs = {name: inputs[name] for name in shapes}
    exported = torch.export.export(module.eval(), (), inputs, dynamic_shapes=shapes, strict=False)
    prepared = prepare_pt2e(exported.module(check_guards=False), Everything())
    prepared(**inputs)
    return convert_pt2e(prepared), inputs


@cache
def get(name: str) -> Source:
    """Return a source by name: one of the functions here, ``int8_<name>`` for its converted graph."""
    makers = {"plain": plain, "resnet": resnet, "bert": bert}
    return int8(makers[name.removeprefix("int8_")]()) if name.startswith("int8_") else makers[name]()
