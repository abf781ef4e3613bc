#!/usr/bin/env bash
# The claims of the papers on this machine: eight sweeps, one table, one page of verdicts.
#
#   launch/reproduce.sh [--scale small|steady|h200] [--corpus PATH] [--workers N]
#
# PATH is a file or a folder of text; without it, what was prepared before, or else the documentation
# of the running Python. Interrupt it when you like: the same command goes on. Runs, the page
# (seed-claims.md) and its figures are in runs/reproduce, runs/reproduce-steady or
# runs/reproduce-h200.
set -euo pipefail

usage="usage: launch/reproduce.sh [--scale small|steady|h200] [--corpus PATH] [--workers N]"
corpus=builtin:python-docs
corpus_given=
scale=small
workers=()
while (($# > 0)); do
  if [[ -z ${2:-} ]]; then
    echo "error: '$1' needs a value; $usage" >&2
    exit 2
  fi
  case $1 in
    --corpus) corpus=$2 corpus_given=1 ;;
    --scale) scale=$2 ;;
    --workers) workers=(--workers "$2") ;;
    *)
      echo "error: unknown argument '$1'; $usage" >&2
      exit 2
      ;;
  esac
  shift 2
done
case $corpus in
  builtin:* | /*) ;;
  *) corpus=$PWD/$corpus ;;
esac

if ! command -v bitscale >/dev/null; then
  echo "error: bitscale is not on PATH; run 'make reproduce', or activate its environment" >&2
  exit 2
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
case $scale in
  small)
    out=runs/reproduce vocab=512
    scaled=()
    ;;
  steady)
    out=runs/reproduce-steady vocab=512
    scaled=(--over configs/sweeps/shared/steady.yaml --seeds 5-9
      "data.corpora=[{path: $out/corpus}]")
    ;;
  h200)
    out=runs/reproduce-h200 vocab=4096
    scaled=(--over configs/sweeps/shared/h200.yaml "data.corpora=[{path: $out/corpus}]")
    # One run after the other, unless --workers says how many share the GPU.
    ((${#workers[@]})) || workers=(--workers 1)
    ;;
  *)
    echo "error: unknown scale '$scale'; $usage" >&2
    exit 2
    ;;
esac

# Another text than before is an error there, and the same text done at once.
if [[ -n $corpus_given || ! -f $out/corpus/corpus.json ]]; then
  bitscale prepare "$corpus" --out "$out/corpus" --vocab-size "$vocab" --split 0.97,0.03,0
fi
exec bitscale sweep configs/sweeps "${scaled[@]}" --out "$out" "${workers[@]}" \
  --claims "$out/seed-claims.md" --figures "$out/figures"
