"""Command: python -m datasets.prepare_photos; see `datasets.prepare.photos`."""

if __name__ == "__main__":  # not in its worker processes, which import this file again
    from datasets.prepare.photos import main
    from utils.engine.session import run_command

    raise SystemExit(run_command(main))
