#!/bin/sh
# Run a node of a Ray cluster, or a command.
#   entrypoint.sh head                 start a Ray head, on $RAY_PORT
#   entrypoint.sh worker HOST:PORT     wait until the head answers, then join it
#   entrypoint.sh launch KEY=VALUE...  run launch.py
#   entrypoint.sh COMMAND...           run any other command
set -eu

app=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
role=${1:-launch}

case "$role" in
head)
    exec ray start --head --block --port="${RAY_PORT:-6379}" --include-dashboard=false
    ;;
worker)
    address=${2:?worker needs the head\'s HOST:PORT}
    tries=${RAY_JOIN_TRIES:-60}
    until ray health-check --address "$address" >/dev/null 2>&1; do
        tries=$((tries - 1))
        if [ "$tries" -le 0 ]; then
            echo "entrypoint: no Ray head answers at $address" >&2
            exit 1
        fi
        sleep 2
    done
    exec ray start --block --address="$address"
    ;;
launch)
    [ "$#" -eq 0 ] || shift
    exec python "$app/launch.py" "$@"
    ;;
*)
    exec "$@"
    ;;
esac
