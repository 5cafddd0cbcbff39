"""A captured model in the Hugging Face Trainer: it trains, evaluates, predicts and saves as the source does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.graph import promises
from tests.hf_models import MODELS
from torchopt_passes.graph.capture import CapturedModule, capture, release

transformers = pytest.importorskip("transformers")


class _Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Sixteen rows of one length, with a column that no forward takes."""

    def __init__(self, name: str, *, extra: bool = False) -> None:
        _, inputs = MODELS[name].case(16)
        self.rows = [{k: v[i] for k, v in inputs.items()} for i in range(16)]
        if extra:
            self.rows = [row | {"comment": torch.tensor(i)} for i, row in enumerate(self.rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def _trainer(model: nn.Module, folder: Path, name: str, *, extra: bool = False, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=3,
        max_steps=3,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        dataloader_pin_memory=False,
        **options,
    )
    rows = _Rows(name, extra=extra)
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


def _pair(name: str) -> tuple[CapturedModule, nn.Module]:
    torch.manual_seed(0)
    model = MODELS[name].build()
    source = promises.reference(model)
    return capture(model, *MODELS[name].case(2)), source


@pytest.mark.parametrize(("name", "accumulation"), [("bert", 1), ("gpt2", 2), ("resnet", 1)])
def test_trains_evaluates_predicts_and_saves_as_the_source(tmp_path: Path, name: str, accumulation: int) -> None:
    graph, source = _pair(name)
    before = {n: p.detach().clone() for n, p in graph.named_parameters()}
    trainers = {
        kind: _trainer(model, tmp_path / kind, name, gradient_accumulation_steps=accumulation)
        for kind, model in (("graph", graph), ("source", source))
    }
    if accumulation > 1:  # the same division of the loss: the captured head has no num_items_in_batch
        trainers["source"].model_accepts_loss_kwargs = trainers["graph"].model_accepts_loss_kwargs
    results: dict[str, Any] = {}
    for kind, trainer in trainers.items():
        torch.manual_seed(0)  # dropout draws the same numbers in both
        results[kind] = trainer.train()
    assert results["graph"].training_loss == pytest.approx(results["source"].training_loss, abs=1e-6)
    assert promises.distance(dict(graph.state_dict()), dict(source.state_dict())) <= 1e-6
    assert promises.distance(before, {n: p.detach() for n, p in graph.named_parameters()}) > 0

    metrics = {kind: trainer.evaluate() for kind, trainer in trainers.items()}
    assert metrics["graph"]["eval_loss"] == pytest.approx(metrics["source"]["eval_loss"], abs=1e-6)
    predicted = {kind: trainer.predict(trainer.eval_dataset) for kind, trainer in trainers.items()}
    assert predicted["graph"].predictions == pytest.approx(predicted["source"].predictions, abs=1e-6)
    assert (predicted["graph"].label_ids == predicted["source"].label_ids).all()

    trainers["graph"].save_model()
    saved = load_file(tmp_path / "graph" / "model.safetensors")
    fresh = MODELS[name].build()
    missing, unexpected = fresh.load_state_dict(saved, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied to the embedding, saved once
    if hasattr(fresh, "tie_weights"):
        fresh.tie_weights()
    assert promises.distance(dict(fresh.state_dict()), dict(source.state_dict())) <= 1e-6


def test_unused_columns_are_removed_and_labels_are_found(tmp_path: Path) -> None:
    graph, source = _pair("bert_qa")
    trainer = _trainer(graph, tmp_path, "bert_qa", extra=True)
    assert trainer.label_names == _trainer(source, tmp_path, "bert_qa").label_names
    assert trainer.label_names == ["start_positions", "end_positions"]
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "start_positions", "end_positions"}
    assert trainer.evaluate()["eval_loss"] > 0


def test_what_the_trainer_asks_of_a_model_survives_deepcopy() -> None:
    graph, source = _pair("gpt2")
    for one in (graph, copy.deepcopy(graph)):
        assert one.config.to_dict() == source.config.to_dict() | {"use_cache": True}
        assert one.main_input_name == "input_ids"
        assert one.accepts_loss_kwargs is False
        assert one.loss_type == source.loss_type
        assert (one.device, one.dtype) == (source.device, source.dtype)


def test_missing_and_unknown_inputs_are_named() -> None:
    graph, _ = _pair("bert")
    _, inputs = MODELS["bert"].case(2)
    with pytest.raises(TypeError, match="labels"):
        graph(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    with pytest.raises(TypeError, match="token_type_ids"):
        graph(**inputs, token_type_ids=inputs["input_ids"])
    with pytest.raises(TypeError, match="num_items_in_batch"):
        graph(**inputs, num_items_in_batch=3)


def test_order_of_keywords_and_positions() -> None:
    graph, source = _pair("bert")
    _, inputs = MODELS["bert"].case(2)
    source.eval()
    graph.eval()
    expected = source(**inputs).logits
    assert promises.distance(graph(**dict(reversed(inputs.items()))).logits, expected) == 0
    rest = {"labels": inputs["labels"]}
    assert promises.distance(graph(inputs["input_ids"], inputs["attention_mask"], **rest).logits, expected) == 0


def test_to_another_dtype_then_release() -> None:
    graph, source = _pair("resnet")
    args, inputs = MODELS["resnet"].case(2)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    graph.to(torch.float64)
    assert graph.dtype == torch.float64
    assert promises.in_eval(graph, source.to(torch.float64), (args, inputs)) <= 1e-12
    back = release(graph)
    assert all(p.dtype == torch.float64 for p in back.parameters())
    assert all(back.get_parameter(n) is p for n, p in graph.named_parameters())
    assert promises.in_eval(graph, back, (args, inputs)) <= 1e-12
