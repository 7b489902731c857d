# Shared by run_stage.sh and pipeline.sh: checks the environment variables and resolves the settings.

refuse() { # MESSAGE
    echo "stair, stage ${STAGE:-s}: $*" >&2
    exit 2
}

# ---- the environment

export STAIR_HOME
set +u # site scripts may fail on a login node, or use unset variables
source "$STAIR_HOME/slurm/site.sh" || refuse "no checkout at STAIR_HOME=$STAIR_HOME"
set -u

for name in $(compgen -e); do
    case "${name^^}" in
        RUN | DATA_TRAIN | DATA_VAL | STRATEGY | RECIPE | RESTARTS)
            [ "$name" = "${name^^}" ] || refuse "$name=${!name} is not read: write ${name^^}" ;;
        STRAT* | RECIP* | RESTART* | DATA_TRAIN?* | DATA_VAL?*) refuse "$name=${!name} is not read; known are RUN, DATA_TRAIN, DATA_VAL, STRATEGY, RECIPE, RESTARTS" ;;
    esac
done
[ -n "${RUN:-}" ] || refuse "RUN is not set: give the run's folder, RUN=runs/mine sbatch slurm/stage1.sh"
case "$RUN" in
    \~ | \~/*) RUN="$HOME${RUN#\~}" ;;
    /*) ;;
    *) RUN="$PWD/$RUN" ;;
esac
[[ "${RESTARTS:=0}" =~ ^[0-9]+$ ]] || refuse "RESTARTS=$RESTARTS: expected a number, 0 for none"
STRATEGY="${STRATEGY:-ddp}"
[ -f "$STAIR_HOME/configs/hardware/$STRATEGY.yaml" ] || refuse "STRATEGY=$STRATEGY: there is no configs/hardware/$STRATEGY.yaml; known are ddp and fsdp2"
[ -z "${RECIPE:-}" ] || [ -d "$STAIR_HOME/configs/$RECIPE" ] || refuse "RECIPE=$RECIPE: there is no folder configs/$RECIPE"
if [[ -n "${DATA_VAL:-}" && "$DATA_VAL" != "{"*:* ]]; then
    DATA_VAL="{val: '${DATA_VAL//\'/\'\'}'}"
fi

# ---- the settings

# resolve FILE ARGS...: writes all settings of stage STAGE to FILE, so that later changes to config files do not affect the
# job. Exits if the settings are not valid.
resolve() {
    local file="$1" text name given files=("$STAIR_HOME/configs/stage$STAGE.yaml")
    shift
    if [ -n "${RECIPE:-}" ]; then
        files+=("$STAIR_HOME/configs/$RECIPE/stage$STAGE.yaml")
        [ -f "${files[1]}" ] || refuse "RECIPE=$RECIPE: there is no configs/$RECIPE/stage$STAGE.yaml"
    fi
    files+=("$STAIR_HOME/configs/hardware/$STRATEGY.yaml")
    command -v lightning > /dev/null || refuse "no command 'lightning': run \`make setup\` in the checkout, and let slurm/site.sh activate it"
    text="$(lightning fit "${files[@]/#/--config=}" ${DATA_TRAIN:+"--data.train=$DATA_TRAIN"} \
        ${DATA_VAL:+"--data.val=$DATA_VAL"} "$@" --print_config)" || exit
    for name in run ckpt_path; do
        given="$(sed -n "s/^$name: //p" <<< "$text")"
        [ "$given" = null ] || refuse "$name=$given is not allowed: set the folder with RUN; each start resumes from the last checkpoint"
    done
    for name in train val; do
        given="$(sed -n '/^data:/,/^[^ ]/s/^  '"$name: //p" <<< "$text")"
        [ "$given" != null ] || refuse "DATA_${name^^} is not set: give a shard spec such as 'shards/{0000..0999}.tar', by it, by --data.$name or in slurm/site.sh"
    done
    mkdir -p "$(dirname "$file")" && echo "$text" > "$file.new" && mv "$file.new" "$file" ||
        refuse "cannot write to $RUN: correct RUN or its permissions"
}
