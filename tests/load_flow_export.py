"""Fresh process where diffusers_ext cannot be imported: load an exported flow with its base, and draw."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from hidden_package import hide

hide("diffusers_ext")
folder = Path(sys.argv[1])
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
assert type(pipe).__name__ == "FlowPostprocessingPipeline"
assert type(pipe.base).__name__ == "BoostAndSkipPipeline" and pipe.base.config.null_class == 3
options = json.loads((folder / "options.json").read_text())
images = pipe(**options, generator=torch.Generator().manual_seed(7), output_type="pt").images
np.save(folder / "drawn.npy", images.numpy())
