"""The training run: read this first.

`train` sets a run up (corpora, ranks, model, engine, resumption); `_loop` is the run itself.
"""

import os
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bitscale import checkpoint, guard, run, run_lock
from bitscale.announcement import amendment_summary, host_lines, run_summary, transition_summary
from bitscale.config import (
    Amendments,
    Config,
    amendments_tree,
    batch_index,
    check_world_size,
    config_hash,
    num_kv_heads,
    num_steps,
    stop_step,
    to_tree,
    transition_step,
)
from bitscale.data.batches import Batches, EvaluationBatch
from bitscale.data.corpus import PreparedCorpus
from bitscale.engine import TrainEngine, make_engine
from bitscale.engine.monitors import Listener, check_monitors, open_monitors
from bitscale.errors import CheckpointError, TrainingFault
from bitscale.evaluate import EvalResult, evaluate
from bitscale.mesh import (
    Mesh,
    close_mesh,
    init_mesh,
    local_rank_from_environment,
    rank_from_environment,
    set_timeout,
    share_model,
    under_launcher,
    world_size_from_environment,
)
from bitscale.model.bitlinear import is_scale, set_strength
from bitscale.model.norms import is_sub_norm
from bitscale.model.stages import make_model
from bitscale.monitor import Monitor
from bitscale.optim import learning_rate, weight_decay
from bitscale.preemption import StopRequest
from bitscale.quant.schedule import Strength, quant_strength
from bitscale.recorder import Recorder, ValidRecord, format_count, format_duration
from bitscale.sources import StateSource, open_state
from bitscale.telemetry import TernaryTelemetry
from bitscale.transition import begin_transition, start_learned_scales
from bitscale.watch import RankWatch, is_lost_peer, watch_rank


@dataclass(frozen=True)
class Outcome:
    step: int  # optimizer steps completed
    preempted: bool  # stopped by a signal, after saving
    valid: EvalResult | None


@dataclass(frozen=True)
class _Session:
    """What the loop and its helpers share; a rollback begins one with more amendments."""

    cfg: Config
    mesh: Mesh
    corpora: list[PreparedCorpus]
    engine: TrainEngine
    batches: Batches
    recorder: Recorder
    saver: checkpoint.Saver
    telemetry: TernaryTelemetry | None
    identity: dict[str, str]
    amendments: Amendments  # what the guard has changed so far
    rank_watch: RankWatch

    def say(self, text: str) -> None:
        if self.mesh.is_main:
            print(text, flush=True)


def train(cfg: Config, *, resume: str | None = None, allow_change: Collection[str] = ()) -> Outcome:
    """Run `cfg` to its end, to `train.stop_step`, or to a SIGTERM.

    Args:
        resume: None (a fresh run), "auto" (the latest checkpoint of this run, if any), or the
            path of a checkpoint or of another run, whose trunk this run then continues.
        allow_change: keys (or sections) in which this run may differ from that checkpoint.

    Raises:
        BitscaleError: anything that a user can mend, before a step is taken; TrainingFault later.
    """
    check_world_size(cfg, world_size_from_environment())
    corpora = run.load_corpora(cfg)
    cfg = run.resolve_vocab(cfg, corpora[0].vocab_size)
    rank, world_size = rank_from_environment(), world_size_from_environment()
    if rank == 0:
        check_monitors(cfg.log)
    with (
        run_lock.hold(Path(cfg.run.dir), enabled=rank == 0),
        watch_rank(
            cfg, rank=rank, local_rank=local_rank_from_environment(), world_size=world_size
        ) as rank_watch,
    ):
        return _train(cfg, corpora, resume, allow_change, rank_watch)


def _train(
    cfg: Config,
    corpora: list[PreparedCorpus],
    resume: str | None,
    allow_change: Collection[str],
    rank_watch: RankWatch,
) -> Outcome:
    identity = run.identity(cfg, corpora)
    resume_from = run.find_resume(cfg, resume)
    reader = None
    comparison = run.Comparison([], [])
    if resume_from is not None:
        # Each rank verifies its share of the files.
        ranks = (rank_from_environment(), world_size_from_environment())
        reader = open_state(resume_from, cfg, verify=ranks)
    amendments = guard.load_amendments(Path(cfg.run.dir), reader)
    comparison = run.Comparison([], [])
    if reader is not None:
        comparison = run.compare(cfg, identity, reader, allow_change)

    timeout_seconds = cfg.watch.collective_timeout_seconds
    mesh = init_mesh(cfg.engine.device, cfg.engine.num_threads, timeout_seconds)
    rank_watch.joined()
    mesh = share_model(mesh, cfg.parallel.tp, num_kv_heads(cfg), cfg.parallel.pp)
    try:
        run.check_same_checkpoint(mesh, resume_from)
        # Rank 0's: a network file system may show another rank none yet, or older ones.
        amendments = mesh.gather_objects(amendments)[0]
        session = _set_up(cfg, mesh, corpora, identity, reader, amendments, rank_watch)
        _announce(session, reader, comparison)
        start = 0 if reader is None else reader.meta.step
        reader = None  # it maps its files, whose place on the disk `prune` could not give back
        with StopRequest(repeats_kill=not under_launcher()) as stop_request:
            outcome = _attempt(session, start, stop_request)
        session.recorder.close()
        return outcome
    finally:
        # Leaving a group of which ranks are lost may wait for them; this process ends anyway.
        if not is_lost_peer(sys.exception()):
            close_mesh()


def _attempt(session: _Session, start: int, stop_request: StopRequest) -> Outcome:
    """The loop, again from a checkpoint as often as the guard goes back to one."""
    while True:
        try:
            return _loop(session, start, stop_request)
        except (guard.GoBack, TrainingFault) as problem:
            _record(session, session.saver.finish())  # from before the fault, on every rank
            if not isinstance(problem, guard.GoBack):
                raise
            session, start = _go_back(session, problem.fault)


def _loop(session: _Session, start: int, stop_request: StopRequest) -> Outcome:
    cfg, engine, mesh = session.cfg, session.engine, session.mesh
    first_ternary_step = transition_step(cfg)
    last = stop_step(cfg)
    monitor = Monitor(cfg, mesh, session.batches, session.recorder, session.amendments)
    valid = None
    for step in range(start, last):
        session.rank_watch.mark("step", step)
        strength = quant_strength(step, cfg, session.amendments)
        if step == first_ternary_step:
            begin_transition(engine, mesh, cfg.transition.optimizer_state)
            session.recorder.event(
                step, session.batches.tokens_seen(step), "transition", **cfg.transition.model_dump()
            )
            session.say(f"transition begins: {transition_summary(cfg)}")
        set_strength(engine.module, strength)
        lr, decay = learning_rate(step, cfg), weight_decay(step, cfg)
        batch = session.batches.micro_batches(batch_index(step, session.amendments))
        result = engine.train_step(batch, lr=lr, weight_decay=decay)
        done = step + 1
        monitor.add(done, result, lr, decay, strength)

        stopping = mesh.any(stop_request.received)
        _record(session, session.saver.poll())
        if _due(done, cfg.log.every) or done == last or stopping:
            monitor.report()
        if session.telemetry is not None and _due(done, cfg.log.telemetry_every):
            _read_telemetry(session, done)
        if _due(done, cfg.train.eval_every) or done == last:
            valid = _evaluate(session, done)
        due = _due(done, cfg.checkpoint.every) or done in cfg.checkpoint.at
        if due or done == last or stopping:
            monitor.report()  # a checkpoint never outlives an unseen NaN
            _save(session, done, strength, wait=done == last or stopping)
        if stopping and done < last:
            session.recorder.event(done, session.batches.tokens_seen(done), "preempted")
            session.say(
                f"stopped by a signal after step {done}; saved, continue with --resume auto"
            )
            return Outcome(done, preempted=True, valid=valid)
    if start >= last:
        session.say(f"nothing to do: the checkpoint is at step {start:,} of {last:,}")
    if last == num_steps(cfg):  # again, if the session that got here was killed before this line
        session.recorder.event(last, session.batches.tokens_seen(last), "finished")
    return Outcome(max(start, last), preempted=False, valid=valid)


def _set_up(
    cfg: Config,
    mesh: Mesh,
    corpora: list[PreparedCorpus],
    identity: dict[str, str],
    reader: StateSource | None,
    amendments: Amendments,
    rank_watch: RankWatch,
) -> _Session:
    batches = Batches(
        [
            (corpus.shard("train"), entry.weight)
            for corpus, entry in zip(corpora, cfg.data.corpora, strict=True)
        ],
        seq_len=cfg.data.seq_len,
        global_batch_size=cfg.train.global_batch_size,
        micro_batch_size=cfg.train.micro_batch_size,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        seed=cfg.data.seed,
        reset_attention=cfg.data.reset_attention,
    )
    torch.manual_seed(cfg.train.seed)
    model = make_model(cfg, mesh)
    telemetry = TernaryTelemetry(model) if cfg.log.telemetry_every else None
    engine = make_engine(cfg, model, mesh)
    set_timeout(cfg.watch.collective_timeout_seconds)  # in DeepSpeed's groups too
    if reader is not None:
        restore(engine, mesh, reader)
    if mesh.is_main:
        run.write_config(cfg)
        _rewind(cfg, reader)
    recorder = Recorder(
        Path(cfg.run.dir),
        enabled=mesh.is_main,
        # 0 without a checkpoint: a session killed before its first one may have left lines, which
        # come again (run.find_resume has refused any other run in this directory).
        resume_step=0 if reader is None else reader.meta.step,
        num_steps=num_steps(cfg),
        tensorboard=cfg.log.tensorboard,
        listeners=_listeners(cfg, mesh, rank_watch),
    )
    saver = checkpoint.Saver(
        run.checkpoints_dir(cfg),
        mesh,
        keep_last=cfg.checkpoint.keep_last,
        keep_every=cfg.checkpoint.keep_every,
        keep_at=cfg.checkpoint.at,
    )
    if telemetry is not None and reader is not None:
        # Flips count from the checkpoint.
        telemetry.read(engine.gathered, compute=mesh.speaks_for_stage)
    guard.complete_record(cfg, recorder, amendments)
    return _Session(
        cfg=cfg,
        mesh=mesh,
        corpora=corpora,
        engine=engine,
        batches=batches,
        recorder=recorder,
        saver=saver,
        telemetry=telemetry,
        identity=identity,
        amendments=amendments,
        rank_watch=rank_watch,
    )


def _listeners(cfg: Config, mesh: Mesh, rank_watch: RankWatch) -> list[Listener]:
    services = open_monitors(cfg.log) if mesh.is_main else None
    return [rank_watch.observe, *filter(None, [services])]


def restore(engine: TrainEngine, mesh: Mesh, reader: StateSource) -> None:
    """Make the engine's weights and Adam state, and this rank's generator, the checkpoint's, also
    those of an engine that has trained since (a collective)."""
    shapes = engine.parameter_shapes()
    # The transition sets learned scales: a trunk of before, of any quantizer, need not have them.
    start = transition_step(engine.cfg)
    names = shapes.keys() | reader.meta.shapes.keys()
    optional: set[str] = set()
    if start is None or reader.meta.step <= start:
        optional |= {name for name in names if is_scale(name)}
    if run.sub_norms_wait(engine.cfg, reader.meta):
        optional |= {name for name in names if is_sub_norm(name)}
    same_optimizer = not run.check_optimizer(engine.cfg, reader.meta, reader.path, {"optim.name"})
    reader.restore(engine.fragments(), shapes, optional=optional, moments=same_optimizer)
    new = shapes.keys() - reader.meta.shapes.keys()  # may have been trained since it was built
    for fragment in engine.fragments():
        if fragment.name in new and is_sub_norm(fragment.name):
            fragment.master.fill_(1.0)
    engine.publish_masters()
    if any(map(is_scale, new)):
        start_learned_scales(engine)  # and again when they begin to act
    rng_state = reader.rng_state(mesh.rank)
    if rng_state is not None:
        torch.set_rng_state(rng_state)


def _rewind(cfg: Config, reader: StateSource | None) -> None:
    root = run.checkpoints_dir(cfg)
    if reader is None or reader.path.parent.resolve() != root.resolve():
        return
    try:
        for path in checkpoint.rewind(root, root / reader.path.name):
            print(f"kept aside, as this run continues from an earlier step: superseded-{path.name}")
    except OSError as error:
        raise CheckpointError(
            f"{root}: cannot be written ({error}); make it writable, then --resume auto"
        ) from error
    kept = cfg.checkpoint
    try:
        # What a session killed between a save and its pruning has left.
        checkpoint.prune(root, kept.keep_last, kept.keep_every, kept.at)
    except OSError as error:  # no reason not to train, as after a save
        print(f"warning: an older checkpoint could not be deleted: {error}", flush=True)


def _go_back(session: _Session, fault: guard.Fault) -> tuple[_Session, int]:
    """The session as it was at an earlier checkpoint, but for what the guard changes, and the step
    of that checkpoint (a collective)."""
    cfg, mesh, engine = session.cfg, session.mesh, session.engine
    session.say(f"{fault.reason}; going back")
    session.rank_watch.mark("start", fault.step)
    amendment, path = guard.go_back(cfg, mesh, session.recorder, fault, session.amendments)
    restore(engine, mesh, _open_everywhere(path, mesh))
    if session.telemetry is not None:
        session.telemetry.read(engine.gathered, compute=mesh.speaks_for_stage)
    session.say(f"continued from {path}: {amendment_summary(amendment)}")
    return replace(session, amendments=(*session.amendments, amendment)), amendment.from_step


def _open_everywhere(path: Path, mesh: Mesh) -> checkpoint.Reader:
    """A rank that cannot read it must not leave the others waiting for ever."""
    reader, problem = None, ""
    try:
        reader = checkpoint.Reader(path, verify=(mesh.rank, mesh.world_size))
    except CheckpointError as error:
        problem = str(error)
    for text in filter(None, mesh.gather_objects(problem)):
        raise CheckpointError(text)
    assert reader is not None
    return reader


def _announce(session: _Session, reader: StateSource | None, comparison: run.Comparison) -> None:
    cfg, mesh, batches = session.cfg, session.mesh, session.batches
    step = 0 if reader is None else reader.meta.step
    details = {
        "config_hash": config_hash(cfg),
        "world_size": mesh.world_size,
        "versions": run.versions(),
        "differences": comparison.differences,
        "notes": comparison.notes,
    }
    event = "start" if reader is None else "resume"
    source = {} if reader is None else {"checkpoint": str(reader.path)}
    session.recorder.event(step, batches.tokens_seen(step), event, **details, **source)
    tokens = batches.tokens_seen(num_steps(cfg))
    session.say(run_summary(cfg, mesh, session.engine, tokens))
    for line in host_lines(mesh.gather_objects(os.uname().nodename)):
        session.say(line)
    if reader is not None:
        session.say(f"resumed from {reader.path} at step {step}")
    for amendment in session.amendments:
        session.say(f"in force: {amendment_summary(amendment)}")
    for line in comparison.notes:
        session.say(line)
    for difference in comparison.differences:
        session.say(f"allowed change: {difference}")


def _evaluate(session: _Session, done: int) -> EvalResult | None:
    cfg, mesh = session.cfg, session.mesh
    if not any("valid" in corpus.splits for corpus in session.corpora):
        return None
    passes = cfg.train.global_batch_size // (cfg.train.micro_batch_size * mesh.dp_size)
    begin = time.perf_counter()

    def token_losses(batch: EvaluationBatch) -> torch.Tensor:
        session.rank_watch.mark("evaluate", done)  # each batch is progress
        return session.engine.token_losses(batch)

    result = evaluate(
        token_losses,
        session.corpora,
        mesh,
        split="valid",
        seq_len=cfg.data.seq_len,
        batch_size=cfg.train.micro_batch_size,
        max_batches=cfg.train.eval_batches * passes or None,
        reset_attention=cfg.data.reset_attention,
    )
    tokens = session.batches.tokens_seen(done)
    session.recorder.valid(
        ValidRecord(done, tokens, result.loss, result.perplexity, result.bits_per_byte)
    )
    session.say(
        f"valid at step {done:,}: loss {result.loss:.4f}  perplexity {result.perplexity:.2f}  "
        f"{result.bits_per_byte:.4f} bits/byte  ({format_count(result.num_tokens)} tokens in "
        f"{format_duration(time.perf_counter() - begin)})"
    )
    return result


def _read_telemetry(session: _Session, done: int) -> None:
    assert session.telemetry is not None
    mesh = session.mesh
    layers = session.telemetry.read(session.engine.gathered, compute=mesh.speaks_for_stage)
    if mesh.pp_size > 1:  # each stage has read its own layers
        parts = mesh.gather_objects(layers)
        layers = {name: figures for part in parts for name, figures in part.items()}
    session.recorder.telemetry(done, layers)


def _save(session: _Session, done: int, strength: Strength, *, wait: bool) -> None:
    """Save after `done` steps; unless `wait`, training goes on before the files are written."""
    cfg, mesh, engine = session.cfg, session.mesh, session.engine
    session.rank_watch.mark("save", done)
    _record(session, session.saver.finish())
    session.recorder.flush()
    meta = checkpoint.Meta(
        step=done,
        tokens=session.batches.tokens_seen(done),
        lambda_weight=strength.weight,
        lambda_activation=strength.activation,
        config=to_tree(cfg),
        config_hash=config_hash(cfg),
        identity=session.identity,
        shapes={name: list(shape) for name, shape in engine.parameter_shapes().items()},
        world_size=mesh.world_size,
        versions=run.versions(),
        amendments=amendments_tree(session.amendments),
    )
    session.saver.begin(meta, engine.fragments(), torch.get_rng_state())
    if wait or not cfg.checkpoint.asynchronous:
        _record(session, session.saver.finish())


def _record(session: _Session, saved: checkpoint.Saved | None) -> None:
    """Say that a checkpoint has come into force, if one has."""
    if saved is None:
        return
    session.recorder.event(
        saved.meta.step,
        saved.meta.tokens,
        "checkpoint",
        path=str(saved.path),
        seconds=saved.seconds,
        blocked_seconds=saved.blocked_seconds,
    )
    waited = "" if saved.blocked_seconds > 0.9 * saved.seconds else ", in the background"
    session.say(f"saved {saved.path} in {format_duration(saved.seconds)}{waited}")
    if saved.unpruned:
        session.say(f"warning: an older checkpoint could not be deleted: {saved.unpruned}")


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
