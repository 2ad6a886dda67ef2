"""`diffusers-ext info`."""

import click


@click.command()
def info():
    """Versions, devices, usable attention backends and shipped models of this machine."""
    from ..info import print_info

    print_info()
