"""A Trainer of one objective: its loss, and its evaluation, which keeps no logits.

Both are sums over the predicted tokens of a batch. The loss divides its sum by the targets of all micro-batches; the
evaluation adds up three numbers on the device, whatever the size of the validation text.
"""

from collections.abc import Callable

import torch
from transformers import Trainer

from utils.errors import UsageError
from utils.metrics import RunningSums, TokenAccuracy


class ObjectiveTrainer(Trainer):
    """Trainer whose model or whose functions give sums.

    loss_sum: (logits, labels, label_smoothing) -> the summed loss of a batch whose logits are its predicted rows only.
        None: the model computes its loss.
    token_sums: (logits, labels) -> float32 of shape (batch, 3), each sample's correct predictions, targets and negative
        log-likelihood: the objective's evaluation.
    head_gives_sums: the model gives both itself, in place of logits: see chunked_head.give_sums.
    """

    def __init__(
        self,
        *arguments,
        loss_sum: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] | None = None,
        token_sums: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        head_gives_sums: bool = False,
        **named,
    ):
        self.head_gives_sums = head_gives_sums
        self.loss_sum = loss_sum
        self.token_sums = token_sums
        self.running_sums: RunningSums | None = None
        self.evaluated_samples = 0
        self.evaluates_stream = False
        super().__init__(*arguments, **named)
        if loss_sum is not None or head_gives_sums:
            self.model_accepts_loss_kwargs = True  # compute_loss divides by the targets of all micro-batches

    # ---- loss ----
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.loss_sum is None and not self.head_gives_sums:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        if self.head_gives_sums or self.loss_sum is None:
            outputs = model(**inputs, targets=labels)
            loss_sum = outputs["logits"]
        else:
            outputs = model(**inputs)
            loss_sum = self.loss_sum(outputs["logits"], labels, self.args.label_smoothing_factor)
        targets = num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum()
        loss = loss_sum / targets.clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over ranks, targets are all of them
        return (loss, outputs) if return_outputs else loss

    # ---- evaluation ----
    def evaluation_loop(self, dataloader, *arguments, **named):
        self.evaluates_stream = isinstance(dataloader.dataset, torch.utils.data.IterableDataset)
        prefix = named.get("metric_key_prefix", "eval")
        self.running_sums = RunningSums(3, self.args.device) if self.token_sums is not None else None
        self.evaluated_samples = 0
        output = super().evaluation_loop(dataloader, *arguments, **named)
        if self.running_sums is not None:
            sums = self.running_sums.tolist(self.accelerator.gather if self.evaluates_stream else None)
            correct, targets, negative_log_likelihood = sums
            if self.evaluates_stream:
                count = torch.tensor([self.evaluated_samples], device=self.args.device)
                self.evaluated_samples = int(self.accelerator.gather(count).sum())
            if targets == 0:
                raise UsageError("--do_eval: nothing is predicted in so little validation text; give more of it")
            metrics = TokenAccuracy().compute(
                correct=[correct], targets=[targets], negative_log_likelihood=[negative_log_likelihood]
            )
            output.metrics[f"{prefix}_loss"] = metrics["loss"]
            output.metrics[f"{prefix}_accuracy"] = metrics["accuracy"]
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self.running_sums is None or self.token_sums is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            if self.head_gives_sums:
                inputs["targets"] = labels
            sums = model(**inputs)["logits"]  # by name: apex's O2 makes a plain dict of the outputs
            if not self.head_gives_sums:
                sums = self.token_sums(sums, labels)
            # By sample, so that the gathering can drop those that fill up the last batch of some ranks.
            if not self.evaluates_stream:  # of that, ranks may have unequal numbers of batches: they gather at the end
                sums = self.gather_function(sums)
        self.running_sums.add(sums.sum(dim=0))
        self.evaluated_samples += len(sums)
        return None, None, None
