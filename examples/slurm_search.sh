#!/bin/bash
# One search over many nodes of 8 GPUs, a task of the array on each; task I of N searches the problems with number % N == I.
#
#     sbatch --array=0-63 examples/slurm_search.sh --benchmark problems.jsonl --num_repetitions 64 --output_path big.jsonl
#     python report.py big.jsonl              # at any time: the shards that are there, as one run
#     SHARDS=64 sbatch --array=3,7 examples/slurm_search.sh ...      # some of them again, with the same flags
#
# Submitted in the checkout, which all nodes see, with the environment of README's "On a GPU node" active. All flags go to
# inference_eval.py. N is at most the number of problems. A node of its own has servers of its own: nothing is shared but
# files, and one that fails takes only its shard along. The same command goes on with what was stopped.
#
#SBATCH --job-name=value-guided-search
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --exclusive
#SBATCH --gres=gpu:8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
#SBATCH --signal=B:TERM@120

# The last of these: two minutes before the time is over the search is told, and saves.
set -euo pipefail

GENERATOR=${GENERATOR:-deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B}
VALUE_MODEL=${VALUE_MODEL:-VGS-AI/DeepSeek-VM-1.5B}
GENERATORS=${GENERATORS:-6} # GPUs that write; the others serve values
GPUS=${GPUS:-8}
SHARDS=${SHARDS:-$SLURM_ARRAY_TASK_COUNT} # tasks that the whole run was cut into
SEARCHES=${SEARCHES:-24} # at once for each generator; so many fit into the value caches of two GPUs of 80 GB
PORT=${PORT:-30000}      # of the first server; each has the next one

if ((SLURM_ARRAY_TASK_ID >= SHARDS)); then
    echo "task $SLURM_ARRAY_TASK_ID of $SHARDS: tasks count from 0, as in --array=0-$((SHARDS - 1)); SHARDS=N says how many there are" >&2
    exit 2
fi
search="" searching="" told="" servers=() urls=()
stop() { # while servers start: at once; the search saves and leaves
    told=1
    if [ -n "$search" ]; then kill -TERM "$search" 2> /dev/null || true; elif [ -z "$searching" ]; then exit 143; fi
}
trap stop TERM INT
trap 'if [ ${#servers[@]} -gt 0 ]; then kill "${servers[@]}" 2> /dev/null || true; fi' EXIT

for ((gpu = 0; gpu < GPUS; gpu++)); do
    port=$((PORT + gpu))
    if ((gpu < GENERATORS)); then
        CUDA_VISIBLE_DEVICES=$gpu python -m sglang.launch_server --model-path "$GENERATOR" --skip-tokenizer-init \
            --mem-fraction-static 0.85 --port $port --log-level warning &
        urls+=(--sglang_url "http://localhost:$port")
    else
        CUDA_VISIBLE_DEVICES=$gpu python -m engine_lib.value_server --classifier_ckpt_path "$VALUE_MODEL" \
            --mem-fraction-static 0.85 --port $port --log-level warning &
        urls+=(--value_url "http://localhost:$port")
    fi
    servers+=($!)
done
for ((gpu = 0; gpu < GPUS; gpu++)); do
    until curl -sf "localhost:$((PORT + gpu))/health" > /dev/null; do
        kill -0 "${servers[gpu]}" || { echo "the server of GPU $gpu has ended; its lines are above" >&2; exit 1; }
        sleep 2
    done
done

searching=1
# Flags of the command line come last, so that they win.
python inference_eval.py --shard "$SLURM_ARRAY_TASK_ID/$SHARDS" --piref_model "$GENERATOR" \
    --classifier_ckpt_path "$VALUE_MODEL" --value_engine sglang-server "${urls[@]}" \
    --batch_size $((SEARCHES * GENERATORS)) "$@" &
search=$!
if [ -n "$told" ]; then stop; fi # in the moment before its number was known
status=0
wait "$search" || status=$?
if [ -n "$told" ]; then # the signal ended the wait: the search saves, leaves, and has a status of its own
    status=0
    wait "$search" || status=$?
fi
exit "$status"
