"""Command: python -m datasets.prepare_mi3dor; see `datasets.prepare.mi3dor`."""

if __name__ == "__main__":  # not in its worker processes, which import this file again
    from datasets.prepare.mi3dor import main
    from utils.engine.session import run_command

    raise SystemExit(run_command(main))
