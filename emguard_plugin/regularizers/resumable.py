"""What a method keeps in checkpoints, and how a resumed run finds it: when, by whom and from which checkpoint, once for all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from emguard_plugin.models.identity import check_base
from emguard_plugin.reference.checkpoints import find_state
from emguard_plugin.regularizers.run_facts import RunFacts


class Resumable(TrainerCallback):
    """A callback with a state in each checkpoint."""

    state_file: ClassVar[str] = ""
    """What a checkpoint holds of this method; nothing by default."""
    _saved_in: Path | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a method that names a state and cannot write or read it, before a checkpoint is due."""
        super().__init_subclass__(**kwargs)
        for name in ("write_state", "read_state") if cls.state_file else ():
            if getattr(cls, name) is getattr(Resumable, name):
                raise TypeError(f"{cls.__name__} has a `state_file` and no `{name}`: a resumed run would miss {cls.state_file}.")

    def write_state(self, path: Path) -> None:
        """Write `state_file` into a checkpoint; called on one process, once `recorded`.

        Raises:
            OSError: naming the file, when it cannot be written.
        """
        raise NotImplementedError

    def read_state(self, path: Path, run: RunFacts, own: bool) -> tuple[Any, Mapping[str, Any]]:
        """Read what `write_state` wrote.

        Args:
            path: Of the file.
            run: The run that goes on.
            own: Whether it lies in the checkpoint that the run continues, and not in another one of that run.

        Returns:
            The state, and which model it was recorded from: `base`, `name`, `reference` of an `Identity`.

        Raises:
            Damaged: for a file that cannot be used.
            ValueError: for one that belongs to something else.
        """
        raise NotImplementedError

    @property
    def recorded(self) -> bool:
        """Whether there is a state to write."""
        return True

    def flush(self, output_dir: Path) -> None:
        """Write what lies beside the checkpoints; nothing by default. Every process calls it before a checkpoint is completed.

        Raises:
            OSError: naming the file, when it cannot be written.
        """

    def find_stored(self, run: RunFacts) -> Any | None:
        """Return the state of a run that is continued, from its checkpoint or from another of the same run where that lost it.

        Another one's stands in only if it was recorded from the very model that this run starts from.

        Returns:
            What `read_state` returned; None in a fresh run, and where no checkpoint has the file.

        Raises:
            ValueError: for a state that cannot be used, or belongs to another model or other settings.
        """
        if run.resume_from is None:
            return None

        def read(path: Path, own: bool) -> Any:
            state, about = self.read_state(path, run, own)
            check_base(path, about, run.identity)
            if not own and about["reference"] != run.identity.reference:
                raise ValueError(f"{path} has another reference.")
            return state

        return find_state(run.resume_from, self.state_file, read)

    def save(self, folder: Path, first: bool) -> None:
        """Write into a checkpoint what a resumed run needs, once. Every process calls it.

        The trainer mixin does so after the weights and before the host's last file, without which no run resumes from it.

        Args:
            folder: `checkpoint-N` in the output folder.
            first: Whether this is the process that writes.

        Raises:
            OSError: naming the file, when it cannot be written.
        """
        if self._saved_in == folder:
            return
        self.flush(folder.parent)
        if first and self.state_file and self.recorded and folder.is_dir():
            self.write_state(folder / self.state_file)
        self._saved_in = folder

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write into a checkpoint what `save` has not yet written there."""
        self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.is_world_process_zero)
        self._saved_in = None
