#!/bin/sh
# Installs the worker from this bundle on a machine without a network. Run it again whenever you like: it changes only what is not there yet.
#
#   ./install.sh [--prefix DIR] [--as USER] [--replace] [--no-switch]
#
#   --prefix DIR  put everything below DIR instead of / (no root needed, for trying it out)
#   --as USER     run the final check as USER, the one whose host starts the worker (as root the default is the user reranker)
#   --replace     rebuild this release although another bundle of the same version made it; stop the host before
#   --no-switch   prepare and check the release, but leave `current` where it is
#
# Exit codes: 0 installed and checked; 64 wrong use; 65 a file of the bundle is damaged; 71 no such Python here; 73 cannot write; 78 another
# bundle made this release; else the code of `check --deploy` or of pip. `current` is switched only when the check has passed.
set -eu

say() { printf '%s\n' "$*"; }
stop() { code=$1; shift; printf 'install.sh: %s\n' "$*" >&2; exit "$code"; }

prefix='' check_as='' replace=0 switch=1
while [ $# -gt 0 ]; do
    case $1 in
        --prefix) [ $# -gt 1 ] || stop 64 "--prefix needs a directory."; mkdir -p "$2"; prefix=$(cd "$2" && pwd); shift 2 ;;
        --as) [ $# -gt 1 ] || stop 64 "--as needs a user."; check_as=$2; shift 2 ;;
        --replace) replace=1; shift ;;
        --no-switch) switch=0; shift ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "$0"; exit 0 ;;
        *) stop 64 "unknown option $1; see --help." ;;
    esac
done

bundle=$(cd "$(dirname "$0")" && pwd)
cd "$bundle"

# --- nothing is trusted before its checksum -----------------------------------------------------------------------------------
[ -f SHA256SUMS ] || stop 65 "SHA256SUMS is missing; copy the whole bundle again."
bad=$(sha256sum --quiet --strict -c SHA256SUMS 2>/dev/null) || stop 65 "damaged: ${bad:-SHA256SUMS}. Copy the bundle again."
extra=$(find . -type f ! -name SHA256SUMS | awk 'NR == FNR { known[substr($0, 67)]; next } !(substr($0, 3) in known)' SHA256SUMS -)
[ -z "$extra" ] || stop 65 "not part of the bundle: $extra. Remove it, or unpack the bundle again."
say "checksums    all files as they were packed ($(sha256sum SHA256SUMS | cut -c1-16)...)"

# --- the Python that the wheels are for ---------------------------------------------------------------------------------------
fact() { sed -n "s/^  \"$1\": \"\([^\"]*\)\".*/\1/p" bundle.json; }
version=$(fact version) wanted=$(fact python) model=$(fact model_setting) revision=$(fact model_revision)
python=
for candidate in "${PYTHON:-}" "python$wanted" python3; do
    command -v "${candidate:-no-such-python}" >/dev/null 2>&1 || continue
    [ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = "$wanted" ] || continue
    python=$(command -v "$candidate")
    break
done
[ -n "$python" ] || stop 71 "Python $wanted is not here (set PYTHON=/path/to/python$wanted), and the bundle's wheels are for it."
say "python       $python ($wanted)"

# --- the release: code and virtual environment, for root alone to change ------------------------------------------------------
umask 022
home=$prefix/opt/reranker-worker
release=$home/releases/$version
settings=$prefix/etc/reranker-worker/worker.env
cache=$prefix/var/cache/reranker-worker
mkdir -p "$home/releases" "$cache/artefacts" "$cache/huggingface" "$prefix/etc/reranker-worker" ||
    stop 73 "cannot write below ${prefix:-/}; run it as root, or with --prefix DIR."
identity=$(grep -E '  (code/|requirements-hashes\.txt)' SHA256SUMS | sha256sum | cut -d' ' -f1)
made=$(cat "$release/.bundle" 2>/dev/null || true)
if [ "$made" = "$identity" ]; then
    say "release      $release was there"
else
    if [ -n "$made" ] && [ "$replace" = 0 ]; then
        stop 78 "$release was made from another bundle of version $version; stop the host and use --replace, or bundle a new version."
    fi
    rm -rf "$release" # what an interrupted installation left, or what --replace means
    mkdir -p "$release"
    cp -R -p code/. "$release/"
    "$python" -m venv --without-pip "$release/.venv"
    # pip runs from its wheel. Hashes are demanded of every wheel, and neither its settings nor an index can bring in another one.
    env PYTHONPATH="$(ls "$bundle"/wheels/pip-*.whl)" "$release/.venv/bin/python" -m pip --isolated install --no-index \
        --find-links "$bundle/wheels" --require-hashes --no-cache-dir --disable-pip-version-check --root-user-action ignore -q \
        -r requirements-hashes.txt
    # The serving user cannot write compiled files, so they are made now: later starts are faster.
    "$release/.venv/bin/python" -m compileall -q "$release/reranker_worker" "$release/reranking_server.py"
    [ "$(id -u)" != 0 ] || chown -R 0:0 "$release"
    printf '%s\n' "$identity" >"$release/.bundle"
    say "release      $release made"
fi

# --- the user that owns the cache ---------------------------------------------------------------------------------------------
owner=
if [ -z "$prefix" ] && [ "$(id -u)" = 0 ]; then
    if ! getent passwd reranker >/dev/null && command -v useradd >/dev/null; then
        useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin reranker
        say "user         reranker made"
    fi
    ! getent passwd reranker >/dev/null || owner=reranker
fi

# --- the model and what was prewarmed: each directory appears whole, or not at all --------------------------------------------
place() { # FROM TO: copy a directory unless the same one is there
    if [ -d "$2" ] && diff -rq "$1" "$2" >/dev/null 2>&1; then
        say "cache        $2 was there"
        return
    fi
    mkdir -p "$(dirname "$2")"
    draft=$(dirname "$2")/.$(basename "$2").$$.tmp
    rm -rf "$draft"
    cp -R -p "$1" "$draft"
    chmod -R u+w,go-w "$draft"
    [ ! -d "$2" ] || mv "$2" "$draft.old"
    mv "$draft" "$2"
    rm -rf "$draft.old"
    say "cache        $2 made"
}
for entry in cache/artefacts/* cache/huggingface/hub/*; do
    [ ! -d "$entry" ] || place "$entry" "$cache/${entry#cache/}"
done
[ -z "$owner" ] || find "$cache" ! -user "$owner" -exec chown "$owner:" {} +
find "$cache" \( -type d ! -perm -0755 -o -type f ! -perm -0444 \) -exec chmod a+rX {} +

# --- settings: only where there are none yet ----------------------------------------------------------------------------------
case $model in /var/cache/*) model=$prefix$model ;; esac
setting() { printf 's|^#*%s=.*|%s=%s|;' "$1" "$1" "$2"; } # NAME VALUE: states it in the template, where it may be commented out
if [ ! -e "$settings" ]; then
    changes=$(
        setting RERANKING_MODEL_PATH "$model"
        [ -z "$revision" ] || setting RERANKING_MODEL_REVISION "$revision"
        setting RERANKING_ARTEFACTS "$cache/artefacts"
        setting HF_HOME "$cache/huggingface"
        setting RERANKING_LOCAL_FILES_ONLY 1
    )
    {
        sed "$changes" "$release/deploy/systemd/worker.env"
        printf '\n# This node has no network: not even prewarming asks for it.\nHF_HUB_OFFLINE=1\n'
    } >"$settings.tmp"
    mv "$settings.tmp" "$settings"
    say "settings     $settings made"
else
    say "settings     $settings was there, left as it is"
    named=$(sed -n 's/^RERANKING_MODEL_PATH=//p' "$settings" | tail -n 1)
    [ "${named:-bundled}" = "$model" ] || say "attention    they name the model ${named:-bundled}, and this bundle brings $model"
fi

# --- the check, as the user who serves, with the settings that serve ----------------------------------------------------------
set -- "$release/.venv/bin/python" -m reranker_worker check --deploy
check_as=${check_as:-$owner}
if [ -n "$check_as" ] && [ "$(id -u)" = 0 ] && command -v runuser >/dev/null; then
    set -- runuser -u "$check_as" -- "$@"
fi
while IFS= read -r line; do
    case $line in RERANKING_*=* | HF_*=*) set -- "$line" "$@" ;; esac
done <"$settings"
(cd "$release" && env "$@") || stop "$?" "the check failed, so ${home}/current was not switched. Mend what it names and run this again."

# --- the switch: one rename, so that there is always a release ----------------------------------------------------------------
before=$(readlink "$home/current" || true)
if [ "$before" = "releases/$version" ]; then
    say "current      $home/current was releases/$version"
elif [ "$switch" = 1 ]; then
    ln -s "releases/$version" "$home/.current.$$"
    mv -T "$home/.current.$$" "$home/current"
    say "current      $home/current -> releases/$version; restart the host to use it"
    [ -z "$before" ] || say "back         ln -sfn $before $home/current, and restart the host"
fi
say "The host starts $home/current/.venv/bin/python $home/current/reranking_server.py"
