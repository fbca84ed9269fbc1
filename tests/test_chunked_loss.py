"""utils/chunked_loss.py against torch's linear and cross_entropy on whole logits."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from utils import chunked_loss, device, tiled_loss

VOCABULARY, WIDTH = 23, 6
HERE = torch.device(device.accelerator() or "cpu")


@pytest.fixture(autouse=True, params=["tiles", "chunks", "aligned"])
def way(request, monkeypatch) -> str:
    """In tiles, as on a CPU; in whole chunks, and in aligned ones, as on an accelerator; "own": as this machine does it."""
    if request.param == "own":
        return request.param
    monkeypatch.setattr(tiled_loss, "COLUMNS", 7)
    monkeypatch.setattr(tiled_loss, "COLUMNS_WITHOUT_GRADIENTS", 7)
    if request.param != "tiles":
        monkeypatch.setattr(chunked_loss, "TILED_ON", ())
    if request.param == "aligned":
        monkeypatch.setattr(chunked_loss, "UNALIGNED_ON", ())
    return request.param


def example(dtype=torch.float64, bias: bool = True, ignored: bool = True) -> tuple:
    """(hidden, weight, bias, labels) of two samples of nine rows."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    hidden, weight = draw(2, 9, WIDTH), draw(VOCABULARY, WIDTH)
    labels = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
    if ignored:
        labels[0, 2:7] = labels[1, -1] = chunked_loss.IGNORED
    return hidden, weight, draw(VOCABULARY) if bias else None, labels


def whole(hidden, weight, bias, labels, smoothing=0.0) -> torch.Tensor:
    logits = functional.linear(hidden, weight, bias).flatten(0, 1)
    return functional.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels.flatten(),
                                    reduction="sum", label_smoothing=smoothing)  # fmt: skip


def gradients(loss: torch.Tensor, *of) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, [tensor for tensor in of if tensor is not None])


@pytest.mark.parametrize("chunk", [1, 4, 18, 64, None])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_those_of_whole_logits(chunk, smoothing, bias):
    hidden, weight, offset, labels = example(bias=bias)
    loss = chunked_loss.loss_sum(hidden, weight, offset, labels, smoothing, chunk)
    expected = whole(hidden, weight, offset, labels, smoothing)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, stock = (gradients(3 * value, hidden, weight, offset) for value in (loss, expected))
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_are_those_of_finite_differences(smoothing):
    """gradcheck goes backward through one loss several times, which ours does not allow: here each has a loss of its own."""
    hidden, weight, bias, labels = example()

    class Fresh(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return chunked_loss.loss_sum(*tensors, labels, smoothing, 4)

        @staticmethod
        def backward(ctx, grad_output):
            tensors = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            with torch.enable_grad():
                loss = chunked_loss.loss_sum(*tensors, labels, smoothing, 4)
            return torch.autograd.grad(loss, tensors, grad_output)

    assert torch.autograd.gradcheck(Fresh.apply, (hidden, weight, bias))


def test_a_second_backward_through_one_loss_is_refused():
    hidden, weight, bias, labels = example()
    loss = chunked_loss.loss_sum(hidden, weight, bias, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_needs_no_gradient_gets_none():
    hidden, weight, bias, labels = example()
    chunked_loss.loss_sum(hidden, weight.detach(), bias.detach(), labels, chunk=4).backward()
    assert hidden.grad is not None and weight.grad is None
    loss = chunked_loss.loss_sum(hidden.detach(), weight, bias.detach(), labels, chunk=4)
    torch.testing.assert_close(gradients(loss, weight), gradients(whole(hidden, weight, bias, labels), weight))
    with torch.no_grad():
        assert not chunked_loss.loss_sum(hidden, weight, bias, labels).requires_grad


def test_a_weight_that_is_used_twice_gets_both_gradients():
    """As GPT-2's, which is the embedding as well."""
    _, weight, _, labels = example()
    tokens = labels.clamp(min=0)
    found = [
        gradients(function(functional.embedding(tokens, weight), weight, None, labels), weight)[0]
        for function in (chunked_loss.loss_sum, whole)
    ]
    torch.testing.assert_close(*found)


def test_labels_that_are_all_ignored_give_zero():
    hidden, weight, bias, labels = example()
    loss = chunked_loss.loss_sum(hidden, weight, bias, torch.full_like(labels, chunked_loss.IGNORED), 0.1)
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(loss, hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights(dtype):
    """Losses are float32; the weight's gradient is summed over chunks in float32, so that many chunks lose nothing."""
    hidden, weight, bias, labels = example(dtype)
    loss = chunked_loss.loss_sum(hidden, weight, bias, labels, chunk=1)
    assert loss.dtype == torch.float32
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    expected = whole(*exact, labels)
    tolerance = 2 * torch.finfo(dtype).eps
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for mine, theirs in zip(gradients(loss, hidden, weight, bias), gradients(expected, *exact), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=4 * tolerance * theirs.abs().max().item())


def test_under_autocast_products_are_half_and_gradients_float32():
    hidden, weight, bias, labels = example(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_loss.loss_sum(hidden, weight, bias, labels)
        stock = whole(hidden, weight, bias, labels)
    assert loss.item() == pytest.approx(stock.item(), rel=1e-3)
    assert loss.item() != chunked_loss.loss_sum(hidden, weight, bias, labels).item()
    assert {gradient.dtype for gradient in gradients(loss, hidden, weight, bias)} == {torch.float32}


@pytest.mark.parametrize("chunk", [1, 4, 64, None])
@pytest.mark.parametrize("bias", [True, False])
def test_the_evaluation_is_that_of_whole_logits(chunk, bias):
    from utils.objectives import predicted_rows

    hidden, weight, offset, labels = example(torch.float32, bias)
    labels[0, 0] = functional.linear(hidden, weight, offset)[0, 0].argmax()
    found = chunked_loss.token_sums(hidden, weight, offset, labels, chunk)
    expected = predicted_rows.token_sums(functional.linear(hidden, weight, offset), labels)
    assert found.dtype == torch.float32 and found[0, 0] >= 1
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "device"), [(1024, 50257, "cpu"), (8192, 50257, "npu"), (7, 96, "cpu"), (2**20, 257, "npu")]
)
def test_chunks_are_within_memory_and_as_few_as_it_allows(rows, vocabulary, device):
    chunk = chunked_loss.chunk_rows(rows, vocabulary, device)
    memory = chunked_loss.CHUNK_BYTES.get(device, chunked_loss.CHUNK_BYTES_ON_A_DEVICE)
    columns = chunked_loss.aligned(vocabulary, device)
    assert 4 * columns * chunk <= memory
    assert chunk % 16 == 0 and chunk <= chunked_loss.MOST_ROWS
    assert (chunk + 32) * -(-rows // chunk) > min(memory / (4 * columns), chunked_loss.MOST_ROWS, rows)


def test_a_gradient_that_adds_up_over_many_rows_stays_within_float16():
    """40,000 rows with one target: their sum is beyond float16's 65,504, each chunk's is not."""
    hidden = torch.full((40_000, 4), 2.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(20, 4, dtype=torch.float16, requires_grad=True)
    loss = chunked_loss.loss_sum(hidden, weight, None, torch.zeros(40_000, dtype=torch.int64))
    [gradient] = torch.autograd.grad(loss / 40_000, [weight])
    assert gradient[0].tolist() == pytest.approx([-2 * 19 / 20] * 4, rel=1e-3)


def test_whole_logits_are_never_in_memory(way):
    """The largest tensor that any operator makes has the size of a chunk's logits, or of the weight's gradient."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            result = function(*arguments, **(named or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    hidden = torch.randn(512, WIDTH, requires_grad=True)
    weight = torch.randn(1000, WIDTH, requires_grad=True)
    labels = torch.randint(0, 1000, (512,))
    with Largest() as largest:
        chunked_loss.loss_sum(hidden, weight, None, labels, chunk=16).backward()
        chunked_loss.token_sums(hidden.unsqueeze(0), weight, None, labels.unsqueeze(0), chunk=16)
    assert largest.elements == {"tiles": weight.numel(), "chunks": 16 * 1000, "aligned": 16 * 1024}[way]


@pytest.mark.parametrize("way", ["own"], indirect=True)
@pytest.mark.parametrize("compiled", [False, True] if HERE.type != "cpu" else [False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_this_machines_device(way, monkeypatch, dtype, compiled):
    """Its accelerator's own way, if it has one: GPT-2's vocabulary, in three chunks, against float64 on the CPU."""
    monkeypatch.setitem(chunked_loss.CHUNK_BYTES, HERE.type, 4 * 50257 * 16)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator).to(dtype) for shape in [(2, 24, 64), (50257, 64)]]
    tensors[1] *= 0.125
    labels = torch.randint(0, 50257, (2, 24), generator=generator)
    labels[0, 5:9] = chunked_loss.IGNORED
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    expected = whole(*exact, None, labels)
    ours = [tensor.to(HERE).requires_grad_() for tensor in tensors]
    loss_sum = torch.compile(chunked_loss.loss_sum) if compiled else chunked_loss.loss_sum
    loss = loss_sum(*ours, None, labels.to(HERE))
    tolerance = max(4 * torch.finfo(dtype).eps, 2e-6)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for mine, theirs in zip(gradients(loss, *ours), gradients(expected, *exact), strict=True):
        torch.testing.assert_close(mine.double().cpu(), theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize(
    ("vocabulary", "device", "columns"),
    [
        (50257, "cpu", 50257),
        (50257, "npu", 50432),
        (50265, "cuda", 50432),
        (30522, "cuda", 30720),
        (32000, "npu", 32000),
    ],
)
@pytest.mark.parametrize("way", ["chunks"], indirect=True)
def test_logits_have_as_many_columns_as_a_device_wants(way, vocabulary, device, columns):
    assert chunked_loss.aligned(vocabulary, device) == columns


@pytest.mark.parametrize("way", ["aligned"], indirect=True)
def test_each_row_of_a_product_begins_where_a_matrix_unit_reads_fast(way):
    """The vocabulary is odd: in training and in evaluation no product has a factor or a result with rows of that length."""
    starts = set()

    class Rows(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            result = function(*arguments, **(named or {}))
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default):
                matrices = [tensor for tensor in (*arguments, result) if getattr(tensor, "ndim", 0) == 2]
                starts.update(max(tensor.stride()) for tensor in matrices)
            return result

    hidden, labels = torch.randn(32, 64, requires_grad=True), torch.randint(0, 1001, (32,))
    weight, bias = torch.randn(1001, 64, requires_grad=True), torch.randn(1001, requires_grad=True)
    with Rows():
        chunked_loss.loss_sum(hidden, weight, bias, labels, chunk=16).backward()
        chunked_loss.token_sums(hidden.unsqueeze(0), weight, bias, labels.unsqueeze(0), chunk=16)
    assert starts == {16, 64, 1024}
    assert weight.grad.shape == weight.shape and bias.grad.shape == bias.shape


@pytest.mark.parametrize("way", ["chunks", "aligned"], indirect=True)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_compiled_a_chunk_is_one_kernel(way, smoothing):
    """Nothing for which Inductor would end a kernel and write the chunk in float32: no scatter, and no softmax that shares an
    exponential with the loss. Gradients are as without compiling."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    operators = set()

    def collect(graph, inputs):
        operators.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    hidden, weight, bias, labels = example(torch.bfloat16)
    compiled = torch.compile(chunked_loss.loss_sum, backend=aot_autograd(fw_compiler=collect), fullgraph=True)
    found, expected = (
        gradients(function(hidden, weight, bias, labels, smoothing), hidden, weight, bias)
        for function in (compiled, chunked_loss.loss_sum)
    )
    assert "aten._log_softmax.default" in operators and "aten._softmax.default" not in operators
    assert not any("scatter" in name for name in operators if "slice_scatter" not in name)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("target", range(VOCABULARY))
def test_of_equal_logits_the_first_is_the_prediction(target):
    """Equal ones within a tile and in several."""
    hidden, weight, _, labels = example(torch.float32, bias=False, ignored=False)
    with torch.no_grad():
        weight[[3, 5, 9, 10, 22]] = weight[3].clone()
    labels.fill_(target)
    expected = functional.linear(hidden, weight).argmax(dim=-1) == labels
    found = chunked_loss.token_sums(hidden, weight, None, labels)
    assert found[:, 0].tolist() == expected.sum(1).tolist()
    if target == 3:
        assert expected.any()
