"""Command: python -m datasets.prepare_mnist3d; see `datasets.prepare.mnist3d`."""

if __name__ == "__main__":  # not in its worker processes, which import this file again
    from datasets.prepare.mnist3d import main
    from utils.engine.session import run_command

    raise SystemExit(run_command(main))
