#!/usr/bin/env bash
# Everything that a GPU has to show: tests, the three scripts at O2, and the rows of docs/performance.md beside stock. For a
# machine that has torch, transformers and accelerate, and no network:
#   .venv/bin/python -m pip download --dest wheels datasets evaluate pytest tiktoken zstandard matplotlib    # where there is one
#   WHEELS=wheels bash benchmarks/gpu_session.sh OUTPUT_FOLDER [SECTION...]
# Logs, JSON and markdown go to OUTPUT_FOLDER; session.md has all tables. A part that fails does not keep the others from
# running; the exit code tells. After MINUTES (9) no part is begun, and the sections that are left are named: give them to
# the next call.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
output=$(realpath -m "${1:?name a folder for the results}")
shift
all=(gpt2_8 gpt2_32 roberta_16 roberta_64 xlnet_16 scripts optimizer growth tests)
sections=("${@:-${all[@]}}")
python=${PYTHON:-python3}
limit=$((${MINUTES:-9} * 60))
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$output"

if [[ -n ${WHEELS:-} ]]; then
    # Only what is missing: torch, transformers and accelerate stay those of the machine.
    "$python" -m pip install --quiet --no-index --find-links "$WHEELS" datasets evaluate pytest || exit 1
    "$python" -m pip install --quiet --no-index --find-links "$WHEELS" tiktoken zstandard matplotlib ||
        echo "without tiktoken, zstandard or matplotlib: some parts may fail"
fi

failed=0
part() { # NAME COMMAND...: runs it for as long as there is time, keeps what it prints in NAME.log
    local name=$1 left=$((limit - SECONDS))
    shift
    if ((left < 20)); then
        failed=1
        echo "no time left: $name"
        return
    fi
    echo "== $name ($SECONDS s)"
    if ! timeout --kill-after=10 "$left" "$@" > "$output/$name.log" 2>&1; then
        failed=1
        echo "failed: $name"
    fi
    tail -n 12 "$output/$name.log"
    if [[ -f $output/$name.md ]]; then
        { cat "$output/$name.md"; echo; } >> "$output/session.md"
    fi
}

compare() { # NAME FLAGS...
    local name=$1
    shift
    part "$name" "$python" -m benchmarks.compare --rounds 5 --warm_up 2 --eval_rounds 3 --output "$output/$name.json" "$@"
}

rows() { # NAME SHAPE...: both half types, combined gradients and compilation on and off
    local name=$1
    shift
    compare "${name}_fp16" "$@" --fp16 O2 --combine_grad --against stock
    compare "${name}_bf16_compiled" "$@" --bf16 O2 --combine_grad --torch_compile --against best
    compare "${name}_bf16" "$@" --bf16 O2 --combine_grad --against stock
    compare "${name}_bf16_separate" "$@" --bf16 O2 --against
}

"$python" -c 'import torch, transformers, accelerate; print(torch.cuda.get_device_name(), torch.__version__,
    transformers.__version__, accelerate.__version__)' | tee "$output/versions.txt" || exit 1
for index in "${!sections[@]}"; do
    if ((SECONDS > limit - 60)); then
        echo "left for the next call: ${sections[*]:index}"
        exit 3
    fi
    case ${sections[index]} in
    gpt2_8) rows gpt2_8x1024 --objective clm --batch 8 --length 1024 ;;
    gpt2_32) rows gpt2_32x1024 --objective clm --batch 32 --length 1024 ;;
    roberta_16) rows roberta_16x512 --objective mlm --batch 16 --length 512 ;;
    roberta_64) rows roberta_64x512 --objective mlm --batch 64 --length 512 ;;
    xlnet_16) rows xlnet_16x512 --objective plm --batch 16 --length 512 ;;
    optimizer) part optimizer_phase "$python" -m benchmarks.optimizer_phase --output "$output/optimizer_phase.json" ;;
    growth)
        part growth "$python" -m benchmarks.growth --bf16 --steps 10 --output "$output" \
            --sweeps n_layer n_embd length batch vocab_size
        ;;
    tests) part tests "$python" -m pytest -q tests/test_amp.py tests/test_combine_grad.py tests/test_device.py \
        tests/test_chunked_loss.py::test_on_this_machines_device ;;
    scripts)
        part corpus "$python" -m utils.sample_corpus --output_dir "$output/corpus"
        texts=(--train_file "$output/corpus/train.txt" --validation_file "$output/corpus/validation.txt" --vocab_size 1024)
        usual=(--do_train --do_eval --num_train_epochs 2 --learning_rate 1e-3 --per_device_train_batch_size 16)
        usual+=(--save_strategy no --fp16 --fp16_opt_level O2 --use_combine_grad)
        part run_clm "$python" run_clm.py --model_type gpt2 --block_size 128 "${texts[@]}" "${usual[@]}" \
            --output_dir "$output/run_clm"
        part run_mlm "$python" run_mlm.py --model_type roberta --max_seq_length 128 "${texts[@]}" "${usual[@]}" \
            --output_dir "$output/run_mlm"
        part run_plm "$python" run_plm.py --model_type xlnet --max_seq_length 128 "${texts[@]}" "${usual[@]}" \
            --config_overrides n_layer=6,d_model=512,n_head=8 --output_dir "$output/run_plm"
        rm -rf "$output"/run_*/*.safetensors
        ;;
    *)
        echo "${sections[index]}: choose of ${all[*]}"
        exit 2
        ;;
    esac
done
exit "$failed"
