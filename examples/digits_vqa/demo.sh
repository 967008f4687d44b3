#!/usr/bin/env bash
# From nothing to a trained vision-language model: data, training on four ranks, export, held-out questions.
# Run by `make demo`; `bash examples/digits_vqa/demo.sh` does the same in an environment that has tetrascope.
# A finished or interrupted run is gone on with; remove runs/digits_vqa to start anew.
set -euo pipefail
run=runs/digits_vqa/tp2_pp2

echo "1/3  data: handwritten digits composed into pictures, with questions"
python examples/digits_vqa/prepare.py
echo "2/3  training: TP=2 x PP=2 on this machine"
SECONDS=0
tetrascope train examples/digits_vqa/tp2_pp2.yaml --resume
echo "     $((SECONDS / 60)) min $((SECONDS % 60)) s, start-up and export included"
echo "3/3  held-out questions, answered by plain transformers from the exported checkpoint"
python examples/digits_vqa/evaluate.py "$run/hf" --picture "$run/answers.png" --require 0.95
cat <<DONE

checkpoint for transformers   $run/hf
held-out pictures, answered   $run/answers.png
log                           $run/metrics.jsonl   (tensorboard --logdir $run/tensorboard)
native checkpoints            $run/checkpoints
DONE
