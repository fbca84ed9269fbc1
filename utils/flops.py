"""The floating point operations that a model needs, counted from the model itself.

Counted are matrix products, as everywhere where MFU is given (PaLM, arXiv:2204.02311, appendix B): two operations for each
multiplication with its addition. What counts is the model as transformers has it, with all its positions: attention is
counted in full, the head for each position, XLNet's query stream for each row. Who computes less with the same result
(a head for the predicted positions only, a causal mask whose half is skipped) has a higher MFU, and who computes more
(activation checkpointing) a lower one.
"""

import copy
import logging
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFlops:
    """Floating point operations of a forward and a backward pass: for L tokens per_token * L + per_pair * L * L."""

    per_token: float
    per_pair: float

    def __call__(self, sequences: int, length: int) -> float:
        return sequences * (self.per_token * length + self.per_pair * length * length)


def count_model_flops(model: PreTrainedModel) -> ModelFlops | None:
    """Counts a new model of the same class and configuration, on a device that only knows shapes.

    Two lengths give both factors. None, and a line in the log, for a model that cannot be made or run that way.
    """
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # the attention whose products are all seen
    config.use_cache = False
    long = min(64, _positions(config) // 2 * 2)
    try:
        with torch.device("meta"):
            bare = type(model)(config).to("meta").eval()  # XLNet makes some of its weights where it likes
            half, whole = (_count(bare, length) for length in (long // 2, long))
    except Exception as error:  # whatever a model of the hub's raises
        logger.info("the FLOPs of %s cannot be counted, so there is no MFU: %s", type(model).__name__, error)
        return None
    per_pair = 2 * (whole - 2 * half) / long**2
    return ModelFlops(per_token=whole / long - per_pair * long, per_pair=per_pair)


def _positions(config) -> int:
    known = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    return min([64, *(count - 2 for count in known if isinstance(count, int) and count > 3)])


def _count(model: PreTrainedModel, length: int) -> int:
    inputs = {"input_ids": torch.zeros(1, length, dtype=torch.int64)}
    if model.config.model_type == "xlnet":
        inputs |= {"perm_mask": torch.zeros(1, length, length), "target_mapping": torch.zeros(1, length, length)}
    elif model.config.model_type != "openai-gpt":
        # A whole mask is taken as it is. Without one, or with a row of it, most would look at values, and there are none.
        inputs["attention_mask"] = torch.zeros(1, 1, length, length)
    with _Counter() as counter:
        model(**inputs)["logits"].sum().backward()
    return counter.total


class _Counter(TorchDispatchMode):
    """Adds up what torch's own formulas give for each operator."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        if function._overloadpacket in flop_registry:
            self.total += flop_registry[function._overloadpacket](*arguments, **(named or {}), out_val=result)
        return result
