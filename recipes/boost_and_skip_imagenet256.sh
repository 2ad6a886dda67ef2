#!/usr/bin/env bash
# Boost-and-Skip on ImageNet-256: samples at 64 x 64 (gamma 2.5, skip 3), enlarged by ADM's upsampler.
# Um, Kim, Ye, ICML 2025, arXiv 2502.06516. 250 of 1000 ancestral steps.
#
#   bash recipes/boost_and_skip_imagenet256.sh OUT64 64_256_upsampler.pt REAL OUT
#
# OUT64: the output folder of boost_and_skip_imagenet64.sh; the upsampler samples plainly. REAL: ImageNet at 256 x 256.
# Started again, it goes on where it was. On N GPUs: RUN="torchrun --nproc_per_node N -m diffusers_ext.cli" in front.
# Metrics are those of docs/evaluate.md, in DINOv2 features (FEATURES=inception for others). Not run by us on the
# published checkpoint: the numbers are yours to find.
set -euo pipefail

small=$1 checkpoint=$2 real=$3 out=$4
run=${RUN:-diffusers-ext}

[ -d "$out/model" ] ||
    diffusers-ext convert guided-diffusion "$checkpoint" "$out/model" --preset imagenet64_256_upsampler
for gamma in 1 2.5; do
    $run upsample "$out/model" "$small/gamma-$gamma"/samples_*.npz --num-inference-steps 250 --batch-size 16 \
        --format npz --output "$out/gamma-$gamma"
    diffusers-ext evaluate "$out/gamma-$gamma"/samples_*.npz --reference "$real" \
        --features "${FEATURES:-dinov2}" --json "$out/gamma-$gamma.json"
done
