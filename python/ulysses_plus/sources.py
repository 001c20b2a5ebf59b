"""Opens the sources of a recipe: local files (local_files.py) or a data set of the hub.

A source is a mapping as in the recipe; `opened` gives its rows after split, slice and sampling.
"""

import array
import random
import re
import sys
from dataclasses import dataclass
from itertools import chain

from ulysses_plus import hf_datasets, local_files
from ulysses_plus.errors import UserError

# Well-known sets whose splits have their own names.
KNOWN_SPLITS = {
    "HuggingFaceH4/ultrachat_200k": {"train": "train_sft", "eval": "test_sft"},
    "HuggingFaceH4/ultrafeedback_binarized": {"train": "train_prefs", "eval": "test_prefs"},
    "nvidia/AceMath-Instruct-Training-Data": {"train": "general_sft_stage2"},
}
# Well-known sets whose description does not agree with their files.
KNOWN_KWARGS = {"nvidia/AceMath-Instruct-Training-Data": {"verification_mode": "no_checks"}}
TYPES = ("huggingface", "huggingface_instruct", "huggingface_causal")
_SLICE = re.compile(r"^\[\s*(-?\d+%?)?\s*:\s*(-?\d+%?)?\s*\]$")
# A split as it may follow a name: train, train[:50], train[:10%]+test
_SPLIT = r"\w[\w.-]*(?:\[[^\]]*\])?"
_NAME_AND_SPLIT = re.compile(rf"^(.+?):({_SPLIT}(?:\+{_SPLIT})*)$")


@dataclass
class Source:
    """One source, opened. `rows[i]` is a dict; `indices` are the rows taken, in order (None: all)."""

    name: str                       # as a person knows it: chats.jsonl, HuggingFaceH4/ultrachat_200k
    where: str                      # the place in the recipe: "data.sources (run.yml:9)"
    mapping: dict                   # the recipe's mapping
    identity: dict                  # what decides its content, for the cache key
    local: object = None            # its files (local_files.py); None for a data set of the hub
    taken: list = None              # of local files: (split, its slice or "") in order
    size: int = 0                   # rows before sampling
    rows: object = None
    indices: object = None          # a range, or eight bytes a row that was drawn

    def __len__(self):
        return len(self.rows) if self.indices is None else len(self.indices)

    def __getitem__(self, i):
        return self.rows[i if self.indices is None else self.indices[i]]

    def row_number(self, i):
        """The place of sample i in the source as stored."""
        return i if self.indices is None else self.indices[i]


def place(where, key, index=None):
    """Returns "key (run.yml:9)" for the most exact place that the request knows, else "key"."""
    names = [] if index is None else [f"{key}[{index}].name_or_path", f"{key}.{index}.name_or_path", f"{key}[{index}]", f"{key}.{index}"]
    found = next((where[name] for name in [*names, key] if name in where), None)
    return f"{key} ({found})" if found else key


def described(mapping, index, request, key):
    """Returns the Source of one mapping, not opened yet: local files are hashed, data sets of the hub are looked up."""
    at = place(request["where"], key, index)
    mapping = {"name_or_path": mapping} if isinstance(mapping, str) else dict(mapping)
    name = mapping.get("name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{at}: expected name_or_path: a hub id, a folder or a file, found none")
    kind, _, rest = name.partition(":")
    if kind in TYPES and rest:
        mapping["type"], name = kind, rest
    name, split = _name_and_split(name)
    mapping.update(name_or_path=name, split=split or mapping.get("split"))
    evaluates = key.endswith("eval_sources")
    mapping["split"] = _split(name, mapping, "eval" if evaluates else "train")
    kwargs = {**KNOWN_KWARGS.get(name, {}), **(mapping.get("kwargs") or {})}
    hf_datasets.check_arguments(kwargs, at)
    source = Source(name, at, mapping, {"name": name})
    source.local = local_files.find(name, kwargs, at)
    if source.local is None:
        kwargs.pop("trust_remote_code", None), kwargs.pop("streaming", None)
        source.rows = hf_datasets.load_hub(name, mapping["split"], at, kwargs)
        source.identity.update(fingerprint=getattr(source.rows, "_fingerprint", None), split=mapping["split"], kwargs=hf_datasets.content_of(kwargs))
    else:
        source.taken = _taken(source, evaluates)
        source.identity["taken"] = [[source.local.identity(split), part] for split, part in source.taken]
    source.identity["sample"] = _drawn(source)
    return source


def opened(source, scratch):
    """Fills in rows and indices. Raises UserError when nothing is left. What has to be unpacked or converted goes into the folder `scratch`."""
    if source.local is not None:
        splits = list(dict.fromkeys(split for split, _ in source.taken))
        rows = [source.local.rows(split, scratch) for split in splits]
        source.rows = rows[0] if len(rows) == 1 else local_files.Concatenated(rows)
        _take(source, splits, [len(each) for each in rows])
    if len(source) == 0:
        raise UserError(f"{source.where}: {source.name}: expected at least one sample, found none")
    source.size = len(source)
    _sample(source)
    return source


def check_unchanged(sources):
    """Raises UserError where a file is no longer what was hashed: its rows may be of before and of after."""
    for source in sources:
        path = source.local.changed() if source.local is not None else None
        if path is not None:
            raise UserError(f"{source.where}: {path}: changed while it was read: prepare again")


def warn_of_few(source, size):
    """Says so where sample_count is above the `size` of the source."""
    wanted = source.mapping.get("sample_count")
    if wanted is not None and int(wanted) > size:
        print(f"{source.where}: {source.name}: sample_count {int(wanted):,} is above its {size:,} samples: all are taken", file=sys.stderr, flush=True)


def columns(source, skip=False):
    """The column names of an opened source; for a JSON file those of the first row, with `skip` of the first that can be read."""
    names = getattr(source.rows, "column_names", None)
    if names:
        return list(names)
    for i in range(len(source) if skip else 1):
        try:
            return list(source[i].keys())
        except UserError as error:
            first = error if i == 0 else first
    raise first


def _name_and_split(name):
    """Takes "name:train[:50]" apart; the split is "" if there is none."""
    if ":" not in name or local_files.exists(name):
        return name, ""
    if found := _NAME_AND_SPLIT.match(name):
        return found[1], found[2]
    first, rest = name.split(":", 1)
    return (name, "") if "/" in rest else (first, rest)


def _split(name, mapping, default):
    names = mapping.get("split_mapping") or KNOWN_SPLITS.get(name, {})

    def mapped(part):
        base, bracket, rest = part.partition("[")
        return (names[base] if base in names and base not in names.values() else base) + bracket + rest

    return "+".join(mapped(part.strip()) for part in str(mapping.get("split") or default).split("+"))


def _taken(source, evaluates):
    """[(split, slice), ...] of local files. To evaluate on, files without a split of that name are taken if there is one split only."""
    splits, out = source.local.splits, []
    for part in source.mapping["split"].split("+"):
        base, bracket, rest = part.partition("[")
        if bracket and not _SLICE.match(bracket + rest):
            raise UserError(f"{source.where}: split: expected a slice like train[:50] or train[10%:20%], found {part}")
        if splits is None:
            base = None
        elif base not in splits and evaluates and base == "eval" and len(splits) == 1:
            base = splits[0]
        elif base not in splits:
            raise UserError(f"{source.where}: {source.name}: split {base}: expected one of {', '.join(splits)}")
        out.append((base, "".join((bracket + rest).split())))
    return out


def _take(source, splits, counts):
    """Sets the indices that the splits' slices, such as [:50] or [10%:], take out of their rows."""
    starts = {split: sum(counts[:i]) for i, split in enumerate(splits)}
    ranges = [_sliced(part, starts[split], counts[splits.index(split)]) for split, part in source.taken]
    if len(ranges) > 1:
        source.indices = array.array("q", chain.from_iterable(ranges))
    elif source.taken[0][1]:
        source.indices = ranges[0]


def _sliced(part, start, count):
    """The indices that a slice ("": all) takes out of `count` rows that begin at `start`."""
    match = _SLICE.match(part or "[:]")

    def bound(text, default):
        if text is None:
            return default
        value = round(int(text[:-1]) / 100 * count) if text.endswith("%") else int(text)
        return max(0, min(count, value + count if value < 0 else value))

    return range(start + bound(match[1], 0), start + bound(match[2], count))


def _drawn(source):
    """What decides which samples are drawn: {} for all."""
    ratio, wanted = source.mapping.get("sample_ratio"), source.mapping.get("sample_count")
    if ratio is not None and wanted is not None:
        raise UserError(f"{source.where}: expected sample_ratio or sample_count, found both")
    seed = source.mapping.get("sample_seed")
    seed = 42 if seed is None else int(seed)
    if ratio is not None and float(ratio) < 1:
        return {"ratio": float(ratio), "seed": seed}
    return {} if wanted is None else {"count": int(wanted), "seed": seed}


def _sample(source):
    drawn, count = source.identity["sample"], len(source)
    if not drawn:
        return
    wanted = int(count * drawn["ratio"]) if "ratio" in drawn else drawn["count"]
    if wanted >= count:
        return
    if wanted < 1:
        raise UserError(f"{source.where}: {source.name}: expected to sample at least one of {count} samples, found {wanted}")
    chosen = random.Random(drawn["seed"]).sample(range(count), wanted)
    source.indices = array.array("q", chosen if source.indices is None else (source.indices[i] for i in chosen))
