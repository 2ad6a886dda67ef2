"""Fresh process where diffusers_ext cannot be imported: load exports, and stock folders with custom_pipeline=."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from hidden_package import hide

hide("diffusers_ext")
file, root, *variants = sys.argv[1:]
for variant in variants:
    folder = Path(root) / variant
    options = json.loads((folder / "options.json").read_text())
    exported = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    stock = folder / "stock"
    exported.save_pretrained(stock)
    index = json.loads((stock / "model_index.json").read_text())
    index["_class_name"] = "DDPMPipeline"
    index["scheduler"] = json.loads((folder / "model_index.json").read_text())["scheduler"]
    (stock / "model_index.json").write_text(json.dumps(index))
    for code in (folder / "scheduler").glob("*.py"):
        (stock / "scheduler" / code.name).write_text(code.read_text())
    custom = DiffusionPipeline.from_pretrained(stock, custom_pipeline=file, trust_remote_code=True)
    for how, pipe in (("export", exported), ("custom", custom)):
        images = pipe(**options, generator=torch.Generator().manual_seed(7), output_type="np").images
        np.save(folder / f"{how}.npy", images)
assert not [name for name in sys.modules if name.split(".")[0] == "diffusers_ext"]
