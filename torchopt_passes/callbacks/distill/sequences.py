"""Sequence-level distillation: what a teacher writes becomes the data that a student learns from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from torchopt_passes.callbacks.distill.inputs import to_model
from torchopt_passes.callbacks.distill.vocabulary import check_tokenizers
from torchopt_passes.callbacks.items import IGNORE_INDEX
from torchopt_passes.callbacks.student import unwrap
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.graph.verify import in_eval_mode
from torchopt_passes.progress import track

__all__ = ["teacher_sequences"]


def teacher_sequences(
    teacher: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    tokenizers: tuple[Any, Any] | None = None,
    **generate: Any,
) -> list[dict[str, torch.Tensor]]:
    """Let a teacher answer prompts, and return its answers as examples to train a student on.

    Args:
        teacher: a model of Transformers that generates; it runs in eval mode on its own device.
        batches: of prompts: ``input_ids`` and ``attention_mask``; padded on the left for a model without an encoder.
        tokenizers: those of student and teacher, to refuse different ones.
        **generate: options of ``teacher.generate``, such as ``max_new_tokens=64, num_beams=5``.

    Returns:
        One example for each prompt, without padding, on the CPU. Without an encoder ``input_ids`` is prompt and answer,
        and ``labels`` the same with -100 for the prompt; with one ``input_ids`` is the prompt and ``labels`` the
        answer. The end-of-sequence token is part of the answer. Pad them with a collator such as
        ``DataCollatorForSeq2Seq``.

    Raises:
        ConfigError: the teacher does not generate, or a batch has no ``input_ids``.
        CallbackError: the tokenizers differ, or the prompts are padded on the right.

    Source:
        Kim and Rush 2016, "Sequence-Level Knowledge Distillation", section 3.2: the mode of the teacher's distribution,
        by beam search, in the place of the data.
    """
    if tokenizers is not None:
        check_tokenizers(*tokenizers)
    model: Any = unwrap(teacher)
    if not hasattr(model, "generate"):
        raise ConfigError(f"{type(model).__name__} does not generate: give a language model of Transformers")
    encoder = bool(getattr(model.config, "is_encoder_decoder", False))
    end = _end_tokens(model)
    found: list[dict[str, torch.Tensor]] = []
    with in_eval_mode(model):
        for batch in track(batches, "Asking the teacher"):
            if "input_ids" not in batch:
                raise ConfigError(f"a batch of prompts needs input_ids, it has {sorted(batch)}")
            prompts: torch.Tensor = batch["input_ids"]
            mask: torch.Tensor = batch.get("attention_mask", torch.ones_like(prompts)).ne(0)
            if not encoder and not bool(mask[:, -1].all()):
                raise CallbackError(
                    'the prompts are padded on the right, where the answer goes: tokenizer.padding_side = "left"'
                )
            inputs = to_model({"input_ids": prompts, "attention_mask": mask.long()}, model.device, None)
            written = model.generate(**inputs, **generate).cpu()
            answers = written[:, 1:] if encoder else written[:, prompts.shape[1] :]
            for prompt, kept, answer in zip(prompts.cpu(), mask.cpu(), answers, strict=True):
                found.append(_example(prompt[kept], _until_end(answer, end), encoder))
    return found


def _example(prompt: torch.Tensor, answer: torch.Tensor, encoder: bool) -> dict[str, torch.Tensor]:
    whole = prompt if encoder else torch.cat((prompt, answer))
    labels = answer if encoder else torch.cat((torch.full_like(prompt, IGNORE_INDEX), answer))
    return {"input_ids": whole, "attention_mask": torch.ones_like(whole), "labels": labels}


def _until_end(answer: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Return an answer up to its first end token, that one included; what follows is padding."""
    places = torch.isin(answer, end).nonzero()
    return answer[: int(places[0]) + 1] if len(places) else answer


def _end_tokens(model: Any) -> torch.Tensor:
    given = model.generation_config.eos_token_id
    return torch.tensor([] if given is None else given, dtype=torch.long).reshape(-1)
