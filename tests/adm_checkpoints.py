"""Checkpoints of random weights under guided-diffusion's names, small enough for tests."""

import torch


def adm_state(
    widths=(32, 64),
    attention=(False, True),
    num_channels=32,
    num_res_blocks=1,
    resampling="resblock",
    scale_shift=True,
    classes=None,
    image_channels=3,
    learn_sigma=True,
    seed=0,
) -> dict[str, torch.Tensor]:
    """The tensors of an ADM network, in its own naming. Lengths of widths and attention: the number of levels."""
    generator = torch.Generator().manual_seed(seed)
    state, dim = {}, 4 * num_channels

    def draw(name, *shape):
        fan_in = max(1, torch.Size(shape[1:]).numel())
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / fan_in**0.5
        state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1

    def norm(name, width):
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)

    def resblock(name, before, after):
        norm(f"{name}.in_layers.0", before)
        draw(f"{name}.in_layers.2", after, before, 3, 3)
        draw(f"{name}.emb_layers.1", after * (2 if scale_shift else 1), dim)
        norm(f"{name}.out_layers.0", after)
        draw(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            draw(f"{name}.skip_connection", after, before, 1, 1)

    def attend(name, width):
        norm(f"{name}.norm", width)
        draw(f"{name}.qkv", 3 * width, width, 1)
        draw(f"{name}.proj_out", width, width, 1)

    draw("time_embed.0", dim, num_channels)
    draw("time_embed.2", dim, dim)
    if classes is not None:
        state["label_emb.weight"] = torch.randn(classes, dim, generator=generator)
    draw("input_blocks.0.0", widths[0], image_channels, 3, 3)
    skips, now, n = [widths[0]], widths[0], 1
    for level, width in enumerate(widths):
        for _ in range(num_res_blocks):
            resblock(f"input_blocks.{n}.0", now, width)
            if attention[level]:
                attend(f"input_blocks.{n}.1", width)
            now, n = width, n + 1
            skips.append(now)
        if level < len(widths) - 1:
            if resampling == "resblock":
                resblock(f"input_blocks.{n}.0", now, now)
            elif resampling == "conv":
                draw(f"input_blocks.{n}.0.op", now, now, 3, 3)
            skips.append(now)
            n += 1
    resblock("middle_block.0", now, now)
    attend("middle_block.1", now)
    resblock("middle_block.2", now, now)
    n = 0
    for level in reversed(range(len(widths))):
        for j in range(num_res_blocks + 1):
            resblock(f"output_blocks.{n}.0", now + skips.pop(), widths[level])
            now = widths[level]
            if attention[level]:
                attend(f"output_blocks.{n}.1", now)
            if level and j == num_res_blocks:
                end = f"output_blocks.{n}.{1 + attention[level]}"
                if resampling == "resblock":
                    resblock(end, now, now)
                elif resampling == "conv":
                    draw(f"{end}.conv", now, now, 3, 3)
            n += 1
    norm("out.0", now)
    draw("out.2", 6 if learn_sigma else 3, now, 3, 3)
    return state


def save_adm(path, **options):
    """Save adm_state(**options) as the original does; returns the path."""
    torch.save(adm_state(**options), path)
    return path
