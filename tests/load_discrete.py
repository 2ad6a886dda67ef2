"""Fresh process: load saved discrete pipelines and draw from them again.

with FILE FOLDERS: by class and by DiffusionPipeline, after `import diffusers_ext`. without FILE FOLDERS: an export and
a stock folder with custom_pipeline=FILE, where diffusers_ext cannot be imported.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from hidden_package import hide

how, file, *folders = sys.argv[1:]
if how == "without":
    hide("diffusers_ext")
else:
    import diffusers_ext


def loaded(folder: Path) -> list:
    if how == "with":
        return [c.from_pretrained(folder) for c in (diffusers_ext.DiscreteDiffusionPipeline, DiffusionPipeline)]
    exported = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    stock = folder.parent / f"{folder.name}-stock"
    shutil.copytree(folder, stock, ignore=lambda directory, names: ["discrete_diffusion.py"])
    index = json.loads((stock / "model_index.json").read_text())
    index["_class_name"] = "DDPMPipeline"
    (stock / "model_index.json").write_text(json.dumps(index))
    return [exported, DiffusionPipeline.from_pretrained(stock, custom_pipeline=file, trust_remote_code=True)]


for folder in map(Path, folders):
    options = json.loads((folder / "options.json").read_text())
    for pipe in loaded(folder):
        assert type(pipe).__name__ == "DiscreteDiffusionPipeline"
        tokens = pipe(**options, generator=torch.Generator().manual_seed(7)).tokens
        assert tokens.tolist() == json.loads((folder / "expected.json").read_text()), (how, folder)
