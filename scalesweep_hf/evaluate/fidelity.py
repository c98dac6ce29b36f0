"""Perplexity, and the divergence of a quantized model from its original."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from scalesweep_hf.modules import NVFP4Linear
from scalesweep_hf.ops.nvfp4 import dequantize


@dataclass(frozen=True)
class Fidelity:
    """How a language model predicts held-out text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per predicted token.
        kl: mean KL(reference || model) in nats per position; 0 for the reference itself.
        rows: how many token rows were measured.
    """

    perplexity: float
    kl: float
    rows: int


def measure_fidelity(
    models: dict[str, Any], reference: Any, tokens: Tensor, *, batch_size: int = 4
) -> dict[str, Fidelity]:
    """Measure several versions of a causal language model against one reference on the same text.

    Logits are compared in float32, sums kept in float64. Every position of a row predicts the next
    token, so a row of length L gives L - 1 likelihoods and L divergences.

    Args:
        models: by name; each takes ``input_ids`` and returns ``logits`` [B, L, V].
        reference: the original model.
        tokens: [rows, L] integer token ids.
        batch_size: rows per forward pass.

    Returns:
        One Fidelity per model name, in order.

    Raises:
        ValueError: tokens is not [rows >= 1, L >= 2].
    """
    if tokens.ndim != 2 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise ValueError(
            f"tokens has shape {list(tokens.shape)}; expected [rows >= 1, length >= 2]"
        )
    nll = dict.fromkeys(models, 0.0)
    divergence = dict.fromkeys(models, 0.0)
    with torch.no_grad():
        for batch in tqdm(tokens.split(batch_size), desc="Measuring", unit="batch", disable=None):
            expected = _logits(reference, batch)  # [B, L, V]
            for name, model in models.items():
                actual = expected if model is reference else _logits(model, batch)
                for row, ids in enumerate(batch):  # [L, V] at a time: the logits are large
                    loss, kl = _compare(actual[row], expected[row], ids)
                    nll[name] += loss
                    divergence[name] += kl
    rows, length = tokens.shape
    return {
        name: Fidelity(
            perplexity=float(torch.tensor(nll[name] / (rows * (length - 1))).exp()),
            kl=divergence[name] / (rows * length),
            rows=rows,
        )
        for name in models
    }


def weight_error(model: nn.Module, reference: nn.Module) -> float:
    """Return sum ||W - W_q||^2 / sum ||W||^2 over the quantized Linears of a model; 0 without any.

    Args:
        model: quantized.
        reference: the original, with the same module names, on any device.
    """
    error = norm = 0.0
    for name, module in model.named_modules():
        if isinstance(module, NVFP4Linear) and module.is_packed:
            quantized = dequantize(module.quantized_weight())
            original: Tensor = reference.get_parameter(f"{name}.weight").detach().to(quantized)
            error += (original - quantized).square().sum(dtype=torch.float64).item()
            norm += original.square().sum(dtype=torch.float64).item()
    return error / norm if norm else 0.0


def _logits(model: Any, batch: Tensor) -> Tensor:
    ids = batch.to(device=model.device, dtype=torch.int64)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits  # [B, L, V]


def _compare(actual: Tensor, expected: Tensor, ids: Tensor) -> tuple[float, float]:
    """Return the negative log-likelihood of a row [L] and the divergence, summed, of [L, V]."""
    expected = functional.log_softmax(expected.float(), dim=-1)
    actual = functional.log_softmax(actual.to(expected.device).float(), dim=-1)
    chosen = actual[:-1].gather(-1, ids[1:, None].to(device=actual.device, dtype=torch.int64))
    kl = functional.kl_div(actual, expected, reduction="none", log_target=True)
    return -chosen.sum(dtype=torch.float64).item(), kl.sum(dtype=torch.float64).item()
