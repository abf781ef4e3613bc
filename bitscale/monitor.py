"""Watches a run's steps: one line on the console a logging interval, and the guard's eyes."""

import resource
import time

import torch

from bitscale.config import Amendments, Config, batch_index, num_steps, stop_step
from bitscale.data.batches import Batches
from bitscale.engine import StepResult
from bitscale.guard import GoBack, Watch, error_for
from bitscale.mesh import Mesh
from bitscale.quant.schedule import Strength
from bitscale.recorder import Recorder, SpeedRecord, TrainRecord, progress_line


class Monitor:
    """Buffers step results on the device; one host synchronisation a logging interval."""

    def __init__(
        self,
        cfg: Config,
        mesh: Mesh,
        batches: Batches,
        recorder: Recorder,
        amendments: Amendments,
    ) -> None:
        self._cfg, self._mesh, self._batches = cfg, mesh, batches
        self._recorder, self._amendments = recorder, amendments
        guard = cfg.transition.guard
        # Of a resumed run's steps before, so that it judges as if it had never stopped.
        losses = [] if guard.spike is None else recorder.recent_losses(guard.window)
        self._watch = Watch(cfg, losses)
        self._pending: list[tuple[int, StepResult, float, float, Strength]] = []
        self._mark = self._begin = time.perf_counter()
        self._num_done = 0

    def add(
        self, done: int, result: StepResult, lr: float, decay: float, strength: Strength
    ) -> None:
        self._pending.append((done, result, lr, decay, strength))

    def report(self) -> None:
        """Write and print what has come since the last call.

        Raises, on every rank, for the first bad step: GoBack if the guard is to go back, else
        NonFiniteLoss or LossSpike.
        """
        if not self._pending:
            return
        cfg, mesh = self._cfg, self._mesh
        losses = torch.stack([result.loss for _, result, *_ in self._pending])
        losses = mesh.sum(losses) / mesh.world_size
        norms = [float(result.grad_norm) for _, result, *_ in self._pending]
        records = [
            TrainRecord(
                step=done,
                tokens=self._batches.tokens_seen(done),
                loss=loss,
                lr=lr,
                weight_decay=decay,
                lambda_weight=strength.weight,
                lambda_activation=strength.activation,
                grad_norm=norm,
                residual=strength.residual,
            )
            for (done, _, lr, decay, strength), loss, norm in zip(
                self._pending, losses.tolist(), norms, strict=True
            )
        ]
        self._recorder.train(records)
        speed = self._speed(records)
        self._recorder.speed(speed)
        if mesh.is_main:
            mean_loss = sum(record.loss for record in records) / len(records)
            line = progress_line(records[-1]._replace(loss=mean_loss), speed, num_steps(cfg))
            print(line, flush=True)
        self._pending.clear()
        self._judge(records)

    def _judge(self, records: list[TrainRecord]) -> None:
        fault = self._watch.first_fault(records)
        guard = self._cfg.transition.guard
        if guard.spike is not None:
            # Only rank 0 knows the losses of before a resumption.
            fault = self._mesh.gather_objects(fault)[0]
        if fault is None:
            return
        self._recorder.flush()
        raise error_for(fault) if guard.action == "stop" else GoBack(fault)

    def _speed(self, records: list[TrainRecord]) -> SpeedRecord:
        now = time.perf_counter()
        cfg, batches = self._cfg, self._batches
        last = records[-1].step
        step_seconds = (now - self._mark) / len(records)
        self._num_done += len(records)
        remaining = stop_step(cfg) - last
        self._mark = now
        epochs = batches.epochs(batch_index(last, self._amendments))
        return SpeedRecord(
            step=last,
            tokens_per_second=batches.tokens_seen(1) / step_seconds,
            step_seconds=step_seconds,
            peak_gib=_peak_gib(self._mesh.device),
            eta_seconds=remaining * (now - self._begin) / self._num_done,
            epochs={
                corpus.path: passes for corpus, passes in zip(cfg.data.corpora, epochs, strict=True)
            },
        )


def _peak_gib(device: torch.device) -> float:
    """Largest memory of this rank so far: CUDA allocations, or resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
