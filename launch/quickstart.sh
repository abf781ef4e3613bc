#!/usr/bin/env bash
# The whole flow on this machine, small: prepare, train, switch to ternary, export, evaluate.
#
#   launch/quickstart.sh                      on the documentation of the running Python
#   launch/quickstart.sh --corpus PATH        on your text: a file or a folder
#
# Everything lands in runs/quickstart of this repository; running it again starts afresh.
set -euo pipefail

corpus=builtin:python-docs
while (($# > 0)); do
  case $1 in
    --corpus)
      if [[ -z ${2:-} ]]; then
        echo "error: --corpus needs a path: a file or a folder of text" >&2
        exit 2
      fi
      corpus=$2
      shift 2
      ;;
    *)
      echo "error: unknown argument '$1'; usage: launch/quickstart.sh [--corpus PATH]" >&2
      exit 2
      ;;
  esac
done
case $corpus in
  builtin:* | /*) ;;
  *) corpus=$PWD/$corpus ;;
esac

if ! command -v bitscale >/dev/null; then
  echo "error: bitscale is not on PATH; run 'make quickstart', or activate its environment" >&2
  exit 2
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=runs/quickstart

run() {
  printf '\n+'
  printf ' %q' "$@"
  printf '\n'
  "$@"
}

run rm -rf "$out/corpus" "$out/run" "$out/packed"
run bitscale prepare "$corpus" --out "$out/corpus" --vocab-size 2048 --section-bytes 16384 \
  --split 0.94,0.05,0.01
# Stopped in 16 bit on purpose, then resumed: the switch to ternary comes after the restart.
run bitscale train configs/quickstart.yaml train.stop_step=80
run bitscale train configs/quickstart.yaml --resume auto
run bitscale eval "$out/run"
run bitscale export "$out/run" "$out/packed"
run bitscale eval "$out/packed"
run bitscale report "$out/run"

cat <<END

what                          where
tokenizer and token shards    $out/corpus
checkpoints, metrics, report  $out/run
ternary model, packed         $out/packed
END
