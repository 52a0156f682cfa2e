"""Train any configuration: `python main.py --base configs/autoencoder/shapes3d_vq_4_16.yaml -t --gpus 0,`."""

from ldm.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
