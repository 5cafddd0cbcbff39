"""Every family of Transformers models that capture takes: tiny configurations, random weights, inputs of any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

__all__ = ["MODELS", "HFModel", "labels_of"]

Inputs = dict[str, Any]
VOCABULARY = 99


@dataclass(frozen=True)
class HFModel:
    """A tiny model of one family.

    Args:
        build: makes the model (random weights of the current seed).
        inputs: makes the inputs of a batch size and a length: tokens, audio samples, or pixels of an image's side.
        length: the usual length.
        other: another length that the same model takes; equal to `length` where the architecture fixes it.
        drops: whether the configuration has dropout of any kind.
        refused: what the `CaptureError` says (a pattern), for what cannot be captured.
        reason: why it cannot, and what to do, in the user's words.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    length: int = 8
    other: int = 11
    drops: bool = True
    refused: str = ""
    reason: str = ""

    def case(self, batch: int, *, other: bool = False) -> tuple[tuple[Any, ...], Inputs]:
        """Return the arguments of a call: the same for the same batch size and length."""
        torch.manual_seed(100 + batch)
        return (), self.inputs(batch, self.other if other else self.length)


def labels_of(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the labels that the model's forward takes."""
    from transformers.utils import find_labels

    return tuple(find_labels(type(model)))


def _transformers(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _build(config: str, model: str, **options: Any) -> nn.Module:
    return _transformers(model)(_transformers(config)(**options))


def _tokens(batch: int, length: int, *, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length))


def _mask(batch: int, length: int) -> torch.Tensor:
    """Return an attention mask whose rows end in padding, the first excepted."""
    kept = length - torch.arange(batch) % 3
    return (torch.arange(length) < kept[:, None]).long()


def _ignore_padding(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return tokens.masked_fill(mask == 0, -100)


def _text(batch: int, length: int, labels: str) -> Inputs:
    inputs: Inputs = {"input_ids": _tokens(batch, length), "attention_mask": _mask(batch, length)}
    if labels == "class":
        inputs["labels"] = torch.randint(0, 2, (batch,))
    elif labels == "token":
        inputs["labels"] = _ignore_padding(torch.randint(0, 2, (batch, length)), inputs["attention_mask"])
    elif labels == "span":
        inputs["start_positions"] = torch.randint(0, length, (batch,))
        inputs["end_positions"] = torch.randint(0, length, (batch,))
    else:
        inputs["labels"] = _ignore_padding(inputs["input_ids"], inputs["attention_mask"])
    return inputs


def _encoder_decoder(batch: int, length: int) -> Inputs:
    return {
        "input_ids": _tokens(batch, length),
        "attention_mask": _mask(batch, length),
        "labels": _tokens(batch, length - 2),
    }


def _image(batch: int, side: int, *, labels: str = "class") -> Inputs:
    inputs: Inputs = {"pixel_values": torch.randn(batch, 3, side, side)}
    if labels == "class":
        inputs["labels"] = torch.randint(0, 2, (batch,))
    elif labels == "pixel":
        inputs["labels"] = torch.randint(0, 3, (batch, side, side))
    elif labels == "patch":
        inputs["bool_masked_pos"] = torch.rand(batch, (side // 8) ** 2) < 0.4
    return inputs


def _clip(batch: int, length: int) -> Inputs:
    ids = _tokens(batch, length)
    ids[:, -1] = VOCABULARY - 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
        "pixel_values": torch.randn(batch, 3, 32, 32),
        "return_loss": True,
    }


def _speech(batch: int, frames: int) -> Inputs:
    return {"input_features": torch.randn(batch, 16, 64), "labels": _tokens(batch, frames)}


def _waveform(batch: int, samples: int, *, labels: str) -> Inputs:
    inputs: Inputs = {"input_values": torch.randn(batch, samples)}
    if labels == "class":
        inputs["labels"] = torch.randint(0, 2, (batch,))
    elif labels == "ctc":
        inputs["labels"] = torch.randint(1, 30, (batch, 3))
    return inputs


_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}
_BERT = {**_SIZES, "max_position_embeddings": 40}
_DECODER = {**_SIZES, "num_key_value_heads": 2, "max_position_embeddings": 40, "pad_token_id": 0}
_GEMMA = {**_DECODER, "head_dim": 4, "sliding_window": 8}
_VIT: dict[str, Any] = {
    **{k: v for k, v in _SIZES.items() if k != "vocab_size"},
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 2,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
_WAV2VEC2 = {
    **_SIZES,
    "vocab_size": 32,
    "conv_dim": (8, 8),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "layerdrop": 0.0,
}


def _model(
    config: str, model: str, inputs: Callable[[int, int], Inputs], options: dict[str, Any], **facts: Any
) -> HFModel:
    return HFModel(partial(_build, config, model, **options), inputs, **facts)


def _texts(kind: str) -> Callable[[int, int], Inputs]:
    return partial(_text, labels=kind)


_fixed = {"length": 32, "other": 32}
_deberta = {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}

MODELS: dict[str, HFModel] = {
    "bert": _model("BertConfig", "BertForSequenceClassification", _texts("class"), _BERT),
    "bert_mlm": _model("BertConfig", "BertForMaskedLM", _texts("lm"), _BERT),
    "bert_token": _model("BertConfig", "BertForTokenClassification", _texts("token"), _BERT),
    "bert_qa": _model("BertConfig", "BertForQuestionAnswering", _texts("span"), _BERT),
    "roberta": _model("RobertaConfig", "RobertaForSequenceClassification", _texts("class"), _BERT),
    "distilbert": _model(
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        _texts("class"),
        {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 32},
    ),
    "albert": _model(
        "AlbertConfig",
        "AlbertForSequenceClassification",
        _texts("class"),
        {**_BERT, "embedding_size": 8, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    ),
    "electra": _model(
        "ElectraConfig", "ElectraForSequenceClassification", _texts("class"), {**_BERT, "embedding_size": 8}
    ),
    "deberta_v2": _model(
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        _texts("class"),
        {**_deberta, "problem_type": "single_label_classification"},
    ),
    "deberta_v2_no_problem_type": _model(
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        _texts("class"),
        _deberta,
        refused=r"data-dependent.*|label_index",
        reason="its loss looks at the labels' values in Python; set config.problem_type",
    ),
    "gpt2": _model(
        "GPT2Config",
        "GPT2LMHeadModel",
        _texts("lm"),
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 40},
    ),
    "opt": _model(
        "OPTConfig",
        "OPTForCausalLM",
        _texts("lm"),
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 32,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 40,
        },
    ),
    "llama": _model("LlamaConfig", "LlamaForCausalLM", _texts("lm"), {**_DECODER, "attention_dropout": 0.1}),
    "mistral": _model("MistralConfig", "MistralForCausalLM", _texts("lm"), _DECODER, drops=False),
    "qwen3": _model("Qwen3Config", "Qwen3ForCausalLM", _texts("lm"), {**_DECODER, "head_dim": 4}, drops=False),
    "gemma2": _model("Gemma2Config", "Gemma2ForCausalLM", _texts("lm"), _GEMMA, drops=False),
    "phi3": _model("Phi3Config", "Phi3ForCausalLM", _texts("lm"), {**_DECODER, "resid_pdrop": 0.1, "embd_pdrop": 0.1}),
    "t5": _model(
        "T5Config",
        "T5ForConditionalGeneration",
        _encoder_decoder,
        {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0},
    ),
    "bart": _model(
        "BartConfig",
        "BartForConditionalGeneration",
        _encoder_decoder,
        {**_SEQ2SEQ, "max_position_embeddings": 40, "attention_dropout": 0.1},
    ),
    "vit": _model("ViTConfig", "ViTForImageClassification", _image, _VIT, **_fixed),
    "deit": _model("DeiTConfig", "DeiTForImageClassification", _image, _VIT, **_fixed),
    "swin": _model(
        "SwinConfig",
        "SwinForImageClassification",
        _image,
        {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
        | {"num_labels": 2, "drop_path_rate": 0.2},
        **_fixed,
    ),
    "beit": _model("BeitConfig", "BeitForImageClassification", _image, {**_VIT, "drop_path_rate": 0.2}, **_fixed),
    "dinov2": _model("Dinov2Config", "Dinov2ForImageClassification", _image, {**_VIT, "drop_path_rate": 0.2}, **_fixed),
    "convnext": _model(
        "ConvNextConfig",
        "ConvNextForImageClassification",
        _image,
        {"depths": [1, 2], "hidden_sizes": [8, 16], "num_stages": 2, "drop_path_rate": 0.5, "num_labels": 2}
        | {"layer_scale_init_value": 1.0},
        **_fixed,
    ),
    "clip": _model(
        "CLIPConfig",
        "CLIPModel",
        _clip,
        {
            "text_config": {**_BERT, "attention_dropout": 0.1, "eos_token_id": VOCABULARY - 1},
            "vision_config": {**_VIT, "attention_dropout": 0.1},
            "projection_dim": 8,
        },
    ),
    "whisper": _model(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        _speech,
        {
            **_SEQ2SEQ,
            "num_mel_bins": 16,
            "max_source_positions": 32,
            "max_target_positions": 32,
            "decoder_start_token_id": 1,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
            "dropout": 0.1,
        },
    ),
    "wav2vec2": _model(
        "Wav2Vec2Config",
        "Wav2Vec2ForSequenceClassification",
        partial(_waveform, labels="class"),
        {**_WAV2VEC2, "num_labels": 2},
        length=800,
        other=960,
    ),
    "wav2vec2_ctc": _model(
        "Wav2Vec2Config",
        "Wav2Vec2ForCTC",
        partial(_waveform, labels=""),
        _WAV2VEC2,
        length=800,
        other=960,
    ),
    "wav2vec2_ctc_loss": _model(
        "Wav2Vec2Config",
        "Wav2Vec2ForCTC",
        partial(_waveform, labels="ctc"),
        _WAV2VEC2,
        length=800,
        other=960,
        refused=r"labels\.max\(\)",
        reason="its loss looks at the labels' values in Python; capture without labels, compute the CTC loss outside",
    ),
    "wav2vec2_layerdrop": _model(
        "Wav2Vec2Config",
        "Wav2Vec2ForSequenceClassification",
        partial(_waveform, labels="class"),
        {**_WAV2VEC2, "layerdrop": 0.1},
        length=800,
        other=960,
        refused="layerdrop=0",
        reason="layers are dropped by a random number in Python; set config.layerdrop=0",
    ),
    "wav2vec2_spec_augment": _model(
        "Wav2Vec2Config",
        "Wav2Vec2ForSequenceClassification",
        partial(_waveform, labels="class"),
        {**_WAV2VEC2, "mask_time_prob": 0.5, "mask_time_length": 2},
        length=800,
        other=960,
        refused="mask_time_prob=0",
        reason="SpecAugment draws its masks with numpy; set config.mask_time_prob=0 and mask_feature_prob=0",
    ),
    "segformer": _model(
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        partial(_image, labels="pixel"),
        {"depths": [1, 1], "hidden_sizes": [8, 16], "num_encoder_blocks": 2, "num_attention_heads": [1, 2]}
        | {"sr_ratios": [4, 2], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
        | {"decoder_hidden_size": 8, "num_labels": 3, "drop_path_rate": 0.2},
        **_fixed,
    ),
    "resnet": _model(
        "ResNetConfig",
        "ResNetForImageClassification",
        _image,
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 2},
        length=32,
        other=32,
        drops=False,
    ),
}
"""name -> model; every one of them must capture, or be on the documented list of those that cannot."""
