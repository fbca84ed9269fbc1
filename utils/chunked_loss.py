"""A linear layer and cross-entropy in one: logits are made a chunk of rows at a time and are never whole in memory.

Chunks are few and of one size, every operator is a plain one of torch's, and nothing waits for the device, so that an NPU
runs it as it is. torch's own `linear_cross_entropy` (2.13) does likewise in chunks, but has no label smoothing there, cannot
be compiled, and was slower on a CPU. Liger's waits for the device once a step, and a chunk of its logits is no larger than the
hidden states: for GPT-2 at 8x1024 that makes 64 chunks, each of which reads and writes the gradient of 50,257 x 768; ours
are four.
On a CPU a chunk's logits are made in tiles as well: see tiled_loss.
This module knows torch only.
"""

import math

import torch
from torch.nn import functional

from utils import tiled_loss
from utils.prepacked_weights import Prepacked

IGNORED = -100
# The float32 logits of one chunk, in bytes. The weight's gradient is added up once a chunk, which costs little beside the
# products if chunks are large: with 64 rows of GPT-2's 50,257 outputs a CPU took half as long again as with 512.
CHUNK_BYTES = {"cpu": 256 * 2**20}
CHUNK_BYTES_ON_A_DEVICE = 512 * 2**20
# A chunk adds up to a weight's gradient in its own type, before any loss scale: of so many rows it stays within float16.
MOST_ROWS = 4096
TILED_ON = ("cpu",)  # types of device
# Rows of logits that begin anywhere keep matrix units from their fast kernels: the head takes up to three times as long on
# CUDA (Netflix, "Scaling LLM Post-Training at Netflix", 2026), where nanoGPT's steps were a quarter faster with 50,304 words
# than with 50,257; and Ascend's read inner axes slowly that are no multiple of 512 bytes (CANN, MatMulAlignInputsFusionPass).
# So the weight is copied with rows of zeros behind it, which costs as much memory and, of GPT-2's, 0.2 GB of traffic; the
# model keeps its vocabulary.
UNALIGNED_ON = ("cpu",)
ALIGNED = 256  # elements, 512 bytes in half precision


def loss_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
) -> torch.Tensor:
    """Cross-entropy (nats) of `hidden @ weight.T + bias`, summed over all labels that are not -100: a float32 scalar.

    hidden: (..., width). weight: (vocabulary, width). bias: (vocabulary,). labels: int64 of hidden's shape without its last
    dimension. label_smoothing: as in torch's cross_entropy. chunk: rows of one chunk.

    Gradients are exact and first-order only. They are made in the forward pass, where a chunk's logits are at hand: that
    takes no product more than whole logits do. Products are of autocast's type where it is on, else of the weight's;
    the softmax and the sum of the weight's gradient over chunks are in float32 (float64 for float64).
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    chunk = chunk or chunk_rows(len(rows), len(weight), rows.device.type)
    return _LossSum.apply(
        rows, weight, bias, labels.reshape(-1), label_smoothing, chunk, _product_type(weight), torch.is_grad_enabled()
    )


@torch.no_grad()
def token_sums(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    chunk: int | None = None,
    prepacked: Prepacked | None = None,
) -> torch.Tensor:
    """Correct predictions, targets and negative log-likelihood (nats) of each sample: float32 of shape (batch, 3).

    Arguments as in loss_sum; hidden (batch, rows, width), labels (batch, rows). Positions labelled -100 count nowhere.
    prepacked: of tiled_loss.parts_to_pack(weight), for products in float32 on a CPU.
    """
    rows, flat = hidden.flatten(0, 1), labels.flatten()
    chunk = chunk or chunk_rows(len(rows), len(weight), rows.device.type)
    dtype, is_target = _product_type(weight), labels != IGNORED
    with torch.autocast(rows.device.type, enabled=False):
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        whole = (rows.to(dtype), weight, bias, flat.clamp(min=0), chunk)
        if _in_tiles(rows, dtype):
            packed = prepacked.once_it_pays(len(rows)) if prepacked is not None else None
            correct, losses = tiled_loss.correct_and_losses(*whole, packed)
        else:
            correct, losses = _correct_and_losses(*whole)
    correct, losses = correct.view_as(labels) & is_target, losses.view_as(labels) * is_target
    return torch.stack([correct.sum(1).float(), is_target.sum(1).float(), losses.sum(1).float()], dim=1)


def _correct_and_losses(rows, weight, bias, targets, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As tiled_loss.correct_and_losses, by whole chunks."""
    correct, losses = [], []
    weight, bias = _padded(weight, bias)
    for some, target in zip(rows.split(chunk), targets.split(chunk), strict=True):
        logits = functional.linear(some, weight, bias)
        correct.append(logits.argmax(dim=-1) == target)
        losses.append(functional.cross_entropy(logits.float(), target, reduction="none"))
        del logits  # before the next chunk's come
    return torch.cat(correct), torch.cat(losses)


def chunk_rows(rows: int, vocabulary: int, device_type: str) -> int:
    """The rows of one chunk: chunks are as few as memory allows, and of equal size but for the last."""
    row_bytes = 4 * aligned(vocabulary, device_type)
    most = max(1, min(MOST_ROWS, CHUNK_BYTES.get(device_type, CHUNK_BYTES_ON_A_DEVICE) // row_bytes))
    most = most // 16 * 16 or most  # what matrix units like
    chunks = max(1, math.ceil(rows / most))
    return max(1, min(most, math.ceil(rows / chunks / 16) * 16))


def aligned(vocabulary: int, device_type: str) -> int:
    """How many columns the logits of a chunk have."""
    return vocabulary if device_type in UNALIGNED_ON else math.ceil(vocabulary / ALIGNED) * ALIGNED


def _product_type(weight: torch.Tensor) -> torch.dtype:
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _in_tiles(rows: torch.Tensor, dtype: torch.dtype) -> bool:
    # A compiler makes of a chunk's operators what tiles are for, and would take long over so many of them.
    full = dtype in (torch.float32, torch.float64)
    return full and rows.device.type in TILED_ON and not torch.compiler.is_compiling()


def _loss_and_gradients(rows, weight, bias, targets, is_target, smoothing, chunk, wanted) -> tuple:
    """As tiled_loss.loss_and_gradients, by whole chunks; weights of any type, gradients to them in is_target's."""
    (to_rows, to_weight, to_bias), dtype, exact, vocabulary = wanted, rows.dtype, is_target.dtype, len(weight)
    weight, bias = _padded(weight, bias)
    d_rows = torch.empty_like(rows) if to_rows else None
    d_weight = torch.zeros_like(weight, dtype=exact) if to_weight else None
    d_bias = torch.zeros_like(bias, dtype=exact) if to_bias else None
    # Label smoothing takes as much from the gradient of each logit: it is taken from the products, which are smaller.
    even = smoothing / vocabulary
    even_of_rows = (even * weight.sum(dim=0, dtype=exact)).to(dtype) if smoothing and to_rows else None
    is_target_in_type = is_target.to(dtype)
    losses = []
    for start in range(0, len(rows), chunk):
        some, counts = rows[start : start + chunk], is_target_in_type[start : start + chunk]
        column = targets[start : start + chunk].unsqueeze(1)
        logits = functional.linear(some, weight, bias)
        log_p = functional.log_softmax(logits, dim=-1, dtype=exact)
        of_targets = log_p.gather(1, column)
        loss = -of_targets.squeeze(1)
        if smoothing:
            loss = (1 - smoothing) * loss - smoothing * log_p[:, :vocabulary].mean(dim=1)
        losses.append(loss * counts)
        del log_p  # before the gradient comes
        if not any(wanted):
            continue
        # Rows that are no targets are zeroed in what is multiplied with it, which is smaller.
        gradient = _d_logits(logits, column, of_targets, 1 - smoothing)
        del logits
        if d_bias is not None:
            d_bias.add_((counts.unsqueeze(0) @ gradient).squeeze(0))
        if d_rows is not None:
            d_some = gradient @ weight
            if even_of_rows is not None:
                d_some.sub_(even_of_rows)
            d_rows[start : start + chunk] = d_some.mul_(counts.unsqueeze(1))
        if d_weight is not None:
            targets_only = some * counts.unsqueeze(1)
            if dtype == exact:
                d_weight.addmm_(gradient.t(), targets_only)
            else:
                d_weight.add_(gradient.t() @ targets_only)
        del gradient  # before the next chunk's logits come
    if smoothing and d_weight is not None:
        d_weight.sub_(even * (rows * is_target.unsqueeze(1)).sum(dim=0))
    if smoothing and d_bias is not None:
        d_bias.sub_(even * is_target.sum())
    return (
        torch.cat(losses).sum(),
        d_rows,
        None if d_weight is None else d_weight[:vocabulary],
        None if d_bias is None else d_bias[:vocabulary],
    )


def _d_logits(logits, column, of_targets, share: float) -> torch.Tensor:
    """d loss / d logits without label smoothing's even part, in their type: p, less `share` at the targets.

    column: int64 (rows, 1), the targets. of_targets: their log p, (rows, 1) in float32 or float64.
    """
    if torch.compiler.is_compiling():
        # One kernel from logits to gradient. A scatter would be a second, and the chunk be written in float32 for it.
        p = functional.log_softmax(logits, dim=-1, dtype=of_targets.dtype).exp()  # shares no exponential with the loss
        places = torch.arange(logits.shape[1], device=logits.device)
        return torch.where(places == column, p - share, p).to(logits.dtype)
    p = functional.softmax(logits, dim=-1)  # rounded once: its arithmetic is in float32
    return p.scatter_(1, column, (of_targets.exp() - share).to(p.dtype))


def _padded(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both with as many outputs as `aligned` has; those beyond the vocabulary get no probability, and so no gradient.

    As they are where nothing is to be added.
    """
    more = aligned(len(weight), weight.device.type) - len(weight)
    if not more:
        return weight, bias
    if bias is None:
        bias = weight.new_zeros(len(weight))
    # Not -inf, which Ascend's older cores do not know in float16. By the bias, for it costs no operator of its own.
    bias = functional.pad(bias, (0, more), value=torch.finfo(bias.dtype).min)
    return functional.pad(weight, (0, 0, 0, more)), bias


class _LossSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, smoothing, chunk, dtype, with_gradients):
        wanted = tuple(with_gradients and needed for needed in ctx.needs_input_grad[:3])
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        with torch.autocast(hidden.device.type, enabled=False):
            loss, *gradients = (tiled_loss.loss_and_gradients if _in_tiles(hidden, dtype) else _loss_and_gradients)(
                hidden.to(dtype),
                weight.to(dtype),
                None if bias is None else bias.to(dtype),
                labels.clamp(min=0),
                (labels != IGNORED).to(exact),
                smoothing,
                chunk,
                wanted,
            )
        ctx.types = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        # In place: a second backward through the same loss is an error of torch's, as for any freed graph.
        scaled = (
            None if saved is None else saved.mul_(grad_output).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.types, strict=True)
        )
        return *scaled, None, None, None, None, None
