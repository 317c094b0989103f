"""Checkpoints: sharded, damaged, incomplete, oversized; and how much memory loading takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from paceline.engine.build import build_engine
from paceline.engine.models.config import UnsupportedModelError, load_model_config
from paceline.engine.models.decoder import DecoderModel
from paceline.engine.options import EngineOptions
from paceline.engine.weights import load_tensors, model_digest, weight_files
from tests.checkpoints import DEMO, random_checkpoint

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return random_checkpoint("qwen3", tmp_path / "qwen3")


def load(directory: Path, dtype: torch.dtype = torch.float32) -> DecoderModel:
    config = load_model_config(directory)
    return DecoderModel(config, load_tensors(directory), dtype=dtype, device="cpu")


def change(directory: Path, **tensors: torch.Tensor | None) -> None:
    """Write the checkpoint again with some tensors replaced, added or (None) removed."""
    path = directory / "model.safetensors"
    whole = {name: tensor.clone() for name, tensor in load_file(path).items()}
    whole.update({k: v for k, v in tensors.items() if v is not None})
    save_file({k: v for k, v in whole.items() if tensors.get(k, v) is not None}, path)


def shard(directory: Path) -> None:
    """Split the checkpoint into three files with an index."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    names = sorted(tensors)
    weight_map = {
        name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)
    }
    for file in set(weight_map.values()):
        save_file({n: tensors[n].clone() for n in names if weight_map[n] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    path.unlink()


def test_a_sharded_checkpoint_is_the_same_model(checkpoint: Path) -> None:
    whole = dict(load_tensors(checkpoint))
    whole = {name: tensor.clone() for name, tensor in whole.items()}
    shard(checkpoint)
    sharded = dict(load_tensors(checkpoint))
    assert sharded.keys() == whole.keys()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)
    load(checkpoint)


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    shard(checkpoint)
    (checkpoint / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="model-00002-of-00003"):
        load(checkpoint)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": []}}',
    ],
)
def test_an_index_that_is_none_is_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / INDEX).write_text(text)
    with pytest.raises(UnsupportedModelError, match=r"index\.json"):
        weight_files(checkpoint)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", ""])
def test_an_index_cannot_name_files_outside(checkpoint: Path, name: str) -> None:
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UnsupportedModelError):
        weight_files(checkpoint)


def test_only_safetensors_are_read(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="only safetensors"):
        load(checkpoint)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -10])
def test_a_truncated_file_is_named(checkpoint: Path, keep: int) -> None:
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors"):
        load(checkpoint)


@pytest.mark.parametrize(
    "junk", [b"\xff" * 8, b"\x10\x00\x00\x00\x00\x00\x00\x00" + b"not json" * 4]
)
def test_a_damaged_header_is_named(checkpoint: Path, junk: bytes) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(junk + path.read_bytes()[len(junk) :])
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors"):
        load(checkpoint)


@pytest.mark.parametrize(
    "name",
    [Q_PROJ, "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"],
)
def test_a_missing_tensor_is_named(checkpoint: Path, name: str) -> None:
    change(checkpoint, **{name: None})
    with pytest.raises(UnsupportedModelError, match=name):
        load(checkpoint)


@pytest.mark.parametrize("shape", [(128, 63), (127, 64), (64, 128), (128 * 64,), (1, 128, 64)])
def test_a_tensor_of_another_shape_is_named(checkpoint: Path, shape: tuple[int, ...]) -> None:
    change(checkpoint, **{Q_PROJ: torch.zeros(shape)})
    with pytest.raises(UnsupportedModelError, match=f"{Q_PROJ}.*expected"):
        load(checkpoint)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64])
def test_a_tensor_that_is_quantised_is_named(checkpoint: Path, dtype: torch.dtype) -> None:
    change(checkpoint, **{Q_PROJ: torch.zeros(128, 64).to(dtype)})
    with pytest.raises(UnsupportedModelError, match=f"{Q_PROJ}.*{dtype}"):
        load(checkpoint)


def test_a_tensor_that_nobody_uses_is_named(checkpoint: Path) -> None:
    change(checkpoint, **{"model.layers.1.self_attn.q_proj.weight_scale": torch.zeros(1)})
    with pytest.raises(UnsupportedModelError, match="weight_scale"):
        load(checkpoint)


def test_a_tensor_in_two_shards_is_named(checkpoint: Path) -> None:
    shard(checkpoint)
    first, *_ = weight_files(checkpoint)
    tensors = {name: tensor.clone() for name, tensor in load_file(first).items()}
    other = dict(load_tensors(checkpoint))
    extra = next(name for name in sorted(other) if name not in tensors)
    save_file({**tensors, extra: other[extra].clone()}, first)
    with pytest.raises(UnsupportedModelError, match=f"{extra} is in the checkpoint twice"):
        load(checkpoint)


def test_tied_embeddings_need_no_head_and_ignore_one(tmp_path: Path) -> None:
    directory = random_checkpoint("llama", tmp_path / "llama")
    model = load(directory)
    assert model._head_VE is model._embedding_VE
    change(directory, **{"lm_head.weight": torch.zeros(4096, 64)})
    model = load(directory)
    assert model._head_VE is model._embedding_VE


def test_the_digest_knows_weights_and_configuration_but_not_the_writer(checkpoint: Path) -> None:
    digest = model_digest(checkpoint)
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "transformers_version": "9.9"}))
    assert model_digest(checkpoint) == digest
    path.write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert model_digest(checkpoint) != digest
    path.write_text(json.dumps(config))
    data = bytearray((checkpoint / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(data)
    assert model_digest(checkpoint) != digest


def test_weights_in_the_right_type_are_not_copied(checkpoint: Path) -> None:
    model = load(checkpoint)
    mapped = model._layers[0].o.data_ptr()
    maps = Path("/proc/self/maps").read_text().splitlines()
    lines = [line.split() for line in maps if "model.safetensors" in line]
    ranges = [tuple(int(x, 16) for x in line[0].split("-")) for line in lines]
    assert any(start <= mapped < end for start, end in ranges)


_ALLOCATED = """
import sys
from pathlib import Path
import torch
from paceline.engine.models.config import load_model_config
from paceline.engine.models.decoder import DecoderModel
from paceline.engine.weights import load_tensors
def anonymous_kb():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
directory = Path(sys.argv[1])
before = anonymous_kb()
model = DecoderModel(load_model_config(directory), load_tensors(directory),
                     dtype=getattr(torch, sys.argv[2]), device="cpu")
print(anonymous_kb() - before)
"""


@pytest.mark.parametrize(
    ("dtype", "share"),
    [("bfloat16", 0.65), ("float32", 2.1)],
    ids=["fused tensors only", "all of them once, at twice the size"],
)
def test_loading_allocates_what_is_fused_or_cast_and_no_more(dtype: str, share: float) -> None:
    """qkv and gate/up are joined: 58 % of the demo model; a cast copies everything, once."""
    size_kb = (DEMO / "model.safetensors").stat().st_size / 1024
    command = [sys.executable, "-c", _ALLOCATED, str(DEMO), dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert int(result.stdout) < share * size_kb + 3000


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "f16"},
        {"block_size": 0},
        {"chunk_tokens": 0},
        {"max_num_seqs": 0},
        {"threads": 0},
        {"kv_memory_mb": 0},
        {"num_kv_blocks": 1},
        {"num_kv_blocks": -4},
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused(checkpoint: Path, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"dtype|expected at least 1|KV blocks"):
        build_engine(EngineOptions(model=str(checkpoint), **options))  # type: ignore[arg-type]
