"""Command: python -m datasets.prepare_modelnet; see `datasets.prepare.modelnet`."""

if __name__ == "__main__":  # not in its worker processes, which import this file again
    from datasets.prepare.modelnet import main
    from utils.engine.session import run_command

    raise SystemExit(run_command(main))
