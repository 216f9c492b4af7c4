"""The console script `llava`, installed as the package `llava_launcher`: `llava --help` need not wait for torch."""

is_running = False
"""While it is, `import modeling_llava` leaves the registration of the Auto classes to the command that needs it."""


def main() -> int:
    """Run `llava`; see [`modeling_llava.cli.main`]."""
    global is_running
    is_running = True
    from modeling_llava.cli.main import main

    return main()
