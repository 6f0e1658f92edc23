"""Command: python -m datasets.prepare_digits; see `datasets.prepare.digits`."""

if __name__ == "__main__":  # not in its worker processes, which import this file again
    from datasets.prepare.digits import main
    from utils.engine.session import run_command

    raise SystemExit(run_command(main))
