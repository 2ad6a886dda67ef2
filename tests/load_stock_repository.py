"""Fresh process where diffusers_ext cannot be imported: a stock repository with custom_pipeline=."""

import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline
from hidden_package import hide

hide("diffusers_ext")
folder, file = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=file, trust_remote_code=True)
images = pipe(
    num_inference_steps=10, gamma=4.0, skip_steps=3, generator=torch.Generator().manual_seed(7), output_type="pt"
).images
np.save(folder + "/boosted.npy", images.numpy())
