"""A Trainer whose checkpoints are whole or not there, and from which training goes on bit for bit.

It knows no objective and no precision: those are utils/trainer.py's. A save goes like this:

    _save_checkpoint        transformers writes into a passing folder, each rank its own files
    all ranks               tell each other whether they could
    _write_and_commit       the main process adds the manifest, renames, then removes old checkpoints

With --async_save a thread copies weights, masters and moments, and does what comes after. The next update waits for the
copy, which is made while its gradients are computed.
"""

import contextlib
import copy
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerControl

from utils import checkpoint, elastic, output_folder, sharded_checkpoint
from utils.checkpoint_safety import check_model, check_state, reading
from utils.errors import UsageError, one_line
from utils.host_snapshot import HostSnapshot
from utils.main_process import told_by_main

logger = logging.getLogger(__name__)

PROGRESS = ("loss_since_log", "loss_until_log", "last_logged_step", "first_step", "seconds")


@dataclass
class Save:
    """A checkpoint on its way. best: the best model's folder once this is committed. later: what remains to be written.
    error: why it cannot be. copying: by which weights and moments are copied, before `written`. files: with their checksums,
    where all ranks share in those."""

    folder: Path
    step: int
    best_before: str | None
    best: str | None
    later: list[Callable[[], None]] = field(default_factory=list)
    error: Exception | None = None
    wants_push: bool = False
    written: Future | None = None
    copying: list[Future] = field(default_factory=list)
    files: dict[str, tuple[int, str]] | None = None

    @property
    def final(self) -> Path:
        return self.folder.parent.parent / self.folder.name


class CheckpointedTrainer(Trainer):
    """Trainer for LanguageModelingArguments; see the module."""

    control: TrainerControl

    def __init__(self, *arguments, **named):
        self.saving: Save | None = None  # while transformers writes
        self.in_background: Save | None = None  # while a thread writes
        self.last_saved: Path | None = None  # in this training, once it is committed
        self._progress: dict = {}
        super().__init__(*arguments, **named)
        # transformers' own rotation goes by the numbers and times of whatever lies there, and leaves only the best at
        # the end; rotation is a part of the commit here.
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._thread = ThreadPoolExecutor(1, "save") if self.args.async_save else None
        self._weights = HostSnapshot(self.args.device)
        self._moments = HostSnapshot(self.args.device)
        self.add_callback(_Progress(self))

    # ---- save ----
    def save_now(self) -> Path | None:
        """Saves a checkpoint of the step that was finished last, unless there is one, and waits until it is committed.

        To be called by all ranks, between two steps. Returns its folder; None if it could not be written, which the log
        tells.
        """
        self.finish_saves()
        if self.saved_now() is None:
            self._save_checkpoint(self.model_wrapped, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self.finish_saves()
        return self.saved_now()

    def saved_now(self) -> Path | None:
        """The checkpoint of the step that was finished last; None if there is none that is committed."""
        name = f"checkpoint-{self.state.global_step}"
        return self.last_saved if self.last_saved is not None and self.last_saved.name == name else None

    def finish_saves(self) -> None:
        """Waits until the thread has written and committed what it was given. To be called by all ranks."""
        if self._thread is None:
            return
        self._settle(wait=True)
        known = (self.last_saved, self.state.best_model_checkpoint)
        [(self.last_saved, self.state.best_model_checkpoint)] = self._all_ranks(known)[:1]

    def _save_checkpoint(self, model, trial) -> None:
        self._settle(wait=True)
        step = self.state.global_step
        folder = checkpoint.staged_folder(super()._get_output_dir(trial), step)
        best = self.state.best_model_checkpoint
        save = self.saving = Save(folder, step, best, best)
        try:
            with self._noting_errors():
                folder.mkdir(parents=True, exist_ok=True)
            with self._noting_errors():  # in any case, since transformers lets all ranks wait for each other in there
                super()._save_checkpoint(model, trial)
                self._name_best(save)
        finally:
            self.saving = None
        self._agree(save)
        if save.error is None and self._thread is None and self.args.is_sharded:
            save.files = self._describe_together(save)
        if save.error is None and self._thread is None:
            if self.args.should_save:
                with self._noting_errors(save):
                    self._write_and_commit(save)
            self._agree(save)
        if save.error is not None:
            self._give_up(save)
            return
        if self._thread is None:
            self._committed(save)
        elif self.args.should_save:
            copying = [snapshot.fill_in(self._thread) for snapshot in (self._weights, self._moments)]
            save.copying = [copy for copy in copying if copy is not None]
            save.written = self._thread.submit(self._write_and_commit, save)
            self.in_background = save

    def _name_best(self, save: Save) -> None:
        """The best checkpoint by the name that it will have, where transformers has met it in the passing folder."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == save.folder:
            self.state.best_model_checkpoint = str(save.final)
            if self.args.should_save:
                self.state.save_to_json(str(save.folder / "trainer_state.json"))
        save.best = self.state.best_model_checkpoint

    def _write_and_commit(self, save: Save) -> None:
        for write in save.later:
            write()
        run = output_folder.run_id(save.final.parent)
        checkpoint.commit(save.folder, run, save.step, self.args.world_size, save.files)
        checkpoint.rotate(save.final.parent, run, self.save_total_limit, save.best)

    def _describe_together(self, save: Save) -> dict[str, tuple[int, str]]:
        """For all ranks to call: each reads its part of the files, so that more ranks need no more time for more shards."""
        names: list[str] = []
        found: dict[str, tuple[int, str]] = {}
        with self._noting_errors(save):
            names = checkpoint.names_by_size(save.folder) if self.args.should_save else []
        names = told_by_main(lambda: names)
        with self._noting_errors(save):
            found = checkpoint.describe(save.folder, names[self.args.process_index :: self.args.world_size])
        parts = self._all_ranks(found)
        self._agree(save)
        return {name: file for part in parts for name, file in part.items()}

    def _committed(self, save: Save) -> None:
        self.last_saved = save.final
        if save.wants_push:
            super()._push_from_checkpoint(str(save.final))

    def _give_up(self, save: Save) -> None:
        """A checkpoint that cannot be written costs neither the run nor the checkpoints before."""
        if self.state.best_model_checkpoint in (str(save.final), str(save.folder)):
            self.state.best_model_checkpoint = save.best_before
        if not self.args.should_save:
            return
        assert save.error is not None
        checkpoint.discard(save.folder)
        output_dir = save.final.parent
        whole = checkpoint.own(output_dir, output_folder.run_id(output_dir))
        logger.error(
            "--output_dir %s: %s could not be saved: %s; training goes on, and the last complete checkpoint is %s: free "
            "some space, or keep fewer checkpoints with --save_total_limit",
            output_dir,
            save.final.name,
            _reason(save.error),
            whole[-1][0].name if whole else "none yet",
        )

    def wait_for_copies(self) -> None:
        """To be called before weights, masters or moments change: until then the thread may still copy them."""
        if self.in_background is not None:
            for copying in self.in_background.copying:
                copying.result()

    def _settle(self, wait: bool) -> None:
        """Tells how the background save went, if it has come to its end. Raises what is no fault of the disk."""
        save = self.in_background
        if save is None or save.written is None or not (wait or save.written.done()):
            return
        self.in_background = None
        with self._noting_errors(save):
            save.written.result()
        self._give_up(save) if save.error is not None else self._committed(save)

    @contextlib.contextmanager
    def _noting_errors(self, save: Save | None = None) -> Iterator[None]:
        """What keeps a checkpoint from being written is noted, so that no rank waits for another; a model that is saved by
        itself cannot be done without: a UsageError."""
        save = save or self.saving
        try:
            with sharded_checkpoint.first_error():
                yield
        except (OSError, SafetensorError, RuntimeError) as error:
            if not _is_of_writing(error):
                raise
            if save is None:
                raise UsageError(
                    f"--output_dir {self.args.output_dir}: the model could not be saved: {_reason(error)}; free some space "
                    "and start the same command again: it goes on from its last checkpoint"
                ) from error
            save.error = save.error or error

    def _agree(self, save: Save) -> None:
        """All ranks learn of the first error of any."""
        found = self._all_ranks(None if save.error is None else _reason(save.error))
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(found) if text is not None]
        if failed and len(found) > 1:
            save.error = OSError(failed[0])

    def _all_ranks(self, value) -> list:
        return gather_object([value]) if self.args.world_size > 1 else [value]

    def _get_output_dir(self, trial) -> str:
        return str(self.saving.folder.parent) if self.saving is not None else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        assert self.saving is not None
        self.saving.wants_push = True  # once it is committed

    @property
    def _deferred(self) -> Save | None:
        """The checkpoint on its way, if a thread is to write it."""
        return self.saving if self._thread is not None and self.args.should_save and not self.args.is_sharded else None

    def _save(self, output_dir=None, state_dict=None) -> None:
        if (save := self._deferred) is not None:
            frozen = copy.copy(self)
            frozen.model = self._weights.take_model(self.model)
            save.later.append(lambda: Trainer._save(frozen, output_dir))
            return
        # Noted here already, since transformers lets all ranks wait for each other after this.
        with self._noting_errors():
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if (save := self._deferred) is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        moments = self._moments.take_tree(self.optimizer.state_dict())
        schedule = copy.deepcopy(self.lr_scheduler.state_dict())
        frozen = copy.copy(self)
        frozen.optimizer = SimpleNamespace(state_dict=lambda: moments)
        frozen.lr_scheduler = SimpleNamespace(state_dict=lambda: schedule)
        save.later.append(lambda: Trainer._save_optimizer_and_scheduler(frozen, output_dir))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        path = self._progress_file(output_dir)
        path.write_text(json.dumps(self._measure_progress()), encoding="utf-8")

    # ---- resume ----
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.wait_for_copies()
        with reading(resume_from_checkpoint):
            check_state(resume_from_checkpoint)
            check_model(resume_from_checkpoint, self.model.config)
            sharded_checkpoint.check_plain(resume_from_checkpoint)
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result) -> None:
        # A tied weight is saved once: its other name is not missing.
        tied = getattr(self.model, "all_tied_weights_keys", {})
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            self._progress = self._read_progress(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        self.wait_for_copies()
        best = Path(self.state.best_model_checkpoint)
        found = checkpoint.damage(best) if (best / checkpoint.MANIFEST).exists() else None
        if found is not None:
            logger.error("%s: %s; the best model cannot be loaded, the last one stays", best, found)
            return
        super()._load_best_model()

    def _init_training_state(self, max_steps, updates, epochs, resume_from_checkpoint, trial) -> tuple[int, int]:
        with reading(resume_from_checkpoint) if resume_from_checkpoint else contextlib.nullcontext():
            found = super()._init_training_state(max_steps, updates, epochs, resume_from_checkpoint, trial)
        if resume_from_checkpoint is not None and self.state.best_model_checkpoint is None:
            # The output folder may have been moved; the best checkpoint then stands beside the one that is resumed.
            sibling = Path(resume_from_checkpoint).parent / f"checkpoint-{self.state.best_global_step}"
            if self.state.best_global_step and sibling.is_dir():
                self.state.best_model_checkpoint = str(sibling)
        return found

    def evaluation_loop(self, dataloader, *arguments, **named):
        if hasattr(dataloader, "set_epoch"):
            dataloader.set_epoch(0)  # with persistent workers accelerate counts on, and other tokens would be hidden
        return super().evaluation_loop(dataloader, *arguments, **named)

    # ---- what is averaged and timed over the whole run ----
    def _measure_progress(self) -> dict:
        """What makes means and times of a resumed run those of the whole run; of this rank."""
        seconds = time.time() - self._start_time + self._earlier_seconds
        values = (
            self._tr_loss.item(), self._total_loss_scalar, self._globalstep_last_logged, self._first_step, seconds
        )  # fmt: skip
        progress = dict(zip(PROGRESS, values, strict=True))
        return progress | {"samples_per_step": elastic.samples_per_step(self.args)}

    def _progress_file(self, checkpoint: str) -> Path:
        return Path(checkpoint, elastic.PROGRESS_FILE.format(self.args.process_index))

    def _read_progress(self, checkpoint: str) -> dict:
        if self.args.elastic:
            return elastic.mean_progress(checkpoint)
        path = self._progress_file(checkpoint)
        if not path.exists():
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(found[name]) for name in PROGRESS}

    def _take_up_progress(self) -> None:
        progress, self._progress = self._progress, {}
        self.last_saved = None
        self._start_time = time.time()
        self._earlier_seconds = progress.get("seconds", 0.0)
        self._first_step = int(progress.get("first_step", self.state.global_step))
        if progress:
            self._tr_loss.fill_(progress["loss_since_log"])
            self._total_loss_scalar = progress["loss_until_log"]
            self._globalstep_last_logged = int(progress["last_logged_step"])

    def _finalize_training(self, trial, num_train_samples, start_time):
        self.finish_saves()
        self._initial_global_step = self._first_step
        return super()._finalize_training(trial, num_train_samples, start_time - self._earlier_seconds)


class _Progress(TrainerCallback):
    """Takes up the trainer's progress when training begins; lets a background save copy what it needs before the next
    update, and asks after each step how it went."""

    def __init__(self, trainer: CheckpointedTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **_):
        self.trainer._take_up_progress()

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.trainer.wait_for_copies()

    def on_step_end(self, args, state, control, **_):
        self.trainer._settle(wait=False)


def _is_of_writing(error: Exception) -> bool:
    """Whether the error tells that a file could not be written: torch's and safetensors' are no OSError."""
    written = re.search(r"PytorchStreamWriter|inline_container|iostream error", str(error))
    return written is not None or not isinstance(error, RuntimeError)


def _reason(error: Exception) -> str:
    text = one_line(error)
    if isinstance(error, RuntimeError):
        return f"the disk may be full ({text[:120]})"
    return text
