#!/bin/bash
# Trains on several machines without a scheduler: run it on each of them, with the same words.
#
#   NODES=2 HEAD=10.0.0.1:29500 bash configs/cluster/torchrun.sh configs/diffusion/imagenet_f8_class.yaml [key=value ...]
#
#   NODES      number of machines (1), or the least and the most, as 1:4: who is there trains, in the same way
#   HEAD       address and port of the first machine, where the others find it (127.0.0.1:29500)
#   PROCESSES  on each machine (gpu: one for each)
#   RESTARTS   how often the run goes on by itself after a rank was lost (3)
#   ADDRESS    this machine's own address, where its name does not lead to it
#
# The words after the script are those after --base; `-r auto` goes on with the newest run of this name. logs/ and cache/
# have to lie where all machines see them. A signal to torchrun reaches the ranks, which save and leave; torchrun's own
# exit code says little: run_state.json tells how the run ended.

set -euo pipefail
cd "$(dirname "$0")/../.."

# Each start makes a store of its own, in a rank: one inside of the agent would outlive the ranks that wrote to it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# By itself torchrun dies of SIGUSR1 and SIGUSR2 without a word to its ranks. (It sets TORCHELASTIC_SIGNALS_TO_HANDLE to
# what it is told here, so setting that has no effect.)
signals=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2

head=${HEAD:-127.0.0.1:29500}
own=()
if [ -n "${ADDRESS:-}" ]; then
    own=(--local-addr="$ADDRESS" --rdzv-conf="is_host=$([ "${head%:*}" = "$ADDRESS" ] && echo 1 || echo 0)")
fi

exec torchrun --nnodes="${NODES:-1}" --nproc-per-node="${PROCESSES:-gpu}" --max-restarts="${RESTARTS:-3}" \
    --rdzv-backend=c10d --rdzv-endpoint="$head" --rdzv-id="${RUN:-ldm}" \
    "${own[@]}" --signals-to-handle="$signals" --shutdown-timeout=60 \
    main.py -r auto --base "$@"
