#!/usr/bin/env bash
# The job, run on the Ray head: git clone → inline_script → pre_script → train → post_script.
# The parts are the files beside this one, as the values gave them, and run in this shell so that they share
# variables and the working directory. The exit code is the training's, or that of what failed before it.
set -euo pipefail

raytrain_parts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly raytrain_parts
raytrain_clone=""

raytrain_conclude() {
  local exit_code=$?
  trap - EXIT
  set +eu
  if [[ -f $raytrain_parts/post_script.sh ]]; then
    # In a subshell: an `exit` in it must not decide about the job.
    (source "$raytrain_parts/post_script.sh") ||
      echo "raytrain: post_script ended with exit code $?; the job's is $exit_code" >&2
  fi
  if [[ -n $raytrain_clone ]]; then
    cd / && rm -rf -- "$raytrain_clone"
  fi
  exit "$exit_code"
}
trap raytrain_conclude EXIT
# When the job is stopped, Ray signals this shell and the training. Wait for its checkpoint, and for post_script.
trap : TERM

if [[ -f $raytrain_parts/git.sh ]]; then
  source "$raytrain_parts/git.sh"
  # Below HOME, where the workers see it too.
  raytrain_clone=$HOME/tmp/$HOSTNAME
  rm -rf -- "$raytrain_clone"
  # Nobody is there to answer a question for a password.
  GIT_TERMINAL_PROMPT=0 git clone ${raytrain_branch:+"--branch=$raytrain_branch"} -- "$raytrain_repo_url" "$raytrain_clone"
  cd -- "$raytrain_clone"
  if [[ -n $raytrain_commit ]]; then
    # An access point of EFS may give the clone to another user, whom git wouldn't trust.
    export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0=$raytrain_clone
    git cat-file -e "$raytrain_commit^{commit}" 2>/dev/null || git fetch origin "$raytrain_commit"
    git reset --hard "$raytrain_commit"
    unset GIT_CONFIG_COUNT GIT_CONFIG_KEY_0 GIT_CONFIG_VALUE_0
  fi
fi

set +u
for raytrain_part in inline_script pre_script; do
  if [[ -f $raytrain_parts/$raytrain_part.sh ]]; then
    source "$raytrain_parts/$raytrain_part.sh"
  fi
done

# They may have changed these.
trap raytrain_conclude EXIT
trap : TERM
set -eo pipefail

RAY_JOB_CONFIG_JSON_ENV_VAR=$(env --null | python "$raytrain_parts/export_env.py" $$)
export RAY_JOB_CONFIG_JSON_ENV_VAR

# In a subshell, and not as a condition: only so does its first failure end it, and nothing it does ends this shell.
set +e
(
  set -eo pipefail
  trap : TERM
  # The training logs to the same file, which a plain tee would write over, and needs its reader until it has saved.
  tee() {
    trap : TERM
    (trap '' TERM && exec tee -a "$@")
  }
  source "$raytrain_parts/train.sh"
)
exit $?
