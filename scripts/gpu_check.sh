#!/usr/bin/env bash
# What to learn from a GPU in 20 minutes: tests on the device, the table of speeds, a profile of the fast step,
# and both stages trained from scratch on a rendered Shapes3D, with scores against images seen. All into one folder.
#
#   bash scripts/gpu_check.sh OUT                    every part
#   bash scripts/gpu_check.sh OUT render encdiff     some of: tests, render, first_stage, muon, bench, profile, encdiff
#   SMALL=1 bash scripts/gpu_check.sh OUT            small numbers, to try it anywhere in a few minutes
#
# Environment variables:
#   FIRST_STAGE    a checkpoint, where first_stage is left out
#   SECONDS_OF     seconds that muon and encdiff may each train (default 300), and EVERY how many steps they are scored
#                  (default 2000); VALUES: further key=value
#   ROWS           of bench, such as "train sample" (default all)
#   WHEELS         a folder of wheels to install from where there is no network: omegaconf, taming-transformers-rom1504
#                  and whatever else of pyproject.toml is missing
set -uo pipefail
out="${1:?usage: gpu_check.sh OUT [PART...]}"
shift
parts=" ${*:-tests render first_stage muon bench profile encdiff} "
mkdir -p "$out" && out="$(cd "$out" && pwd)"
cd "$(dirname "$0")/.."
python="${PYTHON:-python}"
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$out/site" "$WHEELS"/*.whl || exit 1
    export PYTHONPATH="$out/site${PYTHONPATH:+:$PYTHONPATH}"
fi

seconds="${SECONDS_OF:-300}"
if [ -z "${SMALL:-}" ]; then
    sizes=10,10,10,8,4,15 rows=() batch=() stage_steps=1000 every="${EVERY:-2000}" limit=120 dci=()
else
    sizes=4,4,4,4,4,4 rows=(--only encode loader) batch=(data.params.batch_size=8) stage_steps=3 every=2 limit=600
    dci=("lightning.callbacks.disentanglement.params.settings.dci={num_train: 500, num_test: 200}")
fi

# part NAME LIMIT COMMAND...: its output goes to OUT/NAME.txt; one that fails or runs out of time stops no other.
part() {
    local name="$1" limit="$2" start=$SECONDS
    shift 2
    [[ "$parts" == *" $name "* ]] || return 0
    timeout --signal=INT --kill-after=60 "$limit" "$@" >"$out/$name.txt" 2>&1
    local status=$?
    echo "$name: exit status $status, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}

newest() { ls -dt "$out"/logs/*"$1"*/ 2>/dev/null | head -n 1; }

[ -f "$out/environment.txt" ] || "$python" -m torch.utils.collect_env >"$out/environment.txt" 2>&1
part tests 180 "$python" -m pytest -p no:cacheprovider -p no:warnings tests/models/test_gpu.py -v &
part render 180 "$python" scripts/render_shapes3d.py --out "$out/data" --sizes "$sizes"
data=(data.params.train.params.path="$out/data" data.params.validation.params.path="$out/data")
[ -n "${SMALL:-}" ] && data+=("data.params.train.params.factor_sizes=[$sizes]" "data.params.validation.params.factor_sizes=[$sizes]")
common=(-t --gpus 0, -l "$out/logs" lightning.callbacks.image_logger.params.disabled=true "${data[@]}" "${batch[@]}")
schedule="{target: ldm.lr_scheduler.LambdaLinearScheduler, params: {warm_up_steps: [50], cycle_lengths: null,"
schedule+=" f_start: [0.01], f_max: [1.0], f_min: [0.05]}}"
# LPIPS needs the weights of VGG16, which need a network; and flat-shaded rooms need no discriminator either.
part first_stage "$limit" "$python" main.py --base configs/autoencoder/shapes3d_vq_4_16.yaml configs/muon.yaml \
    configs/fast.yaml "${common[@]}" model.params.lossconfig.params.perceptual_weight=0 \
    model.params.lossconfig.params.disc_factor=0 lightning.trainer.accumulate_grad_batches=1 \
    model.base_learning_rate=1e-5 "model.params.scheduler_config=$schedule" \
    --max_steps "$stage_steps" --limit_val_batches 8 --check_val_every_n_epoch null --val_check_interval "$stage_steps"
wait
first_stage="${FIRST_STAGE:-$(newest shapes3d_vq)checkpoints/last.ckpt}"

# encdiff NAME [CONFIG|key=value...]: the release's EncDiff and what is changed, as a part of this name.
encdiff() {
    local name="$1" configs=() values=()
    [[ "$parts" == *" $name "* ]] || return 0
    shift
    for argument in "$@"; do [[ "$argument" == *.yaml ]] && configs+=("$argument") || values+=("$argument"); done
    part "$name" "$seconds" "$python" main_val.py --base configs/latent-diffusion/shapes3d-vq-4-16.yaml "${configs[@]}" \
        configs/fast.yaml "${common[@]}" -n "$name" data.params.val_batch_size=4096 "${dci[@]}" \
        --max_epochs 1000 --check_val_every_n_epoch null --val_check_interval "$every" \
        "model.params.first_stage_config.params.ckpt_path=$first_stage" \
        "lightning.callbacks.disentanglement.params.metrics=[factor_vae, dci]" \
        lightning.callbacks.disentanglement.params.dtype=bf16 lightning.callbacks.figures.params.names=[swaps] \
        "${values[@]}" ${VALUES:-}
    "$python" - "$(newest "_$name")" <<'PYTHON' | tee -a "$out/summary.txt"
import json, sys
from pathlib import Path

import yaml

if not sys.argv[1]:
    sys.exit("EncDiff was not trained: see its text file")
run = Path(sys.argv[1])
config = next((run / "configs").glob("*-project.yaml"))
batch = yaml.safe_load(config.read_text())["data"]["params"]["batch_size"]
print(f"{'images seen':>12} {'FactorVAE':>10} {'DCI':>7}")
for path in sorted((run / "metrics").glob("*.json")):
    record = json.loads(path.read_text())
    scores = record["scores"]
    print(f"{record['step'] * batch:>12,} {scores['factor_vae']['eval_accuracy']:>10.3f} {scores['dci']['disentanglement']:>7.3f}")
PYTHON
}

# 1e-3 in batches of 128, of which Muon makes more than AdamW of the release's 2.56e-4.
encdiff muon configs/muon.yaml model.base_learning_rate=7.8125e-6 model.params.scheduler_config.params.warm_up_steps=[200]
part bench $((2 * limit)) "$python" scripts/bench.py --quick "${rows[@]}" ${ROWS:+--only $ROWS} --json "$out/bench.json"
part profile 90 "$python" scripts/profile_step.py ${SMALL:+--batch-size 4 --steps 2}
encdiff encdiff
echo "everything is in $out"
