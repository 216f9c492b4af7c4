"""How fast a run goes: samples and supervised tokens per second, how full its rows are, memory, and the time left."""

import time

import torch
from transformers import TrainerCallback

from ..constants import IGNORE_INDEX


class SpeedCallback(TrainerCallback):
    """
    Measures optimizer steps, and adds what it found to each log of the training loss:

    - `samples_per_second`, `supervised_tokens_per_second`: of all processes together, over the steps since the last log.
      Evaluations and checkpoints between steps are not counted.
    - `utilization`: share of the rows' positions that hold a token, in [0, 1]; the rest is padding, or room in packs.
    - `memory_gib`: the most that this process held of its GPU so far; without a GPU, the main memory that it holds now.
    - `minutes_left`: until the last step, at the pace since the start of the run, evaluations and checkpoints included.

    Args:
        micro_batch_positions (`int`, *optional*):
            With `packing="full"`: positions that the packs of a micro-batch could hold.
    """

    def __init__(self, micro_batch_positions: int | None = None):
        self.micro_batch_positions = micro_batch_positions
        self._step_began = self._run_began = None
        self._first_step = 0
        self.num_batches = self.total_supervised = 0  # of this process since training began; a tensor of positions
        self._clear()

    def _clear(self) -> None:
        self._seconds, self._samples, self._positions = 0.0, 0, 0
        # Sums stay on their device until a log: reading them would make the host wait for the GPU at each step.
        self._supervised, self._filled = 0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._run_began, self._first_step = time.perf_counter(), state.global_step
        self.num_batches = self.total_supervised = 0
        self._clear()

    def begin_step(self) -> None:
        """Before the batches of an optimizer step are fetched."""
        self._step_began = time.perf_counter()

    def count(self, batch: dict[str, torch.Tensor]) -> None:
        """One micro-batch of this process."""
        labels, ids = batch.get("labels"), batch.get("input_ids")
        if labels is None or ids is None:
            return
        boundaries, mask = batch.get("cu_seq_lens_q"), batch.get("attention_mask")
        self._samples += ids.shape[0] if boundaries is None else boundaries.numel() - 1
        self.num_batches += 1
        supervised = (labels[..., 1:] != IGNORE_INDEX).sum()
        self._supervised = self._supervised + supervised
        self.total_supervised = self.total_supervised + supervised
        self._filled = self._filled + (ids.numel() if mask is None else mask.sum())
        self._positions += self.micro_batch_positions or ids.numel()

    def on_step_end(self, args, state, control, **kwargs):
        if self._step_began is not None:
            self._seconds += time.perf_counter() - self._step_began

    def report(self, state, num_processes: int) -> dict[str, float]:
        """What was found since the last report; empty if no step was measured."""
        if not self._seconds or not self._samples:
            return {}
        found = {
            "samples_per_second": round(num_processes * self._samples / self._seconds, 3),
            "supervised_tokens_per_second": round(num_processes * int(self._supervised) / self._seconds, 1),
            "utilization": round(int(self._filled) / self._positions, 4),
            "memory_gib": round(_memory() / 2**30, 3),
        }
        done = state.global_step - self._first_step
        if done > 0:
            pace = (time.perf_counter() - self._run_began) / done
            found["minutes_left"] = round(pace * (state.max_steps - state.global_step) / 60, 1)
        self._clear()
        return found


def _memory() -> int:
    """Bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss


__all__ = ["SpeedCallback"]
