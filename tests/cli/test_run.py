import json
import os
import re
import signal
import subprocess
import sys

import pytest

import npmix

GREEDY = ("-n", 4, "--temperature", 0)
PROMPT = "def f"


@pytest.fixture(scope="module")
def expected(tiny):
    """What the Python interface makes of the prompt."""
    with npmix.load(tiny) as model:
        return model.generate(PROMPT, max_tokens=4, temperature=0)


def one_error(result):
    """The message of a command that failed as it should: exit code 1, one line on stderr, nothing on stdout."""
    assert result.exit_code == 1 and result.stdout == ""
    assert re.fullmatch(r"npmix: error: [^\n]+\n", result.stderr), result.stderr
    return result.stderr


def with_line_end(text):
    return text if text.endswith("\n") else text + "\n"


def test_stdout_holds_only_the_text(npmix_command, tiny, expected):
    """stdout is the model's text with a line end; the figures are one line on stderr."""
    result = npmix_command("run", "-m", tiny, *GREEDY, PROMPT)
    assert (result.exit_code, result.stdout) == (0, with_line_end(expected))
    figures = (
        r"npmix: prompt \d+ tokens at [\d.]+ tok/s, text \d+ tokens at [\d.]+ tok/s, first token [\d.]+ s(, peak memory [\d.]+ [kMG]?B)?"
    )
    assert re.fullmatch(figures, result.stderr.splitlines()[-1])


def test_prompt_comes_from_argument_file_or_stdin(npmix_command, tiny, tmp_path):
    """The same text from the argument, --file, --file - and standard input gives the same output, with nothing stripped."""
    prompt = "  é = [\n"
    file = tmp_path / "prompt.txt"
    file.write_bytes(prompt.encode())
    base = ("run", "-m", tiny, "--quiet", "--echo", *GREEDY)
    out = npmix_command(*base, prompt).stdout
    assert out.startswith(prompt)
    assert npmix_command(*base, "--file", file).stdout == out
    assert npmix_command(*base, input=prompt.encode()).stdout == out
    assert npmix_command(*base, "--file", "-", input=prompt.encode()).stdout == out


def test_json_is_one_object(npmix_command, tiny, expected):
    """--json prints one object: text, ids, stop reason, timings."""
    result = npmix_command("run", "-m", tiny, *GREEDY, "--json", PROMPT)
    found = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert found["text"] == expected and found["stop_reason"] in ("length", "eos")
    assert len(found["ids"]) == found["generated_tokens"] <= 4
    assert found["prompt_tokens"] > 1 and found["seed"] is None
    for key in ("prefill_s", "decode_s", "first_token_s", "prompt_tokens_per_s", "decode_tokens_per_s"):
        assert found[key] >= 0


def test_quiet_leaves_stderr_empty(npmix_command, tiny):
    """--quiet: nothing on stderr."""
    assert npmix_command("run", "-m", tiny, *GREEDY, "--quiet", PROMPT).stderr == ""


def test_random_seed_is_shown_and_repeats(npmix_command, tiny):
    """A seed that was drawn stands on stderr and gives the same text again; a given one is not repeated there."""
    base = ("run", "-m", tiny, "-n", 4, "--temperature", 2, PROMPT)
    first = npmix_command(*base)
    seed = re.search(r", seed (\d+)\n$", first.stderr).group(1)
    again = npmix_command(*base, "--seed", seed)
    assert again.stdout == first.stdout and "seed" not in again.stderr


def test_stop_ends_the_text(npmix_command, tiny, expected):
    """--stop may be given several times; its text is not printed."""
    stop = expected[len(expected) // 2 :]
    result = npmix_command("run", "-m", tiny, *GREEDY, "--stop", "\0\0", "--stop", stop, "--json", PROMPT)
    found = json.loads(result.stdout)
    assert found["stop_reason"] == "stop" and found["text"] == expected[: expected.find(stop)]


def test_chat_builds_the_instruct_format(npmix_command, tiny):
    """--chat answers the prompt as a question, as Model.chat does."""
    with npmix.load(tiny) as model:
        answer = model.chat([{"role": "user", "content": "Why?"}], max_tokens=3, temperature=0)
    result = npmix_command("run", "-m", tiny, "--chat", "-n", 3, "--temperature", 0, "Why?")
    assert result.stdout == with_line_end(answer)


def test_engine_options_reach_the_engine(npmix_command, tiny):
    """--threads, --context, --chunk and --kv leave the text as it is (f32 and q8 within rounding) and are checked."""
    base = ("run", "-m", tiny, *GREEDY, "--quiet", PROMPT)
    assert npmix_command(*base, "--threads", 1, "--context", 64, "--chunk", 2).stdout == npmix_command(*base).stdout
    for kv in ("f32", "q8"):
        assert npmix_command(*base, "--kv", kv).exit_code == 0
    assert "100000" in one_error(npmix_command(*base, "--context", 100000))


@pytest.mark.parametrize(
    "arguments", [["--file", "a", "prompt"], ["--json"], ["--echo"], ["--temperature", "nan", "x"], ["--seed", "-1", "x"]]
)
def test_usage(npmix_command, tiny, monkeypatch, arguments):
    """Options that contradict each other or lie out of range end with 2; --json and --echo have no meaning in a session."""
    if len(arguments) == 1:
        monkeypatch.setattr("npmix.cli.run.read_prompt", lambda prompt, file: None)
    result = npmix_command("run", "-m", tiny, *arguments)
    assert result.exit_code == 2 and result.stdout == "" and "Error" in result.stderr


def test_bad_input_is_one_line(npmix_command, tiny, tmp_path):
    """Empty prompts, files that are missing or not UTF-8, models that are not there, prompts that are too long: exit 1, one line."""
    bad = tmp_path / "latin.txt"
    bad.write_bytes(b"caf\xe9")
    base = ("run", "-m", tiny)
    assert "the prompt is empty" in one_error(npmix_command(*base, ""))
    assert "the prompt is empty" in one_error(npmix_command(*base, input=b""))
    assert "byte 0xe9 at offset 3" in one_error(npmix_command(*base, "--file", bad))
    assert "standard input is not UTF-8" in one_error(npmix_command(*base, input=b"\xff"))
    assert "No such file" in one_error(npmix_command(*base, "--file", tmp_path / "none.txt"))
    assert "none" in one_error(npmix_command("run", "-m", tmp_path / "none", "x"))
    assert "--context" in one_error(npmix_command(*base, "--context", 8, "x" * 100))
    one_error(npmix_command(*base, "\udcff"))


def start(*arguments, **options):
    """The command in a process of its own, its three streams as bytes."""
    command = [sys.executable, "-m", "npmix", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, **options)


LONG = ("-n", 400, "--ignore-eos", "--temperature", 1, "--seed", 1)


@pytest.mark.compiled
@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_ctrl_c_ends_the_text_cleanly(tiny):
    """SIGINT during a text: what was made stays, the figures follow, exit code 130, no traceback."""
    slow = "import time, npmix.stream as s; f = s.Stream._choose; s.Stream._choose = lambda *a: (time.sleep(0.05), f(*a))[1]"
    code = f"{slow}\nfrom npmix.cli import main; main(prog_name='npmix')"
    command = [sys.executable, "-c", code, "run", "-m", str(tiny), *map(str, LONG), PROMPT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        first = os.read(process.stdout.fileno(), 100)  # some text has come
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert first and (first + out).endswith(b"\n")
    assert b"Traceback" not in error and b"text " in error.splitlines()[-1]


def test_ctrl_c_while_the_prompt_is_computed(npmix_command, tiny, monkeypatch):
    """SIGINT between two layers of the prompt: no text, exit code 130, no traceback."""
    prefill = npmix.Engine.prefill

    def interrupted(engine, ids, on_progress=None):
        signal.raise_signal(signal.SIGINT)
        return prefill(engine, ids, on_progress)

    monkeypatch.setattr(npmix.Engine, "prefill", interrupted)
    result = npmix_command("run", "-m", tiny, *GREEDY, PROMPT)
    assert (result.exit_code, result.stdout) == (130, "")
    assert "text 0 tokens" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.compiled
@pytest.mark.skipif(os.name != "posix", reason="pipes that report their closing")
def test_closed_pipe_ends_the_text(tiny):
    """A reader that goes away (`npmix run ... | head -c 1`) is no error: 141, nothing on stderr."""
    with start("run", "-m", tiny, "--quiet", *LONG, PROMPT) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert (process.wait(timeout=300), process.stderr.read()) == (141, b"")


@pytest.mark.compiled
def test_text_comes_as_it_is_made(tiny):
    """The first piece is on stdout before the text is finished."""
    with start("run", "-m", tiny, "--quiet", *LONG, PROMPT) as process:
        first = os.read(process.stdout.fileno(), 1 << 16)
        rest = process.stdout.read()
    assert 0 < len(first) < len(first + rest)
