"""Who holds what: ranks, pipeline stages and groups of one configuration on one cluster."""

from dataclasses import dataclass, fields

from bitscale.config import Config, check_world_size, quant_spec
from bitscale.config.spec import QuantSpec
from bitscale.errors import ConfigError
from bitscale.model import cost
from bitscale.model.cost import Phase, Setting, Way
from bitscale.plan.gpus import Gpu

GIB = 2**30


@dataclass(frozen=True)
class Cluster:
    num_nodes: int
    gpus_per_node: int
    gpu: Gpu

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.gpus_per_node


@dataclass(frozen=True)
class Stage:
    """One pipeline stage, as each of its ranks sees it."""

    index: int
    num_layers: int
    has_embedding: bool
    has_head: bool
    in_flight: int  # micro-batches whose activations are held at once (1F1B)


@dataclass(frozen=True)
class Layout:
    """A configuration on a cluster. Construct with `make_layout`."""

    cfg: Config
    cluster: Cluster
    spec: QuantSpec
    way: Way
    stages: tuple[Stage, ...]

    @property
    def tp(self) -> int:
        return self.cfg.parallel.tp

    @property
    def pp(self) -> int:
        return self.cfg.parallel.pp

    @property
    def dp(self) -> int:
        return self.cluster.world_size // (self.tp * self.pp)

    @property
    def bytes(self) -> int:
        """Of a compute weight and an activation."""
        return 2 if self.cfg.train.dtype == "bf16" else 4

    @property
    def num_micro_batches(self) -> int:
        """Per optimizer step and pipeline."""
        return self.cfg.train.global_batch_size // (self.cfg.train.micro_batch_size * self.dp)

    @property
    def micro_batch_tokens(self) -> int:
        return self.cfg.train.micro_batch_size * self.cfg.data.seq_len

    @property
    def bubble(self) -> float:
        """Idle time over busy time of a pipeline stage: (pp − 1) / micro-batches, 1F1B
        (arXiv:2104.04473, section 2.2)."""
        return (self.pp - 1) / self.num_micro_batches

    @property
    def distinct_stages(self) -> tuple[Stage, ...]:
        """The first and last stage, and the fullest of every other number of layers."""
        middle = {stage.num_layers: stage for stage in reversed(self.stages[1:-1])}
        ends = {stage.index: stage for stage in (self.stages[0], self.stages[-1])}
        return (*ends.values(), *middle.values())

    def setting(self, phase: Phase) -> Setting:
        return Setting(
            phase,
            self.way,
            self.spec.activation is not None,
            self.bytes,
            self.cfg.data.seq_len,
            self.tp,
            self.cfg.parallel.sequence_parallel,
            self.cfg.data.reset_attention,
            self.cfg.train.activation_checkpointing,
        )

    def parameters(self, stage: Stage) -> cost.Parameters:
        """Of one rank of `stage`, before ZeRO shares them out."""
        return cost.parameters(
            self.cfg.model,
            num_layers=stage.num_layers,
            tp=self.tp,
            has_embedding=stage.has_embedding,
            has_head=stage.has_head,
        )

    def exchanged_codes(self, stage: Stage, phase: Phase) -> int:
        """Elements of ternary matrices of which ranks exchange codes, and no 16-bit weights."""
        if phase != "ternary" or not self.cfg.engine.ternary_gather:
            return 0
        return self.parameters(stage).matrices

    @property
    def packed_code_bytes(self) -> float:
        """Of a code that ranks exchange."""
        return 0.25 if self.cfg.engine.code_packing == "2bit" else 0.2

    def tied_copy(self, stage: Stage) -> int:
        """Elements of the last stage's copy of the embedding, which no optimizer of it holds."""
        has_copy = self.cfg.model.tie_embeddings and self.pp > 1 and stage.has_head
        return self.parameters(stage).head if has_copy else 0

    def link_gb_per_second(self, num_ranks: int, stride: int) -> float:
        """What a rank of a group sends at most; its ranks stand `stride` apart.

        Ranks are numbered tensor first, then data, then pipeline. A collective across nodes goes
        through the network adapters of all members in a node.
        """
        gpu, per_node = self.cluster.gpu, self.cluster.gpus_per_node
        if num_ranks * stride <= per_node or self.cluster.num_nodes == 1:
            return gpu.node_gb_per_second
        members = max(per_node // stride, 1)
        return min(gpu.node_gb_per_second, members * gpu.network_gb_per_second)


def make_layout(cfg: Config, cluster: Cluster) -> Layout:
    """Raises ConfigError for what cannot be run, or is not reckoned with."""
    for key, value in (("nodes", cluster.num_nodes), ("gpus-per-node", cluster.gpus_per_node)):
        if value < 1:
            raise ConfigError(f"--{key} {value} is not a number of machines; use 1 or more")
    if cfg.model.vocab_size is None:
        raise ConfigError(
            "model.vocab_size is null, which takes it from the corpus's tokenizer, and a plan "
            "reads no corpus; add model.vocab_size=N"
        )
    if cfg.parallel.pipeline_schedule != "1f1b":
        raise ConfigError(
            f"parallel.pipeline_schedule={cfg.parallel.pipeline_schedule!r} is not reckoned with; "
            "plan with 1f1b, which holds as many parameters and idles longer"
        )
    check_world_size(cfg, cluster.world_size)
    spec = quant_spec(cfg.quant)
    _check_spec(cfg, spec)
    _check_raw_keys(cfg)
    return Layout(cfg, cluster, spec, cost.way_of(spec), _stages(cfg, cluster))


# Fields of a specification that a plan reckons with, whatever they say within `_check_spec`.
_KNOWN_FIELDS = {
    "weight", "activation", "product", "bias", "straight_through", "gradient", "gradient_bits",
}  # fmt: skip
_KNOWN_GRADIENTS = ("identity", "clip")
_KNOWN_MEASURES = ("absmean", "absmedian", "absmax", "twn", "rms")


def _check_spec(cfg: Config, spec: QuantSpec) -> None:
    """Raise ConfigError if the quantizer keeps or computes something that is not reckoned with."""
    others = [f for f in fields(spec) if f.name not in _KNOWN_FIELDS]
    is_plain = all(getattr(spec, f.name) == f.default for f in others)
    if cfg.parallel.tp > 1 and cost.way_of(spec) != "kernels" and spec.activation is not None:
        raise ConfigError(
            f"parallel.tp={cfg.parallel.tp} shares the matrices of b158, absmedian and weight-only "
            f"presets, and quant.preset={cfg.quant.preset!r} is another; use one of them, or tp=1"
        )
    is_known = (
        spec.product != "codes"
        and spec.gradient in _KNOWN_GRADIENTS
        and spec.weight.measure in _KNOWN_MEASURES
    )
    if not (is_plain and is_known):
        raise ConfigError(
            f"quant.preset={cfg.quant.preset!r} keeps tensors that bitscale plan does not reckon "
            "with (its own norm, rotation, masks, terms or scales); plan with quant.preset=b158"
        )


def _stages(cfg: Config, cluster: Cluster) -> tuple[Stage, ...]:
    p = cfg.parallel
    counts = cost.blocks_per_stage(cfg.model, cfg.data.seq_len, p.pp)
    dp = cluster.world_size // (p.tp * p.pp)
    num_micro_batches = cfg.train.global_batch_size // (cfg.train.micro_batch_size * dp)
    return tuple(
        Stage(i, counts[i], i == 0, i == p.pp - 1, min(p.pp - i, num_micro_batches))
        for i in range(p.pp)
    )


# Keys of DeepSpeed's zero_optimization that a plan reads, with DeepSpeed 0.19.8's defaults.
ZERO_DEFAULTS: dict[str, int | bool] = {
    "reduce_bucket_size": 500_000_000,
    "overlap_comm": False,  # True at stage 3
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}


def zero_option(cfg: Config, key: str) -> int:
    """A key of `engine.deepspeed.zero_optimization`, or DeepSpeed's default."""
    zero = cfg.engine.deepspeed.get("zero_optimization", {})
    if key == "overlap_comm" and zero.get(key) is None:
        return int(cfg.engine.zero_stage == 3)
    return int(zero.get(key, ZERO_DEFAULTS[key]))


def _check_raw_keys(cfg: Config) -> None:
    zero = cfg.engine.deepspeed.get("zero_optimization", {})
    for key in zero:
        if key not in ZERO_DEFAULTS:
            raise ConfigError(
                f"engine.deepspeed.zero_optimization.{key} changes memory or traffic in a way that "
                "bitscale plan does not reckon with; leave it out of the plan"
            )
