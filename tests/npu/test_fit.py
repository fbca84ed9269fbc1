"""What a steady training step of each script asks of the simulated NPU: nothing that would slow a real one down."""

import fitness
import pytest
from small_runs import command, on_npu

FAMILIES = ("gpt2", "bert", "xlnet")  # one for each script
O2 = ["--fp16", "--fp16_opt_level", "O2", "--use_combine_grad"]


def steady_steps(family, tokenizers, corpus, folder, *flags, layers: int = 2) -> list[list]:
    """The records of steps 3 to 6; nothing is logged in them."""
    words = [*command(family, tokenizers(family), corpus, layers), *flags, "--max_steps", 6, "--logging_steps", 100]
    [report] = on_npu(words, folder, "--per_device_train_batch_size", 4, "--max_eval_samples", 8, from_step=3)
    assert len(report["steps"]) == 4
    assert all(len(step) > 100 for step in report["steps"]), "operators were not recorded"
    assert {"backward", "optimizer"} == {phase for step in report["steps"] for phase, *_ in step}
    return report["steps"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("flags", [O2, []], ids=["O2-combined", "default"])
def test_a_steady_step_suits_the_simulated_npu(corpus, tokenizers, tmp_path, family, flags):
    steps = steady_steps(family, tokenizers, corpus, tmp_path / "run", *flags)
    for step in steps:
        assert fitness.outside_native(step) == []
        assert fitness.data_dependent(step) == []
        assert fitness.shapes(step) == fitness.shapes(steps[0])
        # With a loss scale the host reads once whether a gradient overflowed.
        waits = fitness.host_waits(step)
        assert len(waits) == (1 if "--fp16" in flags else 0), waits
        assert all("accelerate/optimizer.py" in wait for wait in waits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_optimizer_phase_on_the_simulated_npu_does_not_grow_with_depth(corpus, tokenizers, tmp_path, family):
    shallow, deep = (
        steady_steps(family, tokenizers, corpus, tmp_path / str(layers), *O2, layers=layers)[-1] for layers in (2, 12)
    )
    assert len(deep) > 2 * len(shallow), "the deep model is not deep"
    found = fitness.tensors_in_optimizer_phase(deep)
    assert 0 < found <= fitness.tensors_in_optimizer_phase(shallow)
