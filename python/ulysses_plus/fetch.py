"""python -m ulysses_plus.fetch REPO_ID [--tokenizer-only]

Downloads a model from the Hugging Face hub into its ordinary cache (HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE
mean what they always mean) and prints the folder: configuration, safetensors, tokenizer and chat template; no pickled
weights, no code. Progress goes to stderr. Exit 0, 2 (the user must act) or 75 (the network failed).
"""

import argparse
import json
import os
import sys

from ulysses_plus.errors import NetworkError, UserError, chain_of, one_line, run

TOKENIZER_PATTERNS = [
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "*.model", "*.tiktoken", "chat_template*", "additional_chat_templates/*", "config.json",
]
MODEL_PATTERNS = TOKENIZER_PATTERNS + ["*.json", "*.safetensors"]
IGNORED = ["*.bin", "*.pt", "*.pth", "*.py", "*.msgpack", "*.h5", "*.onnx", "onnx/*", "original/*", "*.gguf"]
# What to do with a data set where there is no network.
_ELSEWHERE = (
    "or run 'ulysses prepare' with this recipe on a machine with a network and the same Hugging Face cache (HF_HOME), which this one then needs too, "
    "or give a local file or folder"
)


def fetch(repo_id, tokenizer_only=False):
    """Returns the folder that holds `repo_id`, downloading what is missing. A folder that exists is returned as it is.

    Raises UserError (not found, gated, bad token, offline and not cached, no safetensors, disk full) and NetworkError.
    """
    if os.path.isdir(folder := os.path.expanduser(repo_id)):
        return os.path.abspath(folder)
    if repo_id.startswith((".", "/", "~")) or repo_id.count("/") > 1:
        raise UserError(f"{repo_id}: expected a folder or a hub id like 'owner/name', found no such folder")
    from huggingface_hub import snapshot_download

    if not _offline():
        what = "the tokenizer of " if tokenizer_only else ""
        print(f"looking for {what}{repo_id} at {_host()}", file=sys.stderr)
    try:
        folder = snapshot_download(
            repo_id, allow_patterns=TOKENIZER_PATTERNS if tokenizer_only else MODEL_PATTERNS, ignore_patterns=IGNORED,
            etag_timeout=float(os.environ.get("HF_HUB_ETAG_TIMEOUT", 10)),
        )
    except Exception as error:
        raise sorted_by_who_must_act(error, repo_id, "model") from error
    if not tokenizer_only:
        _check_weights(folder, repo_id)
    return folder


def sorted_by_who_must_act(error, repo_id, kind):
    """Returns the UserError or NetworkError that says in one sentence what `error`, raised for `repo_id` on the hub
    (`kind`: "model" or "dataset"), means; returns `error` itself if it is neither. Never shows the token."""
    import httpx2
    from huggingface_hub import errors

    chain = chain_of(error)

    def first(*kinds):
        return next((e for e in chain if isinstance(e, kinds)), None)

    page = f"{_host()}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
    token = _token_state()
    full = next((e for e in chain if isinstance(e, OSError) and e.errno in (28, 122)), None)
    if full is not None:
        return UserError(f"{repo_id}: the disk is full ({_cache_folder()}): make room, or set HF_HOME to a larger disk")
    if first(errors.HFValidationError):
        return UserError(f"{repo_id}: expected a folder or a hub id like 'owner/name', found no such folder and no valid id")
    if first(errors.GatedRepoError):
        return UserError(f"{repo_id} is gated: accept its licence on its page ({page}), then set HF_TOKEN ({token})")
    refused = first(errors.HfHubHTTPError)
    status = refused.response.status_code if refused is not None and refused.response is not None else None
    if status == 401 and os.environ.get("HF_TOKEN") and not first(errors.RevisionNotFoundError):
        return UserError(
            f"{repo_id}: the hub refused the token in HF_TOKEN, or the {kind} does not exist: check the name, and renew "
            f"the token at {_host()}/settings/tokens"
        )
    if first(errors.RepositoryNotFoundError):
        return UserError(
            f"{repo_id}: no such {kind} at {_host()}, and no such folder here: check the name; if it is private, set "
            f"HF_TOKEN ({token})"
        )
    if first(errors.RevisionNotFoundError):
        return UserError(f"{repo_id}: this revision does not exist at {_host()}: check the name of the branch or commit")
    if first(errors.OfflineModeIsEnabled) or _offline():
        return UserError(
            f"{repo_id}: not in the cache ({_cache_folder()}), and HF_HUB_OFFLINE is set: unset it, or download with "
            f"'python -m ulysses_plus.fetch {repo_id}' where there is a network"
            if kind == "model" else
            f"{repo_id}: not in the cache, and HF_HUB_OFFLINE is set: unset it, {_ELSEWHERE}"
        )
    if status == 401 or status == 403:
        return UserError(f"{repo_id}: the hub refused access (HTTP {status}): check the rights of HF_TOKEN ({token})")
    if status is not None:
        return NetworkError(f"{repo_id}: {_host()} answered HTTP {status}: try again later")
    if first(httpx2.HTTPError, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError):
        elsewhere = f", {_ELSEWHERE}" if kind == "dataset" else ""
        return NetworkError(f"{repo_id}: not in the cache, and {_host()} cannot be reached: check the network and try again{elsewhere}")
    if isinstance(error, OSError):
        return UserError(f"{repo_id}: {one_line(error)}")
    return error


def _check_weights(folder, repo_id):
    if not os.path.exists(os.path.join(folder, "config.json")):
        raise UserError(f"{repo_id}: expected a model with config.json, found none in {folder}")
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(index):
        with open(index, encoding="utf-8") as file:
            wanted = sorted(set(json.load(file).get("weight_map", {}).values()))
    else:
        wanted = [name for name in os.listdir(folder) if name.endswith(".safetensors")] or ["model.safetensors"]
    missing = [name for name in wanted if not os.path.exists(os.path.join(folder, name))]
    if not missing:
        return
    if _offline():
        raise UserError(
            f"{repo_id}: {missing[0]} is not in the cache ({folder}), and HF_HUB_OFFLINE is set: unset it to download"
        )
    raise UserError(
        f"{repo_id}: expected weights as safetensors, found no {missing[0]}: convert them once with Transformers' "
        "save_pretrained"
    )


def _token_state():
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return "set now, but it has no access"
    from huggingface_hub import get_token

    return "a stored login is used now, but it has no access" if get_token() else "not set now"


def _host():
    from huggingface_hub import constants

    return constants.ENDPOINT


def _offline():
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _cache_folder():
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m ulysses_plus.fetch", description=__doc__.split("\n\n")[1])
    parser.add_argument("repo_id", help="hub id such as meta-llama/Llama-3.1-8B-Instruct")
    parser.add_argument("--tokenizer-only", action="store_true", help="the tokenizer and config.json, no weights")
    arguments = parser.parse_args(argv)
    print(fetch(arguments.repo_id, arguments.tokenizer_only))


if __name__ == "__main__":
    run(main)
