"""Train EncDiff, scored for disentanglement at validation: `python main_val.py --base CONFIG -t --gpus 0,`."""

from ldm.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(score=True))
