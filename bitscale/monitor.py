"""Watches a run's steps: one line on the console a logging interval, and the guard's eyes."""

import os
import resource
import statistics
import time

import torch

from bitscale.config import Amendments, Config, batch_index, num_steps, stop_step
from bitscale.data.batches import Batches
from bitscale.engine import StepResult
from bitscale.guard import GoBack, Watch, error_for
from bitscale.mesh import Mesh
from bitscale.quant.schedule import Strength
from bitscale.recorder import (
    Recorder,
    SpeedRecord,
    TrainRecord,
    format_duration,
    progress_line,
)
from bitscale.watch.stragglers import Straggler, Stragglers, comparable_units


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
        units = comparable_units(mesh.world_size, cfg.parallel.tp, cfg.parallel.pp)
        self._stragglers = Stragglers(units, cfg.watch.straggler_ratio or float("inf"))
        self._hosts = mesh.gather_objects(os.uname().nodename)

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
        losses, own_seconds = self._gather()
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
                self._pending, losses, norms, strict=True
            )
        ]
        self._recorder.train(records)
        speed = self._speed(records, own_seconds)
        self._recorder.speed(speed)
        if mesh.is_main:
            mean_loss = sum(record.loss for record in records) / len(records)
            line = progress_line(records[-1]._replace(loss=mean_loss), speed, num_steps(cfg))
            print(line, flush=True)
        for straggler in self._stragglers.judge(own_seconds, len(records)):
            self._tell(straggler, records[-1])
        self._pending.clear()
        self._judge(records)

    def _gather(self) -> tuple[list[float], list[float]]:
        """Each step's loss, the mean over ranks, and each rank's median own seconds of a step.

        One sum for both. In fp64, in which numbers of fp32 add up exactly, whatever the order.
        """
        mesh = self._mesh
        results = [result for _, result, *_ in self._pending]
        losses = torch.stack([result.loss for result in results]).double()
        own_seconds = losses.new_zeros(mesh.world_size)
        own_seconds[mesh.rank] = statistics.median(r.own_time.seconds() for r in results)
        sums = mesh.sum(torch.cat([losses, own_seconds]))
        means = (sums[: len(results)] / mesh.world_size).float()
        return means.tolist(), sums[len(results) :].tolist()

    def _tell(self, straggler: Straggler, last: TrainRecord) -> None:
        ranks, own, others, is_over = straggler
        host = self._hosts[ranks[0]]
        self._recorder.event(last.step, last.tokens, "straggler", host=host, **straggler._asdict())
        if not self._mesh.is_main:
            return
        name = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        verb = "is no longer slow: it needs" if is_over else "is slow: it needs"
        print(
            f"straggler: {name} on {host} {verb} {_format_seconds(own)} of its own a step, the "
            f"others {_format_seconds(others)} ({own / max(others, 1e-9):.2f}x)",
            flush=True,
        )

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

    def _speed(self, records: list[TrainRecord], own_seconds: list[float]) -> SpeedRecord:
        now = time.perf_counter()
        cfg, batches = self._cfg, self._batches
        last = records[-1].step
        step_seconds = (now - self._mark) / len(records)
        self._num_done += len(records)
        remaining = stop_step(cfg) - last
        self._mark = now
        epochs = batches.epochs(batch_index(last, self._amendments))
        slowest = max(range(len(own_seconds)), key=own_seconds.__getitem__)
        others = [seconds for rank, seconds in enumerate(own_seconds) if rank != slowest]
        return SpeedRecord(
            step=last,
            tokens_per_second=batches.tokens_seen(1) / step_seconds,
            step_seconds=step_seconds,
            peak_gib=_peak_gib(self._mesh.device),
            eta_seconds=remaining * (now - self._begin) / self._num_done,
            epochs={
                corpus.path: passes for corpus, passes in zip(cfg.data.corpora, epochs, strict=True)
            },
            slowest_rank=slowest,
            slowest_own_seconds=own_seconds[slowest],
            others_own_seconds=statistics.median(others or own_seconds),
        )


def _format_seconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 10 else format_duration(seconds)


def _peak_gib(device: torch.device) -> float:
    """Largest memory of this rank so far: CUDA allocations, or resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
