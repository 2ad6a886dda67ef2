"""`diffusers-ext app`."""

import click

from .options import DEVICE, TRUST_REMOTE_CODE


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), default=7860, show_default=True, help="Of 127.0.0.1.")
@click.option(
    "--allow-host", "allowed_hosts", multiple=True, metavar="NAME",
    help="Also answer requests for this name, of a proxy; repeat it for more.",
)  # fmt: skip
@DEVICE
@TRUST_REMOTE_CODE
def app(port, allowed_hosts, device, trust_remote_code):
    """Try the methods in a browser, beside the stock sampler, on shipped models and yours.

    The app is reached from this machine alone.
    """
    from ..app.interface import import_gradio, serve
    from ..app.models import Models
    from ..machine.versions import best_device

    import_gradio()  # before anything is loaded
    serve(Models(device or best_device(), trust_remote_code), port, allowed_hosts=allowed_hosts)
