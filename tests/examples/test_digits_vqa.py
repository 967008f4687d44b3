"""The digits example: what prepare.py writes, and evaluate.py end to end on a tiny checkpoint.

The tiny checkpoint has random weights, so its accuracy says nothing; what can be checked is that the prompt
is what Qwen2-VL expects (its own processor cannot be built without torchvision), that a batch is answered as
one by one, and that the figures and the exit code follow from the answers.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "digits_vqa"
TRAIN, TEST = 30, 5


def load_script(name: str) -> ModuleType:
    """A script of the example as a module; examples/ is no package."""
    spec = importlib.util.spec_from_file_location(f"digits_vqa_{name}", EXAMPLE / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {EXAMPLE / name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


prepare = load_script("prepare")
evaluate = load_script("evaluate")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "data"
    assert prepare.main(["--out", str(out), "--train", str(TRAIN), "--test", str(TEST)]) == 0
    return out


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Any:
    return AutoTokenizer.from_pretrained(data / "tokenizer")


@pytest.fixture(scope="module")
def checkpoint(data: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-VL directory as an export leaves it; random weights, so large that the picture matters."""
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
            "initializer_range": 0.3,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "initializer_range": 0.3,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    return folder


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def images_of(sample: dict[str, Any]) -> list[str]:
    return [part["image"] for m in sample["messages"] for part in m["content"] if part["type"] == "image"]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_pools_are_disjoint_and_stratified() -> None:
    labels = prepare.load_scans().labels_N
    pools = prepare.split_pools(labels, seed=0)
    assert not set(pools["train"]) & set(pools["test"])
    assert len(pools["train"]) + len(pools["test"]) == len(labels) == 1797
    for label in range(10):
        share = (labels[pools["train"]] == label).sum() / (labels == label).sum()
        assert share == pytest.approx(0.8, abs=0.01)


def test_no_scan_is_in_both_splits(data: Path) -> None:
    sources = json.loads((data / "sources.json").read_text(encoding="utf-8"))
    pools = prepare.split_pools(prepare.load_scans().labels_N, seed=0)
    for split in ("train", "test"):
        used = {index for image, scans in sources.items() if f"/{split}/" in image for index in scans}
        assert used and used <= set(pools[split].tolist())


@pytest.mark.parametrize("split", ["train", "test"])
def test_samples_are_well_formed(data: Path, split: str) -> None:
    samples = read_jsonl(data / f"{split}.jsonl")
    assert len(samples) == (TRAIN if split == "train" else TEST * len(prepare.QUESTIONS))
    assert len({sample["id"] for sample in samples}) == len(samples)
    for sample in samples:
        roles = [message["role"] for message in sample["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        assert all(part["type"] in ("image", "text") for m in sample["messages"] for part in m["content"])
        assert len(images_of(sample)) <= 1
        for image in images_of(sample):
            with Image.open(data / image) as picture:
                assert picture.mode == "RGB" and picture.format == "PNG"


def test_training_mixes_several_turns_and_text_only() -> None:
    rng = np.random.default_rng(0)
    turns = [len(prepare.picture_turns([1, 2], rng)) for _ in range(50)]
    assert set(turns) == {2, 3}
    for question, answer in (turn for _ in range(50) for turn in prepare.text_only_turns(rng)):
        given = int(question[-2])
        assert int(answer) == given + (1 if "after" in question else -1)


def test_answers_match_the_scans(data: Path) -> None:
    labels = prepare.load_scans().labels_N
    sources = json.loads((data / "sources.json").read_text(encoding="utf-8"))
    for sample in read_jsonl(data / "test.jsonl"):
        digits = [int(labels[index]) for index in sources[images_of(sample)[0]]]
        reading = " ".join(map(str, digits))
        expected = {"read": reading, "count": str(len(digits)), "largest": str(max(digits))}
        assert sample["messages"][-1]["content"][0]["text"] == expected[sample["kind"]]


def test_digits_are_drawn_left_to_right_and_upright() -> None:
    """Two scans to be told apart: ink only in the top left quarter, then ink only in the bottom right one."""
    scans = np.zeros((2, 8, 8), dtype=np.float32)
    scans[0, :4, :4] = scans[1, 4:, 4:] = 1
    for seed in range(20):
        picture = prepare.draw_picture(scans, 28, np.random.default_rng(seed)).convert("L")
        grey = np.asarray(picture, np.float32)
        ink = grey - np.median(grey) > 50
        rows, columns = np.nonzero(ink)
        left = columns < columns.mean()
        assert rows[left].mean() < rows[~left].mean()
        assert ink.sum() > 150


def test_pictures_vary_in_size_and_keep_their_shape(data: Path) -> None:
    sizes = set()
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28)
    for path in sorted((data / "images" / "train").iterdir()):
        with Image.open(path) as picture:
            sizes.add(picture.size)
            _, rows, columns = processor(picture, return_tensors="np")["image_grid_thw"][0]
            assert picture.height == pytest.approx(rows * 14, rel=0.09)
            assert picture.width == pytest.approx(columns * 14, rel=0.09)
    assert len(sizes) >= 4


def test_second_run_does_nothing_and_other_settings_make_it_anew(tmp_path: Path) -> None:
    out = tmp_path / "data"
    settings = prepare.Settings(train=4, test=1)
    assert prepare.prepare(out, settings, Console(quiet=True))
    first = files_below(out)
    assert not prepare.prepare(out, settings, Console(quiet=True))
    assert prepare.prepare(out, prepare.Settings(train=4, test=1, seed=1), Console(quiet=True))
    assert files_below(out) != first
    assert prepare.prepare(out, settings, Console(quiet=True))
    assert files_below(out) == first
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "write_tokenizer", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(tmp_path / "data", prepare.Settings(train=2, test=1), Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_foreign_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        prepare.main(["--out", str(tmp_path), "--train", "2", "--test", "1"])
    assert stop.value.code == 2
    assert "--out" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_tokenizer_round_trips_any_text(tokenizer: Any) -> None:
    for text in ("Which digits are shown, left to right?", "3 1 4", "Größe: 10 µm\n\n  \tπ≈3.14159 🙂 漢字"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_and_digits_are_single_tokens(tokenizer: Any) -> None:
    assert tokenizer.is_fast and len(tokenizer) <= 512
    for token in prepare.SPECIAL_TOKENS:
        assert tokenizer(token)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]
    digits = [tokenizer(str(digit))["input_ids"] for digit in range(10)]
    assert all(len(ids) == 1 for ids in digits)
    space = tokenizer(" ")["input_ids"]
    assert tokenizer("3 1 4")["input_ids"] == digits[3] + space + digits[1] + space + digits[4]
    assert tokenizer("after 31?")["input_ids"][-3:-1] == digits[3] + digits[1]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_chat_template_writes_chatml(tokenizer: Any) -> None:
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "How many?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
        {"role": "user", "content": "And now?"},
    ]
    turns = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How many?<|im_end|>\n"
        "<|im_start|>assistant\n3<|im_end|>\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n"
    )
    default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == default + turns
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == default + turns + "<|im_start|>assistant\n"
    with_system = [{"role": "system", "content": "Be brief."}, *messages]
    rendered = tokenizer.apply_chat_template(with_system, tokenize=False)
    assert rendered == "<|im_start|>system\nBe brief.<|im_end|>\n" + turns
    video = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]
    rendered = tokenizer.apply_chat_template(video, tokenize=False)
    assert rendered.endswith("user\n<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n")


def test_prompt_has_one_placeholder_per_merged_patch(data: Path, checkpoint: Path) -> None:
    loaded = evaluate.Checkpoint(checkpoint)
    for question in evaluate.read_questions(data / "test.jsonl", None):
        encoded = loaded.encode(question)
        (grid,) = encoded.grids
        assert encoded.ids.count(loaded.image_id) == grid.prod() // 4
        assert encoded.patches[0].shape == (grid.prod(), 1176)
        text = loaded.tokenizer.decode(encoded.ids)
        assert text.endswith(f"<|vision_end|>{question.text}<|im_end|>\n<|im_start|>assistant\n")
        assert question.expected not in text.split("assistant\n")[-1]


def test_a_batch_is_answered_as_one_by_one(data: Path, checkpoint: Path) -> None:
    loaded = evaluate.Checkpoint(checkpoint)
    questions = evaluate.read_questions(data / "test.jsonl", None)
    prompts = [loaded.encode(question) for question in questions]
    assert len({len(prompt.ids) for prompt in prompts}) > 1
    single = [loaded.generate([prompt], 8)[0] for prompt in prompts]
    assert loaded.generate(prompts, 8) == single
    assert len(set(single)) > 3  # else the comparison could not see a mix-up


def test_image_tokens_get_their_row_and_column_as_positions(data: Path, checkpoint: Path) -> None:
    """M-RoPE by hand: without the token types, transformers would silently number the image as text."""
    loaded = evaluate.Checkpoint(checkpoint)
    prompts = [loaded.encode(question) for question in evaluate.read_questions(data / "test.jsonl", None)]
    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"])

    loaded.model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    loaded.generate(prompts, 1)
    for prompt, found_3T in zip(prompts, seen[0][-3:].unbind(1), strict=True):
        (grid,) = prompt.grids
        rows, columns = grid[1] // 2, grid[2] // 2
        start = prompt.ids.index(loaded.image_id)
        image = [[start] * (rows * columns), *(np.indices((rows, columns)).reshape(2, -1) + start).tolist()]
        after = np.arange(len(prompt.ids) - start - rows * columns) + start + max(rows, columns)
        expected = [[*range(start), *axis, *after.tolist()] for axis in image]
        assert found_3T[:, -len(prompt.ids) :].tolist() == expected


def test_evaluate_reports_draws_and_judges(
    data: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "made" / "answers.png"
    arguments = [str(checkpoint), "--data", str(data), "--picture", str(picture)]
    assert evaluate.main(arguments) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]
    assert [(kind, row["count"]) for kind, row in scores.items()] == [
        ("read", TEST),
        ("count", TEST),
        ("largest", TEST),
        ("overall", TEST * 3),
    ]
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 900 and drawn.size[1] > 900
    assert evaluate.main([*arguments[:3], "--limit", "4", "--require", "1"]) == 1
    assert "--require" in capsys.readouterr().err


def test_score_counts_exact_matches_only(data: Path) -> None:
    questions = evaluate.read_questions(data / "test.jsonl", None)
    answers = [question.expected for question in questions]
    assert evaluate.score(questions, answers)["overall"] == {"right": 15, "count": 15, "exact_match": 1.0}
    answers[0] += " "
    answers[1] = ""
    scores = evaluate.score(questions, answers)
    assert [scores[kind]["right"] for kind in ("read", "count", "largest", "overall")] == [4, 4, 5, 13]


@pytest.mark.parametrize("missing", ["checkpoint", "data"])
def test_missing_input_is_named(
    missing: str, data: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"checkpoint": checkpoint, "data": data} | {missing: tmp_path}
    assert evaluate.main([str(paths["checkpoint"]), "--data", str(paths["data"])]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_malformed_line_is_named(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test.jsonl").write_text('{"id": "a", "messages": []}\n', encoding="utf-8")
    assert evaluate.main([str(checkpoint), "--data", str(tmp_path)]) == 2
    assert "line 1" in capsys.readouterr().err
