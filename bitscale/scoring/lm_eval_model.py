"""bitscale's models for lm-eval (the Language Model Evaluation Harness, PyPI lm-eval).

Importing this module registers the model class `bitscale`; requests are made of text as lm-eval's
own class for transformers makes them, so that both give the same numbers.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from bitscale.data.tokenizer import Tokenizer
from bitscale.errors import DataError
from bitscale.scoring.model import (
    Continuation,
    ScoredModel,
    open_model,
    open_ranks,
    open_tokenizer,
)

MAX_NEW_TOKENS = 256  # lm-eval's own default where a task does not say


@register_model("bitscale")
class BitscaleLM(TemplateLM):  # type: ignore[misc]
    """A run, checkpoint or export of bitscale, at the λ that was trained last.

    On several ranks (torchrun) every rank gets every request, they share the work, and all have all
    results: to lm-eval it is one process, of which it reports the one with LOCAL_RANK 0.
    """

    def __init__(
        self,
        path: str | Path | ScoredModel,
        tokenizer: str | Path | Tokenizer | None = None,
        batch_size: int | str | None = None,
        device: str | None = None,
        tp: int = 1,
        seq_len: int | None = None,
        max_batch_size: int | str | None = None,
    ) -> None:
        """`--model_args path=runs/a,tp=2`; `max_batch_size` is lm-eval's, for automatic sizes.

        Raises as `open_ranks`, `open_model` and `open_tokenizer`; DataError for `auto` sizes.
        """
        super().__init__()
        if not isinstance(path, ScoredModel):
            mesh = open_ranks("auto" if device is None else device.split(":")[0], tp)
            path = open_model(Path(path), mesh, tp, seq_len)
        self.scored = path
        if tokenizer is None or isinstance(tokenizer, str | Path):
            given = None if tokenizer is None else Path(tokenizer)
            tokenizer = open_tokenizer(self.scored.source, given)
        self.tokens: Tokenizer = tokenizer
        if not str(batch_size or 8).isdigit():
            raise DataError(
                f"batch_size={batch_size}: sizes are not found out here; give a number of sequences"
            )
        self.batch_size = int(batch_size or 8)
        self._device = self.scored.mesh.device

    @property
    def device(self) -> Any:
        return self._device

    @property
    def eot_token_id(self) -> int:
        """Begins every document in training, too: it ended the one before."""
        return self.tokens.eos_id

    @property
    def max_length(self) -> int:
        return self.scored.seq_len

    @property
    def tokenizer_name(self) -> str:
        return self.tokens.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Never with begin or end tokens, whatever is asked for: as in training."""
        return self.tokens.encode(string)

    def get_model_info(self) -> dict[str, Any]:
        """For lm-eval's results file."""
        source = self.scored.source
        return {
            "model_num_parameters": source.num_parameters,
            "model_dtype": source.dtype,
            "model_form": source.form,
            "model_step": source.step,
            "model_lambda": source.strength.weight,
            "model_config_hash": source.config_hash,
        }

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        wanted = [Continuation(context, target) for _, context, target in requests]
        with self._progress(len(wanted), "sequences", disable_tqdm) as bar:
            found = self.scored.log_likelihoods(
                wanted, batch_size=self.batch_size, on_batch=bar.update
            )
        for (arguments, _, _), score in zip(requests, found, strict=True):
            if arguments is not None:
                self.cache_hook.add_partial("loglikelihood", arguments, tuple(score))
        return [(score.nats, score.is_greedy) for score in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Nats of whole texts, by windows that do not overlap but at the end."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                context, targets = make_disjoint_window(pair)
                windows.append((None, context, targets))
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (nats, _) in zip(owners, scores, strict=True):
            totals[owner] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy text up to a stop sequence. DataError for a task that samples."""
        by_options: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            options = json.dumps(request.args[1], sort_keys=True)
            by_options.setdefault(options, []).append(number)
        texts = [""] * len(requests)
        with self._progress(len(requests), "texts", disable_tqdm) as bar:
            for options, numbers in by_options.items():
                prompts = [requests[number].args[0] for number in numbers]
                found = self._generate(prompts, json.loads(options))
                for number, text in zip(numbers, found, strict=True):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                bar.update(len(numbers))
        return texts

    def _generate(self, prompts: Sequence[str], options: dict[str, Any]) -> list[str]:
        options = normalize_gen_kwargs(options, MAX_NEW_TOKENS)
        if options.get("do_sample"):
            raise DataError(
                "the task asks for sampled text (do_sample), and bitscale's models generate "
                "greedily; use --gen_kwargs do_sample=False, or a task without sampling"
            )
        stop = handle_stop_sequences(options.get("until"), eos=None)
        generated = self.scored.generate(
            [self.tok_encode(prompt) or [self.prefix_token_id] for prompt in prompts],
            max_new_tokens=options["max_gen_toks"],
            is_finished=self._finished(stop),
            batch_size=self.batch_size,
        )
        texts = []
        for ids in generated:
            kept = ids[: ids.index(self.eot_token_id)] if self.eot_token_id in ids else ids
            texts.append(postprocess_generated_text(self.tokens.decode(kept), stop, None))
        return texts

    def _finished(self, stop: Sequence[str]) -> Callable[[list[int]], bool]:
        def is_finished(ids: list[int]) -> bool:
            if ids[-1] == self.eot_token_id:
                return True
            text = self.tokens.decode(ids)
            return any(term in text for term in stop if term)

        return is_finished

    def _progress(self, total: int, unit: str, disabled: bool) -> Any:
        quiet = disabled or not self.scored.mesh.is_main
        seconds = 0.2 if sys.stderr.isatty() else 10.0
        return tqdm(total=total, unit=unit, disable=quiet, mininterval=seconds)
