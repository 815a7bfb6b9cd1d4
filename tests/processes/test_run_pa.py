"""The main job as its users start it: flags in both spellings, priority of inputs, printed lines, files, and every way to
bring ranks to life. Texts are compared with what the LLM gives for the same ids in the same process."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qtp import LLM, SamplingParams, run_pa

ROOT = Path(__file__).parents[2]
DENSE, MOE = ROOT / "qtp/demo/dense", ROOT / "qtp/demo/moe"
TEXTS = ["def mean(data):", "class Path:"]


def run(capfd: pytest.CaptureFixture[str], *argv: object) -> str:
    capfd.readouterr()
    code = run_pa.main(["--model", str(DENSE), "--dtype", "float32", *map(str, argv)])
    out, err = capfd.readouterr()
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """Greedy text of 20 tokens for each of TEXTS."""
    with LLM(str(DENSE), tp=1, dtype="float32") as llm:
        outputs = llm.generate(TEXTS, SamplingParams(temperature=0, max_tokens=20))
    return {str(o.prompt): o.outputs[0].text for o in outputs}


def answers(out: str) -> dict[int, str]:
    """The texts after `Answer[i]: `, up to the next line that run_pa prints itself."""
    found: dict[int, str] = {}
    for part in out.split("Answer[")[1:]:
        number, _, text = part.partition("]: ")
        found[int(number)] = text.split("\nGenerate[")[0]
    return found


def test_several_texts_are_one_request_each(capfd: pytest.CaptureFixture[str], expected: dict[str, str]) -> None:
    out = run(capfd, "--input_texts", *TEXTS)
    assert answers(out) == {i: expected[text] for i, text in enumerate(TEXTS)}
    assert "Generate[0] token num: (0, 20)" in out
    assert "Generate[1] token num: (1, 20)" in out


def test_one_text_streams_and_is_repeated_for_a_larger_batch(capfd: pytest.CaptureFixture[str], expected: dict[str, str]) -> None:
    assert answers(run(capfd, "--input-texts", TEXTS[0])) == {0: expected[TEXTS[0]]}
    repeated = run(capfd, "--input-texts", TEXTS[0], "--max-batch-size", "3", "--max_prefill_batch_size", 1)
    assert answers(repeated) == dict.fromkeys(range(3), expected[TEXTS[0]])


def test_both_spellings_are_one_flag(capfd: pytest.CaptureFixture[str]) -> None:
    one = run(capfd, "--input-texts", TEXTS[0], "--max-output-length=7", "--block-size", 3)
    other = run(capfd, "--input_texts", TEXTS[0], "--max_output_length", 7, "--block_size=3")
    assert one == other
    assert "(0, 7)" in one


def test_a_text_that_is_a_path_stands_for_the_file(
    capfd: pytest.CaptureFixture[str], expected: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "prompt.txt").write_text(TEXTS[1])
    assert answers(run(capfd, "--input_texts", tmp_path / "prompt.txt")) == {0: expected[TEXTS[1]]}


def test_priority_is_dict_then_ids_then_texts(capfd: pytest.CaptureFixture[str], expected: dict[str, str]) -> None:
    entries = json.dumps([{"prompt": TEXTS[1], "adapter": "base"}])
    everything = ["--input_ids", "5,6", "--input_texts", TEXTS[0]]
    assert answers(run(capfd, "--input_dict", entries, *everything)) == {0: expected[TEXTS[1]]}
    with LLM(str(DENSE), tp=1, dtype="float32") as llm:
        (by_ids,) = llm.generate([5, 6], SamplingParams(temperature=0, max_tokens=20))
    assert answers(run(capfd, *everything)) == {0: by_ids.outputs[0].text}


def test_conversations_go_through_the_chat_template(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    out = tmp_path / "out.jsonl"
    run(capfd, "--is_chat_model", "--input_file", tmp_path / "chats.jsonl", "--output", out)
    with LLM(str(DENSE), tp=1, dtype="float32") as llm:
        theirs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=20))
        assert llm.tokenizer is not None
        assert "<|im_start|>" in str(theirs[0].prompt)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt_token_ids"] for line in lines] == [list(o.prompt_token_ids) for o in theirs]
    assert [line["token_ids"] for line in lines] == [list(o.outputs[0].token_ids) for o in theirs]
    literal = "{% for m in messages %}{{ m.content }}{% endfor %}"
    run(capfd, "--is_chat_model", "--chat_template", literal, "--input_texts", TEXTS[0], "--output", out)
    with LLM(str(DENSE), tp=1, dtype="float32") as llm:
        assert llm.tokenizer is not None
        assert json.loads(out.read_text())["prompt_token_ids"] == llm.tokenizer.encode(TEXTS[0])


def test_output_and_statistics_files(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, times = tmp_path / "out.jsonl", tmp_path / "times.csv"
    run(
        capfd, "--input_ids", "5,6,7", "9,8", "--load_tokenizer", "False", "--logprobs", 2, "--output", out, "--statistics", times
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1]
    assert [line["prompt_token_ids"] for line in lines] == [[5, 6, 7], [9, 8]]
    for line in lines:
        assert set(line) == {"index", "prompt_token_ids", "token_ids", "text", "finish_reason", "logprobs"}
        assert len(line["logprobs"]) == len(line["token_ids"]) == 20
        assert line["finish_reason"] == "length"
        for token, told in zip(line["token_ids"], line["logprobs"], strict=True):
            assert told[str(token)]["rank"] == 1
            assert told[str(token)]["logprob"] < 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "times.csv"]
    rows = list(csv.DictReader(times.open()))
    assert [(row["batch_size"], row["input_seq_len"], row["output_seq_len"]) for row in rows] == [
        ("1", "3", "20"),
        ("1", "2", "20"),
    ]
    assert all(float(row["e2e_time(ms)"]) > float(row["prefill_time(ms)"]) > 0 for row in rows)


def test_sampling_flags_reach_the_sampler(capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--input_texts", TEXTS[0], "--temperature", 0.9, "--top_p", 0.9, "--top_k", 40, "--repetition_penalty", 1.1]
    one = run(capfd, *flags, "--seed", 1)
    assert run(capfd, *flags, "--seed", 1) == one
    assert run(capfd, *flags, "--seed", 2) != one
    params = SamplingParams(max_tokens=20, temperature=0.9, top_p=0.9, top_k=40, repetition_penalty=1.1, seed=1)
    with LLM(str(DENSE), tp=1, dtype="float32") as llm:
        assert answers(one) == {0: llm.generate(TEXTS[0], params)[0].outputs[0].text}


def test_a_stop_text_ends_the_stream_before_it(capfd: pytest.CaptureFixture[str], expected: dict[str, str]) -> None:
    whole = expected[TEXTS[0]]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    assert answers(run(capfd, "--input_texts", TEXTS[0], "--stop", stop)) == {0: whole[: whole.index(stop)]}


def test_a_long_text_beyond_ascii_is_no_path(capfd: pytest.CaptureFixture[str]) -> None:
    assert "Generate[0] token num: (0, 3)" in run(capfd, "--input_texts", "深度学习是什么" * 14, "--max_output_length", 3)


def test_an_llm_that_is_never_closed_ends_well_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from qtp import LLM, SamplingParams\n"
        f"llm = LLM({str(DENSE)!r}, tp=2)\n"
        "print(len(llm.generate([[5, 6]], SamplingParams(max_tokens=3))[0].outputs[0].token_ids), 'tokens')\n"
    )
    torchrun = Path(sys.executable).parent / "torchrun"
    done = subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node", "2", script], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3 tokens\n"


def test_remote_code_flag_is_accepted_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert run_pa.main(["--model", str(DENSE), "--trust_remote_code", "--input_ids", "5", "--max_output_length", "2"]) == 0
    assert "nothing is executed" in caplog.text


STARTS = {
    "a lone process starts its ranks": [sys.executable, "-m", "qtp.run_pa", "--tp", "2"],
    "torchrun starts the ranks": ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "qtp.run_pa"],
    "bare torchrun, one process that starts the others": ["torchrun", "--standalone", "-m", "qtp.run_pa", "--tp", "3"],
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS.keys())
def test_every_start_gives_the_same_tokens(start: list[str], tmp_path: Path) -> None:
    with LLM(str(MOE), tp=1, dtype="float32") as llm:
        theirs = llm.generate([[5, 6, 7], [9, 8]], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    program = [str(Path(sys.executable).parent / start[0]), *start[1:]] if start[0] == "torchrun" else start
    flags = ["--dtype", "float32", "--input_ids", "5,6,7", "9,8", "--max_output_length", "24", "--ignore_eos"]
    flags += [
        "--max_position_embeddings",
        "100",
        "--max_prefill_batch_size",
        "1",
        "--max_prefill_tokens",
        "2",
        "--block_size",
        "5",
    ]
    out = tmp_path / "out.jsonl"
    command = [*program, "--model", str(MOE), *flags, "--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["token_ids"] for line in lines] == [list(o.outputs[0].token_ids) for o in theirs]
    assert done.stdout.count("Answer[") == 2
