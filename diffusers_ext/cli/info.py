"""`diffusers-ext info`."""

import click

from .options import DEVICE


@click.command()
@click.option(
    "--check", is_flag=True, help="Try each way of placing and speeding up a pipeline here, on tiny random models."
)
@DEVICE
def info(check, device):
    """Versions, devices, usable attention backends and shipped models of this machine."""
    from ..machine.versions import best_device, print_checks, print_info

    if device is not None and not check:
        raise click.UsageError("--device is for --check; give both or none")
    print_checks(device or best_device()) if check else print_info()
