"""Model folders without weights, for `--load_format dummy`: config.json of a well-known shape, a tokenizer of its size.

    python tools/shapes.py FOLDER [qwen3-8b ...]

The tokenizer has the 256 bytes, two control tokens at its end, and words that mean nothing in between: whatever ids a
model of random weights draws, they have a text of ordinary length.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from aiollm.workers.bench_static import SHAPES

TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
SPECIAL = ("<|endoftext|>", "<|im_end|>")


def write(folder: Path, config: dict[str, Any]) -> Path:
    """Write the files of a model with this config into `folder`, and return the folder."""
    size = config["vocab_size"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    words = [*sorted(letters), *(f"\u0120w{index}" for index in range(len(letters), size - len(SPECIAL)))]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": None, "eos_token": SPECIAL[-1], "pad_token": SPECIAL[0], "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    own = {"eos_token_id": size - 1, "bos_token_id": None, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config | own, indent=1), encoding="utf-8")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description="write model folders without weights")
    parser.add_argument("folder", type=Path, help="where; each shape gets a folder of its name in it")
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"{', '.join(SHAPES)} (all)")
    args = parser.parse_args()
    if unknown := set(args.shapes) - SHAPES.keys():
        parser.error(f"{', '.join(sorted(unknown))}: only {', '.join(SHAPES)} are known")
    for name in args.shapes or SHAPES:
        print(write(args.folder / name, SHAPES[name]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
