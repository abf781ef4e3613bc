"""Tokens a second and memory of `bitscale prepare`, against Megatron's way and the tokenizer alone.

    python tools/bench_data.py                                # the documentation inside Python
    python tools/bench_data.py --text /path/to/texts --workers 2 --repeats 5 --json out.json

Three ways from the same JSON lines to tokens, in turns, each in processes of its own; medians.
Processor seconds (of all processes of a way, without the imports of the first) hardly depend on
what else the machine does; wall-clock seconds do.

- limit: one process that holds the texts in memory and encodes them in one call on all threads;
  nothing is read or written meanwhile. Its time leaves imports and reading out.
- megatron: a pool of workers that parse and encode a line each, and megatron-core's
  IndexedDatasetBuilder, as Megatron-LM's tools/preprocess_data.py is built.
- bitscale: `bitscale prepare`, with its manifest, checksums and publishing by one rename.

The outputs of the latter two must be equal to the byte. Peak memory is the proportional set size of
all processes of a way, sampled. At last, reading batches from the result: microseconds a sequence.
"""

import argparse
import filecmp
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from bitscale.data.sources import SourceOptions, find_inputs, read_span
from bitscale.data.tokenizer import load_tokenizer, train_tokenizer

# No torch up here: the workers of `prepare` import this module again, as they would a command's.

PACKAGES = ("sentencepiece", "megatron-core", "numpy", "torch")
SAMPLE_SECONDS = 0.02
WAYS = ("limit", "megatron", "bitscale")


# --- The ways; each in a process of its own ---


def limit(lines: Path, tokenizer_file: Path, workers: int) -> dict[str, float]:
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    texts = [json.loads(line)["text"] for line in lines.open(encoding="utf-8")]
    start, begun = time.perf_counter(), processor_seconds()
    ids = tokenizer.encode(texts, num_threads=workers)
    seconds, busy = time.perf_counter() - start, processor_seconds() - begun
    tokens = sum(map(len, ids)) + len(ids)
    return {"seconds": seconds, "tokens": tokens, "processor_seconds": busy}


class Encoder:
    """What a worker of Megatron's pool does with a line."""

    tokenizer: Any = None

    def __init__(self, tokenizer_file: Path) -> None:
        self.tokenizer_file = tokenizer_file

    def start(self) -> None:
        Encoder.tokenizer = load_tokenizer(self.tokenizer_file)

    def encode(self, line: str) -> list[int]:
        tokenizer = Encoder.tokenizer
        return [*tokenizer.encode(json.loads(line)["text"]), tokenizer.eos_id]


def megatron(lines: Path, tokenizer_file: Path, workers: int, out: Path) -> dict[str, float]:
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    out.mkdir(parents=True, exist_ok=True)
    start, begun, num_tokens = time.perf_counter(), processor_seconds(), 0
    encoder = Encoder(tokenizer_file)
    builder = IndexedDatasetBuilder(str(out / "train.bin"), dtype=np.uint16)
    with (
        multiprocessing.Pool(workers, initializer=encoder.start) as pool,
        lines.open(encoding="utf-8") as file,
    ):
        for ids in pool.imap(encoder.encode, file, 32):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
            num_tokens += len(ids)
    builder.finalize(str(out / "train.idx"))
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": processor_seconds() - begun,
        "tokens": num_tokens,
    }


def bitscale(lines: Path, tokenizer_file: Path, workers: int, out: Path) -> dict[str, float]:
    from bitscale.data.prepare import PrepareOptions, prepare

    if out.exists():
        shutil.rmtree(out)  # else it is up to date, and nothing is done
    start, begun = time.perf_counter(), processor_seconds()
    options = PrepareOptions(
        inputs=(str(lines),), out=out, source=SourceOptions(), tokenizer=tokenizer_file,
        split=(1.0, 0.0, 0.0), workers=workers, overwrite=True,
    )  # fmt: skip
    corpus = prepare(options)
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": processor_seconds() - begun,
        "tokens": corpus.splits["train"].num_tokens,
    }


def work(way: str, folder: Path, workers: int) -> None:
    lines, tokenizer_file = folder / "lines.jsonl", folder / "tokenizer.model"
    if way == "limit":
        found = limit(lines, tokenizer_file, workers)
    else:
        write = {"megatron": megatron, "bitscale": bitscale}[way]
        found = write(lines, tokenizer_file, workers, folder / way)
    print(json.dumps(found))


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


# --- Measuring ---


def make_inputs(folder: Path, text: str, vocab_size: int) -> None:
    """JSON lines of the documents of `text`, and a tokenizer trained on them."""
    options = SourceOptions()
    spans = find_inputs((text,), options).spans
    with (folder / "lines.jsonl").open("w", encoding="utf-8") as file:
        for span in spans:
            for document in read_span(span, options):
                if document.strip():
                    file.write(json.dumps({"text": document}) + "\n")
    documents = (json.loads(line)["text"] for line in (folder / "lines.jsonl").open())
    train_tokenizer(documents, folder / "tokenizer.model", "bpe", vocab_size)


def run_once(way: str, folder: Path, workers: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--work", way, "--folder", str(folder)]
    start = time.perf_counter()
    with subprocess.Popen(
        [*command, "--workers", str(workers)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        peak = [0.0]
        sampler = threading.Thread(target=_sample, args=(process, peak), daemon=True)
        sampler.start()
        stdout, stderr = process.communicate()
    if process.returncode:
        sys.exit(f"{way} failed:\n{stderr.decode()}")
    found: dict[str, float] = json.loads(stdout.splitlines()[-1])
    return found | {"whole_seconds": time.perf_counter() - start, "mib": peak[0]}


def _sample(process: subprocess.Popen[bytes], peak: list[float]) -> None:
    while process.poll() is None:
        total = 0
        try:
            parent = psutil.Process(process.pid)
            for one in (parent, *parent.children(recursive=True)):
                total += one.memory_full_info().pss
        except (psutil.Error, OSError):
            pass  # one of them has just ended
        peak[0] = max(peak[0], total / 2**20)
        time.sleep(SAMPLE_SECONDS)


def measure_reading(folder: Path, seq_len: int = 2048, num_steps: int = 200) -> float:
    """Microseconds a sequence of `seq_len` tokens, shuffled, as training reads it."""
    from bitscale.data.batches import Batches
    from bitscale.data.corpus import load_corpus

    corpus = load_corpus(folder / "bitscale")
    batches = Batches(
        [(corpus.shard("train"), 1.0)], seq_len=seq_len, global_batch_size=8,
        micro_batch_size=8, dp_rank=0, dp_size=1, seed=0, reset_attention=False,
    )  # fmt: skip
    start = time.perf_counter()
    for step in range(num_steps):
        list(batches.micro_batches(step))
    return 1e6 * (time.perf_counter() - start) / (8 * num_steps)


def table(results: dict[str, list[dict[str, float]]]) -> str:
    def median(way: str, key: str) -> float:
        return statistics.median(found[key] for found in results[way])

    lines = [
        "| way | tokens/s | of the limit | tokens a processor second | of the limit | "
        "whole process s | start-up s | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    best = results["limit"][0]["tokens"] / median("limit", "seconds")
    cheapest = results["limit"][0]["tokens"] / median("limit", "processor_seconds")
    for way, runs in results.items():
        speed = runs[0]["tokens"] / median(way, "seconds")
        thrift = runs[0]["tokens"] / median(way, "processor_seconds")
        whole, inside = median(way, "whole_seconds"), median(way, "seconds")
        lines.append(
            f"| {way} | {speed:,.0f} | {speed / best:.2f} | {thrift:,.0f} | "
            f"{thrift / cheapest:.2f} | {whole:.2f} | {whole - inside:.2f} | "
            f"{median(way, 'mib'):.0f} |"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", default="builtin:python-docs", help="file or folder of text")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--note", default="", help="on the state of the machine, for the records")
    parser.add_argument("--json", type=Path, help="write figures and provenance here")
    parser.add_argument("--work", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.work:
        work(args.work, args.folder, args.workers)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, args.text, args.vocab_size)
        results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in tqdm(range(args.repeats), desc="rounds", file=sys.stderr):
            for way in WAYS:
                results[way].append(run_once(way, folder, args.workers))
        reading = measure_reading(folder)
        equal = all(
            filecmp.cmp(folder / "megatron" / name, folder / "bitscale" / name, shallow=False)
            for name in ("train.bin", "train.idx")
        )
    num_tokens = int(results["limit"][0]["tokens"])
    print(f"{num_tokens:,} tokens, {args.workers} workers, medians of {args.repeats}\n")
    print(table(results))
    print(f"\nmegatron's and bitscale's files are {'equal' if equal else 'DIFFERENT'}")
    print(f"reading a sequence of 2,048 tokens: {reading:.0f} µs")
    if args.json:
        from provenance import provenance

        origin = provenance(f"CPU, {os.cpu_count()} cores", PACKAGES)
        origin |= {"note": args.note, "load_average": os.getloadavg()}
        found = {"provenance": origin, "results": results, "reading_us": reading, "equal": equal}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
