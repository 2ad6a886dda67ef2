"""Fresh process: load each saved folder by class and by DiffusionPipeline after `import diffusers_ext`."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

import diffusers_ext

name, root, *variants = sys.argv[1:]
for variant in variants:
    folder = Path(root) / variant
    options = json.loads((folder / "options.json").read_text())
    for how, cls in (("class", getattr(diffusers_ext, name)), ("base", DiffusionPipeline)):
        pipe = cls.from_pretrained(folder)
        assert type(pipe) is getattr(diffusers_ext, name)
        images = pipe(**options, generator=torch.Generator().manual_seed(7), output_type="np").images
        np.save(folder / f"{how}.npy", images)
