"""Held-out text by windows: nats per token and bits per byte, with standard errors.

W windows. A window's tokens depend on each other, windows hardly: standard errors are over windows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from bitscale.data.batches import IGNORE_ID, evaluation_batches
from bitscale.data.shards import ShardWriter, TokenShard
from bitscale.data.tokenizer import Tokenizer
from bitscale.errors import DataError
from bitscale.evaluate import corpora_of_tokenizer, no_split
from bitscale.scoring.model import ScoredModel


@dataclass(frozen=True)
class Text:
    """Tokens to score, and the bytes of text that they are."""

    shard: TokenShard
    bytes_per_token: float


@dataclass(frozen=True)
class HeldOut:
    """Losses of the windows of a text, each target token counted once."""

    nats_W: npt.NDArray[np.float64]
    targets_W: npt.NDArray[np.float64]
    num_bytes: float
    tokenizer_sha256: str  # windows of two models are the same text if it, and their sizes, are

    @property
    def num_tokens(self) -> int:
        return int(self.targets_W.sum())

    @property
    def nats_per_token(self) -> float:
        return float(self.nats_W.sum() / self.targets_W.sum())

    @property
    def stderr(self) -> float:
        """Of `nats_per_token`."""
        return ratio_stderr(self.nats_W, self.targets_W)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats_per_token, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.nats_per_token * self.bits_per_byte_of_nat

    @property
    def bits_per_byte_of_nat(self) -> float:
        """Bits per byte that one nat per token is, in this text and tokenizer."""
        return self.num_tokens / math.log(2) / self.num_bytes

    def difference(self, first: "HeldOut") -> tuple[float, float] | None:
        """Nats per token more than `first`, and the standard error of that: window by window.

        None if the windows are not of the same tokens.
        """
        if self.tokenizer_sha256 != first.tokenizer_sha256 or not np.array_equal(
            self.targets_W, first.targets_W
        ):
            return None
        nats_W = self.nats_W - first.nats_W
        return float(nats_W.sum() / self.targets_W.sum()), ratio_stderr(nats_W, self.targets_W)


def ratio_stderr(sums_W: npt.NDArray[np.float64], counts_W: npt.NDArray[np.float64]) -> float:
    """Standard error of sum(sums) / sum(counts), from the variance over W clusters of tokens.

    The linearized ratio estimator of survey sampling (W. G. Cochran, Sampling Techniques, 1977,
    section 6.3); NaN for one window.
    """
    num = len(sums_W)
    if num < 2:
        return math.nan
    residuals_W = sums_W - sums_W.sum() / counts_W.sum() * counts_W
    return float(math.sqrt(num / (num - 1) * (residuals_W**2).sum()) / counts_W.sum())


def score_held_out(
    scored: ScoredModel,
    texts: Sequence[Text],
    *,
    tokenizer_sha256: str,
    seq_len: int,
    stride: int | None,
    batch_size: int,
    limit: int | None,
    on_tokens: Callable[[int], object] = lambda num_tokens: None,
) -> HeldOut:
    """Loss of `texts`, on every rank (a collective of all ranks, which share the windows).

    `stride`: see `evaluation_batches`. `limit`: windows of each text at most, from its beginning.
    `on_tokens` is called with the targets that each pass of this rank has scored.
    """
    mesh = scored.mesh
    windows: list[tuple[float, int]] = []
    num_bytes = 0.0
    for text in texts:
        own: dict[int, tuple[float, int]] = {}
        batches = evaluation_batches(
            text.shard,
            seq_len=seq_len,
            batch_size=batch_size,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp_size,
            max_batches=None if limit is None else -(-limit // (batch_size * mesh.dp_size)),
            reset_attention=scored.source.reset_attention,
            stride=stride,
        )
        for number, batch in enumerate(batches):
            nats_B = scored.token_losses(batch).double().sum(dim=1).tolist()
            targets_B = (batch.target_ids_BS != IGNORE_ID).sum(dim=1).tolist()
            first = (number * mesh.dp_size + mesh.dp_rank) * batch_size
            own |= {first + b: each for b, each in enumerate(zip(nats_B, targets_B, strict=True))}
            on_tokens(batch.num_targets)
        found = {w: each for part in mesh.gather_objects(own) for w, each in part.items()}
        kept = [found[w] for w in sorted(found)[:limit] if found[w][1]]
        windows += kept
        num_bytes += text.bytes_per_token * sum(targets for _, targets in kept)
    nats, targets = zip(*windows, strict=True)
    return HeldOut(np.array(nats), np.array(targets, dtype=float), num_bytes, tokenizer_sha256)


def corpus_texts(paths: Sequence[Path], tokenizer_sha256: str, split: str) -> list[Text]:
    """The `split` of prepared corpora. DataError if there are none, if none has it, or the
    tokenizer is another."""
    if not paths:  # a published model
        raise DataError(
            "the model does not say what text it was trained on; name some with --text FILE, or a "
            "prepared corpus with --corpus DIR"
        )
    texts = [
        Text(shard, corpus.splits[split].num_bytes / max(shard.num_tokens, 1))
        for corpus in corpora_of_tokenizer(paths, tokenizer_sha256)
        if split in corpus.splits
        for shard in [corpus.shard(split)]
    ]
    if not texts:
        raise no_split(split)
    return texts


@contextmanager
def text_files(paths: Sequence[Path], tokenizer: Tokenizer) -> Iterator[list[Text]]:
    """UTF-8 files, each one document after an end-of-document token, which is no target.

    Raises DataError for a file that cannot be read or is empty.
    """
    with TemporaryDirectory(prefix="bitscale-eval-") as folder:
        texts = []
        for number, path in enumerate(paths):
            content = _read(path)
            prefix = Path(folder) / str(number)
            ids = tokenizer.encode(content)
            with ShardWriter(prefix, tokenizer.vocab_size) as writer:
                writer.add_document([tokenizer.eos_id, *ids])
            texts.append(Text(TokenShard(prefix), len(content.encode()) / max(len(ids), 1)))
        yield texts


def _read(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8-sig")  # as prepare, without a byte-order mark
    except OSError as error:
        raise DataError(
            f"--text {path} cannot be read: {error.strerror}; check its path and permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"--text {path} is not UTF-8 (byte {error.start}); convert it (iconv -t UTF-8)"
        ) from error
    if not content:
        raise DataError(f"--text {path} is empty; give a file with text")
    return content
