"""The user's mistakes: one clear line that names the thing and the way out, exit code 2, no traceback, nothing half-written.

Most cases run the command's own `main` in this process; the last ones start real ranks and see that all of them are gone.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qtp import plan, run_pa

ROOT = Path(__file__).parents[2]
DENSE, MOE = ROOT / "qtp/demo/dense", ROOT / "qtp/demo/moe"
IDS = ["--load_tokenizer", "False", "--input_ids", "5,6,7"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the dense demo checkpoint, to be spoilt."""
    shutil.copytree(DENSE, tmp_path / "model")
    return tmp_path / "model"


def refused(capfd: pytest.CaptureFixture[str], *argv: object, command: Callable[[list[str]], int] = run_pa.main) -> str:
    """The one line that a command prints when it refuses. Asserts exit code 2, nothing on stdout, no traceback."""
    capfd.readouterr()
    code = command([str(arg) for arg in argv])
    out, err = capfd.readouterr()
    assert code == 2, err
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in err
    return lines[0]


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_header(folder: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    """Rewrites the safetensors header in place; `change` may not make it longer."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    path.write_bytes(content[:8] + text.ljust(length) + content[8 + length :])


def test_folder_that_is_not_there(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = refused(capfd, "--model", tmp_path / "nowhere", *IDS)
    assert "nowhere" in line
    assert "no such folder" in line


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(capfd: pytest.CaptureFixture[str], model: Path, name: str) -> None:
    (model / name).unlink()
    line = refused(capfd, "--model", model, *IDS)
    assert str(model) in line
    assert "safetensors" in line or name in line


def test_missing_tokenizer(capfd: pytest.CaptureFixture[str], model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert "--load_tokenizer False" in refused(capfd, "--model", model)


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_truncated_weights(capfd: pytest.CaptureFixture[str], model: Path, kept: int) -> None:
    path = model / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    line = refused(capfd, "--model", model, *IDS)
    assert str(path) in line
    assert "truncated" in line
    assert "fetch the file again" in line


def test_missing_tensor(capfd: pytest.CaptureFixture[str], model: Path) -> None:
    edit_header(model, lambda header: void(header.pop("model.layers.1.self_attn.k_proj.bias")))
    assert "model.layers.1.self_attn.k_proj.bias is missing" in refused(capfd, "--model", model, *IDS)


def test_tensor_of_the_wrong_shape(capfd: pytest.CaptureFixture[str], model: Path) -> None:
    edit_config(model, intermediate_size=696)
    line = refused(capfd, "--model", model, *IDS)
    assert "mlp.gate_proj.weight has shape" in line
    assert "696" in line


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq' is not supported"),
        ({"dtype": None, "torch_dtype": None}, "give --dtype"),
    ],
)
def test_config_that_is_not_supported(
    capfd: pytest.CaptureFixture[str], model: Path, changes: dict[str, object], named: str
) -> None:
    edit_config(model, **changes)
    line = refused(capfd, "--model", model, *IDS)
    assert named in line
    assert "config.json" in line


def test_a_rank_that_never_comes_is_one_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert run_pa.main(["--model", str(DENSE), "--timeout", "1", *IDS]) == 1
    err = capfd.readouterr().err
    assert "error: ranks [1] did not join within 1 s" in err
    assert "Traceback" not in err


def test_a_rank_with_another_model_is_named(model: Path) -> None:
    edit_config(model, rms_norm_eps=1e-4)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launched = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank, folder in enumerate((DENSE, model)):
        environment = {**os.environ, **launched, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        argv = [sys.executable, "-m", "qtp.run_pa", "--model", str(folder), *IDS]
        ranks.append(subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT))
    (out, err), _ = (process.communicate(timeout=120) for process in ranks)
    assert out == ""
    assert ranks[0].returncode == 2
    assert "error: rank 1: its checkpoint or its settings differ from those of rank 0" in err
    assert "Traceback" not in err


def test_config_that_is_not_json(capfd: pytest.CaptureFixture[str], model: Path) -> None:
    (model / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refused(capfd, "--model", model, *IDS)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--dtype", "float8"], "float8"),
        (["--device", "tpu"], "tpu"),
        (["--communicator", "pigeon"], "pigeon"),
        (["--input_texts", "a " * 1100], "--max_input_length is 1024"),
        (["--input_texts", "a " * 2600, "--max_input_length", "9999"], "the limit is 2047"),
        (["--input_texts", ""], "is empty"),
        (["--input_ids", ","], "the prompt is empty"),
        (["--input_ids", "1,99999"], "token id 99999 is outside the vocabulary"),
        (["--input_ids", "1,-4"], "token id -4 is outside the vocabulary"),
        (["--input_ids", "1,two"], "is not a list of ids"),
        (["--tp", "9"], "more than the 8 query heads"),
        (["--tp", "0"], "tp 0"),
        (["--moe_ep", "3", "--tp", "2"], "two factors of 2"),
        (
            ["--num_kv_blocks", "1", "--block_size", "4", "--input_ids", "1,2,3,4,5"],
            "need 6 KV blocks of 4 tokens, and there are 1",
        ),
        (["--block_size", "0"], "block_size 0"),
        (["--max_output_length", "0"], "--max_output_length 0"),
        (["--max_position_embeddings", "4", "--input_ids", "1,2,3,4"], "the limit is 3"),
        (["--input_dict", "[{"], "--input_dict is not valid JSON"),
        (["--input_dict", "{}"], "--input_dict must be a JSON list"),
        (["--input_dict", '[{"text": "a"}]'], "--input_dict entry 0"),
        (["--input_dict", '[{"prompt": "a"}, {"prompt": "b", "adapter": "mine"}]'], "entry 1 names adapter 'mine'"),
        (["--load_tokenizer", "False"], "--load_tokenizer False takes --input_ids"),
        (["--load_tokenizer", "False", "--input_ids", "1", "--stop", "x"], "stop texts need a tokenizer"),
        (["--load_tokenizer", "maybe"], "'maybe' is neither True nor False"),
        (["--temperature", "-1"], "temperature -1.0"),
        (["--top_p", "0"], "top_p 0.0"),
        (["--lora_modules", '{"a": "b"}'], "LoRA is not supported yet"),
        (["--is_embedding_model"], "embedding models are not supported yet"),
        (["--pp", "2"], "pipeline parallelism is not supported yet"),
        (["--dp", "2"], "data parallelism is not supported yet"),
        (["--sp", "2"], "sequence parallelism is not supported yet"),
        (["--cp", "2"], "context parallelism is not supported yet"),
        (["--output", "/nowhere/at/all.jsonl"], "its folder does not exist"),
        (["--output", "/proc/answers.jsonl"], "/proc/answers.jsonl: cannot be written"),
        (["--output", "/"], "is a folder"),
        (["--is_chat_model", "--chat_template", "/nowhere/x.jinja"], "neither a file nor a jinja template"),
        (["--is_chat_model", "--chat_template", "{{ 1 / 0 }}"], "ZeroDivisionError"),
        (["--chat_template", "{{ messages }}"], "add --is_chat_model"),
        (["--num_kv_blocks", "1000000000"], "KV blocks need"),
        (["--timeout", "inf"], "timeout inf must be a number above 0"),
        (["--input_texts", "\udcff"], "is not valid UTF-8"),
        (["--input_dict", "[" * 100_000], "--input_dict is not valid JSON"),
        (["--max_prefill_tokens", "0"], "--max_prefill_tokens 0"),
        (["--communicator", "solo", "--tp", "2"], "'solo' serves one rank, not tp 2"),
        (["--no_such_flag"], "--no_such_flag"),
        (["--tp", "two"], "--tp"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_flag_that_cannot_be(capfd: pytest.CaptureFixture[str], flags: list[str], named: str) -> None:
    assert named in refused(capfd, "--model", DENSE, *flags)


@pytest.mark.parametrize("line", ["{", '"text"', "[]", '[{"role": "user"}]', '[{"role": "user", "content": 5}]', "[5]"])
def test_malformed_line_of_an_input_file(capfd: pytest.CaptureFixture[str], tmp_path: Path, line: str) -> None:
    good = json.dumps([{"role": "user", "content": "hello"}])
    (tmp_path / "chats.jsonl").write_text(f"{good}\n{line}\n")
    told = refused(capfd, "--model", DENSE, "--is_chat_model", "--input_file", tmp_path / "chats.jsonl")
    assert "chats.jsonl line 2" in told


def test_input_file_that_is_not_there(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "cannot be read" in refused(capfd, "--model", DENSE, "--is_chat_model", "--input_file", tmp_path / "no.jsonl")


def test_plan_refuses_in_the_same_way(capfd: pytest.CaptureFixture[str], model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"1234")
    assert "truncated" in refused(capfd, "--model", model, command=plan.main)
    assert "more than the 8 query heads" in refused(capfd, "--model", DENSE, "--tp", 9, command=plan.main)


def test_tp_that_disagrees_with_the_launcher(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    line = refused(capfd, "--model", DENSE, "--tp", "3", *IDS)
    assert "tp 3 disagrees with the world size 2" in line


def test_environment_that_makes_no_sense(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE is 'two'" in refused(capfd, "--model", DENSE, *IDS)


def run_ranks(*command: object) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process group of its own and asserts that nothing of the group is left when it ends."""
    argv = [str(part) for part in command]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    out, err = process.communicate(timeout=120)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def test_every_rank_is_gone_after_a_mistake_of_a_lone_process(model: Path) -> None:
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-1])
    done = run_ranks(sys.executable, "-m", "qtp.run_pa", "--model", model, "--tp", 2, *IDS)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert "truncated" in line


def test_under_torchrun_one_rank_speaks_and_all_are_gone() -> None:
    torchrun = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc-per-node", 2]
    done = run_ranks(*torchrun, "-m", "qtp.run_pa", "--model", MOE, "--tp", 3, *IDS)
    assert done.returncode != 0
    assert done.stderr.count("error: tp 3 disagrees with the world size 2") == 1
    assert done.stderr.count("error: ") == 1
    assert "exitcode  : 2" in done.stderr  # torchrun's own report of the first rank that ended


def void(_: object) -> None:
    """Drops a result."""
