#!/usr/bin/env bash
# A trained adapter, or a merged model, to the Hub, with its card, labels and tokenizer:
#     hf auth login
#     bash examples/upload.sh OUT USER/NAME [--private, or another flag of hf upload]
# Checkpoints, which only a resume needs, stay here. run.json goes along: it has the labels' names,
# and the paths of your files. Without them: --exclude run.json. (hf comes with transformers.)
set -euo pipefail
out=$1 name=$2
config="$out/adapter_config.json"
base=$(sed -n 's/.*"base_model_name_or_path": "\(.*\)".*/\1/p' "$config" 2> /dev/null || true)
if [[ -d $base ]]; then
    echo "error: $base is a directory of this machine: put the base's name on the Hub" \
         "into $config, or upload what python -m minilora.merge writes" >&2
    exit 2
fi
hf upload "$name" "$out" . --exclude "checkpoint-*" --exclude ".*" "${@:3}"
