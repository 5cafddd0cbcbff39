"""The teacher's logits on disk: what is kept, found again, resumed after a kill, and refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from tests.callbacks.distill_models import batch_of, bert, loss_with, padded_tokens, res_net, sentence_bert
from tests.callbacks.loops import Example, collate, images
from torchopt_passes.callbacks import DKD, Distillation, Hint, Scheduled, SoftTargets, TeacherCache, cache_teacher
from torchopt_passes.callbacks.distill.example_keys import example_keys
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.top_k import keep_top_k, top_k_divergence

DATA = padded_tokens(12)


def batches(data: list[Example], size: int = 4) -> list[Example]:
    return [collate(data[start : start + size]) for start in range(0, len(data), size)]


def llama(seed: int, width: int = 16) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def texts(count: int) -> list[Example]:
    return [dict(e, labels=torch.where(e["attention_mask"] > 0, e["input_ids"], -100)) for e in padded_tokens(count)]


@pytest.mark.parametrize("kind", ["tokens", "sentences", "images"])
def test_with_every_class_the_cache_is_the_teacher(kind: str, tmp_path: Path) -> None:
    makers: dict[str, Any] = {"tokens": bert, "sentences": sentence_bert, "images": res_net}
    data = images(8) if kind == "images" else padded_tokens(8, per_token=kind == "tokens")
    teacher = makers[kind](seed=7)
    head = teacher.fc if kind == "images" else teacher.classifier
    head.weight.data.mul_(20.0)
    cache = cache_teacher(teacher, batches(data), tmp_path, top_k=3)
    assert teacher.training  # as it was
    batch = batch_of([data[5], data[0], data[6], data[2]])
    losses: Any = [SoftTargets(), DKD(), "jsd", SoftTargets(form="ce", temperature=3.3)]
    _, live = loss_with(makers[kind](), Distillation(teacher, losses=losses), batch)
    _, cached = loss_with(makers[kind](), Distillation(cache, losses=losses), batch)
    assert cached == pytest.approx(live, rel=2e-3)  # float16
    assert live["soft_targets_loss"] > 1e-3


def test_a_language_model_keeps_the_top_k_and_the_rest(tmp_path: Path) -> None:
    teacher, data = llama(7, 32), texts(8)
    cache = cache_teacher(teacher, batches(data), tmp_path, top_k=8)
    assert len(cache) == 8
    assert cache.positions == sum(int(example["attention_mask"].sum()) for example in data)
    assert cache.size < cache.positions * (8 * 4 + 3 * 4 + 30) + 2000  # keys and ends beside 44 bytes a token
    batch = batch_of(data[3:7])
    student = llama(0)
    _, logged = loss_with(student, Distillation(cache, temperature=2.0), batch)
    with torch.no_grad():
        z_s, z_t = student(**batch).logits[:, :-1], teacher.eval()(**batch).logits[:, :-1]
    values = 4.0 * top_k_divergence(z_s, keep_top_k(z_t, 8, 2.0), 2.0)
    assert logged["kd_loss"] == pytest.approx(float(values[batch["labels"][:, 1:].ne(-100)].mean()), rel=2e-3)
    with pytest.raises(CallbackError, match=r"at temperatures \[1.0, 2.0, 4.0\], not at 3.0"):
        loss_with(student, Distillation(cache, temperature=3.0), batch)
    with pytest.raises(CallbackError, match="DKD needs the teacher's logits of all 50 classes, the cache has the 8"):
        loss_with(student, Distillation(cache, losses=[DKD()]), batch)
    with pytest.raises(ConfigError, match="Hint compares features, and there is no teacher that has them"):
        Distillation(cache, losses=[Hint(layers=("lm_head",))])
    with pytest.raises(ConfigError, match=r"keeps the rest of the classes at temperatures \[1.0, 2.0, 4.0\] alone"):
        Distillation(cache, temperature=Scheduled(initial=4.0, final=1.0))


def test_padding_on_either_side_and_other_neighbours_find_the_same_examples(tmp_path: Path) -> None:
    data = texts(6)
    cache = cache_teacher(llama(7), batches(data), tmp_path, top_k=50)
    left = []
    for example in data:
        size = int(example["attention_mask"].sum())
        left.append({name: value.roll(8 - size) for name, value in example.items()})
    shorter = [
        {name: value[:7] for name, value in example.items()} for example in data if example["attention_mask"][-1] == 0
    ]
    for other in (left[:3], shorter, data[::2]):
        loss, _ = loss_with(llama(0), Distillation(cache), batch_of(other))
        assert loss > 0.0
    without = {"input_ids": data[5]["input_ids"][None, : int(data[5]["attention_mask"].sum())]}
    without["labels"] = without["input_ids"]
    loss_with(llama(0), Distillation(cache), without)


def test_an_encoder_decoder_is_found_by_its_labels_too(tmp_path: Path) -> None:
    def t5(seed: int) -> T5ForConditionalGeneration:
        torch.manual_seed(seed)
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        config = T5Config(vocab_size=50, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
        return T5ForConditionalGeneration(config)

    data = texts(4)
    for index, example in enumerate(data):
        example["labels"] = torch.where(torch.arange(8) < 2 + index, example["labels"].clamp(min=1), -100)
    teacher, batch = t5(7), batch_of(data)
    cache = cache_teacher(teacher, batches(data), tmp_path, top_k=50)
    assert cache.info.columns == ("input_ids", "labels")
    assert cache.positions == 2 + 3 + 4 + 5
    _, live = loss_with(t5(0), Distillation(teacher), batch)
    _, cached = loss_with(t5(0), Distillation(cache), batch)
    assert cached == pytest.approx(live, rel=2e-3)
    batch["labels"] = batch["labels"].roll(1, 0)
    with pytest.raises(CallbackError, match="4 of 4 examples are not in the cache"):
        loss_with(t5(0), Distillation(cache), batch)


class Killed(nn.Module):
    """A teacher that dies after some calls."""

    def __init__(self, inside: nn.Module, calls: int) -> None:
        super().__init__()
        self.inside, self.calls, self.config = inside, calls, inside.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return self.inside(input_ids=input_ids, attention_mask=attention_mask)


def test_a_cache_that_was_broken_off_goes_on(tmp_path: Path) -> None:
    inside, straight = bert(seed=7), tmp_path / "straight"
    cache_teacher(Killed(inside, 99), batches(DATA, 2), straight, top_k=2)
    for calls in (1, 3, 4):
        folder = tmp_path / f"{calls}"
        with pytest.raises(KeyboardInterrupt):
            cache_teacher(Killed(inside, calls), batches(DATA, 2), folder, top_k=2, shard_positions=12)
        assert not (folder / "cache.json").exists() or len(TeacherCache(folder)) < len(DATA)
        teacher = Killed(inside, 99)
        cache = cache_teacher(teacher, batches(DATA, 2), folder, top_k=2, shard_positions=12)
        assert len(cache) == len(DATA)
        if calls > 1:
            assert teacher.calls > 99 - 6  # what was written is not run again
        cache.verify()
        keys = example_keys(collate(DATA), cache.info.columns)
        for one, other in zip(cache.lookup(keys), TeacherCache(straight).lookup(keys), strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
    again = Killed(inside, 0)
    assert len(cache_teacher(again, batches(DATA, 3), folder, top_k=2)) == len(DATA)  # nothing runs


def test_examples_found_by_number(tmp_path: Path) -> None:
    data = [dict(example, index=torch.tensor(number)) for number, example in enumerate(images(6))]
    teacher = res_net(seed=7)
    cache = cache_teacher(teacher, batches(data), tmp_path, top_k=3, index="index")
    assert cache.info.columns == ()
    batch = batch_of(data[:4])
    noisy = dict(batch, pixel_values=torch.zeros_like(batch["pixel_values"]))  # an augmentation
    for given in (batch, noisy):
        _, logged = loss_with(res_net(), Distillation(cache), given)
        assert logged["kd_loss"] > 0.0
    del batch["index"]
    with pytest.raises(CallbackError, match=r"finds examples by \['index'\], but the batch has"):
        loss_with(res_net(), Distillation(cache), batch)


def test_what_is_not_in_it_is_refused(tmp_path: Path) -> None:
    cache = cache_teacher(bert(seed=7), batches(DATA[:8]), tmp_path, top_k=2)
    with pytest.raises(
        CallbackError, match=r"4 of 4 examples are not in the cache .* \(8 examples, found by their inputs"
    ):
        loss_with(bert(), Distillation(cache), batch_of(DATA[8:]))
    with pytest.raises(CallbackError, match="has 4 classes, the cached teacher BertForTokenClassification 3"):
        loss_with(bert(num_labels=4), Distillation(cache), batch_of(DATA[:4]))


def test_another_teacher_or_other_options_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache_teacher(bert(seed=7), batches(DATA[:8]), folder, top_k=2)
    for teacher, options, message in (
        (bert(seed=8), {"top_k": 2}, "fingerprint"),
        (bert(seed=7), {"top_k": 3}, "top_k 3 and 2"),
        (bert(seed=7), {"top_k": 2, "temperatures": (3.0,)}, "temperatures"),
    ):
        with pytest.raises(ConfigError, match=f"another teacher or with other options: .*{message}"):
            cache_teacher(teacher, batches(DATA), folder, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="holds something else"):
        cache_teacher(bert(seed=7), batches(DATA), tmp_path, top_k=2)
    with pytest.raises(ConfigError, match="there is no teacher cache"):
        TeacherCache(tmp_path)


def test_corruption_is_an_error(tmp_path: Path) -> None:
    cache_teacher(bert(seed=7), batches(DATA), tmp_path, top_k=2)
    shard, manifest = tmp_path / "logits-00000.safetensors", tmp_path / "cache.json"
    whole, text = shard.read_bytes(), manifest.read_text()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CallbackError, match=r"corrupted \(checksum\)"):
        loss_with(bert(), Distillation(TeacherCache(tmp_path)), batch_of(DATA[:4]))
    with pytest.raises(CallbackError, match=r"corrupted \(checksum\)"):
        TeacherCache(tmp_path).verify()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="cannot be read"):
        TeacherCache(tmp_path)
    shard.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        TeacherCache(tmp_path)
    shard.write_bytes(whole)
    data = json.loads(text)

    def broken() -> Iterator[str]:
        yield text[:-5]
        yield json.dumps(data | {"format": "other"})
        yield json.dumps(data | {"more": 1})
        yield json.dumps(data | {"top_k": 9})
        yield json.dumps(data | {"top_k": "2"})
        yield json.dumps(data | {"shards": [["../logits-00000.safetensors", "", 12, 60]]})
        yield json.dumps(data | {"shards": [[*data["shards"][0][:2], 11, 60]]})

    for wrong in broken():
        manifest.write_text(wrong)
        with pytest.raises(ConfigError):
            TeacherCache(tmp_path)
    manifest.write_text(text)
    TeacherCache(tmp_path).verify()


def test_a_cache_knows_its_tokenizer(tmp_path: Path) -> None:
    """By its vocabulary: in which order a tokenizer lists it, and what class it has, do not matter."""
    table = {f"t{number}": number for number in range(50)}
    same = SimpleNamespace(get_vocab=lambda: dict(reversed(table.items())))
    teachers, other = (
        SimpleNamespace(get_vocab=lambda vocabulary=vocabulary: vocabulary)
        for vocabulary in (table, table | {"t3": 4, "t4": 3})
    )
    teacher, data = llama(7, 32), texts(4)
    cache = cache_teacher(teacher, batches(data), tmp_path / "a", top_k=8, tokenizer=teachers)
    assert cache.info.tokenizer == sha256(json.dumps(sorted(table.items())).encode()).hexdigest()
    _, checked = loss_with(llama(0), Distillation(cache, tokenizers=same), batch_of(data))
    _, unchecked = loss_with(llama(0), Distillation(cache), batch_of(data))
    assert checked == unchecked
    for given in (other, (other, other)):
        with pytest.raises(CallbackError, match="with 50 tokens is not the one that the teacher's cache was made with"):
            Distillation(cache, tokenizers=given)
    with pytest.raises(ConfigError, match="another teacher or with other options: tokenizer"):
        cache_teacher(teacher, batches(texts(8)), tmp_path / "a", top_k=8, tokenizer=other)
    silent = cache_teacher(teacher, batches(data), tmp_path / "b", top_k=8)
    Distillation(silent, tokenizers=(same, teachers))
    for nothing in (silent, teacher):
        with pytest.raises(ConfigError, match="the student's alone, and no teacher's to compare it with"):
            Distillation(nothing, tokenizers=same)
