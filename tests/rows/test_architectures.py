"""Rows of real architectures, small and randomly initialized, used plainly: every parameter trained, float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.reference import assert_rows_close, assert_scaled_close, flat, rows_by_grad
from torch import Tensor, nn

import rowgrad as rg

transformers = pytest.importorskip("transformers")

B, T, VOCABULARY = 3, 6, 19


@dataclass(frozen=True)
class Architecture:
    """How to build a model and its losses; `dropout` where the configuration's own is kept."""

    build: Callable[[], nn.Module]
    losses: Callable[[nn.Module], Tensor]
    rtol: float = 1e-10
    dtype: torch.dtype = torch.float64
    dropout: bool = False


def ids(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape or (B, T), generator=torch.Generator().manual_seed(1))


def floats(*shape: int) -> Tensor:
    return torch.randn(B, *shape, generator=torch.Generator().manual_seed(2))


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def next_token(model: nn.Module) -> Tensor:
    """One loss an example: the mean over its tokens, some of them padding on the right."""
    x = ids()
    mask = torch.arange(T) < torch.tensor([T, T - 2, T]).unsqueeze(1)
    logits = model(input_ids=x, attention_mask=mask.long(), use_cache=False).logits
    token_losses = F.cross_entropy(logits[:, :-1].mT, x[:, 1:], reduction="none")
    return rg.per_example(token_losses, mask[:, 1:])


def next_token_without_padding(model: nn.Module) -> Tensor:
    x = ids()
    logits = model(input_ids=x, use_cache=False).logits
    return rg.per_example(F.cross_entropy(logits[:, :-1].mT, x[:, 1:], reduction="none"))


def masked_token(model: nn.Module) -> Tensor:
    x = ids()
    logits = model(input_ids=x.masked_fill(torch.arange(T) % 3 == 0, 1)).logits
    return rg.per_example(F.cross_entropy(logits.mT, x, reduction="none"), torch.arange(T) % 3 == 0)


def class_of_sentence(model: nn.Module) -> Tensor:
    logits = model(input_ids=ids()).logits
    return F.cross_entropy(logits, torch.arange(B) % logits.shape[1], reduction="none")


def class_of_image(model: nn.Module) -> Tensor:
    logits = model(pixel_values=floats(3, 8, 8).to(dtype_of(model))).logits
    return F.cross_entropy(logits, torch.arange(B) % logits.shape[1], reduction="none")


def translation(model: nn.Module) -> Tensor:
    x, y = ids(), ids(B, T - 1)
    logits = model(input_ids=x, decoder_input_ids=y, use_cache=False).logits
    return rg.per_example(F.cross_entropy(logits[:, :-1].mT, y[:, 1:], reduction="none"))


def transcription(model: nn.Module) -> Tensor:
    y = ids(B, T - 1)
    logits = model(input_features=floats(8, 16).to(dtype_of(model)), decoder_input_ids=y, use_cache=False).logits
    return rg.per_example(F.cross_entropy(logits[:, :-1].mT, y[:, 1:], reduction="none"))


def image_and_text(model: nn.Module) -> Tensor:
    """The contrastive loss within the batch: every example meets every other."""
    logits = model(input_ids=ids(), pixel_values=floats(3, 8, 8).to(dtype_of(model))).logits_per_image
    return F.cross_entropy(logits, torch.arange(B), reduction="none")


def make(config: str, model: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return build


TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = TEXT | {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = BERT | {"num_key_value_heads": 1, "head_dim": 4}
MIXTRAL = LLAMA | {"num_local_experts": 3, "num_experts_per_tok": 2, "router_jitter_noise": 0.0}
GPT2 = TEXT | {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
GPT2_DRY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
VIT = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
}
MAMBA = TEXT | {"hidden_size": 8, "state_size": 3, "num_hidden_layers": 2, "conv_kernel": 2, "time_step_rank": 2}
T5 = TEXT | {
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
WHISPER = TEXT | {
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "num_mel_bins": 8,
    "max_source_positions": 8,
    "max_target_positions": 8,
    "decoder_start_token_id": 1,
    "dropout": 0.0,
}
DISTIL = TEXT | {
    "dim": 8,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 12,
    "max_position_embeddings": 16,
    "num_labels": 3,
}
DISTIL_DRY = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
CLIP_TOWER = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP = {
    "text_config": TEXT | CLIP_TOWER | {"max_position_embeddings": 16, "projection_dim": 4},
    "vision_config": CLIP_TOWER | {"image_size": 8, "patch_size": 4, "projection_dim": 4},
    "projection_dim": 4,
}
RESNET = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "num_labels": 3, "layer_type": "basic"}

ARCHITECTURES = {
    "gpt2": Architecture(make("GPT2Config", "GPT2LMHeadModel", **GPT2, **GPT2_DRY), next_token),
    "gpt2, dropout": Architecture(make("GPT2Config", "GPT2LMHeadModel", **GPT2), next_token, dropout=True),
    "gpt2, eager": Architecture(
        make("GPT2Config", "GPT2LMHeadModel", **GPT2, **GPT2_DRY, attn_implementation="eager"), next_token
    ),
    "bert": Architecture(make("BertConfig", "BertForMaskedLM", **BERT, **DRY), masked_token),
    "bert, classes, dropout": Architecture(
        make("BertConfig", "BertForSequenceClassification", **BERT), class_of_sentence, dropout=True
    ),
    "albert": Architecture(
        make("AlbertConfig", "AlbertForMaskedLM", **BERT, **DRY, embedding_size=5, num_hidden_groups=1), masked_token
    ),
    "distilbert": Architecture(
        make("DistilBertConfig", "DistilBertForSequenceClassification", **DISTIL, **DISTIL_DRY), class_of_sentence
    ),
    "llama": Architecture(make("LlamaConfig", "LlamaForCausalLM", **LLAMA), next_token),
    "qwen2, tied": Architecture(make("Qwen2Config", "Qwen2ForCausalLM", **LLAMA, tie_word_embeddings=True), next_token),
    "mixtral": Architecture(
        make("MixtralConfig", "MixtralForCausalLM", **MIXTRAL, experts_implementation="eager"), next_token
    ),
    "mixtral, batched experts": Architecture(
        make("MixtralConfig", "MixtralForCausalLM", **MIXTRAL, experts_implementation="batched_mm"), next_token
    ),
    "mixtral, grouped experts": Architecture(
        make("MixtralConfig", "MixtralForCausalLM", **MIXTRAL, experts_implementation="grouped_mm"),
        next_token,
        dtype=torch.float32,
        rtol=2e-5,
    ),
    "t5": Architecture(make("T5Config", "T5ForConditionalGeneration", **T5), translation),
    "whisper": Architecture(make("WhisperConfig", "WhisperForConditionalGeneration", **WHISPER), transcription),
    "mamba": Architecture(  # its scan casts to float32 whatever the model's dtype
        make("MambaConfig", "MambaForCausalLM", **MAMBA), next_token_without_padding, rtol=1e-6
    ),
    "vit": Architecture(make("ViTConfig", "ViTForImageClassification", **VIT, **DRY), class_of_image),
    "clip": Architecture(make("CLIPConfig", "CLIPModel", **CLIP), image_and_text),
    "resnet, training": Architecture(make("ResNetConfig", "ResNetForImageClassification", **RESNET), class_of_image),
}
COUPLED = {"clip", "resnet, training"}
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def prepared(name: str) -> tuple[nn.Module, Callable[[], Tensor], float]:
    """The model in training mode, its losses by a fresh and repeatable forward pass, and the tolerance."""
    architecture = ARCHITECTURES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = architecture.build().to(architecture.dtype).train().requires_grad_(True)

    def losses() -> Tensor:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(3)
            return architecture.losses(model)

    return model, losses, architecture.rtol


def jacobian(losses: Tensor, model: nn.Module, **options: Any) -> rg.Jacobian:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rg.RowgradWarning)
        return rg.jacobian(losses, model, **options)


@each_architecture
def test_rows_are_the_gradients_of_each_loss(name: str, leaves_nothing_behind: Any) -> None:
    model, losses_of, rtol = prepared(name)
    params = dict(model.named_parameters())
    losses = losses_of()
    assert losses.shape == (B,)
    rows = rows_by_grad(losses, params)
    norms = flat(rows).norm(dim=1)
    with leaves_nothing_behind(model, losses):
        J = jacobian(losses, model)
        assert_rows_close(J.dense(as_dict=True), rows, rtol)
    assert_scaled_close(J.norms(), norms, norms, rtol)
    for p, found in J.norms("parameter").items():
        assert_scaled_close(found, flat({p: rows[p]}).norm(dim=1), norms, rtol)
    assert_scaled_close(J.gram(), flat(rows) @ flat(rows).T, torch.outer(norms, norms), rtol)
    c = torch.tensor([0.5, -1.0, 2.0], dtype=losses.dtype)
    expected = {p: torch.einsum("b,b...->...", c.double(), r.double()) for p, r in rows.items()}
    J.backward(c)
    for p, v in params.items():
        found = torch.zeros_like(v) if v.grad is None else v.grad
        assert_scaled_close(found, expected[p], (c.abs() * norms).sum(), rtol)


@each_architecture
def test_a_second_call_and_streamed_norms(name: str) -> None:
    model, losses_of, rtol = prepared(name)
    rows = rows_by_grad(losses_of(), dict(model.named_parameters()))
    norms = flat(rows).norm(dim=1)
    for verify in ("cached", "cached", "always"):
        assert_rows_close(jacobian(losses_of(), model, verify=verify).dense(as_dict=True), rows, rtol)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rg.RowgradWarning)
        assert_scaled_close(rg.grad_norms(losses_of(), model), norms, norms, rtol)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - COUPLED))
def test_independent_architectures_take_rules(name: str) -> None:
    model, losses_of, _ = prepared(name)
    J = jacobian(losses_of(), model)
    assert J.couplings == ()
    assert J.explain().slow_uses() == []


@pytest.mark.parametrize("name", sorted(COUPLED))
def test_coupled_architectures_say_so(name: str) -> None:
    model, losses_of, _ = prepared(name)
    assert len(jacobian(losses_of(), model).couplings) > 0


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_gradient_checkpointing(name: str) -> None:
    model, losses_of, rtol = prepared(name)
    rows = rows_by_grad(losses_of(), dict(model.named_parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the method was renamed
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_rows_close(jacobian(losses_of(), model).dense(as_dict=True), rows, rtol)


def test_the_explanation_of_a_small_gpt2_fits_a_screen() -> None:
    model, losses_of, _ = prepared("gpt2")
    text = str(jacobian(losses_of(), model).explain())
    assert all(name in text for name, _ in model.named_parameters())
    assert len(text.splitlines()) < 60
