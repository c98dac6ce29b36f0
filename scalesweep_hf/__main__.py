"""``python -m scalesweep_hf``, and the script ``scalesweep``: Ctrl-C ends them from the start."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from scalesweep_hf import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
