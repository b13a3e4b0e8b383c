"""Say what to type instead of words that a command does not know."""

from __future__ import annotations

import difflib
import itertools
import re
import shlex
from collections.abc import Collection, Sequence

RANKS_OF_LAUNCHERS = ("-n", "-np", "--np", "--ranks")
HOSTS = ("--hosts", "--host", "-H", "-f", "--machinefile", "--nodes")
WITH_RANKS = ("bench", "chat", "doctor", "pack", "run", "serve")
# A run goes on by itself, and never overwrites another one's answers.
GOING_ON = ("--resume", "--continue", "--restart", "--force", "--overwrite")
OF_SLURM = {
    "--account", "--array", "--constraint", "--cpus-per-task", "--dependency", "--exclude", "--exclusive",
    "--job-name", "--mem", "--mem-per-cpu", "--nodelist", "--nodes",
    "--ntasks", "--ntasks-per-node", "--partition", "--qos", "--time",
}  # fmt: skip
# Names that other launchers have for `launch -n`.
RANKS_AT_LAUNCH = ("-c", "-N", "--ntasks", "--ranks", "--nproc")
OF_RUN = ("--model", "--input", "--output", "--set")
# Words for which other programs have a command, by the command that does it here.
COMMANDS = {
    "pull": ("add", "download", "fetch", "get"),
    "models": ("info", "list", "ls", "show"),
    "pack": ("compile", "convert", "quantize"),
    "run": (
        "batch", "complete", "continue", "embed", "generate", "infer", "restart", "resume", "run-batch", "score",
        "start",
    ),
    "lm-eval": ("eval", "evaluate"),
    "watch": ("follow", "log", "logs", "progress", "tail"),
    "status": ("ps", "top"),
    "report": ("html", "plot", "plots"),
    "compare": ("diff",),
}  # fmt: skip
WITHOUT_COMMAND = {
    **dict.fromkeys(
        ("abort", "cancel", "kill", "stop"), "Ctrl-C or SIGTERM stops a run, and scancel one that Slurm has started"
    ),
    **dict.fromkeys(("clean", "delete", "remove", "rm"), "to remove a run, type rm -r DIRECTORY"),
}  # fmt: skip
# Options of other programs that ask for what there is in another way, or not at all.
ELSEWHERE = {
    **dict.fromkeys(
        ("--device", "--gpu", "--gpus", "--cuda", "--n-gpu-layers", "-ngl"), "mpillm computes on CPUs only"
    ),
    **dict.fromkeys(
        ("--prompt", "-p"), "to ask a model, type mpillm chat; run answers a file of requests: --input requests.jsonl"
    ),
    **dict.fromkeys(("--system", "--system-prompt"), "type /system TEXT in the conversation of mpillm chat"),
    "--stream": "chat and serve stream; a run writes finished answers to results.jsonl",
    **dict.fromkeys(
        ("--ssl-certfile", "--ssl-keyfile", "--tls"), "for TLS put a proxy in front of the server"
    ),
    **dict.fromkeys(
        ("--alias", "--served-model-name"), "clients see the name of the model's file; rename it, or make a link"
    ),
    **dict.fromkeys(("--key", "--token"), "type --api-key KEY"),
    "--cors": "type --allowed-origins ORIGIN",
    **dict.fromkeys(
        ("--cache-dir", "--local-dir"), "to store models elsewhere, type export MPILLM_CACHE=DIRECTORY first"
    ),
    **dict.fromkeys(("--config", "--job"), "the job file needs none: mpillm run JOB.toml"),
    **dict.fromkeys(("--batch-file", "--file", "--prompts"), "type --input FILE"),
    **dict.fromkeys(("--quiet", "-q"), "to see answers alone, add 2> FILE"),
    **dict.fromkeys(("--debug", "--log-level"), "type mpillm -v -v, and then the command"),
    "--dry-run": "mpillm plan says what a run would take",
    "--interval": "type --every SECONDS",
    "--nodes": "--ranks N plans one rank on each of N hosts; --ranks-per-host M puts M ranks on each",
    **dict.fromkeys(
        ("--chat-template", "--template"), "the template of a model is the file chat_template.jinja in its directory"
    ),
    **dict.fromkeys(("--adapter", "--lora", "--lora-modules"), "type --set adapters.NAME=DIRECTORY"),
    "--trust-remote-code": "mpillm runs no code of models; leave it out",
    "--enable-prefix-caching": "prompts that begin alike always share their cache; leave it out",
    **dict.fromkeys(("--background", "--daemon", "--detach"), "type nohup before the command, and & behind it"),
    **dict.fromkeys(("--base-url", "--url"), "chat loads a model itself; a server has a chat on its web page"),
    "--gpu-memory-utilization": "type --set memory.kv=SIZE",
    "--prompt-file": "run answers a file of requests: --input requests.jsonl",
    "--revision": "type mpillm pull hf:OWNER/NAME@REVISION",
    "--workers": "one process serves all clients; for more speed type mpillm launch -n N serve",
}  # fmt: skip
# The same, where it depends on the command.
AT_COMMAND = {
    **{
        (command, name): f"{command} reads none; type mpillm run --input FILE"
        for command in ("chat", "serve")
        for name in ("--input", "-i")
    },
    ("serve", "--output"): "type --data DIRECTORY for uploaded files and batches",
    **{("pack", name): "type --weights TYPE" for name in ("--dtype", "--outtype", "--quantize", "--type")},
    **{("report", name): "the page is report.html in the directory" for name in ("--html", "--output", "-o")},
    **{("export", f"--{kind}"): f"type --format {kind}" for kind in ("csv", "jsonl", "parquet")},
    **{("pack", name): "the directory needs none: mpillm pack SRC DST" for name in ("--output", "-o")},
}  # fmt: skip


def sentence(
    command: str,
    unknown: Sequence[str],
    words: Sequence[str],
    known: Collection[str],
    before: Collection[str],
) -> str | None:
    """On `unknown`, some of the `words` after `command`; the first one that can be explained decides.

    `known` are the options of the command, `before` those that stand before it.
    """
    for word in unknown:
        name, equals, value = word.partition("=")
        following = words[words.index(word) + 1 :]
        value = value if equals or not following else following[0]
        if name in RANKS_OF_LAUNCHERS and command in WITH_RANKS:
            return (
                f"the launcher sets the number of ranks; type mpillm launch -n {value or 'N'} {command} ..."
            )
        if command == "run" and name in OF_SLURM:
            typed = f"{name}={value}" if value and not value.startswith("-") else name
            return f"{name} is an option of Slurm; type it before the script: sbatch {typed} slurm/one-node.sbatch ..."
        if command == "run" and name in GOING_ON:
            return (
                f"there is no option {name}: the same command continues a stopped run, and another --output "
                "starts a new one"
            )
        if command and word in before:
            return f"{word} must come before the command; type mpillm {word} {command} ..."
        letter = re.fullmatch(r"-([a-z])", name)
        if letter and (
            option := next((option for option in known if option.startswith(f"--{letter[1]}")), None)
        ):
            return f"there is no option {name}; type {option} {value or 'VALUE'}"
        if name in HOSTS and command == "launch":
            return f"there is no option {name}; write the hosts into a file, one in a line, and type --hostfile FILE"
        if name in RANKS_AT_LAUNCH and command == "launch":
            return f"there is no option {name}; type -n {value or 'N'}"
        if found := AT_COMMAND.get((command, name)) or ELSEWHERE.get(name):
            return f"there is no option {name}: {found}"
        if not word.startswith("-"):
            if " " in word and command == "chat":
                return f"{word!r} is not an option; run mpillm chat, and type it there"
            if word.endswith(".toml"):
                if command in ("plan", "run"):
                    return f"{word!r} is a second job file; {command} takes one"
                return f"{word!r} is a job file, which only run and plan read; type --model MODEL"
            before_it = words[max(words.index(word) - 2, 0) : words.index(word)]
            # The word may belong to an option that is explained instead, or continue the value of one.
            belongs = before_it[-1] in unknown or (before_it[0].startswith("--") and "=" not in before_it[0])
            if "--model" in known and command != "run" and not belongs:
                return f"{word!r} is not an option; to choose a model, type --model {word}"
            if "--set" in known and (meant := _value_of_set(word, words)):
                return f"{word!r} is an unexpected argument; did you mean {meant}?"
            continue
        if name in ("--hosts", "--hostfile", "--machinefile") and command in WITH_RANKS:
            return f"there is no option {name}; type mpillm launch --hostfile FILE {command} ..."
        settable = name.startswith("--") and "--set" in known
        if settable and (key := _key_called(name[2:])):
            return f"there is no option {name}; type --set {key}={value or 'VALUE'}"
        names = {option.lstrip("-"): option for option in known}
        if close := difflib.get_close_matches(name.lstrip("-"), names, n=1, cutoff=0.65):
            if names[close[0]] == name:
                return f"{name} must come after the command; type mpillm {command or 'COMMAND'} ... {name}"
            return f"there is no option {name}; did you mean {names[close[0]]}?"
        if command == "launch" and name in OF_RUN:
            given = f" {value}" if value and not value.startswith("-") else ""
            return f"{name} must come after the command; type mpillm launch -n N run {name}{given} ..."
        if command == "launch":
            return f"there is no option {name}; if it is mpiexec's, type --mpi-option={word}"
        if settable and (key := _key_like(name[2:])):
            return f"there is no option {name}; did you mean --set {key}={value or 'VALUE'}?"
    return None


def of_command(word: str, commands: Collection[str]) -> str:
    """Return a sentence that says what to type instead of an unknown command."""
    if word in WITHOUT_COMMAND:
        return WITHOUT_COMMAND[word]
    if word.endswith(".toml"):
        meant = [f"run {word}"]
    elif word.isdecimal():  # a number is the value of an option that stands in the wrong place
        meant = [f"launch -n {word} run"]
    elif word in ("help", "version"):
        meant = [f"mpillm --{word}", *(["mpillm run --help"] if word == "help" else [])]
    else:
        meant = [command for command, words in COMMANDS.items() if word in words]
        meant = meant or difflib.get_close_matches(word, commands, n=1)
    return f"did you mean {' or '.join(meant)}?" if meant else f"there are {', '.join(commands)}"


def _value_of_set(word: str, words: Sequence[str]) -> str | None:
    """Say what was meant by a word that is a key and its value, or that follows those of --set after a blank."""
    name, equals, value = word.partition("=")
    if equals and (key := _key_of(name)):
        return f"--set {shlex.quote(f'{key}={value}')}"
    at = words.index(word)
    if "--set" in words[max(0, at - 2) : at - 1]:
        rest = itertools.takewhile(lambda other: not other.startswith("-"), words[at - 1 :])
        return f"--set {shlex.quote(re.sub(' ?= ?', '=', ' '.join(rest), count=1))}"
    return None


def _key_of(name: str) -> str | None:
    from mpillm import spec

    return name if name in spec.known_keys() else spec.key_called(name)


def _key_called(option: str) -> str | None:
    from mpillm import spec

    return spec.key_called(option.replace("-", "_"))


def _key_like(option: str) -> str | None:
    from mpillm import spec

    names = {key.rpartition(".")[2]: key for key in spec.known_keys()}
    close = difflib.get_close_matches(option.replace("-", "_"), names, n=1, cutoff=0.8)
    return names[close[0]] if close else None
