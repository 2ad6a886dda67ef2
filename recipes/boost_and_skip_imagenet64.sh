#!/usr/bin/env bash
# Boost-and-Skip on ImageNet-64, class-conditional: gamma 2.5, skip 3.
# Um, Kim, Ye, ICML 2025, arXiv 2502.06516. 250 of 1000 ancestral steps.
#
#   bash recipes/boost_and_skip_imagenet64.sh 64x64_diffusion.pt REAL OUT [SAMPLES]
#
# REAL: ImageNet at 64 x 64, a folder, zip or .npz.
# Started again, it goes on where it was. On N GPUs: RUN="torchrun --nproc_per_node N -m diffusers_ext.cli" in front.
# Metrics are those of docs/evaluate.md, in DINOv2 features (FEATURES=inception for others). Not run by us on the
# published checkpoint: the numbers are yours to find.
set -euo pipefail

checkpoint=$1 real=$2 out=$3 samples=${4:-50000}
run=${RUN:-diffusers-ext}

[ -d "$out/model" ] || diffusers-ext convert guided-diffusion "$checkpoint" "$out/model" --preset imagenet64
for setting in "1 0" "2.5 3"; do # the stock sampler, then Boost-and-Skip: gamma, skipped steps
    read -r gamma skip <<<"$setting"
    $run sample "$out/model" --pipeline boost-and-skip --gamma "$gamma" --skip-steps "$skip" --num-inference-steps 250 \
        --random-labels --num-samples "$samples" --batch-size 100 --format npz --output "$out/gamma-$gamma"
    diffusers-ext evaluate "$out/gamma-$gamma"/samples_*.npz --reference "$real" \
        --features "${FEATURES:-dinov2}" --json "$out/gamma-$gamma.json"
done
