"""What tokenizer.json says of truncation and padding is for inference: no token of a text or a chat is cut or added."""

import json
import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from test_prepare import chat, make_tokenizer, request, write_lines  # noqa: E402
from ulysses_plus import token_file  # noqa: E402
from ulysses_plus.prepare import prepare  # noqa: E402

SETTINGS = {
    "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
    "padding": {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<|end|>"},
}


@pytest.mark.parametrize("kind,row", [("sft", chat("the answer is yes and no", "no, the code word")), ("causal", {"text": "the answer is yes and no"})])
def test_stored_truncation_and_padding_are_not_applied(tmp_path, kind, row):
    make_tokenizer().save_pretrained(tmp_path / "plain")
    path = write_lines(tmp_path / "rows.jsonl", [row])
    want = token_file.read(prepare({**request(tmp_path, str(tmp_path / "plain"), path), "type": kind})["tokens"])
    for name, value in SETTINGS.items():
        make_tokenizer().save_pretrained(tmp_path / name)
        file = tmp_path / name / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
        answer = prepare({**request(tmp_path, str(tmp_path / name), path), "type": kind})
        assert not answer["cached"] and str(token_file.read(answer["tokens"])) == str(want)
