"""Combined gradients: every gradient of a model in one flat buffer per dtype, and the optimizer on top of it.

Ascend's apex calls this `combine_grad`. Unscaling, the finite check, the norm, clipping and the update then are a fixed
number of operators, however many parameters the model has:

    backward              a hook on each parameter copies its gradient into its slice of the buffer, or adds it there if
                          an earlier micro-batch left one, and frees it at once
    finish_gradients()    waits for the reduction over ranks and sets aside what received no gradient
    clip_grad_norm_()     one norm over the buffer
    step()                the wrapped optimizer on a few long slices ("segments"); float32 masters back to half weights

The parameters themselves become views of a flat buffer too. `zero_grad(set_to_none=True)` breaks nothing, since no
`.grad` outlives backward. The state is saved in torch.optim's own per-parameter form, so that a checkpoint can be
resumed with combined gradients or without. This module knows torch only.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import nn

from utils.flat_buffer import NORM_ROW, FlatBuffer, Member, flatten_half_weights, make_buffers

if TYPE_CHECKING:
    from utils.data_parallel import GradientReducer


@dataclass(eq=False)
class Segment:
    """Neighbouring members that the wrapped optimizer sees as one parameter."""

    parameter: nn.Parameter
    gradient: torch.Tensor
    members: list[Member] = field(default_factory=list)

    @property
    def start(self) -> int:
        return self.members[0].start


class CombinedOptimizer(torch.optim.Optimizer):
    """Runs an optimizer over flat buffers.

    optimizer: a fresh torch optimizer over the model's parameters. It must be element-wise unless `join` is false:
        joined parameters share one update.
    masters: {half parameter: float32 master}; the optimizer updates the masters and the model receives a copy.
    join: one segment for all neighbours in a group; otherwise each parameter is a segment in its own shape, for
        optimizers that look at shapes. The gradients live in the buffers in both cases.
    fold_clip: the clipping factor reaches the update as `grad_scale` of torch's fused kernels, which saves a pass over
        the gradients. Only for devices whose kernel obeys it: torch_npu's takes the argument and ignores it.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        masters: Mapping[nn.Parameter, nn.Parameter] | None = None,
        join: bool = True,
        fold_clip: bool = False,
    ):
        initial_state = optimizer.state_dict()["state"]  # Adagrad's starts filled
        optimizer.state.clear()
        masters = masters or {}
        self.optimizer = optimizer
        self.join = join
        self.fold_clip = fold_clip and getattr(optimizer, "_step_supports_amp_scaling", False)
        self.clip_factor: torch.Tensor | None = None
        self.reducer: GradientReducer | None = None
        parameters = [(p, group) for group, content in enumerate(optimizer.param_groups) for p in content["params"]]
        self.members = [
            Member(source, masters.get(source, source), index, group)
            for index, (source, group) in enumerate(parameters)
            if source.requires_grad
        ]
        self.buffers = make_buffers(self.members)
        self._write_backs = [pair for buffer in self.buffers for pair in flatten_half_weights(buffer)]
        self._window = "empty"  # then "open" while gradients arrive, then "finished" until the next one arrives
        self._arrived: set[Member] = set()
        self._present: set[Member] = set(self.members)
        self.segments = self._make_segments(initial_state)
        self._publish_segments()
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups = optimizer.param_groups
        self.state = optimizer.state
        self._fill_state(initial_state)
        for member in self.members:
            member.source.register_post_accumulate_grad_hook(self._gradient_hook(member))

    # ---- layout ----
    def _make_segments(self, state: Mapping[int, dict]) -> list[Segment]:
        """Segments of neighbours in a group whose scalar state (the step count) is the same in `state`."""
        segments = []
        for buffer in self.buffers:
            for _, neighbours in groupby(buffer.members, lambda m: (m.group, _scalars(state.get(m.index)))):
                run = list(neighbours)
                for members in [run] if self.join else [[member] for member in run]:
                    segments.append(self._segment(buffer, members))
        return segments

    def _segment(self, buffer: FlatBuffer, members: list[Member]) -> Segment:
        place = slice(members[0].start, members[-1].stop)
        shape = (-1,) if self.join else members[0].target.shape
        gradient = buffer.gradients[place].view(shape)
        segment = Segment(nn.Parameter(buffer.weights[place].view(shape)), gradient, members)
        segment.parameter.grad = gradient
        return segment

    def _publish_segments(self) -> None:
        for group, content in enumerate(self.optimizer.param_groups):
            content["params"] = [s.parameter for s in self.segments if s.members[0].group == group]

    # ---- gradients ----
    def _gradient_hook(self, member: Member) -> Callable[[nn.Parameter], None]:
        def gather(parameter: nn.Parameter) -> None:
            if self._window != "open":
                self._arrived.clear()
                self._window = "open"
            if member in self._arrived:
                member.gradient.add_(parameter.grad)
            else:
                member.gradient.copy_(parameter.grad)
                self._arrived.add(member)
            parameter.grad = None
            if self.reducer is not None:
                self.reducer.mark_ready(member)

        return gather

    def finish_gradients(self) -> None:
        """Ends the gathering: afterwards the segments' `.grad` are what `.grad` would be on the parameters.

        A parameter that received no gradient (on no rank) keeps weight and state, as in torch.optim, where its `.grad`
        would be None. To be called by every rank, before anything that reads gradients; again does no harm.
        """
        if self._window != "open":
            return
        for member in self.members:
            if member not in self._arrived:
                member.gradient.zero_()
        arrived = self._arrived
        if self.reducer is not None:
            arrived = {self.members[i] for i in self.reducer.finish([member in arrived for member in self.members])}
        if arrived != self._present:
            self._set_aside_absent(arrived)
        self._window = "finished"

    def _set_aside_absent(self, arrived: set[Member]) -> None:
        segments = []
        for segment in self.segments:
            runs = [list(run) for _, run in groupby(segment.members, arrived.__contains__)]
            segments += [segment] if len(runs) == 1 else self._split(segment, runs)
        self.segments = segments
        for segment in segments:
            segment.parameter.grad = segment.gradient if segment.members[0] in arrived else None
        self._publish_segments()
        self._present = set(arrived)

    def _split(self, segment: Segment, runs: list[list[Member]]) -> list[Segment]:
        # Parts stay apart for good: from now on their step counts differ, and with them Adam's bias correction.
        buffer = next(b for b in self.buffers if segment.members[0].gradient.dtype == b.weights.dtype)
        parts = [self._segment(buffer, run) for run in runs]
        state = self.state.pop(segment.parameter, None)
        for part in parts if state else []:
            offset = part.start - segment.start
            self.state[part.parameter] = {
                name: value[offset : offset + part.parameter.numel()]
                if _is_elementwise(value, segment.parameter)
                else _clone(value)
                for name, value in state.items()
            }
        return parts

    def grad_norm(self) -> torch.Tensor:
        """The 2-norm over all gradients, float32, on the device."""
        self.finish_gradients()
        norms = [
            torch.linalg.vector_norm(
                torch.linalg.vector_norm(buffer.gradients.view(-1, NORM_ROW), dim=1, dtype=torch.float32)
            )
            for buffer in self.buffers
        ]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scales the gradients so that their 2-norm is at most `max_norm`; returns the norm from before.

        The factor is torch.nn.utils.clip_grad_norm_'s: min(1, max_norm / (norm + 1e-6)).
        """
        norm = self.grad_norm()
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        if self.fold_clip:
            self.clip_factor = factor
        else:
            for buffer in self.buffers:
                buffer.gradients.mul_(factor)
        return norm

    def holds_weights(self) -> bool:
        """Whether the model's parameters are still views of the flat tensors: copies elsewhere would never be trained."""
        flat = [buffer.weights for buffer in self.buffers] + [half for half, _ in self._write_backs]
        places = {tensor.untyped_storage().data_ptr() for tensor in flat}
        return all(member.source.untyped_storage().data_ptr() in places for member in self.members)

    def gradient_buffers(self) -> dict[str, int]:
        """{dtype: elements} of the gradient buffers."""
        return {str(b.gradients.dtype).removeprefix("torch."): b.elements for b in self.buffers}

    # ---- torch.optim.Optimizer ----
    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update from the gradients gathered since the last one; without any it does nothing.

        A closure is refused: backward fills the buffers only once per step.
        """
        assert closure is None, "combined gradients take no closure"
        self.finish_gradients()
        if self._window == "empty":
            return
        if self.clip_factor is not None:
            self.optimizer.grad_scale = self.clip_factor.reciprocal()
        self.optimizer.step()
        if self.clip_factor is not None:
            del self.optimizer.grad_scale
        for half, masters in self._write_backs:
            half.copy_(masters)
        self._forget_gradients()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops what was gathered. Nothing is written: the next gradient overwrites its slice."""
        self._forget_gradients()

    def wipe_gradients(self) -> None:
        """Drops what was gathered and writes zeros, for gradients that are not finite.

        Clipping by a norm that is NaN leaves NaN between the slices, where nothing is ever written again: every later norm
        would be NaN.
        """
        for buffer in self.buffers:
            buffer.gradients.zero_()
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        self._window = "empty"
        self.clip_factor = None

    def state_dict(self) -> dict:
        """The state in the form that the wrapped optimizer's own state_dict() would have over the model's parameters."""
        state = {}
        for segment in self.segments:
            values = self.state.get(segment.parameter)
            for member in segment.members if values else []:
                place = slice(member.start - segment.start, member.stop - segment.start)
                state[member.index] = {
                    name: value.reshape(-1)[place].view(member.target.shape)
                    if _is_elementwise(value, segment.parameter)
                    else _clone(value)
                    for name, value in values.items()
                }
        groups = [
            {**{name: value for name, value in content.items() if name != "params"}, "params": self._indices(group)}
            for group, content in enumerate(self.param_groups)
        ]
        return {"state": dict(sorted(state.items())), "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Takes a state_dict of this class or of the wrapped optimizer over the same parameters, in the same order.

        Raises ValueError if groups or parameters differ in number.
        """
        sizes = [len(content["params"]) for content in state_dict["param_groups"]]
        own_sizes = [len(self._indices(group)) for group in range(len(self.param_groups))]
        if sizes != own_sizes:
            raise ValueError(f"the optimizer state has groups of {sizes} parameters, this model has {own_sizes}")
        for content, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            content.update({name: value for name, value in saved.items() if name != "params"})
        saved_indices = [index for content in state_dict["param_groups"] for index in content["params"]]
        own_indices = [member.index for member in sorted(self.members, key=lambda member: member.index)]
        state = {
            own: state_dict["state"][index]
            for own, index in zip(own_indices, saved_indices, strict=True)
            if index in state_dict["state"]
        }
        self.state.clear()
        self.segments = self._make_segments(state)
        self._present = set(self.members)
        self._fill_state(state)
        self._publish_segments()
        self._forget_gradients()

    def _fill_state(self, state: Mapping[int, dict]) -> None:
        for segment in self.segments:
            if segment.members[0].index in state:
                self.state[segment.parameter] = self._join_state(segment, state)

    def _join_state(self, segment: Segment, state: Mapping[int, dict]) -> dict:
        joined = {}
        content = self.param_groups[segment.members[0].group]
        for name, value in state[segment.members[0].index].items():
            if _is_elementwise(value, segment.members[0].target):
                flat = torch.zeros_like(segment.parameter, dtype=value.dtype)
                for member in segment.members:
                    place = slice(member.start - segment.start, member.stop - segment.start)
                    flat.view(-1)[place].copy_(state[member.index][name].reshape(-1))
                joined[name] = flat
            elif isinstance(value, torch.Tensor):
                # torch.optim keeps step counts on the host unless the kernel reads them (fused, capturable).
                on_device = content.get("fused") or content.get("capturable")
                joined[name] = value.to(segment.parameter.device if on_device else value.device, copy=True)
            else:
                joined[name] = value
        return joined

    def _indices(self, group: int) -> list[int]:
        return sorted(member.index for member in self.members if member.group == group)

    @contextlib.contextmanager
    def float32_weights(self) -> Iterator[None]:
        """The model's parameters are their masters for the while: to save them, or to load some."""
        half = [(member, member.source.data) for member in self.members if member.source is not member.target]
        for member, _ in half:
            member.source.data = member.target.data
        try:
            yield
        finally:
            for member, weights in half:
                member.source.data = weights
            for weights, masters in self._write_backs:
                weights.copy_(masters.detach())


def _is_elementwise(value, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape == parameter.shape


def _clone(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def _scalars(state: dict | None) -> tuple | None:
    """What must be equal for two parameters' states to be joined: names, and values that are not per element."""
    if state is None:
        return None
    return tuple(
        (name, None if isinstance(value, torch.Tensor) and value.dim() > 0 else float(value))
        for name, value in sorted(state.items())
        if value is not None
    )
