"""A folder as GGUF, by llama.cpp's own converter: `to_gguf.py CONVERTER FOLDER OUT.gguf [TARGET]`.

The converter knows pre-tokenizers by a hash of what they do to a test text, and refuses unknown ones. A
tokenizer trained for a small model is unknown, so its pre-tokenizer is named here; the suite feeds token ids.
It also imports sentencepiece before it sees that a tokenizer is none of its.
"""

import runpy
import sys
import types
from pathlib import Path


def main() -> None:
    converter, folder, out, *target = sys.argv[1:]
    sys.path[:0] = [str(Path(converter).parent), str(Path(converter).parent / "gguf-py")]
    from conversion.base import TextModel

    sys.modules.setdefault("sentencepiece", types.SimpleNamespace(SentencePieceProcessor=None))
    known = TextModel.get_vocab_base_pre

    def named(self, tokenizer):
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            return "qwen2"

    TextModel.get_vocab_base_pre = named
    sys.argv = [converter, folder, "--outtype", "f32", "--outfile", out]
    sys.argv += ["--target-model-dir", target[0]] if target else []
    runpy.run_path(converter, run_name="__main__")


main()
