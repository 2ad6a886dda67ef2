"""Fresh process where diffusers_ext cannot be imported: load by path and from exports, sample with an interval."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from hidden_package import hide

hide("diffusers_ext")
file, root = sys.argv[1], Path(sys.argv[2])
options = json.loads((root / "options.json").read_text())
custom = DiffusionPipeline.from_pretrained(root / "stock", custom_pipeline=file, trust_remote_code=True)
exported = DiffusionPipeline.from_pretrained(root / "export", trust_remote_code=True)
for how, pipe in (("custom", custom), ("export", exported)):
    pipe.set_progress_bar_config(disable=True)
    images = pipe(**options, generator=torch.Generator().manual_seed(7), output_type="np").images
    np.save(root / f"{how}.npy", images)
    assert pipe.guidance_report.guided_steps == [1, 2]
assert not [name for name in sys.modules if name.split(".")[0] == "diffusers_ext"]
