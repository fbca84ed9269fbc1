"""utils/amp.py: levels, casting, autocast and loss scaling."""

import pytest
import tiny
import torch
from torch import nn

from utils import amp
from utils.combine_grad import CombinedOptimizer

HALF = [torch.float16, torch.bfloat16]


def precision(level: str, dtype: torch.dtype = torch.bfloat16) -> amp.Precision:
    return amp.choose_precision(dtype == torch.float16, dtype == torch.bfloat16, level)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"fp16": False, "bf16": False}, ("O0", torch.float32, None)),
        ({"fp16": True, "bf16": False}, ("O1", torch.float16, "dynamic")),
        ({"fp16": False, "bf16": True}, ("O1", torch.bfloat16, None)),
        ({"fp16": True, "bf16": False, "level": "O2"}, ("O2", torch.float16, "dynamic")),
        ({"fp16": True, "bf16": False, "level": "O0"}, ("O0", torch.float32, None)),
        ({"fp16": True, "bf16": False, "level": "O3", "loss_scale": "128"}, ("O3", torch.float16, 128.0)),
        ({"fp16": False, "bf16": True, "level": "O2", "loss_scale": "dynamic"}, ("O2", torch.bfloat16, "dynamic")),
    ],
)
def test_flags_choose_level_type_and_scale(flags, expected):
    chosen = amp.choose_precision(**flags)
    assert (chosen.level, chosen.dtype, chosen.loss_scale) == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"fp16": True, "bf16": True}, ["--fp16", "--bf16"]),
        ({"fp16": True, "bf16": False, "level": "O4"}, ["--fp16_opt_level O4", "O0, O1, O2, O3"]),
        ({"fp16": False, "bf16": False, "level": "O2"}, ["--fp16_opt_level O2", "--fp16 or --bf16"]),
        ({"fp16": False, "bf16": False, "loss_scale": "128"}, ["--loss_scale 128"]),
        ({"fp16": True, "bf16": False, "loss_scale": "-1"}, ["--loss_scale -1"]),
        ({"fp16": True, "bf16": False, "loss_scale": "much"}, ["--loss_scale much"]),
        ({"fp16": True, "bf16": False, "loss_scale": "nan"}, ["--loss_scale nan"]),
    ],
)
def test_contradictions_name_the_flag(flags, words):
    with pytest.raises(ValueError) as error:
        amp.choose_precision(**flags)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("dtype", HALF)
def test_o2_keeps_norms_and_gives_masters_to_the_rest(dtype):
    model = tiny.gpt2()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masters = amp.cast_model(model, precision("O2", dtype))
    for name, parameter in model.named_parameters():
        if ".ln_" in name:
            assert parameter.dtype == torch.float32 and parameter not in masters
        else:
            assert parameter.dtype == dtype
            assert torch.equal(masters[parameter], before[name])
    assert model.lm_head.weight is model.transformer.wte.weight


def test_o2_norms_compute_in_float32_and_hand_on_half():
    model = tiny.gpt2()
    seen = []
    norm = model.transformer.h[0].ln_1
    amp.cast_model(model, precision("O2", torch.float16))
    plain_forward = norm.forward
    norm.forward = lambda x: seen.append(x.dtype) or plain_forward(x)
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    model(input_ids=tiny.batches(1)[0])
    assert seen == [torch.float32, torch.float16]


def test_o3_casts_everything_and_has_no_masters():
    model = tiny.gpt2()
    assert amp.cast_model(model, precision("O3")) == {}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_buffers_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.register_buffer("inverse_frequency", torch.tensor([1.0, 0.1, 0.01]))
    model[0].weight.requires_grad_(False)
    masters = amp.cast_model(model, precision("O2"))
    assert model.inverse_frequency.dtype == torch.float32
    assert model[0].weight.dtype == torch.bfloat16 and model[0].weight not in masters


@pytest.mark.parametrize("dtype", HALF)
def test_a_mask_follows_to_half_and_frequencies_do_not(dtype):
    """GPT multiplies its scores by a float mask: in float32 it would turn all of them into float32."""
    model = nn.Linear(4, 4)
    model.register_buffer("mask", torch.ones(3, 3).tril())
    model.register_buffer("frequency", 10000 ** -torch.linspace(0, 1, 8))
    amp.cast_model(model, precision("O2", dtype))
    assert model.mask.dtype == dtype and model.frequency.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF)
def test_o1_runs_linear_layers_in_half_on_a_cpu(dtype):
    layer = nn.Linear(4, 4)
    with amp.autocast(precision("O1", dtype), "cpu"):
        assert layer(torch.ones(2, 4)).dtype == dtype
    with amp.autocast(precision("O2", dtype), "cpu"):
        assert layer(torch.ones(2, 4)).dtype == torch.float32


def overflow_once(loss_scale) -> tuple[amp.LossScaler, nn.Parameter, list]:
    """Five steps, the third with an infinite gradient; the weight after each, and the scales."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = amp.LossScaler("cpu", loss_scale, growth_interval=2)
    trace = []
    for step in range(5):
        loss = (weight * (float("inf") if step == 2 else 1.0)).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        trace.append((round(weight[0].item(), 4), scaler.get_scale()))
    return scaler, weight, trace


def test_dynamic_scale_halves_on_overflow_and_grows_after_good_steps():
    _, _, trace = overflow_once("dynamic")
    assert [scale for _, scale in trace] == [2.0**16, 2.0**17, 2.0**16, 2.0**16, 2.0**17]
    assert [weight for weight, _ in trace] == [0.9, 0.8, 0.8, 0.7, 0.6]


def test_fixed_scale_skips_the_overflowed_step_too_and_never_moves():
    _, _, trace = overflow_once(128.0)
    assert trace == [(0.9, 128.0), (0.8, 128.0), (0.8, 128.0), (0.7, 128.0), (0.6, 128.0)]


def test_scaler_state_survives_a_checkpoint():
    scaler, _, _ = overflow_once("dynamic")
    restored = amp.LossScaler("cpu", "dynamic", growth_interval=2)
    restored.load_state_dict(scaler.state_dict())
    assert restored.state_dict() == scaler.state_dict()


def test_half_gradients_are_unscaled_where_there_are_no_masters():
    weight = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler = amp.LossScaler("cpu", 64.0)
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)
    assert torch.equal(weight.grad, torch.ones(3, dtype=torch.float16))


def test_a_fused_optimizer_does_not_step_past_an_overflow():
    weight = nn.Parameter(torch.ones(16))
    optimizer = torch.optim.AdamW([weight], fused=True)
    amp.read_overflow_on_the_host(optimizer)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    scaler = amp.LossScaler("cpu", "dynamic")
    for factor in (1.0, float("inf")):
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert calls == [1]


def train(level: str | None, dtype: torch.dtype, steps: int = 12) -> list[float]:
    model = tiny.gpt2()
    masters = amp.cast_model(model, precision(level, dtype)) if level else {}
    optimizer = CombinedOptimizer(torch.optim.AdamW(tiny.groups(model), lr=3e-3), masters)
    scaler = amp.LossScaler("cpu", "dynamic") if dtype == torch.float16 else None
    losses = []
    for ids in tiny.batches(steps):
        loss = model(input_ids=ids, labels=ids).loss
        (scaler.scale(loss) if scaler else loss).backward()
        losses.append(loss.item())
        optimizer.finish_gradients()
        if scaler:
            scaler.unscale_(optimizer)
        optimizer.clip_grad_norm_(1.0)
        scaler.step(optimizer) if scaler else optimizer.step()
        if scaler:
            scaler.update()
    return losses


@pytest.mark.parametrize("dtype", HALF)
def test_o2_stays_near_float32(dtype):
    """Rung 4 of the numerics ladder. Half weights round to 2**-11 (float16) or 2**-8 (bfloat16)."""
    reference, half = train(None, torch.float32), train("O2", dtype)
    assert reference[-1] < reference[0] - 0.3
    tolerance = 2e-3 if dtype == torch.float16 else 1e-2
    assert half == pytest.approx(reference, rel=tolerance)
