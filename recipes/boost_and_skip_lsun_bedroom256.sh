#!/usr/bin/env bash
# Boost-and-Skip on LSUN-Bedrooms-256, unconditional: skip 3, gamma of your choice.
# Um, Kim, Ye, ICML 2025, arXiv 2502.06516. 250 of 1000 ancestral steps.
#
#   bash recipes/boost_and_skip_lsun_bedroom256.sh lsun_bedroom.pt REAL OUT GAMMA [SAMPLES]
#
# The authors give no gamma for this one; 2.5 and 4 are those of their other models. REAL: a folder, zip or .npz.
# Started again, it goes on where it was. On N GPUs: RUN="torchrun --nproc_per_node N -m diffusers_ext.cli" in front.
# Metrics are those of docs/evaluate.md, in DINOv2 features (FEATURES=inception for others). Not run by us on the
# published checkpoint: the numbers are yours to find.
set -euo pipefail

checkpoint=$1 real=$2 out=$3 boost=$4 samples=${5:-50000}
run=${RUN:-diffusers-ext}

[ -d "$out/model" ] || diffusers-ext convert guided-diffusion "$checkpoint" "$out/model" --preset lsun_bedroom256
for setting in "1 0" "$boost 3"; do # the stock sampler, then Boost-and-Skip: gamma, skipped steps
    read -r gamma skip <<<"$setting"
    $run sample "$out/model" --pipeline boost-and-skip --gamma "$gamma" --skip-steps "$skip" --num-inference-steps 250 \
        --num-samples "$samples" --batch-size 8 --format npz --output "$out/gamma-$gamma"
    diffusers-ext evaluate "$out/gamma-$gamma"/samples_*.npz --reference "$real" \
        --features "${FEATURES:-dinov2}" --json "$out/gamma-$gamma.json"
done
