"""Trains the two demo checkpoints that ship inside the package: qtp/demo/dense and qtp/demo/moe.

Both are small Qwen2 models in the Hugging Face layout, trained on the source of the running interpreter's
standard library with transformers' own models and loss, as two processes side by side. The tokenizer, the
order of the data and the first weights are fixed by the seed; the number of steps follows from the time
budget and the speed of the machine, so two runs end near each other but not at the same weights.

Shapes: B sequences of a batch, T tokens of a sequence, N tokens of the corpus.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

DEMO = Path(__file__).resolve().parent.parent / "qtp" / "demo"
HELD_OUT = tuple(f"{name}.py" for name in ("statistics", "heapq", "textwrap", "fractions", "shlex", "calendar", "queue", "csv"))
HELD_OUT_CHARACTERS_PER_MODULE = 12_000
SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data",
    "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip
ENDOFTEXT, IM_START, IM_END = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENIZER_SIZE = 4096
VOCAB_SIZE = 4160
WINDOW = 512
RECORD = "training.json"
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How one model is trained. `seconds` is wall time, evaluations included. `start` is a folder that an earlier training
    wrote, to go on from its weights; None: from random ones."""

    name: str
    seconds: float
    threads: int
    start: Path | None = None
    batch: int = 2
    sequence: int = 512
    peak_lr: float
    final_lr_share: float = 0.02
    warmup_share: float = 0.03
    weight_decay: float = 0.1
    clip: float = 1.0
    bias_std: float = 0.1
    seconds_per_evaluation: float = 180
    patience: int = 3
    seed: int = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Perplexity:
    """The content of perplexity.json: see `perplexity` for the exact definition."""

    held_out_perplexity: float
    tokens: int
    window: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The content of training.json, for the table in README.md: all that was spent on a model, earlier trainings included."""

    name: str
    parameters: int
    steps: int
    tokens: int
    minutes: float


def read_corpus() -> tuple[list[str], str]:
    """The training documents (one a module, in path order) and the held-out text.

    The held-out text is the head of each module of HELD_OUT, in that order, cut at a line end.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and str(relative) not in HELD_OUT:
            documents.append(path.read_text(encoding="utf-8", errors="ignore"))
    heads = []
    for name in HELD_OUT:
        text = (root / name).read_text(encoding="utf-8")
        head = text[:HELD_OUT_CHARACTERS_PER_MODULE]
        heads.append(head[: head.rindex("\n") + 1])
    return documents, "".join(heads)


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """A byte-level BPE built as Qwen2's is; the ids after its vocabulary are those of SPECIALS, in order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    assert tokenizer.get_vocab_size() == TOKENIZER_SIZE + len(SPECIALS) <= VOCAB_SIZE
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and a tokenizer_config.json in the words of Qwen2-Instruct."""
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in SPECIALS
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [IM_START, IM_END],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": 2048,
        "pad_token": ENDOFTEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def build_model(name: str) -> PreTrainedModel:
    """A freshly initialised float32 model: 'dense' (Qwen2) or 'moe' (Qwen2-MoE)."""
    endoftext, _, im_end = range(TOKENIZER_SIZE, TOKENIZER_SIZE + len(SPECIALS))
    shared: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 2048,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "bos_token_id": endoftext,
        "eos_token_id": im_end,
        "pad_token_id": endoftext,
    }
    if name == "dense":
        return Qwen2ForCausalLM(
            Qwen2Config(
                hidden_size=256,
                intermediate_size=704,
                num_hidden_layers=6,
                num_attention_heads=8,
                tie_word_embeddings=True,
                **shared,
            )
        )
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=6,
            num_experts=10,
            num_experts_per_tok=3,
            moe_intermediate_size=96,
            shared_expert_intermediate_size=256,
            norm_topk_prob=False,
            router_aux_loss_coef=0.01,
            tie_word_embeddings=False,
            **shared,
        )
    )


def batches(ids_N: np.ndarray, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Endless [B, T] batches: each epoch cuts the corpus from a new random offset and shuffles the pieces."""
    random = np.random.default_rng(recipe.seed)
    length = recipe.sequence
    while True:
        offset = int(random.integers(length))
        pieces = ids_N[offset : offset + (len(ids_N) - offset) // length * length].reshape(-1, length)
        order = random.permutation(len(pieces))
        for start in range(0, len(order) - recipe.batch + 1, recipe.batch):
            yield torch.from_numpy(pieces[order[start : start + recipe.batch]].astype(np.int64))


@torch.inference_mode()
def perplexity(model: PreTrainedModel, ids: list[int]) -> Perplexity:
    """Perplexity of `model` over the token ids of a text.

    The text is encoded whole, no special token added. The ids are cut into non-overlapping windows of WINDOW
    tokens; the last, shorter window counts too. Each window is a sequence of its own, from position 0: its
    first token is context only, each other token is predicted from the tokens before it in the same window.
    The log-softmax is taken in float32 over all `vocab_size` logits, padded ids included. The result is
    exp(sum of negative log-likelihoods / number of predicted tokens); `tokens` is that number.
    """
    total, count = 0.0, 0
    for start in range(0, len(ids), WINDOW):
        window_T = torch.tensor(ids[start : start + WINDOW], device=model.device)
        logits = model(input_ids=window_T[None, :-1]).logits[0].float()
        total += torch.nn.functional.cross_entropy(logits, window_T[1:], reduction="sum").item()
        count += len(window_T) - 1
    return Perplexity(held_out_perplexity=math.exp(total / count), tokens=count, window=WINDOW)


def learning_rate(progress: float, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to `final_lr_share` of the peak; `progress` runs from 0 to 1."""
    if progress < recipe.warmup_share:
        return recipe.peak_lr * (progress / recipe.warmup_share)
    turn = math.pi * (progress - recipe.warmup_share) / (1 - recipe.warmup_share)
    return recipe.peak_lr * (recipe.final_lr_share + (1 - recipe.final_lr_share) * (1 + math.cos(turn)) / 2)


def train(recipe: Recipe, ids_N: np.ndarray, held_out: list[int], folder: Path) -> None:
    """Trains one model within `recipe.seconds`; writes its weights, configs and outcome.json into `folder`.

    Ends early once the held-out perplexity has not improved for `patience` evaluations. The weights of the
    best evaluation are the ones that are written.
    """
    started = time.monotonic()
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.name)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            torch.nn.init.normal_(parameter, std=recipe.bias_std)
    before = Outcome(name=recipe.name, parameters=0, steps=0, tokens=0, minutes=0.0)
    if recipe.start is not None:
        model.load_state_dict(type(model).from_pretrained(recipe.start, dtype=torch.float32).state_dict())
        before = Outcome(**json.loads((recipe.start / RECORD).read_text(encoding="utf-8")))
    routed = {"output_router_logits": True} if recipe.name == "moe" else {}
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    best, best_state, worse, steps, evaluated = math.inf, {}, 0, 0, started
    source = batches(ids_N, recipe)
    position = 0 if recipe.name == "dense" else 1
    bar = tqdm(total=100, desc=recipe.name, position=position, mininterval=5, unit="%")
    progress = 0.0
    while progress < 1 and worse < recipe.patience:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, recipe)
        batch_BT = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch_BT, labels=batch_BT, **routed).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        steps += 1
        now = time.monotonic()
        progress = min((now - started) / recipe.seconds, 1.0)
        if progress == 1 or now - evaluated > recipe.seconds_per_evaluation:
            evaluated = now
            value = perplexity(model, held_out).held_out_perplexity
            worse = 0 if value < best else worse + 1
            if value < best:
                best = value
                best_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            tqdm.write(f"{recipe.name}: step {steps}, loss {loss.item():.3f}, held-out perplexity {value:.3f}")
        bar.update(round(progress * 100, 1) - bar.n)
    bar.close()
    model.load_state_dict(best_state)
    save_model(model, folder)
    outcome = Outcome(
        name=recipe.name,
        parameters=sum(p.numel() for p in model.parameters()),
        steps=before.steps + steps,
        tokens=before.tokens + steps * recipe.batch * recipe.sequence,
        minutes=before.minutes + (time.monotonic() - started) / 60,
    )
    write_json(folder / RECORD, asdict(outcome))


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Writes bfloat16 weights under the classic names, one tensor an expert; configs for old readers too."""
    endoftext, _, im_end = range(TOKENIZER_SIZE, TOKENIZER_SIZE + len(SPECIALS))
    model = model.bfloat16()
    model.generation_config = GenerationConfig(
        bos_token_id=endoftext, eos_token_id=[im_end, endoftext], pad_token_id=endoftext, do_sample=False
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"rope_theta": config["rope_parameters"]["rope_theta"], "torch_dtype": config["dtype"]}
    write_json(folder / "config.json", dict(sorted(config.items())))


def measure(folder: Path, text: str) -> Perplexity:
    """Reads a finished checkpoint back, computes in float32, and writes its perplexity.json."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False)
    result = perplexity(model, ids)
    write_json(folder / "perplexity.json", asdict(result))
    return result


def readme(outcomes: list[Outcome], results: list[Perplexity]) -> str:
    rows = "\n".join(
        f"| `{outcome.name}` | {outcome.parameters:,} | {outcome.steps:,} steps, "
        f"{outcome.tokens / 1e6:.1f} M tokens, {outcome.minutes:.0f} min | {result.held_out_perplexity:.3f} |"
        for outcome, result in zip(outcomes, results, strict=True)
    )
    return f"""# Demo checkpoints

Two small models in the Hugging Face layout, so that everything here can be tried and tested without a
download. `dense` is a Qwen2 with tied embeddings, `moe` a Qwen2-MoE with 10 experts (top 3) and a shared
expert. They are trained by `scripts/train_demo.py` on the Python standard library and continue Python source;
they know the tokens of the ChatML template but were never taught to chat.

| model | parameters | training | held-out perplexity |
|---|---|---|---|
{rows}

The perplexity is that of the bfloat16 weights, computed in float32 over `held_out.txt` in non-overlapping
windows of {WINDOW} tokens; `perplexity` in `scripts/train_demo.py` says exactly how. It is a mean over
{results[0].tokens:,} predicted tokens of this tokenizer, so compare it only with itself.

`held_out.txt` holds the heads of {len(HELD_OUT)} modules (HELD_OUT in the script), left out of the training
text and of the tokenizer's. It is part of CPython, under the Python Software Foundation licence.
"""


def replace_entries(source: Path, target: Path) -> None:
    """Moves every entry of `source` into `target` by renaming; one in the way is set aside, then deleted."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(source.iterdir()):
        place = target / entry.name
        old = target / f".{entry.name}.old"
        if place.exists():
            place.rename(old)
        entry.rename(place)
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    source.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="wall time of the two together")
    parser.add_argument("--start", type=Path, help="go on from the models that an earlier run wrote there")
    parser.add_argument("--peak-lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--out", type=Path, default=DEMO, help="default: the package's own folder")
    args = parser.parse_args()

    documents, text = read_corpus()
    tokenizer = train_tokenizer(documents)
    endoftext = tokenizer.token_to_id(ENDOFTEXT)
    encoded = tokenizer.encode_batch(documents, add_special_tokens=False)
    ids_N = np.concatenate([np.array([*document.ids, endoftext], dtype=np.uint16) for document in encoded])
    held_out = tokenizer.encode(text, add_special_tokens=False).ids
    characters = sum(map(len, documents))
    print(f"corpus: {characters:,} characters, {len(ids_N):,} tokens; held out: {len(held_out):,} tokens")

    args.out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".demo-", dir=args.out.parent))
    threads = max((os.cpu_count() or 2) // 2, 1)
    recipe = Recipe(name="dense", seconds=args.minutes * 60, threads=threads, peak_lr=args.peak_lr)
    recipes = [replace(recipe, name=name, start=args.start / name if args.start else None) for name in ("dense", "moe")]
    spawn = multiprocessing.get_context("spawn")
    processes = []
    for recipe in recipes:
        folder = work / recipe.name
        folder.mkdir()
        save_tokenizer(tokenizer, folder)
        process = spawn.Process(target=train, args=(recipe, ids_N, held_out, folder), name=recipe.name)
        process.start()
        processes.append(process)
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"training of {process.name} ended with {process.exitcode}; files are in {work}")

    outcomes, results = [], []
    for recipe in recipes:
        record = work / recipe.name / RECORD
        outcomes.append(Outcome(**json.loads(record.read_text(encoding="utf-8"))))
        results.append(measure(work / recipe.name, text))
        print(outcomes[-1], results[-1], sep="\n")
    (work / "held_out.txt").write_text(text, encoding="utf-8", newline="\n")
    (work / "README.md").write_text(readme(outcomes, results), encoding="utf-8")
    replace_entries(work, args.out)


if __name__ == "__main__":
    main()
