"""Every form of a model's name leads to a checked folder, or to an error that says what to do."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.torch import load_file, save_file

from aiollm.hub.errors import HubError
from aiollm.hub.resolve import ModelFiles, resolve


def quiet(message: str, part: float | None) -> None:
    pass


def find(model: str | Path, **options: Any) -> ModelFiles:
    return resolve(str(model), progress=quiet, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with config.json and one whole weight file."""
    path = tmp_path / "my-model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file({"a": torch.ones(4)}, path / "model.safetensors")
    return path


def test_a_whole_folder_is_taken_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(folder) == ModelFiles(str(folder), "my-model", "folder")
    monkeypatch.chdir(folder)
    assert find(".").name == "my-model"
    monkeypatch.chdir(folder.parent.parent)
    assert find(f"{folder.parent.name}/my-model").folder == str(folder)  # looks like a hub id, but it is here


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(cache: Path, tmp_path: Path, write_gguf: Any) -> None:
    path = tmp_path / "Tiny [Q8].gguf"
    write_gguf(path)
    first = find(path)
    assert first.name == "Tiny [Q8]"
    assert Path(first.folder).parent == cache
    stamp = (Path(first.folder) / "model.safetensors").stat().st_ino
    assert find(path) == first
    assert (Path(first.folder) / "model.safetensors").stat().st_ino == stamp
    write_gguf(path, "qwen3")
    assert find(path) == first
    assert json.loads((Path(first.folder) / "config.json").read_text())["model_type"] == "qwen3"


def test_a_truncated_gguf_file_is_refused_and_leaves_nothing(cache: Path, tmp_path: Path, write_gguf: Any) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(HubError, match=r"tiny.gguf is truncated: tensor .* ends at byte \d+, the file has \d+"):
        find(path)
    assert [entry.suffix for entry in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth"])
def test_a_pickled_checkpoint_is_refused_with_a_command_that_converts_it(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "it's a [model]"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    shared = torch.arange(6.0).reshape(2, 3).T
    torch.save({"a": shared, "b": shared}, folder / f"pytorch_model-00001-of-00002.{suffix}")
    torch.save({"c": torch.ones(2), "step": 3}, folder / f"pytorch_model-00002-of-00002.{suffix}")
    torch.save({"step": Path}, folder / f"optimizer.{suffix}")
    with pytest.raises(HubError, match="pickled checkpoints are not loaded, because they can run code") as refusal:
        find(folder)
    command = str(refusal.value).partition("convert with: ")[2]
    assert command.startswith(f"{sys.executable} -m aiollm convert ")
    subprocess.run(command, shell=True, check=True)
    find(folder)
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert tensors.keys() == {"a", "b", "c"}
    assert torch.equal(tensors["b"], shared)


def test_weights_are_not_needed_for_a_dummy_load(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(HubError, match=r"has no \*.safetensors files; --load_format dummy"):
        find(folder)
    assert find(folder, need_weights=False).folder == str(folder)
    (folder / "config.json").unlink()
    with pytest.raises(HubError, match=r"no config.json"):
        find(folder, need_weights=False)


def test_a_folder_with_a_gguf_file_only_points_to_it(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").touch()
    with pytest.raises(HubError, match=r"no config.json: it holds x.gguf, which can be given itself"):
        find(tmp_path)


def test_a_missing_shard_is_named(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HubError, match=r"lacks 1 of 2 weight files, first model-2\.safetensors"):
        find(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git-lfs pointer"),
        ((100_000_001).to_bytes(8, "little") + b'{"a": ', "header of 100000001 bytes, over the limit of 100000000"),
        (b"", "header cannot be read"),
        (b"\x10\0\0\0\0\0\0\0{'not json'      ", "header cannot be read"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(folder: Path, content: bytes, words: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(HubError, match=words):
        find(folder)


def test_a_cut_safetensors_file_is_refused(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-3])
    with pytest.raises(HubError, match=f"damaged: {len(whole) - 3} bytes, its header says {len(whole)}"):
        find(folder)


@pytest.mark.parametrize("nonsense", ["llama", "/no/such/folder", "a/b/c", "missing.gguf", "org/missing.gguf", "../up"])
def test_nonsense_is_answered_with_the_accepted_forms(nonsense: str) -> None:
    with pytest.raises(HubError, match=r"not here.*folder with config.json.*\.gguf file.*org/name"):
        find(nonsense)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(HubError, match="is no model: give a folder"):
        find(tmp_path / "notes.txt")


def test_a_hub_id_becomes_a_snapshot_without_code_or_pickles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def snapshot(model: str, **options: Any) -> str:
        calls.append((model, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    expected = ModelFiles(str(folder), "org/name", "Hugging Face hub, org/name at v2")
    assert find("org/name", revision="v2") == expected
    find("org/name", need_weights=False)
    templates = ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
    files = ["config.json", "model-1.safetensors", "tokenizer.model", *templates, "x.py", "y.bin", "z.pth"]
    kept = [list(filter_repo_objects(files, allow_patterns=options["allow_patterns"])) for _, options in calls]
    small = [files[0], *files[2:5]]
    assert kept == [small, files[:5], small]
    assert [options["revision"] for _, options in calls] == ["v2", "v2", None]


def test_weights_are_downloaded_for_a_model_that_can_be_served_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    weights = (folder / "model.safetensors").rename(folder / "later")

    def snapshot(model: str, *, allow_patterns: list[str], **options: Any) -> str:
        with_weights = bool(list(filter_repo_objects(["x.safetensors"], allow_patterns=allow_patterns)))
        steps.append("weights" if with_weights else "small files")
        if with_weights and weights.exists():
            weights.rename(folder / "model.safetensors")
        return str(folder)

    def refuse(found: Path) -> None:
        assert found == folder
        steps.append("check")
        raise HubError("no such architecture")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(HubError, match="no such architecture"):
        find("org/name", check=refuse)
    assert steps == ["small files", "check"]
    find("org/name", check=lambda found: steps.append("check"))
    assert steps[2:] == ["small files", "check", "weights"]
    find("org/name", check=refuse)  # all is here
    assert steps[5:] == ["small files", "weights"]


def test_a_gguf_file_is_converted_for_a_model_that_can_be_served_only(
    cache: Path, tmp_path: Path, write_gguf: Any
) -> None:
    def refuse(folder: Path) -> None:
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
        assert not (folder / "model.safetensors").exists()
        raise HubError("no GPU")

    write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(HubError, match="no GPU"):
        find(tmp_path / "tiny.gguf", check=refuse)
    assert [entry.suffix for entry in cache.iterdir()] == [".lock"]


def test_offline_the_hub_error_says_what_to_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        HubError, match=r"'org/name' is no folder here, and the Hugging Face hub.*[^.]\. Check the spelling"
    ):
        find("org/name")


def test_finding_a_model_imports_neither_torch_nor_the_converters(folder: Path) -> None:
    code = (
        "import sys; from aiollm.hub.resolve import resolve; "
        f"resolve({str(folder)!r}, progress=print); "
        "print({'torch', 'transformers', 'numpy', 'gguf', 'tokenizers', 'huggingface_hub'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"
