"""utils/bad_numbers.py on tiny models: what is not finite updates nothing and is told; a loss that leaps is undone."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_trainer import blocks, logged, trainer_for, weights
from transformers import TrainerCallback

from utils import device
from utils.bad_numbers import BadSteps, LossSpikes, sample_ids
from utils.errors import UsageError

WAYS = {
    "fused": {},
    "fused, combined": {"use_combine_grad": True},
    "read on the host": {"optim": "adamw_torch"},
    "read on the host, combined": {"optim": "adamw_torch", "use_combine_grad": True},
    "bfloat16 masters": {"bf16": True, "fp16_opt_level": "O2", "use_combine_grad": True},
    "float16 masters": {"fp16": True, "fp16_opt_level": "O2", "loss_scale": "8"},
}


class Spoil(TrainerCallback):
    """Puts a value into one element of one gradient in these steps; keeps the weights of each step."""

    def __init__(self, value: float, *steps: int):
        self.value, self.steps = value, steps
        self.weights: list[torch.Tensor] = []
        self.now = False

    def on_train_begin(self, args, state, control, model=None, **_):
        # A tensor hook: it comes before the gradient goes into its flat buffer.
        parameter = model.transformer.h[0].mlp.c_fc.weight
        parameter.register_hook(self.spoil)

    def spoil(self, gradient: torch.Tensor) -> torch.Tensor:
        if self.now:
            gradient = gradient.clone()
            gradient.view(-1)[7] = self.value
        return gradient

    def on_step_begin(self, args, state, control, **_):
        self.now = state.global_step + 1 in self.steps

    def on_step_end(self, args, state, control, model=None, **_):
        self.weights.append(weights(model))


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_with_one_element_that_is_not_finite_updates_nothing(tmp_path, way, value) -> None:
    spoil = Spoil(value, 3, 6)
    trainer = trainer_for(tmp_path, callbacks=[spoil], **WAYS[way])
    trainer.train()
    for step in range(2, 9):
        same = torch.equal(spoil.weights[step - 1], spoil.weights[step - 2])
        assert same == (step in (3, 6)), f"step {step}"
    assert all(torch.isfinite(after).all() for after in spoil.weights)
    norms = logged(trainer, "grad_norm")
    assert [not math.isfinite(norm) for norm in norms] == [step in (3, 6) for step in range(1, 9)]
    assert logged(trainer, "bad_steps") == [1, 1]


@pytest.mark.parametrize("way", ["fused", "fused, combined", "read on the host"])
def test_a_skipped_step_leaves_the_optimizer_as_it_was(tmp_path, way) -> None:
    """Adam's moments and step counts too: they must be those of a training without the step."""
    trainer = trainer_for(tmp_path, callbacks=[Spoil(math.nan, 3)], max_steps=3, **WAYS[way])
    trainer.train()
    reference = trainer_for(tmp_path, max_steps=2, **WAYS[way])
    reference.train()
    ours, theirs = (t.optimizer.state_dict()["state"] for t in (trainer, reference))
    for index, state in theirs.items():
        assert all(torch.equal(ours[index][name], value) for name, value in state.items())


@pytest.mark.parametrize("way", ["fused", "fused, combined", "read on the host"])
def test_finite_numbers_stay_what_they_are(tmp_path, way) -> None:
    with_check = trainer_for(tmp_path / "on", tiny.gpt2(dropout=0.1), **WAYS[way])
    with_check.train()
    without = trainer_for(tmp_path / "off", tiny.gpt2(dropout=0.1), max_bad_steps=0, **WAYS[way])
    without.train()
    assert logged(with_check, "loss") == logged(without, "loss")
    assert torch.equal(weights(with_check.model), weights(without.model))


def test_what_a_device_counts_by_itself_ends_before_a_save(tmp_path) -> None:
    """As on a device whose kernel does not obey a verdict: simulated on a CPU by a count that is handed over."""
    trainer = trainer_for(
        tmp_path, callbacks=[Spoil(math.nan, 3)], logging_steps=100, save_strategy="steps", save_steps=2
    )

    def count(norm: torch.Tensor) -> None:
        trainer.bad_steps._spoilt = (trainer.bad_steps._spoilt or torch.zeros(())) + norm.isfinite().logical_not()

    trainer.bad_steps.before_update = count
    with pytest.raises(UsageError, match="step 3: the gradients were not finite, and the optimizer's kernel"):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_without_the_check_it_is_as_torch_has_it(tmp_path) -> None:
    spoil = Spoil(math.nan, 3)
    trainer_for(tmp_path, callbacks=[spoil], max_bad_steps=0).train()
    assert not torch.isfinite(spoil.weights[2]).all()


@pytest.mark.parametrize("way", WAYS)
def test_training_ends_after_so_many_in_a_row(tmp_path, way) -> None:
    spoil = Spoil(math.nan, 2, 4, 5, 6)
    trainer = trainer_for(tmp_path, callbacks=[spoil], max_bad_steps=3, logging_steps=100, **WAYS[way])
    with pytest.raises(UsageError, match="not finite in 3 steps in a row, up to step 6, which has the samples"):
        trainer.train()
    assert torch.isfinite(weights(trainer.model)).all()
    assert torch.equal(weights(trainer.model), spoil.weights[2])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_samples_of_a_step(tmp_path, accumulate) -> None:
    """Against the rows that the model was really given, in the second epoch too."""
    given: list[list[int]] = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            given.append([])

    data = blocks()  # some rows are there twice
    first = {}
    place = [first.setdefault(tuple(data[number]["input_ids"]), number) for number in range(len(data))]
    trainer = trainer_for(tmp_path, callbacks=[Look()], max_steps=14, gradient_accumulation_steps=accumulate)

    def note(_, arguments, named):
        given[-1] += [first[tuple(row)] for row in named["input_ids"].tolist()]

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    assert [[place[number] for number in sample_ids(trainer, step)] for step in range(1, 15)] == given


def test_a_loss_that_is_not_finite_is_logged_as_it_is(tmp_path) -> None:
    """The loss alone: its gradient is finite. transformers would put the mean of the others in its place."""
    model = tiny.gpt2()
    seen = []

    def spoil(_, inputs, output):
        seen.append(1)
        if len(seen) == 6:
            output.loss = output.loss + torch.tensor(math.nan)
        return output

    model.register_forward_hook(spoil)
    trainer = trainer_for(tmp_path, model, logging_steps=4)
    trainer.train()
    assert [math.isnan(loss) for loss in logged(trainer, "loss")] == [False, True]


# ---- losses that leap ----
def feed(spikes: LossSpikes, losses: list[float]) -> None:
    for step, loss in enumerate(losses, start=1):
        spikes.look(loss, step - 1, step)


class Arguments:
    on_loss_spike, process_index, world_size, output_dir = "warn", 0, 1, "nowhere"


def test_what_is_a_leap(caplog) -> None:
    falling = [10 * 0.97**step + 0.1 * (-1) ** step for step in range(60)]
    spikes = LossSpikes(Arguments)
    feed(spikes, falling)
    assert "leaps" not in caplog.text
    spikes.look(falling[-1] + 5, 60, 61)
    assert "leaps" not in caplog.text, "within what the last losses deviate by"
    spikes.look(40.0, 61, 62)
    assert "step 62: the loss leaps to 40" in caplog.text
    level = LossSpikes(Arguments)
    feed(level, [2.0] * 20)
    assert level.limit() == pytest.approx(2.0 + 6 * 0.02), "losses that do not move deviate by nothing"
    few = LossSpikes(Arguments)
    feed(few, [1.0] * 15)
    assert few.limit() == math.inf
    few.look(math.nan, 15, 16)
    assert few.limit() == math.inf


class Leap(TrainerCallback):
    """Adds to the loss of these steps when they are trained for the first time, and notes what is trained."""

    def __init__(self, *steps: int):
        self.steps = list(steps)
        self.step = 0
        self.trained: list[tuple[int, int]] = []

    def on_step_begin(self, args, state, control, model=None, **_):
        self.step = state.global_step + 1

    def forward(self, _, arguments, named, output):
        self.trained.append((self.step, int(named["input_ids"].sum())))
        if self.step in self.steps:
            self.steps.remove(self.step)
            output.loss = output.loss * 50
        return output


def leaping(folder, *steps: int, **options):
    leap = Leap(*steps)
    options = {"max_steps": 30, "save_strategy": "steps", "save_steps": 5, "on_loss_spike": "rollback"} | options
    trainer = trainer_for(folder, callbacks=[leap], **options)
    trainer.model.register_forward_hook(leap.forward, with_kwargs=True)
    return trainer, leap


@pytest.mark.parametrize(
    "options",
    [{}, {"use_combine_grad": True}, {"bf16": True, "fp16_opt_level": "O2"}],
    ids=["plain", "combined", "O2"],
)
def test_a_rollback_goes_on_from_the_checkpoint_behind_those_batches(tmp_path, options) -> None:
    trainer, leap = leaping(tmp_path, 23, **options)
    trainer.train()
    plain = leaping(tmp_path / "plain", **options, on_loss_spike=None)
    plain[0].train()
    # All batches in their places, but those of steps 21 to 23 are trained once, not again.
    assert leap.trained == plain[1].trained
    assert trainer.state.global_step == 30
    assert logged(trainer, "learning_rate")[-1] == logged(plain[0], "learning_rate")[-1]
    # The same by hand: checkpoint-20, told that it is at step 23.
    by_hand, _ = leaping(tmp_path / "by_hand", **options)
    by_hand._skips_to = 23
    by_hand.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert torch.equal(weights(by_hand.model), weights(trainer.model))


def test_a_loss_that_leaps_again_and_again_ends_the_training(tmp_path) -> None:
    trainer, _ = leaping(tmp_path, 18, 21, 24, 27)
    with pytest.raises(UsageError, match="the loss leaps again, at step 27, after 3 rollbacks"):
        trainer.train()


def test_without_a_checkpoint_training_goes_on(tmp_path, caplog) -> None:
    trainer, leap = leaping(tmp_path, 23, save_strategy="no")
    trainer.train()
    assert "no checkpoint to go back to" in caplog.text and trainer.state.global_step == 30


def test_a_number_from_the_device_is_read_later() -> None:
    assert device.DeferredNumber(torch.tensor(3.5)).get() == 3.5


def deepspeed(skipped: bool, **options) -> BadSteps:
    """Of a trainer whose engine has made its update, or skipped it, when the norm is known."""
    trainer = SimpleNamespace(
        is_deepspeed_enabled=True,
        accelerator=SimpleNamespace(scaler=None),
        args=SimpleNamespace(max_bad_steps=options.get("max_bad_steps", 2), process_index=0),
        optimizer=SimpleNamespace(step_was_skipped=skipped),
        state=SimpleNamespace(global_step=6),
    )
    return BadSteps(trainer)


def test_what_deepspeed_has_skipped_is_counted() -> None:
    steps = deepspeed(skipped=True)
    steps.before_update(math.inf)
    assert (steps.in_a_row, steps.since_log) == (1, 1)
    steps.trainer.optimizer.step_was_skipped = False
    steps.before_update(1.0)
    assert (steps.in_a_row, steps.since_log) == (0, 1)


def test_what_deepspeed_has_updated_with_ends_the_run() -> None:
    with pytest.raises(UsageError, match="step 7: the gradients were not finite, and DeepSpeed has updated with them"):
        deepspeed(skipped=False).before_update(math.nan)
    deepspeed(skipped=False, max_bad_steps=0).before_update(math.nan)
