"""The command line: help, JSON, and each mistake of a user's one clear line and exit code 2."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import threading
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from workers.cli import main, parser
from workers.config import configure
from workers.output import write_output
from workers.progress import Progress, table

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "describe"):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        assert f"example: towers {command}" in capsys.readouterr().out


def test_the_commands_that_the_pages_show_exist() -> None:
    root, found = Path(__file__).parents[2], 0
    for page in (root / "README.md", *root.glob("docs/*.md")):
        for block in re.findall(r"```\w*\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", "").splitlines():
                if line.startswith("towers "):
                    args = parser().parse_args(shlex.split(line, comments=True)[1:])
                    if sent := getattr(args, "arguments", None):  # with a job
                        parser().parse_args(sent)
                    found += 1
    assert found > 40


def test_describe_counts_the_papers_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "--network", "alexnet", "--json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["parameters"] == 60_965_224
    assert result["parameters_per_device"] * 2 == 60_965_224
    assert 0.71e9 < result["macs"] < 0.73e9
    sent = {layer["name"]: layer["sent"] for layer in result["layers"]}
    assert sent["conv3"] == 128 * 128 * 13 * 13 * 4
    assert [name for name, count in sent.items() if count] == ["conv3", "fc6", "fc7", "fc8"]
    for layer in ("conv1", "fc8", "60,965,224"):
        assert layer in out


def test_describe_shows_who_sits_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "--stages", "2", "--replicas", "2", "--json"]) == 0
    out = capsys.readouterr().out
    ranks = json.loads(out.splitlines()[-1])["ranks"]
    assert [(r["replica"], r["stage"], r["tower"]) for r in ranks][:4] == [
        (0, 0, 0),
        (0, 0, 1),
        (0, 1, 0),
        (0, 1, 1),
    ]
    assert ranks[0]["layers"] == ["conv1", "conv2"]
    assert sum(r["parameters"] for r in ranks) == 2 * 60_965_224
    assert "conv3 to fc8" in out


def test_json_comes_last_whatever_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.toml").touch()
    assert main(["scale", f"{tmp_path}", "--augmenters", "2:3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == {"run": f"{tmp_path}", "augmenters": "2:3"}
    assert main(["completion", "bash", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["shell"] == "bash"


def test_a_run_that_has_ended_is_not_said_to_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.toml").write_text(configure({"run": "r"}).to_toml())
    with (tmp_path / "events.jsonl").open("a") as events:
        fcntl.flock(events, fcntl.LOCK_EX)  # as who trains there, or is about to go on
        print(json.dumps({"time": 1, "event": "end"}), file=events, flush=True)
        assert main(["scale", f"{tmp_path}", "--augmenters", "2:3"]) == 0
        assert "as soon as the run looks" in capsys.readouterr().out
    assert main(["scale", f"{tmp_path}", "--augmenters", "2:3"]) == 0  # it ended, or was killed
    assert "if it is resumed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("print('done'); return 0", 0),  # its work was done
        ("[print('x' * 9999) or sys.stdout.flush() for _ in range(99)]; return 0", 1),
        ("raise ConnectionResetError('a store')", 1),
    ],
)
def test_work_that_a_closed_pipe_ended_is_not_called_done(source: str, code: int) -> None:
    program = f"import sys\nfrom workers import cli\ndef run(args):\n    {source}\n"
    program += "def add(commands): cli.completion.command(commands, 'x', 'x', 'x', run)\n"
    program += "cli.training.add = add\nsys.exit(cli.main(['x']))"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=BUFFERED,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as job:
        assert job.stdout
        assert job.stderr
        job.stdout.close()
        said = job.stderr.read().decode()
    assert job.returncode == code
    store = "towers: a store failed, again and again: a store\n"
    assert said == (store if "a store" in source else "")


@pytest.mark.parametrize("buffered", [True, False])
def test_a_full_disk_under_the_output_is_a_line(buffered: bool) -> None:
    command = [sys.executable, "-m", "workers.cli", "describe"]
    environment = BUFFERED if buffered else {**BUFFERED, "PYTHONUNBUFFERED": "1"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "towers: cannot write: [Errno 28] No space left on device\n"


def test_what_is_written_to_is_no_file_or_a_link(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"before")
    (tmp_path / "link").symlink_to("file")
    heard: list[bytes] = []
    reader = threading.Thread(target=lambda: heard.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    for name in ("pipe", "link"):
        write_output(f"{tmp_path}/{name}", b"now")
    reader.join(10)
    assert heard == [b"now"]
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"now"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "pipe"]


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Files that hold no images, or none that can be trained on."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "text.parquet")
    rows = pa.array([{"bytes": b"x", "path": "x"}], image)
    pq.write_table(pa.table({"image": rows, "text": ["a"]}), tmp_path / "unlabelled.parquet")
    pq.write_table(pa.table({"image": rows, "label": [1]}), tmp_path / "whole.parquet")
    pq.write_table(pa.table({"image": rows, "label": [0]}), tmp_path / "alike.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "truncated.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["empty"], "no Parquet files there; `towers prepare` makes them of images"),
        (["text.parquet"], "no column of encoded images"),
        (["unlabelled.parquet"], "no column of integer labels"),
        (["alike.parquet"], "alike.parquet: labels of 1 class; a network tells 2 or more apart"),
        (["truncated.parquet"], "truncated.parquet: not readable as Parquet"),
        (["whole.parquet", "--network", "lenet"], "network is 'lenet': one of alexnet, "),
        (["whole.parquet", "--batch", "100", "--microbatches", "3"], "a multiple of 3"),
        (["whole.parquet", "--config", "none.toml"], "none.toml: no such configuration file"),
        (["whole.parquet", "--stages", "9"], "stages is 9: alexnet has 8 layers"),
        (["whole.parquet", "--stages", "0"], "stages is 0: at least 1"),
        (["whole.parquet", "--cuts", "conv9"], "cuts has 'conv9': one of conv2, conv3"),
        (["whole.parquet", "--cuts", "conv3", "--stages", "3"], "stages is 3: 2 by cuts conv3"),
        (["whole.parquet", "--run", "text.parquet"], "text.parquet is no folder"),
        (["whole.parquet", "--run", f"runs-{'x' * 300}"], "cannot be written: File name too long"),
        ([""], "shards is given, and empty; is a variable of the shell not set?"),
        (["whole.parquet", "--config", ""], "config is given, and empty"),
        (["--resume"], "--resume needs --run RUN"),
        (["--resume", "--run", "nothing"], "nothing/config.toml: no such configuration file"),
        (["gs+nothing://x/y"], "gs+nothing://x/y: Protocol not known"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    options: list[str],
    message: str,
    parquet: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(parquet)
    assert main(["train", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("towers: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (parquet / "runs").exists()


@pytest.mark.parametrize(
    ("given", "meant"),
    [("--netwrok", "--network"), ("--lr", "--rate"), ("--batch-size", "--batch")],
)
def test_an_unknown_option_is_exit_2(
    given: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", given, "1"])
    assert end.value.code == 2
    said = f"towers train: no such argument: {given} (did you mean {meant}?); `towers train -"
    error = capsys.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == 1


def test_a_terminal_has_colours_unless_it_wants_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def described() -> str:
        assert main(["describe", "--network", "cifar"]) == 0
        return capsys.readouterr().out

    plain = described()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    coloured = described()
    assert coloured.startswith("\x1b[1mlayer")
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert described() == plain


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["tra"], "train"),
        (["train", "--net"], "--network"),
        (["train", "--network", "alexnet-"], "alexnet-2012 alexnet-mini"),
        (["evaluate", "--crops", ""], "1 10"),
        (["evaluate", "run", "--wo"], "--workers"),
        (["predict", "photo"], ""),  # bash itself completes files
    ],
)
def test_bash_completes_commands_options_and_values(
    words: list[str], completed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", "bash"]) == 0
    line = " ".join(f"'{word}'" for word in ["towers", *words])
    script = f'COMP_WORDS=({line}); COMP_CWORD={len(words)}; _towers; echo "${{COMPREPLY[@]}}"'
    text = capsys.readouterr().out + script
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == (completed, "")


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh here")
def test_zsh_takes_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    script = "autoload -U compinit; compinit -u -D\n" + capsys.readouterr().out
    script += "print -r -- $_comps[towers]"
    done = subprocess.run(["zsh", "-f", "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("_bash_complete -o default -F _towers", "")


def test_a_terminal_may_stop_what_writes_in_the_background() -> None:
    """By `stty tostop`: the run's process is in no terminal's foreground."""
    pid, terminal = pty.fork()
    if not pid:
        try:
            attributes = termios.tcgetattr(1)
            attributes[3] |= termios.TOSTOP
            termios.tcsetattr(1, termios.TCSANOW, attributes)
            program = (
                "from workers.guard import guarded; guarded(lambda *_: print('hello') or 0, 1)"
            )
            os.execv(sys.executable, [sys.executable, "-c", program])
        finally:
            os._exit(1)
    said = b""
    while b"hello" not in said:  # or hangs
        said += os.read(terminal, 1000)
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)


def test_a_run_whose_guard_is_killed_ends_as_it_would() -> None:
    program = """
import os, signal, sys
from workers.guard import guarded

def work(deaths, progressed):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # it may come before it is awaited
    os.kill(os.getppid(), signal.SIGKILL)
    signal.sigwait({signal.SIGTERM})
    progressed()
    print("in order")
    return 0

guarded(work, 1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGKILL, "in order\n", "")


def test_ctrl_c_and_a_closing_terminal_end_work_in_order_the_latter_not_if_nohup_says_so() -> None:
    program = """
import os, signal
from workers.guard import guarded, in_order

def work(deaths, progressed):
    told = []
    with in_order(told.append):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGHUP)
    print(told)
    return 0

guarded(work, 1)
"""
    for before, told in (("", "['SIGINT', 'SIGHUP']\n"), ("nohup", "['SIGINT']\n")):
        command = [*before.split(), sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
        assert (done.returncode, done.stdout) == (0, told), done.stderr


@pytest.mark.parametrize(
    ("end", "code"), [("return 0", 0), ("return 3", 3), ("raise ValueError", 1)]
)
def test_a_run_that_ended_is_not_begun_again_whatever_its_process_dies_of(
    end: str, code: int
) -> None:
    program = f"""
import atexit, os, sys
from workers.guard import guarded

def work(deaths, progressed):
    print("once")
    progressed()
    atexit.register(os.abort)
    {end}

sys.exit(guarded(work, 1))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=BUFFERED, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "once\n" if "return" in end else "")
    assert "again" not in done.stderr


@pytest.mark.parametrize("dies", ["os.kill(os.getpid(), signal.SIGKILL)", "return AGAIN"])
def test_a_run_that_dies_again_and_again_without_progress_is_given_up(dies: str) -> None:
    program = f"""
import os, signal, sys
from workers.guard import AGAIN, guarded

def work(deaths, progressed):
    print(deaths, flush=True)
    if deaths < 2:
        progressed()
    {dies}

sys.exit(guarded(work, 2))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (1, ["0", "1", "2", "3"]), done.stderr
    *again, last = done.stderr.splitlines()
    how = "lost its Ray" if "AGAIN" in dies else "was killed by SIGKILL"
    assert again == [f"the run's supervisor {how}: started again"] * 3
    assert last == f"towers: the run's supervisor {how}; --resume goes on"


def test_a_result_that_could_not_be_written_is_no_success() -> None:
    program = """
import sys
from workers.guard import guarded

sys.exit(guarded(lambda *_: print("result") or 0, 1))
"""
    command = [sys.executable, "-c", program]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=BUFFERED, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 120  # Python's own for it


def test_a_run_goes_on_without_its_terminal() -> None:
    ours, terminal = pty.openpty()
    out = os.fdopen(terminal, "w")
    progress = Progress(out)
    progress.say("there")
    os.close(ours)
    progress.say("gone")
    progress.line("and gone")
    with suppress(OSError):
        out.close()
    reader, pipe = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError), os.fdopen(pipe, "w") as out:  # which `main` hears of
        Progress(out).say("nobody reads it")


def test_a_table_has_numbers_to_the_right_and_counts_wide_letters() -> None:
    rows = [("日本", "1.5%", "a b"), ("fünf", "12.0%", "c")]
    assert table(rows, ("name", "error", "what")).splitlines() == [
        "name  error  what",
        "----  -----  ----",
        "日本   1.5%  a b",
        "fünf  12.0%  c",
    ]
