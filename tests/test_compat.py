"""Tells when a private API behind torchopt_passes/_compat.py moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from torchopt_passes import _compat


def test_the_trainer_is_found_from_a_callback_event_and_only_there(tmp_path: object) -> None:
    from transformers import TrainerCallback

    from tests.callbacks.loops import make_trainer, ragged_tokens, tiny_bert

    found: list[object] = []

    class Look(TrainerCallback):
        def on_train_begin(self, *args: object, **kwargs: object) -> None:
            found.append(_compat.calling_trainer())

    trainer = make_trainer(tiny_bert(), ragged_tokens(4), tmp_path, [Look()], batch=4, steps=1)  # type: ignore[arg-type]
    trainer.train()
    assert found == [trainer]
    assert _compat.calling_trainer() is None


def test_models_that_predict_the_next_token() -> None:
    from transformers import (
        BertConfig,
        BertForTokenClassification,
        BertLMHeadModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    tiny = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 10,
    }
    t5 = {"d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "vocab_size": 10}
    assert _compat.predicts_next_token(LlamaForCausalLM(LlamaConfig(**tiny)))
    assert _compat.predicts_next_token(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=60000)))
    assert _compat.predicts_next_token(BertLMHeadModel(BertConfig(**tiny, is_decoder=True)))
    assert not _compat.predicts_next_token(BertForTokenClassification(BertConfig(**tiny)))
    assert not _compat.predicts_next_token(T5ForConditionalGeneration(T5Config(**t5)))
    assert not _compat.predicts_next_token(nn.Linear(1, 1))


def test_the_trainer_counts_labels_as_told(tmp_path: object) -> None:
    from tests.callbacks.loops import collate, make_trainer, ragged_tokens, tiny_bert

    trainer = make_trainer(tiny_bert(), ragged_tokens(4), tmp_path, [], batch=4, steps=1)  # type: ignore[arg-type]
    batch = collate(ragged_tokens(4)[:3])
    counts = []
    for shifted in (False, True):
        _compat.count_shifted_labels(trainer, shifted)
        counts.append(int(trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))[1]))
    assert counts[0] - counts[1] == 3  # one label a row
    assert _compat.count_shifted_labels(trainer, False) is True


def test_the_module_inside_a_compiled_one() -> None:
    model = nn.Linear(1, 1)
    assert _compat.compiled_source(torch.compile(model, backend="eager")) is model
    assert _compat.compiled_source(model) is None


def test_output_structure_of_an_exported_graph() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"a": x + 1, "b": x * 2}

    graph = torch.export.export(Two(), (torch.ones(2),)).module()
    spec = _compat.output_spec(graph)
    assert spec is not None
    assert torch.utils._pytree.tree_unflatten([1, 2], spec) == {"a": 1, "b": 2}
    assert _compat.output_spec(torch.fx.symbolic_trace(nn.ReLU())) is None


def test_packages_are_compiled_and_loaded(tmp_path: Path) -> None:
    exported = torch.export.export(nn.Linear(3, 2).eval(), (torch.ones(4, 3),))
    with torch.no_grad():
        _compat.aoti_compile(exported, tmp_path / "m.pt2", {"aot_inductor.metadata": {}})
        (got,) = [_compat.aoti_load(tmp_path / "m.pt2")(torch.ones(4, 3))]
        torch.testing.assert_close(got, exported.module()(torch.ones(4, 3)))


def test_structures_of_a_captured_graph() -> None:
    from torch import fx

    class Pair(nn.Module):
        def forward(self, x: torch.Tensor, *, y: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"sum": x + y, "product": x * y}

    x, y = torch.ones(2), torch.full((2,), 3.0)
    exported = torch.export.export(Pair(), (x,), {"y": y})
    graph = exported.module(check_guards=False).graph
    names, in_spec, out_spec = _compat.call_structure(graph)
    assert names == ["x", "y"]
    assert _compat.output_spec_of(graph) == out_spec
    assert _compat.load_structure(_compat.save_structure(out_spec)) == out_spec

    twin = _compat.copy_graph(graph)
    _compat.set_output_spec(twin, _compat.both_specs(out_spec, out_spec))
    assert _compat.split_spec(twin) == (out_spec, out_spec)
    assert _compat.output_spec_of(graph) == out_spec, "the copy's structure is its own"

    bare = fx.Graph()
    bare.output(bare.graph_copy(graph, {}))
    _compat.set_call_structure(bare, names, in_spec, out_spec)
    again = fx.GraphModule(nn.Module(), bare)
    assert torch.equal(again(x, y=y)["product"], x * y)


def test_operators_and_tensors_without_data() -> None:
    import operator

    assert _compat.is_operator(torch.ops.aten.add.Tensor)
    assert not _compat.is_operator(torch.ops.aten.add)
    assert not _compat.is_operator(operator.add)
    mode = _compat.fake_tensor_mode()
    fake = mode.from_tensor(torch.ones(2, 3))
    with mode:
        assert (fake @ fake.T).shape == (2, 2)


def test_export_tells_the_sizes_it_assumed() -> None:
    class Tied(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    auto = {0: torch.export.Dim.AUTO}
    exported = torch.export.export(Tied(), (torch.ones(3), torch.ones(3)), dynamic_shapes=(auto, auto), strict=False)
    assert _compat.size_guards(exported) == ("L['x'].size()[0] == L['y'].size()[0]",)


def test_decomposed_ops_round_as_their_formula() -> None:
    ops = _compat.decomposed_ops()
    q = ops.quantize_per_tensor.default(torch.tensor([0.26, -9.0]), 0.1, 3, 0, 255, torch.uint8)
    assert q.tolist() == [6, 0]
    back = ops.dequantize_per_tensor.default(q, 0.1, 3, 0, 255, torch.uint8)
    torch.testing.assert_close(back, torch.tensor([0.3, -0.3]))


def test_the_wrapper_whose_forward_runs_is_known() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    found: list[object] = []

    class Inside(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found.append(_compat.active_data_parallel())
            return super().forward(x)

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(Inside(1, 1))
        wrapped(torch.ones(1, 1))
        wrapped.module(torch.ones(1, 1))
    finally:
        torch.distributed.destroy_process_group()
    assert found == [wrapped, None]


def test_the_plain_tensors_inside_a_quantized_one() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    plain = torch.ones(2)
    assert _compat.plain_parts(plain) == [plain]
    model = nn.Sequential(nn.Linear(4, 2))
    quantize_(model, Int8WeightOnlyConfig())
    parts = _compat.plain_parts(model[0].weight)
    assert {part.dtype for part in parts} >= {torch.int8}
    assert all(type(part) is torch.Tensor for part in parts)


def test_the_hooks_of_torch_prune_are_found_by_name() -> None:
    from torch.nn.utils import prune

    layer = nn.Linear(4, 2)
    assert _compat.pruned_names(layer) == []
    prune.identity(layer, "bias")
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.l1_unstructured(layer, "weight", 0.5)
    assert sorted(_compat.pruned_names(layer)) == ["bias", "weight"]


def test_what_runs_eagerly_is_not_compiled() -> None:
    seen: list[bool] = []

    @_compat.run_eagerly
    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.compiler.is_compiling())
        return x + 1

    def outer(x: torch.Tensor) -> torch.Tensor:
        return look(x * 2) * 3

    compiled = torch.compile(outer, backend="eager")
    assert float(compiled(torch.tensor(1.0))) == 9.0
    assert seen == [False]


def test_executorch_runs_on_as_many_threads_as_asked() -> None:
    pytest.importorskip("executorch", reason="needs pip install 'torchopt_passes[executorch]'")
    from executorch.extension.pybindings import portable_lib

    for count in (2, 1):
        _compat.executorch_threads(count)
        assert portable_lib._threadpool_get_thread_count() == count
