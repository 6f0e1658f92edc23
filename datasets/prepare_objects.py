"""Command: python -m datasets.prepare_objects; see `datasets.prepare.objects`."""

if __name__ == "__main__":  # not in its worker processes, which import this file again
    from datasets.prepare.objects import main
    from utils.engine.session import run_command

    raise SystemExit(run_command(main))
