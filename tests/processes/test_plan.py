"""qtp.plan says what a run then holds, from config and headers alone, and says no where it cannot fit."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qtp import LLM, cards, plan
from qtp.config import ModelConfig
from qtp.layout.spec import COMPRESSED
from qtp.layout.split import Grid
from qtp.quantization import Quantization
from qtp.resolve import shares
from qtp.weights.names import declare
from qtp.wire.codec import decode, encode
from qtp.wire.messages import StepPlan

ROOT = Path(__file__).parents[2]
DENSE, MOE = ROOT / "qtp/demo/dense", ROOT / "qtp/demo/moe"


def run(capfd: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    capfd.readouterr()
    code = plan.main([str(arg) for arg in argv])
    out, err = capfd.readouterr()
    assert err == ""
    return code, out


@pytest.mark.parametrize(("folder", "tp", "flags"), [(DENSE, 3, {}), (MOE, 4, {}), (MOE, 6, {"moe_ep": 3, "moe_tp": 2})])
def test_the_plan_is_what_the_ranks_then_hold(
    capfd: pytest.CaptureFixture[str], folder: Path, tp: int, flags: dict[str, int]
) -> None:
    argv = [part for name, value in flags.items() for part in (f"--{name}", value)]
    code, out = run(capfd, "--model", folder, "--tp", tp, "--memory", 1, *argv)
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.split() and line.split()[0].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(tp))
    with LLM(str(folder), tp=tp, communicator="loopback", block_size=16, num_kv_blocks=4, **flags) as llm:
        assert [int(row[-2]) for row in rows] == [ready.weight_bytes for ready in llm.ranks.ready]
        cache = llm.ranks.worker.cache
        assert int(rows[0][-1]) * 4 * 16 == 2 * cache.keys.numel() * cache.keys.element_size()
    layers = llm.model_config.num_layers
    assert f"{1 + 2 * layers} all_reduce of T x {2 * llm.model_config.hidden_size} bytes" in out


def test_it_says_no_where_it_cannot_fit(capfd: pytest.CaptureFixture[str]) -> None:
    code, out = run(capfd, "--model", DENSE, "--memory", 0.001)
    assert code == 1
    assert "no: the weights and a step's working memory alone do not fit" in out
    model = ModelConfig.load(DENSE)
    (share,) = shares(model, Grid.of(1), "bfloat16")
    fixed, kv = (
        share.weight_bytes + plan.working_bytes(model, share, "bfloat16", plan.STEP_TOKENS),
        2048 * share.kv_bytes_per_token,
    )
    code, out = run(capfd, "--model", DENSE, "--memory", (fixed + 0.5 * kv) / 2**30, "--max-len", 2048)
    assert code == 1
    assert "no: one sequence of 2048 tokens does not fit; raise --tp or --memory, or lower --max-len to 1024 or less" in out
    code, out = run(capfd, "--model", DENSE, "--memory", (fixed + 2.5 * kv) / 2**30, "--max-len", 2048)
    assert code == 0
    assert "sequences of 2048 tokens at once: 2" in out


def test_it_imports_no_torch() -> None:
    code = (
        f"import sys; from qtp import plan; plan.main(['--model', {str(MOE)!r}, '--tp', '4']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "yes: it fits" in done.stdout


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Qwen2-72B shape, 64 query heads and 8 KV heads, cut to one layer; its weights are holes in the file."""
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    code = """
import sys
from pathlib import Path
sys.path.insert(0, "scripts")
import make_checkpoint as m
model, out = m.replace(m.MODELS["qwen2-72b"], layers=1), Path(sys.argv[1])
out.mkdir()
wanted = list(m.tensors(model))
with open(out / "model.safetensors", "wb") as file:
    m.write_header(file, wanted, "BF16", 2)
    file.truncate(file.tell() + 2 * sum(tensor.elements for tensor in wanted))
m.write_json(out / "config.json", m.config_json(model, "bfloat16"))
"""
    subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, timeout=120, cwd=ROOT)
    return folder


def crossing(lines: list[str], name: str) -> tuple[int, int]:
    """(bytes, messages) that the line of `name` tells."""
    words = next(line for line in lines if line.strip().startswith(f"{name}:")).split()
    return int(words[words.index("bytes,") - 1]), int(words[words.index("messages") - 1])


def test_64_ranks_on_8_nodes(wide: Path) -> None:
    command = [sys.executable, "-m", "qtp.plan", "--model", wide, "--tp", "64", "--nodes", "8", "--batch", "64", "--memory", "8"]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - start < 5
    lines = done.stdout.splitlines()
    model = ModelConfig.load(wide)
    rows = shares(model, Grid.of(64), "bfloat16")
    nodes = [line.split() for line in lines if line.startswith("node ")]
    assert [row[2] for row in nodes] == [f"{first}-{first + 7}" for first in range(0, 64, 8)]
    for node, row in enumerate(nodes):
        here = rows[8 * node : 8 * node + 8]
        assert int(row[3]) == sum(s.weight_bytes for s in here)
        assert int(row[4]) == sum(plan.working_bytes(model, s, "bfloat16", plan.STEP_TOKENS) for s in here)
        assert int(row[5]) == sum(s.kv_bytes_per_token for s in here)
        assert float(row[6]) == 64
    assert "3 all_reduce of 2097152 bytes (summed in float32) and one all_gather of 1024 bytes a rank" in done.stdout
    assert crossing(lines, "gloo") == (3 * 2 * 63 * 32768 + 63 * 1024, 3 * 126 + 63)
    assert crossing(lines, "hierarchical") == (3 * 2 * 7 * 262144 + 7 * 8 * 1024, 3 * 14 + 7)
    told = next(line for line in lines if line.startswith("control traffic")).replace(",", "").split()
    numbers = [int(word) for word in told if word.isdigit()]
    frame = 4 + len(encode(plan.decode_step(64, model.max_position, 128)))
    assert numbers == [64, frame, 63, 63 * frame, 56 * frame]


def carried(members: int, size: int) -> tuple[int, int]:
    """(bytes over one link, messages over it) of a ring all_reduce, by passing parts on until every member has every sum."""
    part = -(-size // members)
    have = [{p: {m} for p in range(members)} for m in range(members)]  # of which members a part is the sum
    everyone, sent, rounds = set(range(members)), 0, 0
    for step in range(2 * (members - 1)):
        passed = [((m - step) % members, set(have[m][(m - step) % members])) for m in range(members)]
        for m, (p, sums) in enumerate(passed):
            there = have[(m + 1) % members]
            there[p] = sums if step >= members - 1 else there[p] | sums
        sent, rounds = sent + part, rounds + 1
    assert all(sums == everyone for each in have for sums in each.values())
    return sent, rounds


@pytest.mark.parametrize("members", [2, 3, 8, 64])
def test_a_ring_carries_what_the_formula_says(members: int) -> None:
    found = plan.ring_sum(1000, members)
    assert (found.sent, found.rounds) == carried(members, 1000)


@pytest.mark.parametrize(
    ("tp", "nodes", "expected"),
    [
        (8, 1, [(0, 8)]),
        (8, 3, [(0, 3), (3, 6), (6, 8)]),
        (5, 4, [(0, 2), (2, 3), (3, 4), (4, 5)]),
        (3, 3, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_ranks_are_spread_over_nodes_evenly(tp: int, nodes: int, expected: list[tuple[int, int]]) -> None:
    assert [(ranks.start, ranks.stop) for ranks in plan.placed(tp, nodes)] == expected


def test_uneven_nodes_and_one_node(capfd: pytest.CaptureFixture[str]) -> None:
    code, out = run(capfd, "--model", DENSE, "--tp", 4, "--nodes", 3, "--batch", 8, "--memory", 1)
    assert code == 0
    nodes = [line.split() for line in out.splitlines() if line.startswith("node ")]
    assert [(row[2], row[-1]) for row in nodes] == [("0-1", "2.00"), ("2-2", "1.00"), ("3-3", "1.00")]
    # 13 sums of 8 rows of 256 float32 values, then 128 bytes a rank, of 2 ranks where hosts pass on what they have
    assert crossing(out.splitlines(), "gloo") == (13 * 2 * 3 * 2048 + 3 * 128, 13 * 6 + 3)
    assert crossing(out.splitlines(), "hierarchical") == (13 * 2 * 2 * 2731 + 2 * 2 * 128, 13 * 4 + 2)
    code, out = run(capfd, "--model", DENSE, "--tp", 4, "--memory", 1)
    assert code == 0
    assert "node " not in out
    assert "in all, 0 of them to other hosts" in out
    assert "control traffic" not in run(capfd, "--model", DENSE)[1]


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (("--nodes", 5), "error: --nodes 5 is more than the 4 ranks of --tp; use 4 or fewer nodes, or raise --tp\n"),
        (("--nodes", 0), "error: --nodes 0 must be at least 1\n"),
        (("--nodes", -3), "error: --nodes -3 must be at least 1\n"),
        (("--batch", 0), "error: --batch 0 must be at least 1\n"),
    ],
)
def test_impossible_nodes_are_one_line(capfd: pytest.CaptureFixture[str], argv: tuple[object, ...], error: str) -> None:
    capfd.readouterr()
    assert plan.main(["--model", str(DENSE), "--tp", "4", *map(str, argv)]) == 2
    assert capfd.readouterr() == ("", error)


def test_the_decode_step_is_one_that_travels() -> None:
    step = plan.decode_step(256, 4096, 128)
    assert decode(encode(step)) == step
    assert isinstance(step, StepPlan)
    assert len({chunk.seq_id for chunk in step.chunks}) == 256
    assert sum(len(chunk.new_blocks) for chunk in step.chunks) == 2
    assert all(chunk.count == 1 and chunk.sample and len(chunk.appended) == 1 for chunk in step.chunks)


def card_rows(out: str) -> dict[int, str]:
    """The lines of the table of a card by tp."""
    return {int(line.split()[1]): line for line in out.splitlines() if line.startswith("tp ")}


def test_a_card_says_what_fits_and_how_fast_it_can_be(capfd: pytest.CaptureFixture[str]) -> None:
    """The dense demo at tp 1, by hand: one step reads all weights but the embedding, if that is no head as well."""
    code, out = run(capfd, "--model", DENSE, "--card", "h100", "--gpu-memory-utilization", 0.5, "--max-len", 1024, "--batch", 9)
    assert code == 0
    assert "card H100: 79.1 GiB, of which 0.5 are 39.55 GiB; it reads 3.35 TB/s and does 989.4 TFLOP/s in bfloat16" in out
    assert f"memory of a rank: {39.55:.2f} GiB; left for KV" in out
    model = ModelConfig.load(DENSE)
    (share,) = shares(model, Grid.of(1), "bfloat16")
    embedding = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size * 2
    read = share.weight_bytes - embedding
    one, many = 3.35e12 / read, 9 * 3.35e12 / (read + 9 * 1024 * share.kv_bytes_per_token)
    spare = int(int(79.1 * 2**30) * 0.5) - share.weight_bytes - plan.working_bytes(model, share, "bfloat16", plan.STEP_TOKENS)
    rows = card_rows(out)
    assert list(rows) == [tp for tp in (1, 2, 4, 8) if tp <= model.num_heads]
    assert f" {spare // share.kv_bytes_per_token}  {one:.0f}; {many:.0f} for 9 x 1024 tokens " in rows[1]
    heads, d, hidden = model.num_heads + model.num_kv_heads, model.head_dim, model.hidden_size
    met = model.num_layers * (2 * heads * d * hidden + 3 * hidden * model.intermediate_size)
    assert rows[1].split()[-1] == f"{989.4e12 / (2 * met):.0f}"


def test_a_card_that_is_too_small_says_no(capfd: pytest.CaptureFixture[str]) -> None:
    code, out = run(capfd, "--model", DENSE, "--card", "RTX4090", "--gpu_memory_utilization", 0.0001)
    assert code == 1
    assert card_rows(out)[1].endswith("does not fit")
    assert "do not fit; raise --tp or --gpu-memory-utilization" in out


def test_a_step_of_few_tokens_reads_few_experts() -> None:
    """At tp 1: top_k of the experts for one sequence, nearly all for many; everything else of a layer in any case."""
    model = ModelConfig.load(MOE)
    held = cards.loads(model, Grid.of(1), "bfloat16")
    assert model.moe is not None
    experts = 3 * model.hidden_size * model.moe.expert_intermediate_size * model.moe.num_experts * len(model.moe.layers) * 2
    whole = cards.bytes_read(model, held, 10**6)
    few = whole - cards.bytes_read(model, held, 1)
    assert few == pytest.approx(experts * (1 - model.moe.top_k / model.moe.num_experts), abs=2)
    assert cards.reached(model, 1) == pytest.approx(model.moe.top_k / model.moe.num_experts)
    assert 0.9 < cards.reached(model, 64) < 1.0
    assert cards.reached(ModelConfig.load(DENSE), 1) == 1.0


def test_cards_hold_compressed_weights_expanded() -> None:
    """As much as W8A8 takes, in memory and in what a step reads; a CPU computes from the streams."""
    model = ModelConfig.load(DENSE)
    linear = [part.name for spec in declare(model) for part in spec.parts if part.name.endswith("_proj.weight")]

    def of(kind: str) -> ModelConfig:
        types = {part.name: "FLOAT" for spec in declare(model) for part in spec.parts} | dict.fromkeys(linear, kind)
        told = Quantization(word=kind.lower(), types=types, group_size=0, kv_cache=None, source="a test")
        return replace(model, quantization=told)

    grid = Grid.of(2)
    plain, small = of("W8A8"), of("W8A8SC")
    assert cards.loads(small, grid, "bfloat16") == cards.loads(plain, grid, "bfloat16")
    on_card, whole, on_cpu = (
        shares(m, grid, "bfloat16", expanded=expanded)[0].weight_bytes
        for m, expanded in ((small, True), (plain, False), (small, False))
    )
    compressed = sum(spec.elements(0, grid) for spec in declare(small) if spec.dtype == COMPRESSED)
    assert on_card == whole
    assert compressed > 0.5 * whole
    assert whole - on_cpu == pytest.approx(0.46 * compressed, rel=1e-3)


@pytest.mark.parametrize("card", cards.CARDS.values(), ids=lambda card: card.name)
def test_cards_are_plausible(card: cards.Card) -> None:
    assert cards.card(card.name.swapcase()) is card
    assert 20 * 2**30 < card.memory < 200 * 2**30
    assert 100 < card.peak / card.bandwidth < 500, "operations for each byte read"


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (("--card", "B1"), "--card B1 is unknown; choose H100, H200, A100-80, A100-40, L40S, RTX4090, 910B, or give --memory"),
        (("--card", "H100", "--memory", 3), "--memory 3 and --card H100 both say what a rank has; give one of them"),
        (("--card", "H100", "--gpu_memory_utilization", 2), "--gpu_memory_utilization 2 must be above 0 and at most 1"),
        (("--gpu-memory-utilization", 0.5), "--gpu_memory_utilization 0.5 is of a card; name it with --card, or give --memory"),
    ],
)
def test_cards_that_cannot_be_are_one_line(capfd: pytest.CaptureFixture[str], argv: tuple[object, ...], error: str) -> None:
    capfd.readouterr()
    assert plan.main(["--model", str(DENSE), *map(str, argv)]) == 2
    assert capfd.readouterr() == ("", f"error: {error}\n")
