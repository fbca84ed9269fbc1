"""What amp.initialize sets for the whole process."""


class LossScale:
    """A loss scale: fixed, or halved by an overflow and doubled after 2000 backward passes without one."""

    def __init__(self, loss_scale: str | float):
        self.dynamic = loss_scale == "dynamic"
        self.value = 2.0**16 if self.dynamic else float(loss_scale)
        self.unskipped = 0

    def update(self, overflow: bool) -> bool:
        """Moves on after a backward pass; returns whether the step must be skipped. A fixed scale skips none."""
        if overflow and self.dynamic:
            self.value, self.unskipped = self.value / 2, 0
            return True
        self.unskipped += 1
        if self.dynamic and self.unskipped == 2000:
            self.value, self.unskipped = self.value * 2, 0
        return False


class State:
    scale: LossScale
    backward_passes = 0


STATE = State()
