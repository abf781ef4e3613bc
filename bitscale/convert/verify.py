"""Whether two forms of a model are the same model: codes exactly, outputs within bounds.

Shapes: B batch, S sequence, V vocabulary, N compared positions.

A is computed by bitscale's decoder, at the λ at which it is the function that B's format computes
(dequantized weights, for instance, meet activations in 16 bit); B by its own client.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bitscale.convert.certificate import codes_digest, read_certificate
from bitscale.convert.clients import Logits, client_logits, decoder_logits, llama_cpp_twin
from bitscale.convert.gguf_file import open_gguf
from bitscale.convert.gguf_source import certificate_of
from bitscale.convert.llama_perplexity import find_program, in_range, run_program
from bitscale.convert.loaded import DTYPES
from bitscale.convert.model_source import ModelSource
from bitscale.data.tokenizer import load_tokenizer
from bitscale.errors import CheckpointError, DataError

_MAX_WINDOW = 512


@dataclass(frozen=True)
class Bounds:
    """Up to where two computations of the same function are taken for equal."""

    # The largest difference of a logit over the largest logit. Clients round activations by
    # x · (127 / max) and not x / (max / 127): one 8-bit code in a million moves by 1, and with it
    # the logits by some 1e-3.
    logits: float = 2e-2
    kl_nats: float = 1e-4  # mean Kullback-Leibler divergence of the next token's distribution
    loss_nats: float = 1e-3  # mean loss on the text


class Check(NamedTuple):
    name: str
    passed: bool
    figures: str  # for people
    values: dict[str, float]  # for programs


class Comparison(NamedTuple):
    """Of logits at N positions."""

    max_difference: float
    largest_logit: float
    kl_nats: float
    greedy_agreement: float  # share of positions with the same most probable token
    losses: tuple[float, float]  # mean nats per token, of the first and the second model
    num_positions: int


def verify(
    a: ModelSource,
    b: ModelSource,
    *,
    text: Path | None = None,
    num_tokens: int = 2048,
    program: Path | None = None,
    bounds: Bounds | None = None,
) -> list[Check]:
    """Every comparison that the two forms allow; they are the same model if all passed.

    Args:
        text: a file of which the first `num_tokens` tokens are compared; default: tokens drawn
            with a fixed seed, of which no loss is reported.
        program: llama.cpp's llama-perplexity, to compute `b`, a GGUF file, on `text`.

    Raises BitscaleError if a model cannot be read or computed.
    """
    if num_tokens < 2:
        raise DataError(f"--tokens {num_tokens} are too few to compare; give 2 or more")
    if program is not None:
        _refuse_for_program(b, text)
        program = find_program(program)
    checks = [_architecture(a, b)]
    if not checks[0].passed:
        return checks
    checks += _certificates(a, b)
    if a.strength.weight == b.strength.weight == 1.0:
        checks.append(_codes(a, b))
    elif a.has_latents and b.has_latents:
        checks.append(_weights(a, b))
    if program is None or text is None:
        outputs = _of_client(a, b, text, num_tokens)
    else:
        outputs = _of_program(a, b, program, text, num_tokens)
        checks += _token_ids(a, outputs, text)
    checks += _compared(a, b, outputs, bounds or Bounds(), with_loss=text is not None)
    return checks


def compare_logits(
    first: Logits, second: Logits, windows: Iterable[Tensor], scored: slice = slice(None)
) -> Comparison:
    """Both models on the same token ids, window by window [1, S], at positions `scored`."""
    difference = largest = kl = 0.0
    agreeing = count = num_targets = 0
    losses = [0.0, 0.0]
    for ids_BS in windows:
        one, other = (model(ids_BS).flatten(0, 1)[scored].double() for model in (first, second))
        difference = max(difference, float((one - other).abs().max()))
        largest = max(largest, float(one.abs().max()))
        p, q = one.log_softmax(-1), other.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        agreeing += int((one.argmax(-1) == other.argmax(-1)).sum())
        count += one.shape[0]
        targets = ids_BS.flatten()[1:][scored]
        num_targets += targets.numel()
        for i, log_probs in enumerate((p, q)):
            predictions = log_probs[: targets.numel()]  # nothing follows the last token
            losses[i] += float(F.nll_loss(predictions, targets, reduction="sum"))
    means = (losses[0] / num_targets, losses[1] / num_targets)
    return Comparison(difference, largest, kl / count, agreeing / count, means, count)


def _architecture(a: ModelSource, b: ModelSource) -> Check:
    ours, theirs = a.model.model_dump(), b.model.model_dump()
    for tree in (ours, theirs):
        tree["num_kv_heads"] = tree["num_kv_heads"] or tree["num_heads"]
    # What only training knows, what follows from biases made of weights, and norms of weight 1.
    free = {"init_std", "bias", "norm_affine", "head_bits"}
    other = [key for key in ours if ours[key] != theirs[key] and key not in free]
    values = {"differences": float(len(other))}
    if other:
        key = other[0]
        figures = f"{len(other)} differences; {key} is {ours[key]!r} and {theirs[key]!r}"
        return Check("architecture", False, figures, values)
    return Check("architecture", True, f"{a.num_parameters:,} parameters", values)


def _certificates(a: ModelSource, b: ModelSource) -> Iterator[Check]:
    for source in (a, b):
        content = _certificate_in(source)
        if content is None or content["codes_sha256"] is None:
            continue
        found = codes_digest(source.ternary_names, source.ternary)
        passed = found == content["codes_sha256"]
        said = "as its certificate says" if passed else f"not {content['codes_sha256'][:16]}"
        figures = f"codes sha256 {found[:16]}, {said}"
        yield Check(f"certificate of {source.path}", passed, figures, {})
    if a.tokenizer_sha256 and b.tokenizer_sha256:
        same = a.tokenizer_sha256 == b.tokenizer_sha256
        shown = f"sha256 {a.tokenizer_sha256[:16]} and {b.tokenizer_sha256[:16]}"
        yield Check("tokenizer", same, shown, {})


def _certificate_in(source: ModelSource) -> dict[str, Any] | None:
    if source.kind == "gguf":
        return certificate_of(open_gguf(source.path))
    return read_certificate(source.path) if source.path.is_dir() else None


def _codes(a: ModelSource, b: ModelSource) -> Check:
    """Codes must be equal; scales up to the rounding of the forms that they are stored in."""
    bound = max(a.scale_rounding, b.scale_rounding)
    different = total = 0
    worst = 0.0
    for name in sorted(a.ternary_names):
        ours, theirs = a.ternary(name), b.ternary(name)
        different += int((ours.codes_FD != theirs.codes_FD).sum())
        total += ours.codes_FD.numel()
        if ours.scale.shape != theirs.scale.shape:
            worst = math.inf
        else:
            worst = max(worst, float((theirs.scale / ours.scale - 1.0).abs().max()))
    figures = (
        f"{different:,} of {total:,} differ; scales by {worst:.1e} relative (bound {bound:.1e})"
    )
    values = {"different": float(different), "total": float(total), "scale": worst}
    return Check("codes", different == 0 and worst <= bound, figures, values)


def _weights(a: ModelSource, b: ModelSource) -> Check:
    """Latents must be equal once both are rounded to the narrower dtype."""
    dtype = DTYPES["bf16" if "bf16" in (a.dtype, b.dtype) else "fp32"]
    worst, where = 0.0, ""
    for name in a.shapes:
        if name not in b.shapes:
            continue
        ours, theirs = a.latent(name).to(dtype).float(), b.latent(name).to(dtype).float()
        difference = float((ours - theirs).abs().max()) if ours.numel() else 0.0
        if difference > worst:
            worst, where = difference, f" ({name})"
    figures = f"largest difference {worst:.1e}{where} in {str(dtype).removeprefix('torch.')}"
    return Check("weights", worst == 0.0, figures, {"difference": worst})


class _Outputs(NamedTuple):
    """Both models' logits, ready to be compared, and on what."""

    by: str  # who computes B
    ours: Logits  # A at the λ of B, as its twin
    theirs: Logits
    as_trained: Logits | None  # A at its own λ, where that is another function
    windows: list[Tensor]
    scored: slice = slice(None)


def _of_client(a: ModelSource, b: ModelSource, text: Path | None, num_tokens: int) -> _Outputs:
    ids = _random_ids(a, num_tokens) if text is None else _text_ids(a, b, text, num_tokens)
    width = min(a.seq_len, b.seq_len, _MAX_WINDOW)
    starts = range(0, ids.numel() - 1, width)
    windows = [ids[None, start : start + width] for start in starts]
    name, theirs, twin = client_logits(b)
    return _Outputs(name, twin(a, b.computes), theirs, _as_trained(a, b, twin), windows)


def _of_program(
    a: ModelSource, b: ModelSource, program: Path, text: Path, num_tokens: int
) -> _Outputs:
    """B by llama.cpp's llama-perplexity, which makes tokens of the text itself."""
    assert b.model.vocab_size is not None
    width = min(a.seq_len, b.seq_len, _MAX_WINDOW)
    found = run_program(
        program,
        b.path,
        _read_text(text, 16 * num_tokens),
        window=width,
        num_windows=max(num_tokens // width, 1),
        vocab_size=b.model.vocab_size,
    )
    twin = llama_cpp_twin
    trained = _as_trained(a, b, twin)
    return _Outputs(
        program.name,
        in_range(twin(a, b.computes)),
        found.logits,
        None if trained is None else in_range(trained),
        found.windows(),
        found.scored,
    )


def _refuse_for_program(b: ModelSource, text: Path | None) -> None:
    if b.kind != "gguf":
        raise CheckpointError(
            f"--llama-cpp computes GGUF files, and B, {b.path}, is none; leave it out"
        )
    if text is None:
        raise CheckpointError("--llama-cpp needs --text FILE, of which llama.cpp makes tokens")
    if open_gguf(b.path).metadata.get("tokenizer.ggml.add_bos_token"):
        raise CheckpointError(
            f"{b.path} wants a begin token (add_bos_token), which llama-perplexity puts in place "
            "of each window's first; leave --llama-cpp out, and llama-cpp-python computes the file"
        )


def _token_ids(a: ModelSource, outputs: _Outputs, text: Path) -> Iterator[Check]:
    """llama.cpp's tokens of the text against those that A was trained on, where it tells."""
    if a.tokenizer_file is None:
        return
    theirs = torch.cat(outputs.windows, dim=1).flatten()
    ours = torch.tensor(_encoded(a, _read_text(text, 16 * theirs.numel())))[: theirs.numel()]
    different = theirs.numel() - int((ours == theirs[: ours.numel()]).sum())
    figures = f"{different:,} of {theirs.numel():,} differ from A's tokenizer"
    yield Check("token ids", different == 0, figures, {"different": float(different)})


def _compared(
    a: ModelSource, b: ModelSource, outputs: _Outputs, bounds: Bounds, *, with_loss: bool
) -> Iterator[Check]:
    found = compare_logits(outputs.ours, outputs.theirs, outputs.windows, outputs.scored)
    relative = found.max_difference / max(found.largest_logit, 1e-30)
    at = f"A in bitscale at λ {b.computes.weight:g}/{b.computes.activation:g}, B in {outputs.by}"
    yield Check(
        "logits",
        relative <= bounds.logits and found.kl_nats <= bounds.kl_nats,
        f"largest difference {found.max_difference:.2e} = {relative:.1e} of the largest logit "
        f"(bound {bounds.logits:g}), mean KL {found.kl_nats:.1e} nats (bound {bounds.kl_nats:g}), "
        f"same greedy token {found.greedy_agreement:.2%} of {found.num_positions:,}; {at}",
        {
            "max_difference": found.max_difference,
            "relative": relative,
            "kl_nats": found.kl_nats,
            "greedy_agreement": found.greedy_agreement,
        },
    )
    if with_loss:
        yield _perplexity(found, bounds)
    if outputs.as_trained is not None:
        again = compare_logits(outputs.as_trained, outputs.theirs, outputs.windows, outputs.scored)
        yield _no_verdict(a, again)


def _perplexity(found: Comparison, bounds: Bounds) -> Check:
    one, other = found.losses
    figures = (
        f"A {math.exp(one):.4f}, B {math.exp(other):.4f}: loss {one:.5f} and {other:.5f} nats "
        f"(bound {bounds.loss_nats:g})"
    )
    values = {"loss_a": one, "loss_b": other}
    return Check("perplexity", abs(one - other) <= bounds.loss_nats, figures, values)


def _as_trained(a: ModelSource, b: ModelSource, twin: object) -> Logits | None:
    """A at its own λ, if B computes another function than A was trained as."""
    if (a.strength == b.computes or not a.has_latents) and twin is decoder_logits:
        return None
    return decoder_logits(a, a.strength)


def _no_verdict(a: ModelSource, found: Comparison) -> Check:
    figures = (
        f"(no verdict) A at its own λ {a.strength.weight:g}/{a.strength.activation:g}: mean KL "
        f"{found.kl_nats:.1e} nats, same greedy token {found.greedy_agreement:.2%}"
    )
    values = {"kl_nats": found.kl_nats, "greedy_agreement": found.greedy_agreement}
    return Check("as trained", True, figures, values)


def _random_ids(a: ModelSource, num_tokens: int) -> Tensor:
    assert a.model.vocab_size is not None
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, a.model.vocab_size, (num_tokens,), generator=generator)


def _text_ids(a: ModelSource, b: ModelSource, text: Path, num_tokens: int) -> Tensor:
    content = _read_text(text, 16 * num_tokens)
    source = a if a.tokenizer_file is not None else b
    if source.tokenizer_file is None:
        raise CheckpointError(
            f"--text {text}: neither {a.path} nor {b.path} has a tokenizer; put its file beside "
            "one of them, or leave --text out"
        )
    ids = _encoded(source, content)[:num_tokens]
    if len(ids) < 2:
        raise DataError(f"--text {text}: {len(ids)} tokens; give a file with more text")
    return torch.tensor(ids)


def _encoded(source: ModelSource, content: str) -> list[int]:
    assert source.tokenizer_file is not None
    return load_tokenizer(source.tokenizer_file, source.eod_token).encode(content)


def _read_text(text: Path, num_characters: int) -> str:
    try:
        return text.read_text(encoding="utf-8-sig")[:num_characters]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text {text}: not readable as UTF-8 text ({error})") from error
