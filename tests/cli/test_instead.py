"""Typical mistakes are answered by one sentence that says what to type instead."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from mpillm.cli import main
from tests.job_helpers import CHAT

MISTAKES = {
    "an option of the job": ("run --max-tokens 5", "type --set sampling.max_tokens=5"),
    "an input as the job": ("plan prompts.jsonl", "to run its requests, type --input prompts.jsonl"),
    "a command": ("rnu", "there is no command 'rnu'; did you mean run?"),
    "a job as the command": ("jobs/a.toml", "there is no command 'jobs/a.toml'; did you mean run jobs/a.toml?"),
    "ranks without launch": ("-n 4 run jobs/a.toml", "there is no command '4'; did you mean launch -n 4 run?"),
    "no such command": ("frobnicate", "there is no command 'frobnicate'; there are run, plan,"),
    "a key": ("plan --set sampling.temprature=1", "did you mean 'sampling.temperature'?"),
    "no input": ("launch -n 2 run --model smollm2-135m --output out", "add input = \"...\" or --input PATH"),
    "a job that is not there": ("plan jobs/quickstrat.toml", "The job file jobs/quickstrat.toml does not exist"),
    "a model that is not there": ("pull nosuch", "it has smollm2-135m, qwen3-0.6b"),
    "launch without ranks": ("launch run", "mpillm launch -n 2 run, or --hostfile FILE"),
    "a job at launch": ("launch -n 2 a.toml", "the command before the job: mpillm launch -n 2 run a.toml."),
    "an origin": (
        "serve --allowed-origins http://localhost:3000/page",
        "http://localhost:3000/page is not an origin; write http://HOST:PORT, or * for all pages",
    ),
    "origins as vLLM has them": ("serve --allowed-origins [\"*\"]", "is not an origin; write http://HOST:PORT"),
    "ranks behind the command": (
        "launch run a.toml -n 4", "-n must come before the command: mpillm launch -n 4 run a.toml."
    ),
    "a hostfile behind the command": (
        "launch doctor --hostfile h", "--hostfile must come before the command: mpillm launch --hostfile h doctor."
    ),
    "a hostfile without its option": (
        "launch hosts run a.toml", "if it is a hostfile, type mpillm launch --hostfile hosts run a.toml."
    ),
    "hosts at launch": ("launch --hosts node1,node2 doctor", "one in a line, and type --hostfile FILE"),
    "MPICH's letter at launch": ("launch -f hosts doctor", "there is no option -f; write the hosts into a file"),
    "a hostfile's letters": ("launch --hostfile hots doctor", "The hostfile hots does not exist; did you mean hosts?"),
    "no hostfile": ("launch --hostfile x/y doctor", "y does not exist; mpillm init hostfile DIR writes one."),
    "a directory of hostfiles": ("launch --hostfile . doctor", ". is a directory; mpillm init hostfile DIR writes a"),
    "a model at launch": (
        "launch -n 2 --model a.gguf run", "--model must come after the command; type mpillm launch -n N run --model"
    ),
    "a key at launch": ("launch -n 2 --set run", "--set must come after the command; type mpillm launch -n N run"),
    "a launcher at launch": ("launch -n 2 mpiexec", "launch starts mpiexec by itself; type mpillm launch -n 2 run"),
    "an option before the command": ("--json plan", "--json must come after the command; type mpillm"),
    "a server's directory": ("serve --output o", "type --data DIRECTORY for uploaded files and batches"),
    "an input's letters": (
        f"run --model {CHAT} --input takn --output out", "The input takn does not exist; did you mean taken?"
    ),
    "a run's letters": ("status takn", "The directory takn does not exist; did you mean taken?"),
    "launch of nothing": ("launch -n 2", "launch needs a command: mpillm launch -n 2 run JOB.toml."),
    "launch of something else": ("launch -n 2 plan a.toml", "bench and pack; type mpillm plan a.toml without it."),
    "launch of a check without ranks": ("launch doctor", "mpillm launch -n 2 doctor, or --hostfile FILE"),
    "an option at launch": ("launch -n 2 chat --modle x", "there is no option --modle; did you mean --model?"),
    "a port": ("serve --port 99999", "99999 is not a port; ports are 0 (any free one) to 65535"),
    "a size": ("plan --memory lots", "'lots' is not a size"),
    "a dash": ("run --max-tokns 5", "did you mean --set sampling.max_tokens=5?"),
    "an option's letters": ("doctor --modle x", "there is no option --modle; did you mean --model?"),
    "a global option": ("--verison", "there is no option --verison; did you mean --version?"),
    "another program's option": ("plan --batch-size=4", "type --set batch.max_num_seqs=4"),
    "vLLM's option": ("run --tensor-parallel-size 2", "type --set layout.shards=2"),
    "ranks of a run": ("run --ranks 4", "type mpillm launch -n 4 run"),
    "sbatch's option": ("run --mem=64G", "type it before the script: sbatch --mem=64G slurm/one-node.sbatch ..."),
    "mpiexec's option": ("run -n 4 jobs/a.toml", "type mpillm launch -n 4 run"),
    "a model as a word": ("chat smollm2-135m", "to choose a model, type --model smollm2-135m"),
    "an option with a word": ("serve --frobnicate a", "there is no option --frobnicate; mpillm serve --help lists all"),
    "help": ("help", "did you mean mpillm --help or mpillm run --help?"),
    "a number in words": ("plan --ranks two", "argument --ranks: 'two' is not a whole number"),
    "half a second": ("watch out --every 0.5", "argument --every: '0.5' is not a whole number"),
    "a rate in words": ("plan --suggest fast", "'fast' is not a rate; write tokens/s"),
    "a server's output": ("serve --set output=x", "serve reads no input and stores its files in --data DIR"),
    "a chat's input": ("chat --set input=x", "is for a run: chat reads no input and writes no output"),
    "a port in words": ("serve --port http", "argument --port: 'http' is not a whole number"),
    "no directory": ("report", "type mpillm report DIRECTORY"),
    "no second run": ("compare out", "type mpillm compare FIRST SECOND"),
    "merged by a letter": ("merge xyz -o m", "The directory xyz does not exist; give the output dir"),
    "merged without an output": ("merge a b", "type mpillm merge PART --output OUTPUT"),
    "a key without its value": ("plan --set sampling.seed 3", "'sampling.seed' is not of the form section.key=value"),
    "a value without --set": (
        "run a.toml sampling.seed=3", "is an unexpected argument; did you mean --set sampling.seed=3?"
    ),
    "a second value of --set": ("run a.toml --set sampling.seed=3 top_p=1", "did you mean --set sampling.top_p=1?"),
    "a value with blanks around =": ("run a.toml --set sampling.seed = 3", "did you mean --set sampling.seed=3?"),
    "a value with a blank": ("run a.toml --set output=my runs", "did you mean --set 'output=my runs'?"),
    "hosts of a run": ("run a.toml --hosts hosts", "type mpillm launch --hostfile FILE run ..."),
    "hosts without slots": ("launch --hostfile none run", "gives node2 no slots; give it some, or remove its line."),
    "a model's name": ("plan --model smollm2-135M", "Did you mean smollm2-135m?"),
    "a beginning of a model's name": ("plan --model smollm2", "Did you mean smollm2-"),
    "a path as a name": ("pull ./m.gguf", "granite-8b, phi-4, qwen3-30b-a3b, and hf:owner/name works too"),
    "a repository": ("pull Qwen/Qwen3-0.6B", "hf:Qwen/Qwen3-0.6B works too"),
    "a file as the directory": ("init job taken", "taken is a file; give another directory."),
    "a file as the run": ("report taken", "taken is a file; give the output directory of a run."),
    "a file's status": ("status taken", "taken is a file; give the output directory of a run."),
    "a text without quotes": ("plan bare.toml", '(at line 1, column 9); a text has quotes: model = "smollm2-135m".'),
    "YAML": ("plan yaml.toml", "; TOML has model = VALUE, with quotes around a text."),
    "a key twice": ("plan twice.toml", "; model occurs twice."),
    "going on": ("run --resume", "the same command continues a stopped run, and another --output starts a new one"),
    "overwriting": ("run --overwrite", "another --output starts a new one"),
    "a global option at its command": ("run -v", "-v must come before the command; type mpillm -v run ..."),
    "a version of a command": ("plan --version", "--version must come before the command"),
    "ranks without end": ("plan --ranks 100000", "plan takes up to 1024 ranks, not 100000"),
    "memory in a small unit": ("plan --memory 10KiB", "10KiB is too little memory for a rank; write MiB or GiB"),
    "memory without a unit": ("plan --memory 8", "8 is too little memory for a rank; did you mean 8GiB?"),
    "hosts and their memory": (
        "plan --model smollm2-135m --hosts hosts --memory 4GiB",
        "hosts says what --memory says; change it there, or leave out --memory.",
    ),
    "a job file as JSON": ("plan --suggest 5 --json", "--suggest prints a job file; leave out --json."),
    "a rate of nothing": ("plan --suggest 0", "'0' is not a rate; write tokens/s as a number above 0"),
    "a hostfile as hosts": ("plan --model smollm2-135m --hosts hosts", "belongs to launch --hostfile."),
    "an address": ("pull https://huggingface.co/Qwen/Qwen3-0.6B", "type mpillm pull hf:Qwen/Qwen3-0.6B."),
    "a model's address": ("plan --model huggingface.co/Qwen/Qwen3-0.6B", "is a URL; write hf:Qwen/Qwen3-0.6B."),
    "a model's file": ("plan --model ./nosuch.gguf", "A plan needs no more than a config.json: --model DIR"),
    "a word too many": ("pull smollm2-135m qwen", "'qwen' is an unexpected argument; type mpillm pull name"),
    "a model as an option": ("pack --model tiny out", "no option --model; type mpillm pack SRC DST; --help lists all"),
    "a run as an option": ("status --dir out/x", "no option --dir; type mpillm status DIRECTORY; --help lists all"),
    "no such option": ("models --json", "there is no option --json; mpillm models --help lists all"),
    "a GPU": ("run --device cuda", "there is no option --device: mpillm computes on CPUs only"),
    "layers on a GPU": ("chat -ngl 99", "mpillm computes on CPUs only"),
    "a prompt": ("run --prompt Hello", "run answers a file of requests: --input requests.jsonl"),
    "streaming": ("run --stream", "a run writes finished answers to results.jsonl"),
    "a system message": ("chat --system kind", "type /system TEXT in the conversation"),
    "a message": ("chat 'Why is it so?'", "run mpillm chat, and type it there"),
    "workers": ("serve --workers 4", "for more speed type mpillm launch -n N serve"),
    "ranks of a check": ("doctor --ranks 2", "type mpillm launch -n 2 doctor"),
    "mpiexec's way": ("launch -np 2 run", "there is no option -np; type -n N"),
    "an input from the web": (
        "run --input https://a.b/c.jsonl --output out", "https://a.b/c.jsonl is a URL; download it first"
    ),
    "an output in a store": ("run --input taken --output s3://a/b", "s3://a/b is a URL; give a directory"),
    "a job with an address": ("run web.toml --output out", "The input s3://a/b is a URL"),
    "a key's beginning": ("plan --set sampling.temp=1", "did you mean 'sampling.temperature'?"),
    "a key's first letters": ("plan --set sampling.max=1", "did you mean 'sampling.max_tokens'?"),
    "a key of vLLM": ("plan --set layout.tp=2", "did you mean 'layout.shards'?"),
    "a key of another section": ("plan --set memory.threads=2", "did you mean 'layout.threads'?"),
    "a key with a dash": ("plan --set sampling.top-p=1", "did you mean 'sampling.top_p'?"),
    "a key like none": ("plan --set layout.xyz=1", "there are layout.hosts, layout.replicas, layout.shards"),
    "a letter for the model": ("run -m smollm2-135m", "there is no option -m; type --model smollm2-135m"),
    "a letter for the input": ("run -i a.jsonl -o out", "The input a.jsonl does not exist"),
    "a letter for a chat's input": ("chat -i a.jsonl", "chat reads none; type mpillm run --input FILE"),
    "a letter for a port": ("serve -p 80", "there is no option -p; type --port 80"),
    "a letter at launch": ("launch -n 2 run -m x", "there is no option -m; type --model x"),
    "a job in YAML": ("run jobs.yaml", "The job file jobs.yaml does not exist; a job is TOML, and mpillm init"),
    "a YAML beside its TOML": ("run twice.yaml", "The job file twice.yaml does not exist; did you mean twice.toml?"),
    "a job's letters": ("plan ./twise.toml", "The job file twise.toml does not exist; did you mean twice.toml?"),
    "a model as the job": ("run smollm2-135m", "is a model, not a job file (TOML); type --model smollm2-135m."),
    "a model's file as the job": ("run big.gguf", "type --model big.gguf."),
    "mpiexec's way, without a run": ("launch -np 2", "there is no option -np; type -n N"),
    "what bench has not": ("bench --what speed", "'speed' is not one of kernels, prefill, decode, batch, startup,"),
    "what bench calls otherwise": ("bench --what Kernel", "did you mean kernels?"),
    "memory as a plain number": (
        f"plan --model {CHAT} --set memory.weights=4", "(4 is 4 bytes; write 4GiB for more)"
    ),
    "a cache as a plain number": (f"plan --model {CHAT} --set memory.kv=2", "(2 is 2 bytes; write 2GiB for more)"),
    "a kind of init": ("init jobs out", "is not one of job, hostfile, slurm, docs; did you mean job?"),
    "a format": ("export out --format excel", "'excel' is not one of csv, parquet, jsonl"),
    "a block type": ("pack a b --weights q8", "did you mean q8_0?"),
    "an option without its value": ("run --model", "expected one argument; mpillm run --help lists all"),
    "two that exclude": (
        "launch -n 2 --hostfile a run", "a says how many ranks each machine takes; change its slots, or leave out -n."
    ),
    "a model on Windows": (
        "plan --model 'C:\\models\\m.gguf'", "is a path of Windows; in its Linux (WSL) it is /mnt/c/models/m.gguf"
    ),
    "an output on Windows": (
        "run --model x --input taken --output D:/out", "is a path of Windows; in its Linux (WSL) it is /mnt/d/out"
    ),
    "threads without end": ("plan --set layout.threads=9999", "layout.threads: expected a whole number <= 1024"),
    "a run that is not there": ("report nothing", "The directory nothing does not exist; give the output directory"),
    "another program's pull": ("download smollm2-135m", "there is no command 'download'; did you mean pull?"),
    "another program's list": ("ls", "there is no command 'ls'; did you mean models?"),
    "another program's pack": ("quantize smollm2-135m q4_0", "did you mean pack?"),
    "another program's run": ("generate", "there is no command 'generate'; did you mean run?"),
    "a start": ("start", "there is no command 'start'; did you mean run?"),
    "a score": ("score p.jsonl", "there is no command 'score'; did you mean run?"),
    "logs": ("logs out", "there is no command 'logs'; did you mean watch?"),
    "a difference": ("diff a b", "there is no command 'diff'; did you mean compare?"),
    "a stop": ("stop out", "there is no command 'stop'; Ctrl-C or SIGTERM stops a run"),
    "cleaning": ("clean out", "to remove a run, type rm -r DIRECTORY"),
    "init of nothing": ("init", "type mpillm init job|hostfile|slurm|docs DIRECTORY"),
    "a place of pulled models": ("pull smollm2-135m --local-dir x", "type export MPILLM_CACHE=DIRECTORY first"),
    "a key where none is set": ("report out --format pdf", "no option --format; type mpillm report DIRECTORY; --help"),
    "a run that is a file": ("compare taken taken", "taken is a file; give the output directory of a run."),
    "a compared run's letters": ("compare takn takn", "The directory takn does not exist; did you mean taken?"),
    "a part that is not there": ("merge xyz --output m", "The directory xyz does not exist; give the output dir"),
    "a merged file": ("merge taken --output m", "taken is a file; give the output directory of a run."),
    "a spreadsheet": ("export out -o x.xlsx", "x.xlsx ends in none of .csv, .parquet, .jsonl; choose one of them"),
    "two formats": ("export out --format parquet -o x.csv", "x.csv is not called like --format parquet; leave one"),
    "two jobs": ("plan a.toml b.toml", "'b.toml' is a second job file; plan takes one"),
    "a job to chat": ("chat a.toml", "'a.toml' is a job file, which only run and plan read; type --model MODEL"),
    "a job to a check": ("doctor a.toml", "'a.toml' is a job file, which only run and plan read"),
    "a rate with its unit": ("plan a.toml --suggest 50 tokens/s", "'tokens/s' is an unexpected argument; type"),
    "an option like none": ("plan --time", "there is no option --time; mpillm plan --help lists all"),
    "nodes of a plan": ("plan --nodes 4", "--ranks N plans one rank on each of N hosts"),
    "hosts for ranks": ("plan --ranks-per-node 2", "did you mean --ranks-per-host?"),
    "an underscore": ("serve --api_key x", "there is no option --api_key; did you mean --api-key?"),
    "origins in short": ("serve --cors *", "there is no option --cors: type --allowed-origins ORIGIN"),
    "TLS": ("serve --ssl-certfile a", "for TLS put a proxy in front of the server"),
    "another name": ("serve --served-model-name x", "clients see the name of the model's file; rename it"),
    "a program at launch": ("launch -n 3 python x.py", "type mpiexec -n 3 python x.py."),
    "no ranks": ("launch -n 0 run", "-n 0 is not a number of ranks; write 1 to 4096."),
    "too many ranks": (
        "launch -n 99999999999 doctor",
        "-n 99999999999 is not a number of ranks; write 1 to 4096.",
    ),
    "a hostfile of a run": ("run a.toml --hostfile h", "type mpillm launch --hostfile FILE run ..."),
    "a directory as the job": ("run .", ". is a directory, not a job file (TOML); if it holds a model, type --model ."),
    "an option for the job": ("run --job a.toml", "there is no option --job: the job file needs none: mpillm run"),
    "an option for the file": ("run --file a.jsonl", "there is no option --file: type --input FILE"),
    "quiet": ("run -q", "there is no option -q: to see answers alone, add 2> FILE"),
    "debugging": ("run --debug", "there is no option --debug: type mpillm -v -v, and then the command"),
    "a trial": ("run --dry-run", "mpillm plan says what a run would take"),
    "seconds of watch": ("watch out --interval 3", "there is no option --interval: type --every SECONDS"),
    "a context": ("plan --context 8192", "type --set memory.max_context=8192"),
    "vLLM's cache": ("run --kv-cache-dtype q8_0", "type --set memory.kv_type=q8_0"),
    "a host with its port": ("serve --host localhost:80", "is not a host; type --host localhost --port 80"),
    "a host as an address": ("serve --host http://127.0.0.1", "is not a host; type --host 127.0.0.1"),
    "a token": ("serve --token abc", "there is no option --token: type --api-key KEY"),
    "a directory for measurements": ("doctor --output .", "argument -o/--output: . is a directory; give a file"),
    "nobody may wait": ("serve --max-waiting 0", "argument --max-waiting: 0 is not a positive number"),
    "ranks without -n": ("launch 2 run a.toml", "the number of ranks needs -n: mpillm launch -n 2 run a.toml."),
    "srun's ranks": ("launch --ntasks 4 run", "there is no option --ntasks; type -n 4"),
    "mpiexec at launch": ("launch -n 2 mpiexec run a.toml", "type mpillm launch -n 2 run a.toml."),
    "an option of mpiexec": ("launch -n 2 --oversubscribe run", "is mpiexec's, type --mpi-option=--oversubscribe"),
    "mpiexec's option after a blank": ("launch -n 2 --mpi-option --tag-output run", "type --mpi-option=WORD"),
    "a command's letters at launch": ("launch -n 2 srve", "launch cannot start 'srve'; did you mean serve?"),
    "ranks behind a dash": ("launch run -- -n 2", "mpillm launch -n 2 run"),
    "hosts of nothing": ("launch --hostfile taken run", "taken names no host; write 'node1 slots=2' into it, a line"),
    "an input of a chat": ("chat --input a.jsonl", "chat reads none; type mpillm run --input FILE"),
    "an input of a server": ("serve --input a.jsonl", "serve reads none; type mpillm run --input FILE"),
    "an adapter": ("chat --lora x", "type --set adapters.NAME=DIRECTORY"),
    "a template": ("serve --chat-template x", "is the file chat_template.jinja in its directory"),
    "another server": ("chat --base-url http://a", "chat loads a model itself; a server has a chat on its web page"),
    "a background": ("serve --daemon", "type nohup before the command, and & behind it"),
    "an empty key": ("serve --api-key ''", "the key is empty; leave out --api-key for a server without one"),
    "code of a model": ("serve --trust-remote-code", "mpillm runs no code of models; leave it out"),
    "a shared beginning": ("serve --enable-prefix-caching", "prompts that begin alike always share their cache"),
    "no file of hosts": ("plan --hosts nosuch.toml", "(No such file or directory); mpillm doctor --output FILE"),
    "a part twice": ("merge run run --output m", "The part run is given twice; leave one out."),
    "a revision": ("pull hf:a/b --revision main", "type mpillm pull hf:OWNER/NAME@REVISION"),
    "a file that is there": ("pull taken", "taken is on this machine already; type --model taken."),
    "a type to pack": ("pack tiny out --quantize q8_0", "there is no option --quantize: type --weights TYPE"),
    "a target to pack": ("pack tiny --output out", "the directory needs none: mpillm pack SRC DST"),
    "a report's page": ("report out -o page.html", "no option -o: the page is report.html in the directory"),
    "a report in HTML": ("report out --html", "no option --html: the page is report.html in the directory"),
    "a table in CSV": ("export out --csv", "there is no option --csv: type --format csv"),
    "a word too many for a comparison": ("compare a b c", "type mpillm compare first second"),
    "memory as vLLM has it": ("serve --gpu-memory-utilization 0.9", "type --set memory.kv=SIZE"),
    "hosts as a hostfile": ("launch --hostfile node1,node2 run", "write the hosts into a file, one in a line"),
    "init into a run": ("init job run", "run is the output directory of a run; give another directory."),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    (tmp_path / "run").mkdir()
    for file in ("journal", "results.jsonl", "results.h5", "timings.h5", "report.json"):
        (tmp_path / "run" / file).touch()
    (tmp_path / "bare.toml").write_text("model = smollm2-135m\n")
    (tmp_path / "yaml.toml").write_text("model: smollm2-135m\n")
    (tmp_path / "twice.toml").write_text('model = "a"\nmodel = "b"\n')
    (tmp_path / "web.toml").write_text('input = "s3://a/b"\n')
    (tmp_path / "hosts").write_text("node1 slots=4\n")
    (tmp_path / "none").write_text("node1 slots=4\nnode2 slots=0\n")
    words, said = MISTAKES[name]
    try:
        code = main(shlex.split(words))
    except SystemExit as end:  # argparse's
        code = int(end.code or 0)
    captured = capsys.readouterr()
    shown = captured.err or captured.out  # a plan's problems belong to the plan
    assert code == 2, shown
    assert said in (" ".join(shown.split()) if words.startswith("plan") else shown), shown
    assert "Traceback" not in shown
    assert len(shown.splitlines()) == 1 or words.startswith("plan --model"), "one sentence, without a usage"


def test_a_model_is_planned_without_an_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name is enough, as the next steps of a bare `mpillm` say; an input that is missing is told."""
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--model", str(CHAT), "--ranks", "2"]) == 0
    shown = capsys.readouterr()
    assert " for an input of\n" in shown.out
    assert not shown.err
    assert main(["plan", "--model", str(CHAT), "--suggest", "1"]) == 0
    assert 'input = "requests.jsonl"\noutput = "out"' in capsys.readouterr().out
    assert main(["plan", "--model", str(CHAT), "--input", "promts.jsonl"]) == 0
    assert (
        "The input promts.jsonl does not exist; this plan is for a typical input." in capsys.readouterr().err
    )
    (tmp_path / "prompts.txt").write_text("A plain text.\nAnother.\n")
    main(["plan", "--model", str(CHAT), "--input", "prompts.txt"])
    said = "prompts.txt has 2 lines without a valid request; run answers these with an error."
    assert said in capsys.readouterr().err
