"""The guidance interval with an IP-Adapter, whose image embeddings are rows of the batch as well."""

import pytest
import torch
from tiny_guided_pipelines import BATCH, CASES, STEPS

from diffusers_ext.pipelines import GuidanceInterval

DIM = 8  # of an image embedding


def with_ip_adapter(pipe, count: int = 1):
    """Load random weights of adapters of four image tokens; returns a list that gets the rows of each UNet call."""
    unet, width = pipe.unet, pipe.unet.config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    modules, generator = dict(unet.named_modules()), torch.Generator().manual_seed(0)
    adapter, number = {}, 1
    for name in unet.attn_processors:
        if "attn2" in name:
            out = modules[name.removesuffix(".processor")].to_k.out_features
            for part in ("to_k_ip", "to_v_ip"):
                adapter[f"{number}.{part}.weight"] = torch.randn(out, width, generator=generator)
            number += 2
    projection = {
        "proj.weight": torch.randn(4 * width, DIM, generator=generator),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": adapter}] * count)
    rows = []
    unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    return rows


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl"])
def test_ip_adapter(name):
    case = CASES[name]()
    rows = with_ip_adapter(case.pipe)
    both = torch.randn(2 * BATCH, 1, DIM, generator=torch.Generator().manual_seed(1))  # unconditional first

    def run(embeddings, **options):
        rows.clear()
        call = {**case.options, **options, "ip_adapter_image_embeds": [embeddings], "return_dict": False}
        return case.pipe(**call, generator=torch.Generator().manual_seed(0))[0]

    plain = run(both)
    assert rows == [2 * BATCH] * STEPS
    with GuidanceInterval(case.pipe, sigma_lo=0.0):
        assert torch.equal(run(both), plain)
    with GuidanceInterval(case.pipe, sigma_hi=1e-9):
        empty = run(both)
    assert rows == [BATCH] * STEPS
    off = run(both.chunk(2)[1], **case.off)
    assert (plain - off).abs().max() > 1e-2
    torch.testing.assert_close(empty, off, rtol=0, atol=2e-5)
    with GuidanceInterval(case.pipe, guided_steps=(1, 2)):
        middle = run(both)
    assert rows == [BATCH, 2 * BATCH, 2 * BATCH, BATCH]
    assert min((middle - other).abs().max() for other in (plain, off)) > 1e-3
