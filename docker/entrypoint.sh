#!/bin/sh
# What a container is: a node of a Ray cluster, or the command line.
#   entrypoint.sh head                 Ray's head, on $RAY_PORT
#   entrypoint.sh worker HOST:PORT     a node that joins it; waits until the head answers
#   entrypoint.sh launch KEY=VALUE...  launch.py
#   entrypoint.sh COMMAND...           anything else, as it is
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
