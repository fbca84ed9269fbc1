#!/usr/bin/env bash
# Everything that a GPU has to show, in one call: the tests of precision and combined gradients, the three scripts at O2, and
# the benchmarks beside the stock recipe. For a machine that has torch, transformers and accelerate, and no network:
#   .venv/bin/python -m pip download --dest wheels datasets evaluate pytest    # where there is one
#   bash benchmarks/gpu_session.sh OUTPUT_FOLDER [WHEELS_FOLDER]
# Logs and JSON files go to OUTPUT_FOLDER. A part that fails does not keep the others from running; the exit code tells.
set -uo pipefail
cd "$(dirname "$0")/.."
output=$(realpath -m "${1:?name a folder for the results}")
wheels=${2:-}
python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1
mkdir -p "$output"

if [[ -n $wheels ]]; then
    # Only what is missing: torch, transformers and accelerate stay those of the machine.
    "$python" -m pip install --quiet --no-index --find-links "$wheels" datasets evaluate pytest || exit 1
fi

failed=0
part() { # NAME COMMAND...: runs it, keeps what it prints in NAME.log
    local name=$1
    shift
    echo "== $name"
    if ! "$@" > "$output/$name.log" 2>&1; then
        failed=1
        echo "failed: $name"
    fi
    tail -n 12 "$output/$name.log"
}

"$python" -c 'import torch, transformers, accelerate; print(torch.cuda.get_device_name(), torch.__version__,
    transformers.__version__, accelerate.__version__)' | tee "$output/versions.txt" || exit 1
part tests "$python" -m pytest -q tests/test_amp.py tests/test_combine_grad.py tests/test_device.py

corpus=$output/corpus
part corpus "$python" -m utils.sample_corpus --output_dir "$corpus"
texts=(--train_file "$corpus/train.txt" --validation_file "$corpus/validation.txt" --vocab_size 1024)
o2=(--fp16 --fp16_opt_level O2 --use_combine_grad)
usual=(--do_train --do_eval --num_train_epochs 2 --learning_rate 1e-3 --per_device_train_batch_size 16 --save_strategy no)
part run_clm "$python" run_clm.py --model_type gpt2 --block_size 128 "${texts[@]}" "${o2[@]}" "${usual[@]}" \
    --output_dir "$output/run_clm"
part run_mlm "$python" run_mlm.py --model_type roberta --max_seq_length 128 "${texts[@]}" "${o2[@]}" "${usual[@]}" \
    --output_dir "$output/run_mlm"
part run_plm "$python" run_plm.py --model_type xlnet --max_seq_length 128 --config_overrides n_layer=6,d_model=512,n_head=8 \
    "${texts[@]}" "${o2[@]}" "${usual[@]}" --output_dir "$output/run_plm"

part optimizer_phase "$python" -m benchmarks.optimizer_phase --output "$output/optimizer_phase.json"
part roberta "$python" -m benchmarks.predicted_rows --family roberta --batch 16 --rounds 20 --bf16 \
    --output "$output/roberta.json"
part xlnet "$python" -m benchmarks.predicted_rows --family xlnet --batch 16 --rounds 20 --bf16 \
    --output "$output/xlnet.json"
rm -rf "$output"/run_*/*.safetensors
exit "$failed"
