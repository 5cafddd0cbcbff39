"""Recipes: strict reading, exact round trips, and the passes and callbacks that come out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchopt_passes as top
from tests.models import build
from torchopt_passes.callbacks import Callback, Distillation, GradualPruning, attach
from torchopt_passes.graph.fusion import FuseBatchNorm
from torchopt_passes.graph.quantization import InsertFakeQuant
from torchopt_passes.recipe import Recipe, callback_types, load_recipe

TEXT = """
version: 1
passes:
  - prune_weights: {pattern: 2:4, include: [stem, "f*"]}   # a comment
  - fuse_batch_norm
  - insert_fake_quant:
      target: onnx
      momentum: 1e-3
callbacks:
  - gradual_pruning: {sparsity: 0.8, start: 10, skip: [fc]}
  - distillation: {alpha: .25}
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    with pytest.raises(top.ConfigError) as caught:
        load_recipe(write(folder, text, name))
    return str(caught.value)


def test_what_the_file_says_is_what_comes_out(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, TEXT))
    assert recipe.passes == (
        top.PruneWeights(pattern="2:4", include=("stem", "f*")),
        FuseBatchNorm(),
        InsertFakeQuant(target="onnx", momentum=0.001),
    )
    assert recipe.callbacks == (
        ("gradual_pruning", {"sparsity": 0.8, "start": 10, "skip": ("fc",)}),
        ("distillation", {"alpha": 0.25}),
    )
    assert recipe.pipeline() == top.Pipeline(*recipe.passes)


@pytest.mark.parametrize("name", ["again.yaml", "again.yml", "again.json"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(write(tmp_path, TEXT))
    assert load_recipe(recipe.save(tmp_path / name)) == recipe
    assert load_recipe(recipe.to_dict()) == recipe
    assert load_recipe(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_every_registered_pass_round_trips(tmp_path: Path) -> None:
    from tests.graph.cases import CASES

    passes = tuple(case.make() for case in CASES.values())
    for name in ("all.yaml", "all.json"):
        assert load_recipe(Recipe(passes=passes).save(tmp_path / name)).passes == passes


# words that some YAML takes for a number, a truth value, nothing, a key or markup
words = st.one_of(
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12),
    st.from_regex(r"[-+.0-9eE_:]{1,8}", fullmatch=True),
    st.sampled_from(
        ["no", "on", "Yes", "true", "True", "null", "~", "2:4", "1e3", "0x1f", "010", "1_000", ".nan", "<<"]
    ),
    st.sampled_from(["2024-01-01", "*a", "&a", "!t", "- a", "a: b", "{a}", "#", "'", '"', " a", "a ", "=", "\u2028"]),
)


@settings(deadline=None)
@given(st.lists(words, max_size=4), st.floats(min_value=1e-30, max_value=0.999))
def test_any_name_and_number_survives_yaml(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], x: float
) -> None:
    recipe = Recipe(
        passes=(top.PruneWeights(sparsity=x, include=tuple(names)),),
        callbacks=(("gradual_pruning", {"sparsity": x, "skip": tuple(names)}),),
    )
    path = recipe.save(tmp_path_factory.mktemp("recipe") / "recipe.yaml")
    assert load_recipe(path) == recipe
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == recipe.to_dict()  # other readers see the same


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not None"),
        ("[1]", r"not [1]"),
        ("version: 2", "version must be 1, not 2"),
        ("version: true", "version must be 1, not True"),
        ("version: '1'", "version must be 1, not '1'"),
        ("passes: []", "version must be 1, not None"),
        ("version: 1\nextra: 2", "unknown ['extra']"),
        ("version: 1\npasses: 3", "'passes' must be a list, not 3"),
        ("version: 1\npasses: {fuse_batch_norm: }", "'passes' must be a list"),
        ("version: 1\ncallbacks: gradual_pruning", "'callbacks' must be a list"),
        ("version: 1\npasses: [prune]", "no pass is named 'prune'"),
        ("version: 1\npasses: [3]", "not 3"),
        ("version: 1\npasses: [{prune_weights: {sparsity: 0.5}, fuse_batch_norm: }]", "a pass in a recipe is"),
        ("version: 1\npasses: [prune_weights: {sparsty: 0.5}]", "unknown ['sparsty']"),
        ("version: 1\npasses: [prune_weights: {sparsity: '0.5'}]", "valid number (got '0.5')"),
        ("version: 1\npasses: [prune_weights: {sparsity: .nan}]", "valid number (got '.nan')"),
        ("version: 1\npasses: [prune_weights: {sparsity: 1.5}]", "must be in [0, 1)"),
        ("version: 1\npasses: [prune_weights: 3]", "must be {option: value}"),
        ("version: 1\ncallbacks: [prune]", "no callback is named 'prune'"),
        ("version: 1\ncallbacks: [gradual_pruning: {sparsty: 0.5}]", "GradualPruning: unknown ['sparsty']"),
        ("version: 1\ncallbacks: [gradual_pruning: {sparsity: '0.5'}]", "GradualPruning: sparsity: Input should be"),
        ("version: 1\ncallbacks: [gradual_pruning: {sparsity: 1.5}]", "sparsity must be in (0, 1)"),
        ("version: 1\ncallbacks: [gradual_pruning: {sparsity: .5, skips: []}]", "GradualPruning: unknown ['skips']"),
        ("version: 1\ncallbacks: [gradual_pruning: {sparsity: .5, every: 010}]", "Epochs (got '010')"),
        ("version: 1\ncallbacks: [gradual_pruning: 3]", "must be {option: value}"),
        ("version: 1\ncallbacks: [3]", "a callback in a recipe is"),
        ("version: 1\ncallbacks: [distillation: {alpha: high}]", "Distillation: alpha: Input should be"),
        ("version: 1\nversion: 1", "the key 'version' stands twice"),
        ("version: 1\npasses: [prune_weights: {sparsity: .5, sparsity: .6}]", "the key 'sparsity' stands twice"),
        ("version: 1\n2: 3", "the key 2 is no word"),
        ("version: 1\n? [a]\n: 3", "is no word"),
        ("version: 1\npasses: &a [fuse_batch_norm]", "anchors"),
        ("version: 1\npasses: [*a]", "anchors"),
        ("version: 1\npasses: [!!python/name:os.system x]", "tags"),
        ("version: 1\npasses: !!python/object/apply:os.system [ls]", "tags"),
        ("version: 1\n---\nversion: 1", "single document"),
        ("version: [1", "expected"),
        ("version: 1\npasses: [" + "[" * 3000, "recipe.yaml: "),
    ],
)
def test_bad_yaml_is_refused_with_the_place(tmp_path: Path, text: str, says: str) -> None:
    message = refused(tmp_path, text)
    assert says in message
    assert message.startswith("recipe.yaml: ")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"version": 1, "version": 1}', "stands twice"),
        ('{"version": 1, "passes": [{"prune_weights": {"sparsity": NaN}}]}', "NaN is not allowed"),
        ('{"version": 1,}', "recipe.json"),
        ("[1]", "not [1]"),
        ('{"version": 1, "passes": ' + "[" * 100_000, "recipe.json"),
    ],
)
def test_bad_json_is_refused(tmp_path: Path, text: str, says: str) -> None:
    message = refused(tmp_path, text, "recipe.json")
    assert says in message
    assert message.startswith("recipe.json: ")


def test_bad_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(top.ConfigError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"version: 1 # \xe9")
    with pytest.raises(top.ConfigError, match="cannot be read"):
        load_recipe(tmp_path / "latin.yaml")
    with pytest.raises(top.ConfigError, match=r"\.yaml, \.yml or \.json"):
        load_recipe(write(tmp_path, "version: 1", "recipe.txt"))
    with pytest.raises(top.ConfigError, match=r"\.yaml, \.yml or \.json"):
        Recipe().save(tmp_path / "recipe.toml")
    assert not (tmp_path / "recipe.toml").exists()


def test_the_pipeline_prunes(tmp_path: Path) -> None:
    model, inputs = build("conv_residual")
    recipe = load_recipe({"version": 1, "passes": [{"prune_weights": {"sparsity": 0.5}}]})
    assert recipe.pipeline() == top.PruneWeights(sparsity=0.5)  # one pass needs no pipeline
    recipe.pipeline()(top.capture(model, inputs))
    assert float((model.fc.weight == 0).float().mean()) == 0.5


def test_callbacks_come_out_ready_to_train() -> None:
    recipe = load_recipe(
        {"version": 1, "callbacks": [{"gradual_pruning": {"sparsity": 0.75, "start": 1, "end": 2, "every": 1}}]}
    )
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = recipe.make_callbacks(), recipe.make_callbacks()
    assert first[0] is not second[0]  # a callback holds the state of one training
    with attach(model, optimizer, first, total_steps=3):
        for _ in range(3):
            model(torch.ones(2, 8)).sum().backward()
            optimizer.step()
    assert float((model.weight == 0).float().mean()) == 0.75


def test_live_things_are_given_by_name() -> None:
    recipe = load_recipe(
        {"version": 1, "callbacks": [{"distillation": {"alpha": 0.25}}, {"gradual_pruning": {"sparsity": 0.5}}]}
    )
    teacher = nn.Linear(2, 2)
    distillation, pruning = recipe.make_callbacks(teacher=teacher)
    assert isinstance(distillation, Distillation) and isinstance(pruning, GradualPruning)
    assert distillation.teacher is teacher and distillation.alpha == 0.25
    with pytest.raises(top.ConfigError, match=r"'distillation' needs teacher=: make_callbacks\(teacher=\.\.\.\)"):
        recipe.make_callbacks()
    with pytest.raises(top.ConfigError, match=r"no callback of the recipe takes \['techer'\]"):
        recipe.make_callbacks(techer=teacher)
    with pytest.raises(top.ConfigError, match=r"torch\.nn\.Module.*, not int"):
        recipe.make_callbacks(teacher=3)
    late = load_recipe({"version": 1, "callbacks": [{"distillation": {"alpha": 1.5}}]})
    with pytest.raises(top.ConfigError, match="alpha must be in"):
        late.make_callbacks(teacher=teacher)


def test_every_public_callback_is_known_and_yours_are_too() -> None:
    from torchopt_passes import callbacks
    from torchopt_passes.graph.record import snake_case

    public = [getattr(callbacks, name) for name in callbacks.__all__]
    ours = [c for c in public if isinstance(c, type) and issubclass(c, Callback) and c is not Callback]
    assert ours
    types = callback_types()
    assert all(types[snake_case(kind.__name__)] is kind for kind in ours)

    @dataclass(kw_only=True, eq=False)
    class CountMySteps(Callback):
        limit: int = 3

        def __post_init__(self) -> None:
            if self.limit < 0:
                raise ValueError("limit must not be negative")

    with pytest.raises(top.ConfigError, match="CountMySteps: limit must not be negative"):
        load_recipe({"version": 1, "callbacks": [{"count_my_steps": {"limit": -5}}]})
    recipe = load_recipe({"version": 1, "callbacks": [{"count_my_steps": {"limit": 5}}]})
    (callback,) = recipe.make_callbacks()
    assert isinstance(callback, CountMySteps) and callback.limit == 5


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    def shape(progress: float) -> float:
        return progress

    recipe = load_recipe({"version": 1, "callbacks": [{"gradual_pruning": {"sparsity": 0.5, "schedule": shape}}]})
    made: Any = recipe.make_callbacks()[0]
    assert made.schedule is shape
    with pytest.raises(top.ConfigError, match="a recipe cannot hold <function"):
        recipe.save(tmp_path / "recipe.yaml")
    assert list(tmp_path.iterdir()) == []


def test_moments_in_epochs_and_criteria_with_options(tmp_path: Path) -> None:
    text = """
version: 1
callbacks:
  - gradual_pruning:
      {sparsity: 0.8, start: {epochs: 0.5}, end: 0.7, every: {epochs: 1}, criterion: {magnitude: {dense: true}}}
  - rig_l: {sparsity: 0.9, end: {epochs: 3}, scope: uniform}
  - soft_movement_pruning: {penalty: 50.0}
"""
    recipe = load_recipe(write(tmp_path, text))
    pruning, rigl, soft = recipe.make_callbacks()
    assert isinstance(pruning, GradualPruning)
    assert (pruning.start, pruning.end, pruning.every) == (top.Epochs(0.5), 0.7, top.Epochs(1))
    assert pruning.criterion == top.Magnitude(dense=True)
    assert isinstance(rigl, top.RigL)
    assert rigl.end == top.Epochs(3)
    assert isinstance(soft, top.SoftMovementPruning)
    for name in ("again.yaml", "again.json"):
        assert load_recipe(recipe.save(tmp_path / name)).callbacks == recipe.callbacks
    for wrong, message in (
        ("{sparsity: .8, start: {epochs: -1}}", "Epochs needs a number"),
        ("{sparsity: .8, start: {epochs: two}}", "epochs: "),
        ("{sparsity: .8, start: {steps: 2}}", "GradualPruning: start: "),
        ("{sparsity: .8, criterion: {magnitude: {dens: true}}}", "magnitude: .*dens"),
        ("{sparsity: .8, criterion: {size: {}}}", "GradualPruning: criterion: "),
    ):
        with pytest.raises(top.ConfigError, match=message):
            load_recipe(write(tmp_path, f"version: 1\ncallbacks: [gradual_pruning: {wrong}]"))
    live = Recipe(callbacks=(("gradual_pruning", {"criterion": top.Snip(batches=[torch.ones(1)])}),))
    with pytest.raises(top.ConfigError, match="a recipe cannot hold"):
        live.to_dict()


def test_the_losses_of_a_distillation_are_data(tmp_path: Path) -> None:
    text = """
version: 1
callbacks:
  - distillation:
      alpha: {initial: 0.9, final: 0.1, end: {epochs: 2}}
      losses: [dkd, {hint: {weight: 0.1, layers: {"layer.{i}": "h.{i}"}, match: last}}, {jsd: {beta: 0.2}}]
      layers: [stem]
"""
    recipe = load_recipe(write(tmp_path, text))
    (callback,) = recipe.make_callbacks(teacher=nn.Linear(2, 3))
    assert isinstance(callback, Distillation)
    assert callback._losses == (
        top.DKD(),
        top.Hint(weight=0.1, layers={"layer.{i}": "h.{i}"}, match="last"),
        top.JSD(beta=0.2),
    )
    assert load_recipe(recipe.save(tmp_path / "again.json")) == recipe
    (again,) = load_recipe(
        {"version": 1, "callbacks": [{"distillation": {"teacher": "initial_weights"}}]}
    ).make_callbacks()
    assert isinstance(again, Distillation)
    bad = "version: 1\ncallbacks: [distillation: {teacher: initial_weights, losses: [{dkd: {betta: 1.0}}]}]"
    assert "DKD: unknown ['betta']" in refused(tmp_path, bad)
