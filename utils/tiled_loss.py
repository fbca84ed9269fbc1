"""A linear layer and cross-entropy in one on a CPU: logits in tiles of the vocabulary that stay in the processor's cache.

A product with as many columns as a vocabulary has writes logits to memory that each following operator reads and writes
again. By tiles, softmax and the gradients' products find them in the cache. On GPT-2's head this is a fifth faster than
whole logits, in training and in evaluation; an accelerator would rather have few launches: see chunked_loss, which decides.
This module knows torch only.
"""

import math

import torch

from utils import prepacked_weights

# Of a tile: with 1,024 rows in float32 8 and 6 MiB of logits. Gradients are products of tiles too, and like them wider.
COLUMNS = 2048
COLUMNS_WITHOUT_GRADIENTS = 1536


def loss_and_gradients(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    is_target: torch.Tensor,
    smoothing: float,
    chunk: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The summed cross-entropy (nats) and its gradients to rows, weight and bias, None where one is not wanted.

    rows: (n, width), float32 or float64 as weight (vocabulary, width) and bias. targets: int64 (n,), within the vocabulary.
    is_target: of rows' dtype, 1 or 0 for rows that count nowhere. chunk: rows whose logits are in memory at once.

    With z the logits, e = exp(z - max) and s their sum, d loss / d z is e / s less the targets' distribution. The products
    take e as it is: 1 / s belongs to a row, so the small sides of the products are scaled, and the targets are subtracted
    from the results.
    """
    tiles = _tiles(len(weight), COLUMNS)
    to_rows, to_weight, to_bias = wanted
    d_rows = torch.zeros_like(rows) if to_rows else None
    d_weight = torch.empty_like(weight) if to_weight else None
    d_bias = torch.zeros_like(bias) if to_bias else None
    width = weight.sum(dim=0) if smoothing and to_rows else None
    memory = [rows.new_empty(min(chunk, len(rows)), stop - start) for start, stop in tiles]
    loss = rows.new_zeros(())
    for first in range(0, len(rows), chunk):
        some, target = rows[first : first + chunk], targets[first : first + chunk]
        counts = is_target[first : first + chunk]
        logits = [tile[: len(some)] for tile in memory]
        most, mean = None, rows.new_zeros(len(some))
        for z, (start, stop) in zip(logits, tiles, strict=True):
            _product(some, weight, bias, start, stop, z)
            highest = z.amax(dim=1)
            most = highest if most is None else torch.maximum(most, highest)
            if smoothing:
                mean += z.sum(dim=1) / len(weight)
        assert most is not None
        of_target = _of_targets(some, weight, bias, target)
        total = rows.new_zeros(len(some))
        for z, (start, stop) in zip(logits, tiles, strict=True):
            total += z.sub_(most.unsqueeze(1)).exp_().sum(dim=1)
            if d_rows is not None:
                d_rows[first : first + chunk].addmm_(z, weight[start:stop])
        losses = most + total.log() - (1 - smoothing) * of_target - smoothing * mean
        loss += (losses * counts).sum()
        by_row = counts / total
        if d_rows is not None:
            d_some = d_rows[first : first + chunk].mul_(by_row.unsqueeze(1))
            d_some.sub_(weight[target] * ((1 - smoothing) * counts).unsqueeze(1))
            if smoothing:
                d_some.sub_((smoothing / len(weight)) * counts.unsqueeze(1) * width)
        if d_weight is not None:
            scaled = some * by_row.unsqueeze(1)
            for z, (start, stop) in zip(logits, tiles, strict=True):
                torch.addmm(d_weight[start:stop], z.t(), scaled, beta=1.0 if first else 0.0, out=d_weight[start:stop])
            counted = some * counts.unsqueeze(1)
            d_weight.index_add_(0, target, counted, alpha=smoothing - 1)
            if smoothing:
                d_weight.sub_((smoothing / len(weight)) * counted.sum(dim=0))
        if d_bias is not None:
            for z, (start, stop) in zip(logits, tiles, strict=True):
                d_bias[start:stop].addmv_(z.t(), by_row)
            d_bias.index_add_(0, target, counts, alpha=smoothing - 1)
            if smoothing:
                d_bias.sub_((smoothing / len(weight)) * counts.sum())
    return loss, d_rows, d_weight, d_bias


def correct_and_losses(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    chunk: int,
    packed: list[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each row's highest logit is its target's, bool (n,), and the negative log-likelihood of that (nats).

    Arguments as in loss_and_gradients; packed: what prepacked_weights makes of parts_to_pack(weight). Of equal logits the
    first is the highest, as in argmax. No more than one tile of logits is in memory.
    """
    tiles = _tiles(len(weight), COLUMNS_WITHOUT_GRADIENTS)
    memory = rows.new_empty(min(chunk, len(rows)) * tiles[0][1])
    correct, losses = [], []
    for some, target in zip(rows.split(chunk), targets.split(chunk), strict=True):
        is_highest = torch.zeros(len(some), dtype=torch.bool)
        of_target, total = some.new_empty(len(some)), some.new_zeros(len(some))
        most = some.new_full((len(some),), -math.inf)
        for i, (start, stop) in enumerate(tiles):
            if packed is not None:
                z = prepacked_weights.multiply(some, packed[i], None if bias is None else bias[start:stop])
            else:
                z = memory[: len(some) * (stop - start)].view(len(some), stop - start)
                _product(some, weight, bias, start, stop, z)
            # Only rows whose target is in this tile are searched for the place of the highest: amax is several times faster.
            highest, here = z.amax(dim=1), ((target >= start) & (target < stop)).nonzero().squeeze(1)
            own, place = z[here], target[here] - start
            of_target[here] = own.gather(1, place.unsqueeze(1)).squeeze(1)
            is_highest &= highest <= most
            is_highest[here] = (own.argmax(dim=1) == place) & (highest[here] > most[here])
            before, most = most, torch.maximum(most, highest)
            total = total * (before - most).exp() + z.sub_(most.unsqueeze(1)).exp_().sum(dim=1)
        correct.append(is_highest)
        losses.append(most + total.log() - of_target)
    return torch.cat(correct), torch.cat(losses)


def parts_to_pack(weight: torch.Tensor) -> list[torch.Tensor]:
    """The tiles of a head's weight that correct_and_losses multiplies with."""
    return [weight[start:stop] for start, stop in _tiles(len(weight), COLUMNS_WITHOUT_GRADIENTS)]


def _tiles(vocabulary: int, columns: int) -> list[tuple[int, int]]:
    return [(start, min(start + columns, vocabulary)) for start in range(0, vocabulary, columns)]


def _product(rows, weight, bias, start: int, stop: int, out: torch.Tensor) -> None:
    if bias is None:
        torch.mm(rows, weight[start:stop].t(), out=out)
    else:
        torch.addmm(bias[start:stop], rows, weight[start:stop].t(), out=out)


def _of_targets(rows, weight, bias, targets: torch.Tensor) -> torch.Tensor:
    logits = (rows * weight[targets]).sum(dim=1)
    return logits if bias is None else logits + bias[targets]
