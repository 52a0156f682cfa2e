#!/usr/bin/env bash
# What to learn from a GPU in 25 minutes: tests on the device, the table of speeds, a profile of the fast step, and both
# stages trained from scratch on a rendered Shapes3D, with scores against images seen. All into one folder.
#
#   bash scripts/gpu_check.sh OUT             the whole check
#   bash scripts/gpu_check.sh OUT --small     small numbers, to try it anywhere in a few minutes
#
# Needs no network. The Python environment must have torch, pytorch-lightning, numba, h5py, scikit-learn, matplotlib and
# einops. What is missing besides is installed from a folder of wheels that WHEELS names:
#   omegaconf antlr4-python3-runtime taming-transformers-rom1504 torchvision requests tensorboard torchmetrics lmdb
#   filelock safetensors threadpoolctl tqdm pytest
set -uo pipefail
out="${1:?usage: gpu_check.sh OUT [--small]}"
small="${2:-}"
mkdir -p "$out" && out="$(cd "$out" && pwd)"
cd "$(dirname "$0")/.."
python="${PYTHON:-python}"
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install --no-index --find-links "$WHEELS" omegaconf taming-transformers-rom1504 requests \
        tensorboard torchmetrics lmdb filelock safetensors threadpoolctl tqdm pytest || exit 1
fi

if [ -z "$small" ]; then
    sizes=10,10,10,8,4,15 limits=(180 360 60 90 240 480) rows=() batch=() stage_steps=100000 steps=100000 every=2000
    dci=()
else
    sizes=4,4,4,4,4,4 limits=(600 600 600 600 600 600) rows=(--only encode loader) batch=(data.params.batch_size=8)
    stage_steps=3 steps=4 every=2
    dci=("lightning.callbacks.disentanglement.params.settings.dci={num_train: 500, num_test: 200}")
fi

# part NAME SECONDS COMMAND...: its output goes to OUT/NAME.txt; a part that fails or runs out of time stops no other.
part() {
    local name="$1" seconds="$2" start=$SECONDS
    shift 2
    timeout --signal=INT --kill-after=30 "$seconds" "$@" >"$out/$name.txt" 2>&1
    local status=$?
    echo "$name: exit status $status, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}

newest() { ls -dt "$out"/logs/*"$1"*/ 2>/dev/null | head -n 1; }

: >"$out/summary.txt"
"$python" -m torch.utils.collect_env >"$out/environment.txt" 2>&1
git rev-parse HEAD >>"$out/environment.txt" 2>/dev/null
part tests "${limits[0]}" "$python" -m pytest -p no:cacheprovider -p no:warnings tests/test_gpu.py -v
part bench "${limits[1]}" "$python" scripts/bench.py --quick "${rows[@]}" --json "$out/bench.json"
part profile "${limits[2]}" "$python" scripts/profile_step.py ${small:+--batch-size 4 --steps 2}
part render "${limits[3]}" "$python" scripts/render_shapes3d.py --out "$out/data" --sizes "$sizes"
data=(data.params.train.params.path="$out/data" data.params.validation.params.path="$out/data")
[ -n "$small" ] && data+=("data.params.train.params.factor_sizes=[$sizes]" "data.params.validation.params.factor_sizes=[$sizes]")
common=(-t --gpus 0, -l "$out/logs" lightning.callbacks.image_logger.params.disabled=true)
# LPIPS needs the weights of VGG16, which need a network.
part first_stage "${limits[4]}" "$python" main.py --base configs/autoencoder/shapes3d_vq_4_16.yaml configs/fast.yaml \
    "${common[@]}" "${data[@]}" "${batch[@]}" model.params.lossconfig.params.perceptual_weight=0 \
    --max_steps "$stage_steps" --limit_val_batches 8
part encdiff "${limits[5]}" "$python" main_val.py --base configs/latent-diffusion/shapes3d-vq-4-16.yaml \
    configs/fast.yaml "${common[@]}" "${data[@]}" "${batch[@]}" "${dci[@]}" --max_steps "$steps" \
    --check_val_every_n_epoch null --val_check_interval "$every" \
    "model.params.first_stage_config.params.ckpt_path=$(newest shapes3d_vq)checkpoints/last.ckpt" \
    "lightning.callbacks.disentanglement.params.metrics=[factor_vae, dci]" \
    lightning.callbacks.disentanglement.params.dtype=bf16

"$python" - "$(newest shapes3d-vq)" <<'PYTHON' | tee -a "$out/summary.txt"
import json, sys
from pathlib import Path

import yaml

if not sys.argv[1]:
    sys.exit("EncDiff was not trained: see encdiff.txt")
run = Path(sys.argv[1])
config = next((run / "configs").glob("*-project.yaml"))
batch = yaml.safe_load(config.read_text())["data"]["params"]["batch_size"]
print(f"{'images seen':>12} {'FactorVAE':>10} {'DCI':>7}")
for path in sorted((run / "metrics").glob("*.json")):
    record = json.loads(path.read_text())
    scores = record["scores"]
    print(f"{record['step'] * batch:>12,} {scores['factor_vae']['eval_accuracy']:>10.3f} {scores['dci']['disentanglement']:>7.3f}")
PYTHON
echo "everything is in $out"
