"""utils/combine_grad.py: flat gradients against torch.optim over the parameters themselves."""

import copy

import pytest
import tiny
import torch
from operator_count import count
from torch import nn

from utils import amp
from utils.combine_grad import CombinedOptimizer

BF16_O2 = amp.choose_precision(False, True, "O2")


def adamw(model: nn.Module, fused: bool = True, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(tiny.groups(model), lr=lr, fused=fused)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def train(
    model, optimizer, batches, accumulate: int = 1, max_norm: float = 0.0, set_to_none: bool = True
) -> list[float]:
    """Trains as Trainer does, on micro-batches of which `accumulate` make a step; the loss of each micro-batch."""
    losses = []
    for number, ids in enumerate(batches, start=1):
        losses.append(tiny.backward(model, ids))
        if number % accumulate:
            continue
        if max_norm and isinstance(optimizer, CombinedOptimizer):
            optimizer.clip_grad_norm_(max_norm)
        elif max_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        model.zero_grad(set_to_none=set_to_none)
    return losses


def pair(
    build=tiny.gpt2, make=adamw, **options
) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module, CombinedOptimizer]:
    """The same model twice, with a plain optimizer and with a combined one."""
    plain, flat = build(), build()
    return plain, make(plain), flat, CombinedOptimizer(make(flat), **options)


# ---- rung 2: on equals off ----
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("join", [True, False])
def test_equals_torch_bit_for_bit_without_clipping(accumulate, fused, join):
    plain, plain_optimizer, flat, flat_optimizer = pair(make=lambda m: adamw(m, fused), join=join)
    data = tiny.batches(12)
    assert train(plain, plain_optimizer, data, accumulate) == train(flat, flat_optimizer, data, accumulate)
    assert torch.equal(weights(plain), weights(flat))


@pytest.mark.parametrize("fold_clip", [True, False])
@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_equals_torch_to_1e6_with_clipping(fold_clip, max_norm):
    plain, plain_optimizer, flat, flat_optimizer = pair(fold_clip=fold_clip)
    data = tiny.batches(12)
    assert train(flat, flat_optimizer, data, max_norm=max_norm) == pytest.approx(
        train(plain, plain_optimizer, data, max_norm=max_norm), rel=1e-6
    )
    assert torch.allclose(weights(plain), weights(flat), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.SGD(tiny.groups(m), lr=0.1, momentum=0.9),
        lambda m: torch.optim.Adagrad(tiny.groups(m), lr=0.01),
        lambda m: torch.optim.RMSprop(tiny.groups(m), lr=0.001, momentum=0.5),
        lambda m: torch.optim.AdamW(tiny.groups(m), lr=1e-3, amsgrad=True),
    ],
    ids=["sgd", "adagrad", "rmsprop", "amsgrad"],
)
def test_any_elementwise_optimizer_runs_flat(make):
    plain, plain_optimizer, flat, flat_optimizer = pair(make=make)
    data = tiny.batches(6)
    assert train(plain, plain_optimizer, data) == train(flat, flat_optimizer, data)


def test_odd_sizes_differ_in_rounding_only():
    """Where a parameter's size is no multiple of the vector width, its last elements are rounded otherwise."""
    plain, plain_optimizer, flat, flat_optimizer = pair(build=lambda: tiny.gpt2(width=34, vocabulary=97))
    data = [ids % 97 for ids in tiny.batches(12)]
    assert train(flat, flat_optimizer, data) == pytest.approx(train(plain, plain_optimizer, data), rel=1e-6)


def test_norm_is_right_where_one_float32_sum_is_not():
    parameter = nn.Parameter(torch.zeros(40_000_000))
    optimizer = CombinedOptimizer(torch.optim.SGD([parameter], lr=0.1))
    gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    exact = gradient.double().norm().item()
    (parameter * gradient).sum().backward()
    assert optimizer.grad_norm().item() == pytest.approx(exact, rel=1e-6)


# ---- rung 3: micro-batches ----
def test_accumulated_micro_batches_equal_one_large_batch():
    large, small = tiny.gpt2(), tiny.gpt2()
    data = tiny.batches(6, size=8)
    micro = [part for ids in data for part in ids.chunk(4)]
    large_optimizer, small_optimizer = CombinedOptimizer(adamw(large)), CombinedOptimizer(adamw(small))
    train(large, large_optimizer, data)
    for number, ids in enumerate(micro, start=1):
        (small(input_ids=ids, labels=ids).loss / 4).backward()
        if number % 4 == 0:
            small_optimizer.step()
            small.zero_grad()
    assert torch.allclose(weights(large), weights(small), atol=1e-5)


def test_micro_batches_accumulate_in_float32_at_o2():
    layer = nn.Linear(1, 1, bias=False)
    masters = amp.cast_model(layer, BF16_O2)
    optimizer = CombinedOptimizer(torch.optim.SGD(layer.parameters(), lr=1.0), masters)
    for _ in range(300):
        layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    optimizer.finish_gradients()
    # 300 ones added up in bfloat16 stop at 256.
    assert optimizer.members[0].gradient.item() == 300.0


# ---- parameters of all kinds ----
class Uneven(nn.Module):
    """Uses `sometimes` when told to, `never` never; `frozen` takes no gradient; `first` and `tied` are one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 16)
        self.sometimes = nn.Linear(16, 16)
        self.never = nn.Linear(16, 16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.tied = nn.Linear(16, 16, bias=False)
        self.tied.weight = self.first.weight

    def forward(self, x: torch.Tensor, use: bool) -> torch.Tensor:
        x = self.frozen(torch.tanh(self.first(x)))
        if use:
            x = torch.tanh(self.sometimes(x))
        return self.tied(x).square().mean()


@pytest.mark.parametrize(
    "uses", [[True] * 6, [False, False, True, True, True, True], [True, False, True, False, False, True]]
)
def test_parameters_without_a_gradient_keep_weight_and_state(uses):
    """As in torch, where `.grad` is None; apex dropped for ever what had no gradient in the first backward."""
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    plain, plain_optimizer, flat, flat_optimizer = pair(build=Uneven, make=lambda m: adamw(m, lr=0.01))
    for use in uses:
        for model, optimizer in ((plain, plain_optimizer), (flat, flat_optimizer)):
            model(x, use).backward()
            optimizer.step()
            model.zero_grad()
    assert torch.equal(weights(plain), weights(flat))
    assert flat.tied.weight is flat.first.weight
    saved, expected = flat_optimizer.state_dict()["state"], plain_optimizer.state_dict()["state"]
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[i][name], expected[i][name]) for i in expected for name in expected[i])


def test_norm_counts_no_gradient_of_an_earlier_step():
    model = Uneven()
    optimizer = CombinedOptimizer(adamw(model))
    x = torch.ones(2, 16)
    model(x, True).backward()
    optimizer.step()
    model.zero_grad()
    reference = copy.deepcopy(Uneven())
    reference.load_state_dict(model.state_dict())
    model(x, False).backward()
    reference(x, False).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters() if p.grad is not None])
    assert optimizer.grad_norm().item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_breaks_nothing(set_to_none):
    plain, plain_optimizer, flat, flat_optimizer = pair()
    data = tiny.batches(4)
    assert train(plain, plain_optimizer, data, set_to_none=set_to_none) == train(
        flat, flat_optimizer, data, set_to_none=set_to_none
    )
    start = flat_optimizer.buffers[0].weights.data_ptr()
    end = start + flat_optimizer.buffers[0].weights.nbytes
    assert all(start <= p.data_ptr() < end and p.grad is None for p in flat.parameters())


@pytest.mark.parametrize("half", [True, False])
def test_weights_that_left_their_buffer_are_noticed(half):
    model = tiny.gpt2()
    optimizer = CombinedOptimizer(adamw(model), amp.cast_model(model, BF16_O2) if half else {})
    assert optimizer.holds_weights()
    model.to(torch.device("cpu:0"))  # for torch another device than cpu: it copies
    assert not optimizer.holds_weights()


def test_a_step_without_backward_does_nothing():
    _, _, flat, optimizer = pair()
    train(flat, optimizer, tiny.batches(2))
    before = weights(flat).clone()
    optimizer.step()
    assert torch.equal(weights(flat), before)


def test_dropped_gradients_do_not_count():
    plain, plain_optimizer, flat, flat_optimizer = pair()
    first, second = tiny.batches(2)
    tiny.backward(flat, first)
    flat_optimizer.zero_grad()
    train(plain, plain_optimizer, [second])
    train(flat, flat_optimizer, [second])
    assert torch.equal(weights(plain), weights(flat))


def test_buffers_are_one_per_type_and_count_parameters_only():
    model = tiny.gpt2()
    model.transformer.h[0].mlp.to(torch.bfloat16)
    optimizer = CombinedOptimizer(adamw(model))
    by_type = optimizer.gradient_buffers()
    assert set(by_type) == {"float32", "bfloat16"}
    assert sum(by_type.values()) == sum(p.numel() for p in model.parameters())


# ---- masters ----
def test_half_weights_follow_their_masters_and_norms_are_their_own():
    model = tiny.gpt2()
    masters = amp.cast_model(model, BF16_O2)
    optimizer = CombinedOptimizer(adamw(model, lr=0.01), masters)
    train(model, optimizer, tiny.batches(3))
    for member in optimizer.members:
        assert torch.equal(member.source.detach(), member.target.detach().to(member.source.dtype))
    assert optimizer.gradient_buffers() == {"float32": sum(p.numel() for p in model.parameters())}


def test_float32_weights_shows_masters_and_takes_what_is_loaded():
    model = tiny.gpt2()
    optimizer = CombinedOptimizer(adamw(model), amp.cast_model(model, BF16_O2))
    with optimizer.float32_weights():
        assert model.dtype == torch.float32
        with torch.no_grad():
            model.transformer.wte.weight.fill_(0.1234567)
    assert model.transformer.wte.weight.dtype == torch.bfloat16
    assert model.transformer.wte.weight[0, 0].item() == pytest.approx(0.1234567, rel=2**-8)
    train(model, optimizer, tiny.batches(1))  # the hooks are still there
    assert not torch.equal(model.transformer.wte.weight[:, 0].float(), torch.full((tiny.VOCABULARY,), 0.1235))


# ---- checkpoints ----


@pytest.mark.parametrize("before", ["plain", "flat", "each"])
@pytest.mark.parametrize("after", ["plain", "flat", "each"])
def test_a_checkpoint_resumes_with_the_option_on_or_off(before, after):
    def optimizer_of(kind: str, model: nn.Module):
        return adamw(model) if kind == "plain" else CombinedOptimizer(adamw(model), join=kind == "flat")

    data = tiny.batches(8)
    whole = tiny.gpt2()
    expected = train(whole, adamw(whole), data)
    first, second = tiny.gpt2(), tiny.gpt2(seed=5)
    first_optimizer, second_optimizer = optimizer_of(before, first), optimizer_of(after, second)
    losses = train(first, first_optimizer, data[:4])
    saved = copy.deepcopy((first.state_dict(), first_optimizer.state_dict()))
    second.load_state_dict(saved[0])
    second_optimizer.load_state_dict(saved[1])
    losses += train(second, second_optimizer, data[4:])
    assert losses == expected


def test_learning_rate_of_a_checkpoint_is_taken():
    model = tiny.gpt2()
    optimizer = CombinedOptimizer(adamw(model))
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.5
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == optimizer.optimizer.param_groups[0]["lr"] == 0.5


def test_another_models_state_is_refused():
    one, other = tiny.gpt2(layers=1), tiny.gpt2(layers=2)
    with pytest.raises(ValueError, match="groups of"):
        CombinedOptimizer(adamw(one)).load_state_dict(CombinedOptimizer(adamw(other)).state_dict())


# ---- the work of a step ----
def phase(layers: int, dtype: torch.dtype, fold_clip: bool):
    """The operators from the end of backward to the next forward, in a steady step."""
    model = tiny.gpt2(layers=layers)
    half = dtype != torch.float32
    precision = amp.choose_precision(dtype == torch.float16, dtype == torch.bfloat16, "O2" if half else None)
    masters = amp.cast_model(model, precision) if half else {}
    optimizer = CombinedOptimizer(adamw(model), masters, fold_clip=fold_clip)
    scaler = amp.LossScaler("cpu", "dynamic") if dtype == torch.float16 else None

    def optimize() -> None:
        optimizer.finish_gradients()
        if scaler:
            scaler.unscale_(optimizer)
        optimizer.clip_grad_norm_(1.0)
        scaler.step(optimizer) if scaler else optimizer.step()
        if scaler:
            scaler.update()
        model.zero_grad()

    for ids in tiny.batches(2):
        loss = model(input_ids=ids, labels=ids).loss
        (scaler.scale(loss) if scaler else loss).backward()
        counted = count(optimize)
    return counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fold_clip", [True, False])
def test_the_optimizer_phase_does_not_grow_with_the_model(dtype, fold_clip):
    shallow, deep = phase(2, dtype, fold_clip), phase(12, dtype, fold_clip)
    assert shallow.calls == deep.calls
    assert shallow.tensors == deep.tensors < 80


def test_a_plain_optimizer_is_handed_every_parameter():
    """The measure sees what it is for: torch's fused AdamW takes few calls, but a list of all parameters in each."""
    model = tiny.gpt2()
    optimizer = adamw(model)
    train(model, optimizer, tiny.batches(1))
    tiny.backward(model, tiny.batches(1)[0])
    assert count(optimizer.step).tensors > 5 * len(list(model.parameters()))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_hooks_cost_at_most_one_operator_a_parameter(micro_batches):
    ids = tiny.batches(1)[0]

    def backward_calls(combined: bool) -> int:
        model = tiny.gpt2()
        optimizer = adamw(model)
        if combined:
            optimizer = CombinedOptimizer(optimizer)
        calls = 0
        for _ in range(micro_batches):
            loss = model(input_ids=ids, labels=ids).loss
            calls = count(loss.backward).calls.total()
        return calls

    parameters = len(list(tiny.gpt2().parameters()))
    assert backward_calls(True) - backward_calls(False) <= parameters
