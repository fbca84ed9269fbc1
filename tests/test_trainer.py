"""utils/trainer.py against transformers' own Trainer, on tiny models, on a CPU."""

import math

import numpy as np
import pytest
import tiny
import torch
from operator_count import OperatorCount
from transformers import Trainer, TrainerCallback, TrainingArguments

from utils.objectives import causal
from utils.packing import Blocks
from utils.trainer import LanguageModelingTrainer
from utils.training_arguments import LanguageModelingArguments

LEVELS = {
    "O0": {},
    "O1": {"fp16": True},
    "O2": {"fp16": True, "fp16_opt_level": "O2"},
    "O2-bf16": {"bf16": True, "fp16_opt_level": "O2"},
    "O3-bf16": {"bf16": True, "fp16_opt_level": "O3"},
}


def blocks(count: int = 48, seed: int = 1) -> Blocks:
    return Blocks(torch.cat(tiny.batches(count // 4, seed=seed)).numpy().astype(np.int32))


def arguments(folder, kind=LanguageModelingArguments, **options):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "max_steps": 8,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return kind(**{**defaults, **options})


def trainer_for(
    folder, model=None, callbacks=None, kind=LanguageModelingTrainer, **options
) -> LanguageModelingTrainer:
    return kind(
        model=model or tiny.gpt2(),
        args=arguments(folder, **options),
        train_dataset=blocks(),
        eval_dataset=blocks(20, seed=2),
        data_collator=causal.collate,
        token_sums=causal.token_sums,
        callbacks=callbacks,
    )


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


# ---- rungs 1, 2 and 4 of the numerics ladder ----
@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.0}, {"optim": "adafactor"}]
)
def test_every_option_off_equals_trainer_bit_for_bit(tmp_path, options):
    stock = Trainer(
        model=tiny.gpt2(dropout=0.1),
        args=arguments(tmp_path / "stock", TrainingArguments, **options),
        train_dataset=blocks(),
        data_collator=causal.collate,
    )
    stock.train()
    ours = trainer_for(tmp_path / "ours", tiny.gpt2(dropout=0.1), **options)  # Trainer seeds when it is made
    ours.train()
    assert logged(ours, "loss") == logged(stock, "loss")
    assert logged(ours, "grad_norm") == logged(stock, "grad_norm")
    assert torch.equal(weights(ours.model), weights(stock.model))


def both(tmp_path, **options) -> tuple[LanguageModelingTrainer, LanguageModelingTrainer]:
    trainers = []
    for combine in (False, True):
        trainer = trainer_for(tmp_path / str(combine), tiny.gpt2(dropout=0.1), use_combine_grad=combine, **options)
        trainer.train()
        trainers.append(trainer)
    return tuple(trainers)


@pytest.mark.parametrize("level", LEVELS)
def test_combined_gradients_change_nothing_without_clipping(tmp_path, level):
    off, on = both(tmp_path, max_grad_norm=0.0, **LEVELS[level])
    assert logged(on, "loss") == logged(off, "loss")
    assert torch.equal(weights(on.model), weights(off.model))


@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
def test_combined_gradients_change_rounding_only_with_clipping(tmp_path, level):
    off, on = both(tmp_path, max_grad_norm=0.1, gradient_accumulation_steps=2, **LEVELS[level])
    assert logged(on, "loss") == pytest.approx(logged(off, "loss"), rel=1e-6 if level == "O0" else 1e-3)
    assert logged(on, "grad_norm") == pytest.approx(logged(off, "grad_norm"), rel=1e-5 if level == "O0" else 2e-2)


@pytest.mark.parametrize("level", ["O1", "O2", "O2-bf16", "O3-bf16"])
@pytest.mark.parametrize("combine", [True, False])
def test_half_precision_stays_near_float32(tmp_path, level, combine):
    reference = trainer_for(tmp_path / "O0")
    half = trainer_for(tmp_path / level, use_combine_grad=combine, loss_scale="128", **LEVELS[level])
    reference.train()
    half.train()
    tolerance = {"O1": 1e-3, "O2": 1e-3, "O2-bf16": 5e-3, "O3-bf16": 3e-2}[level]
    assert logged(half, "loss") == pytest.approx(logged(reference, "loss"), rel=tolerance)
    assert logged(half, "loss")[-1] < logged(half, "loss")[0]


# ---- no flag is ignored ----
class Spy(TrainerCallback):
    """Notes the types of weights and activations in the first forward pass."""

    def on_train_begin(self, args, state, control, model=None, **_):
        attention = model.transformer.h[0].attn.c_proj
        self.weight = attention.weight.dtype
        self.norm = model.transformer.ln_f.weight.dtype
        self.activation = None

        def note(module, inputs, output):
            self.activation = self.activation or output.dtype

        attention.register_forward_hook(note)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
@pytest.mark.parametrize("combine", [True, False])
def test_each_level_runs_in_its_own_types(tmp_path, level, dtype, combine):
    spy = Spy()
    half = {"fp16": True} if dtype == torch.float16 else {"bf16": True}
    trainer = trainer_for(
        tmp_path, callbacks=[spy], fp16_opt_level=level, use_combine_grad=combine, max_steps=2, **half
    )
    trainer.train()
    expected = {
        "O0": (torch.float32, torch.float32, torch.float32),
        "O1": (torch.float32, torch.float32, dtype),
        "O2": (dtype, torch.float32, dtype),
        "O3": (dtype, dtype, dtype),
    }
    assert (spy.weight, spy.norm, spy.activation) == expected[level]


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"fp16": True}, 65536.0),
        ({"fp16": True, "fp16_opt_level": "O2"}, 65536.0),
        ({"bf16": True, "fp16_opt_level": "O2"}, 1.0),
        ({"bf16": True, "fp16_opt_level": "O2", "loss_scale": "dynamic"}, 65536.0),
        ({"fp16": True, "fp16_opt_level": "O3", "loss_scale": "64"}, 64.0),
        ({"use_combine_grad": True}, 1.0),
    ],
)
def test_the_log_carries_scale_and_skipped_steps(tmp_path, options, scale):
    trainer = trainer_for(tmp_path, max_steps=2, learning_rate=1e-5, **options)
    trainer.train()
    assert logged(trainer, "loss_scale") == [scale, scale]
    assert logged(trainer, "skipped_steps") == [0, 0]


def test_gradient_buffers_are_reported_by_type(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=1, use_combine_grad=True, bf16=True, fp16_opt_level="O3")
    trainer.train()
    assert trainer.combined.gradient_buffers() == {"bfloat16": sum(p.numel() for p in trainer.model.parameters())}


def test_underflow_at_o3_is_told(tmp_path, caplog):
    trainer_for(tmp_path, fp16=True, fp16_opt_level="O3", max_steps=1).train()
    assert "--adam_epsilon 1e-08 are zero" in caplog.text
    caplog.clear()
    trainer_for(tmp_path, fp16=True, fp16_opt_level="O3", max_steps=1, adam_epsilon=1e-4).train()
    assert "are zero" not in caplog.text


def test_a_slow_half_type_is_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("utils.device.half_slowdown", lambda device, dtype: 42.0)
    trainer_for(tmp_path, fp16=True)
    assert "this CPU multiplies float16 matrices 42 times slower" in caplog.text


# ---- overflow ----
class Overflow(TrainerCallback):
    """Makes a gradient infinite in step 3; notes what must not move then."""

    def __init__(self):
        self.before = self.after = self.handle = None

    def on_step_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **_):
        if state.global_step == 2:
            self.before = self.look(model, optimizer, lr_scheduler)
            parameter = model.transformer.h[1].mlp.c_fc.weight
            self.handle = parameter.register_hook(lambda gradient: gradient * float("inf"))

    def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **_):
        if state.global_step == 3:
            self.handle.remove()
            self.after = self.look(model, optimizer, lr_scheduler)

    @staticmethod
    def look(model, optimizer, lr_scheduler) -> dict:
        moments = [
            value.clone()
            for state in optimizer.state_dict()["state"].values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
        return {
            "weights": weights(model),
            "moments": torch.cat([moment.float().flatten() for moment in moments]),
            "learning_rates": [group["lr"] for group in optimizer.param_groups],
            "last_epoch": lr_scheduler.last_epoch,
        }


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize("combine", [True, False])
@pytest.mark.parametrize("scale", ["dynamic", "256"])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_after_an_overflow_nothing_moved(tmp_path, caplog, level, combine, scale, max_grad_norm):
    overflow = Overflow()
    trainer = trainer_for(
        tmp_path,
        callbacks=[overflow],
        fp16=True,
        fp16_opt_level=level,
        loss_scale=scale,
        use_combine_grad=combine,
        max_grad_norm=max_grad_norm,
        max_steps=5,
        learning_rate=1e-4,
        adam_epsilon=1e-4,
        optim="adamw_torch_fused",
    )
    trainer.train()
    assert torch.equal(overflow.before["weights"], overflow.after["weights"])
    assert torch.equal(overflow.before["moments"], overflow.after["moments"])
    assert overflow.before["learning_rates"] == overflow.after["learning_rates"]
    assert overflow.before["last_epoch"] == overflow.after["last_epoch"]
    assert logged(trainer, "skipped_steps") == [0, 0, 1, 1, 1]
    start = 65536.0 if scale == "dynamic" else 256.0
    later = start / 2 if scale == "dynamic" else start
    assert logged(trainer, "loss_scale") == [start, start, later, later, later]
    assert (
        f"step 3: a gradient overflowed, so weights and learning rate stay as they are; the loss scale is now {later:g}"
        in caplog.text
    )
    assert trainer.lr_scheduler.last_epoch == 4


# ---- checkpoints ----
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("first", "then"), [(True, True), (False, True), (True, False)])
def test_a_checkpoint_resumes_with_combined_gradients_or_without(tmp_path, level, first, then):
    options = {"max_grad_norm": 0.0, "learning_rate": 1e-3, **LEVELS[level]}
    whole = trainer_for(tmp_path / "whole", use_combine_grad=first, **options)
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 4}
    trainer_for(tmp_path / "run", use_combine_grad=first, **options, **saving).train()
    resumed = trainer_for(tmp_path / "run", tiny.gpt2(seed=9), use_combine_grad=then, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert torch.equal(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize(("before", "after"), [("O2", "O0"), ("O0", "O2"), ("O1", "O2-bf16"), ("O2-bf16", "O1")])
def test_a_checkpoint_resumes_at_another_level(tmp_path, before, after):
    saving = {"save_strategy": "steps", "save_steps": 4}
    trainer_for(tmp_path, use_combine_grad=True, **LEVELS[before], **saving).train()
    resumed = trainer_for(tmp_path, tiny.gpt2(seed=9), **LEVELS[after])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    whole = trainer_for(tmp_path / "whole")
    whole.train()
    assert logged(resumed, "loss") == pytest.approx(logged(whole, "loss"), rel=2e-2)


def test_scaler_and_count_of_skipped_steps_are_in_the_checkpoint(tmp_path):
    options = {"fp16": True, "fp16_opt_level": "O2", "use_combine_grad": True, "learning_rate": 1e-4, "max_steps": 6}
    trainer_for(tmp_path, callbacks=[Overflow()], save_strategy="steps", save_steps=4, **options).train()
    scaler = torch.load(tmp_path / "checkpoint-4" / "scaler.pt", weights_only=True)
    assert scaler["scale"] == 32768.0 and scaler["_growth_tracker"] == 1
    resumed = trainer_for(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert logged(resumed, "loss_scale")[-2:] == [32768.0, 32768.0]
    assert logged(resumed, "skipped_steps")[-2:] == [1, 1]


@pytest.mark.parametrize("combine", [True, False])
def test_masters_are_what_o2_saves(tmp_path, combine):
    from transformers import GPT2LMHeadModel

    trainer = trainer_for(tmp_path, use_combine_grad=combine, **LEVELS["O2"])
    trainer.train()
    trainer.save_model()
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    target = {member.source: member.target for member in trainer.combined.members}
    own = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, target[own[name]]) for name, p in loaded.named_parameters())
    assert own["transformer.wte.weight"].dtype == torch.float16


def test_the_best_model_is_loaded_into_the_masters(tmp_path):
    trainer = trainer_for(
        tmp_path,
        use_combine_grad=True,
        load_best_model_at_end=True,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        learning_rate=1.0,  # it only gets worse: the first evaluation is the best
        metric_for_best_model="accuracy",
        **LEVELS["O2-bf16"],
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    from safetensors.torch import load_file

    saved = load_file(f"{best}/model.safetensors")
    trainer.save_model(tmp_path / "final")
    final = load_file(tmp_path / "final" / "model.safetensors")
    assert all(torch.equal(saved[name], final[name]) for name in saved)


# ---- evaluation ----
@pytest.mark.parametrize("count", [20, 18])
def test_loss_and_accuracy_are_those_of_every_prediction(tmp_path, count):
    model = tiny.gpt2()
    data = Blocks(blocks(20, seed=2).ids[:count].copy())
    trainer = trainer_for(tmp_path, model)
    metrics = trainer.evaluate(data)
    ids = torch.as_tensor(data.ids, dtype=torch.int64)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    accuracy = (logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean()
    assert metrics["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert metrics["eval_accuracy"] == pytest.approx(accuracy.item(), rel=1e-6)


def test_ignored_positions_count_nowhere():
    logits = torch.zeros(1, 4, 3)
    logits[0, :, 2] = math.log(2)  # probabilities 1/4, 1/4, 1/2
    labels = torch.tensor([[0, 2, -100, 1]])
    correct, targets, negative_log_likelihood = causal.token_sums(logits, labels)[0].tolist()
    assert (correct, targets) == (1, 2)
    assert negative_log_likelihood == pytest.approx(math.log(2) + math.log(4))


def test_evaluation_keeps_nothing_that_grows(tmp_path):
    trainer = trainer_for(tmp_path)
    model = trainer.model
    batch = causal.collate([trainer.eval_dataset[i] for i in range(4)])
    trainer.evaluate()
    assert trainer.prediction_step(model, batch, False) == (None, None, None)
    assert trainer.running_sums.total.shape == (3,)


# ---- the work of a step ----
class CountedTrainer(LanguageModelingTrainer):
    """Counts what operators are handed from the end of backward to the next forward, in Trainer's own loop."""

    counter: OperatorCount | None = None
    counts: list

    def training_step(self, *arguments, **named):
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.counts.append(self.counter)
        loss = super().training_step(*arguments, **named)
        self.counter = OperatorCount()
        self.counter.__enter__()
        return loss

    def train(self, *arguments, **named):
        self.counts = []
        try:
            return super().train(*arguments, **named)
        finally:
            self.counter.__exit__(None, None, None)


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O2-bf16"])
def test_the_optimizer_phase_does_not_grow_with_the_model(tmp_path, level):
    def steady(layers: int, combine: bool) -> OperatorCount:
        trainer = trainer_for(
            tmp_path / f"{layers}{combine}",
            tiny.gpt2(layers=layers),
            kind=CountedTrainer,
            use_combine_grad=combine,
            max_steps=4,
            logging_steps=100,
            optim="adamw_torch_fused",
            **LEVELS[level],
        )
        trainer.train()
        return trainer.counts[1]

    shallow, deep = steady(2, True), steady(12, True)
    assert shallow.tensors == deep.tensors < 80
    assert shallow.calls == deep.calls
    assert steady(2, False).tensors > 80  # the flag does something


# ---- out of memory ----
class OutOfMemory:
    """A trainer's model asks for more memory than any machine has, in a batch of more than `most` samples."""

    def __init__(self, most: int, where: str):
        self.most = most
        self.where = where
        self.failed = 0

    def attach(self, trainer: LanguageModelingTrainer) -> None:
        middle = trainer.model.transformer.h[0].mlp
        self.batch = 0

        def note(_, arguments, output):
            self.batch = len(arguments[0])
            if self.where == "forward":
                self.allocate()

        middle.register_forward_hook(note)
        if self.where == "backward":  # when the gradients of the last layer are in their buffers
            middle.c_fc.weight.register_hook(lambda gradient: self.allocate())
        if self.where == "optimizer":
            trainer.create_optimizer()
            optimizer = trainer.combined or trainer.optimizer
            step = optimizer.step

            def failing(*arguments, **named):
                self.allocate()
                return step(*arguments, **named)

            optimizer.step = failing

    def allocate(self) -> None:
        if self.batch > self.most:
            self.failed += 1
            torch.empty(2**60)


@pytest.mark.parametrize(
    ("where", "level", "combine"),
    [
        ("forward", "O2", True),
        ("backward", "O2", True),
        ("optimizer", "O2", True),
        ("backward", "O0", True),
        ("forward", "O0", False),
        ("optimizer", "O2", False),
    ],
)
def test_a_smaller_batch_is_found_and_trains_as_if_it_had_been_asked_for(tmp_path, where, level, combine):
    options = {"use_combine_grad": combine, "learning_rate": 1e-3, **LEVELS[level]}
    found = trainer_for(tmp_path / "found", auto_find_batch_size=True, per_device_train_batch_size=5, **options)
    limit = OutOfMemory(3, where)
    limit.attach(found)
    found.train()
    assert limit.failed == 2  # at 5 and at 4
    asked = trainer_for(tmp_path / "asked", per_device_train_batch_size=3, **options)
    asked.train()
    assert logged(found, "loss") == logged(asked, "loss")
    assert torch.equal(weights(found.model), weights(asked.model))
    if combine or level == "O2":
        assert found.combined.holds_weights()


@pytest.mark.parametrize("level", ["O0", "O2"])
def test_checkpointed_activations_change_nothing(tmp_path, level):
    """With dropout, whose masks are drawn again, and combined gradients."""
    found = []
    for checkpointing in (False, True):
        options = {"use_combine_grad": True, "gradient_checkpointing": checkpointing, **LEVELS[level]}
        trainer = trainer_for(tmp_path / str(checkpointing), tiny.gpt2(dropout=0.1), learning_rate=1e-3, **options)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == checkpointing
        found.append(trainer)
    assert logged(found[0], "loss") == logged(found[1], "loss")
    assert torch.equal(weights(found[0].model), weights(found[1].model))


def test_masters_are_never_made_of_half_weights(tmp_path):
    trainer = trainer_for(tmp_path, bf16=True, fp16_opt_level="O2")
    trainer.evaluate()
    with pytest.raises(RuntimeError, match="evaluate.. before train.. has made the weights half"):
        trainer.train()


def test_a_checkpoint_beyond_the_goal_is_told(tmp_path, caplog):
    trainer_for(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2).train()
    trainer_for(tmp_path / "less", max_steps=1).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert "nothing is left to train: step 2 is reached, and the run has 1" in caplog.text
