#!/usr/bin/env bash
# From nothing to a trained model in a few minutes: installs into .venv, writes a sample corpus, trains a small GPT-2
# with run_clm.py and shows its loss beside the floor that no model can beat. Running it again only shows the results.
#   scripts/demo.sh [OUTPUT_FOLDER]       default: demo_output
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
output=${1:+$(cd "$here" && realpath -m "$1")}
output=${output:-demo_output}
python=$(scripts/make_venv.sh requirements.txt)

"$python" -m utils.sample_corpus --output_dir "$output/corpus"
precision=$("$python" -m utils.device)
# shellcheck disable=SC2086  # $precision is several words, or none
"$python" run_clm.py \
    --model_type gpt2 \
    --config_overrides n_embd=128,n_layer=4,n_head=4,n_positions=128 \
    --vocab_size 1024 \
    --train_file "$output/corpus/train.txt" \
    --validation_file "$output/corpus/validation.txt" \
    --per_device_train_batch_size 8 \
    --per_device_eval_batch_size 8 \
    --num_train_epochs 4 \
    --learning_rate 2e-3 \
    --warmup_steps 100 \
    --do_train \
    --do_eval \
    $precision --use_combine_grad \
    --logging_steps 100 \
    --eval_strategy epoch \
    --save_strategy epoch \
    --save_total_limit 1 \
    --output_dir "$output/model"
"$python" scripts/show_floor.py "$output/corpus" "$output/model"
